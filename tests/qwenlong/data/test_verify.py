"""Filters: every planted bad sample is caught, and clean samples pass."""

import random

import pytest
from toy_route import WORDS, toy_samples, toy_text

from qwenlong.data.decontaminate import Contamination
from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import AnswerFinder, asks_the_same, entity_terms, normalise, tells_name
from qwenlong.data.recipe import DecontaminateConfig, VerifyConfig
from qwenlong.data.verify import (
    MODEL_FILTERS,
    check_grounding,
    find_duplicates,
    guesses_allowed,
    verify_sample,
)
from qwenlong.llm import RequestRefused
from qwenlong.types import Document, Evidence, Sample, TokenCount

PLANTED = 60  # of each kind
CLEAN = 240


def make(question, answer, *, answer_type="text", text="A page. The fact is here.", **fields):
    document = Document(id="d", title="Page", text=text)
    span = Evidence(doc="d", start=0, end=len(text))
    base = {
        "id": f"s-{abs(hash((question, answer))) % 10**9}",
        "task": "reading_qa",
        "question": question,
        "documents": [document],
        "answers": [answer],
        "answer_type": answer_type,
        "reward": {"text": "cover", "number": "numeric", "choice": "multiple_choice"}[answer_type],
        "evidence": [span],
    }
    return Sample(**{**base, **fields})


def finder(question, answer, **fields):
    return AnswerFinder(make(question, answer, **fields))


# --- the answer in a text ------------------------------------------------------


@pytest.mark.parametrize(
    "answer, text, is_in",
    [
        ("Rome", "The city of ROME is old.", True),
        ("Rome", "Romeo loved Juliet.", False),
        ("New  York", "in new\nyork today", True),
        ("C++", "written in C++, then", True),
        ("yes", "yes, of course", False),
        ("３ cats", "there were 3 cats here", True),
        ("東京", "首都は東京です", True),
        ("", "anything", False),
        ("4217", "it has 4,217 rows", True),
        ("4217", "it has 14217 rows", False),
        ("4217", "number 4217.5 is another", False),
    ],
)
def test_text_answers(answer, text, is_in):
    assert finder("What is it?", answer).is_in(normalise(text)) is is_in


@pytest.mark.parametrize(
    "answer, unit, text, is_in",
    [
        ("1234.50", None, "a total of 1,234.5 here", True),
        ("1234", None, "a total of 1234.0 here", True),
        ("1234", None, "version 1234.0.1", False),
        ("-1234", None, "fell by 1,234 points", True),
        ("7", None, "there are 7 of them", False),  # short numbers are everywhere
        ("7", "km", "it is 7 km away", True),
        ("7", "km", "it is 17 km away", False),
        ("7", None, "Gondor has 7 rivers", True),  # with the entity of the question
        ("7", None, "Mordor has 7 rivers", False),
        ("120", None, "120 items", False),  # two significant digits
    ],
)
def test_number_answers(answer, unit, text, is_in):
    found = finder("How many rivers does Gondor have?", answer, answer_type="number", unit=unit)
    assert found.is_in(normalise(text)) is is_in


def test_choice_is_looked_for_by_its_text():
    found = finder("Which?", "B", answer_type="choice", choices=["a red fox", "a grey owl"])
    assert found.is_in("there sat a grey owl.")
    assert not found.is_in("b and a red fox")


@pytest.mark.parametrize(
    ("text", "name", "is_told"),
    [
        ("In case filepath is a symlink, follow it.", "_follow_symlinks", True),
        ("Encode the message's payload in Base64.", "encode_base64", True),
        ('Called to implement "operator.length_hint()".', "object.__length_hint__", True),
        ("Checking if a timeout has expired.", "Popen._checkTimeout", True),
        ("Parse an HTTP response.", "HTTPResponse", True),
        ("Return the size of the window.", "get_terminal_size", False),
        ("Produce a symbolic disassembly.", "dis", False),
        ("Called to compute the hash.", "__len__", False),
        ("Anything at all.", "__", False),
        ("", "run", False),
    ],
)
def test_a_description_tells_the_name(text, name, is_told):
    assert tells_name(text, name) is is_told


def test_entities():
    assert entity_terms('When did Anna Berg see "the comet" of `x_1` in 1997?') == [
        "anna berg",
        "the comet",
        "x_1",
        "1997",
    ]
    assert entity_terms("What is it?") == []
    assert entity_terms("Wo liegt Ōsaka, und wo Äußere Alster?") == [
        "wo",
        "ōsaka",
        "äussere alster",
    ]
    # The same entities however the question begins.
    for question in ("Which river crosses Lower Saxony?", "Lower Saxony: please name the river."):
        assert entity_terms(question) == ["lower saxony"]


# --- planted samples -----------------------------------------------------------


def clean_samples(count, seed=0, start=0):
    """Toy samples with five distractors each, extended by hand."""
    documents = [
        SourceDocument(title=f"page {n}", text=toy_text(n), source="toy")
        for n in range(start, start + 400)
    ]
    rng = random.Random(seed)
    samples = []
    for sample in toy_samples(documents, seed=seed, limit=count):
        used = {d.id for d in sample.documents}
        others = rng.sample([d for d in documents if d.id not in used], 5)
        distractors = [
            Document(id=d.id, title=d.title, text=d.text, role="distractor") for d in others
        ]
        extended = [*sample.documents, *distractors]
        rng.shuffle(extended)
        samples.append(
            sample.model_copy(
                update={
                    "documents": extended,
                    "tokens": TokenCount(tokenizer="chars4", n=4000),
                    "placement": {"target_tokens": 4096},
                }
            )
        )
    return samples


class ScriptedAsker:
    """Answers from what the prompt shows, unless it knows the question or loses its way."""

    name = "scripted"

    def __init__(self, samples, *, knows=(), fragile=()):
        self._answers = {s.question: s for s in samples}
        self._knows, self._fragile = set(knows), set(fragile)
        self.calls = 0

    def __call__(self, messages, k):
        self.calls += 1
        prompt = messages[-1]["content"]
        sample = next(s for q, s in self._answers.items() if q in prompt)
        closed = "<documents>" not in prompt
        is_lost = sample.id in self._fragile and prompt.count("<document ") > 3
        if (closed and sample.id not in self._knows) or is_lost:
            return ["Therefore, the answer is (nothing known)"] * k
        return [f"Therefore, the answer is ({sample.answers[0]})"] * k


def verified(samples, **options):
    duplicates = find_duplicates(samples, 90.0)
    config = VerifyConfig(k=4)
    return [
        verify_sample(s, config, resolve={}.get, duplicate_of=duplicates.get(i), **options)
        for i, s in enumerate(samples)
    ]


def failed(sample):
    return {name for name, v in sample.filters.items() if v.verdict == "fail"}


def test_clean_samples_pass_and_the_false_positive_rate_is_bounded():
    samples = clean_samples(CLEAN)
    results = verified(samples, ask=ScriptedAsker(samples))
    rejected = [s for s in results if failed(s)]
    assert len(rejected) / CLEAN <= 0.01, [failed(s) for s in rejected]
    assert all(s.difficulty.pass_rate == 1.0 and s.difficulty.model == "scripted" for s in results)


def test_without_a_model_its_filters_are_not_run():
    samples = clean_samples(3)
    for sample in verified(samples):
        verdicts = {name: sample.filters[name].verdict for name in MODEL_FILTERS}
        assert verdicts == dict.fromkeys(MODEL_FILTERS, "not_run")
        assert sample.difficulty is None


def test_answerable_without_context_are_caught():
    samples = clean_samples(CLEAN)
    planted = {s.id for s in samples[::4]}
    assert len(planted) == PLANTED
    results = verified(samples, ask=ScriptedAsker(samples, knows=planted))
    assert {s.id for s in results if "grounding" in failed(s)} == planted
    for sample in results:
        if sample.id in planted:
            assert sample.filters["robustness"].verdict == "not_run"


def test_fragile_are_caught():
    samples = clean_samples(CLEAN)
    planted = {s.id for s in samples[::4]}
    results = verified(samples, ask=ScriptedAsker(samples, fragile=planted))
    assert {s.id for s in results if "robustness" in failed(s)} == planted
    assert all(s.difficulty.pass_rate == 0 for s in results if s.id in planted)


def disguise(question, how):
    if how == 0:
        return question
    if how == 1:
        return question.upper() + " "
    if how == 2:
        return question.replace(",", "").replace("?", " ?")
    if how == 3:
        return question.replace("Which codes, joined in this order, do", "Which codes do").replace(
            "guard?", "guard, joined in this order?"
        )
    return f"Please answer: {question}"


def test_duplicates_are_caught():
    samples = clean_samples(CLEAN)
    rng = random.Random(1)
    planted = []
    for i in range(PLANTED):
        original = samples[i * 4]
        documents = list(original.documents)
        rng.shuffle(documents)
        question = disguise(original.question, i % 5)
        update = {"id": f"copy-{i}", "question": question, "documents": documents}
        planted.append(original.model_copy(update=update))
    results = verified(samples + planted)
    caught = {s.id for s in results if "duplicate_question" in failed(s)}
    assert caught == {s.id for s in planted}
    assert results[CLEAN].filters["duplicate_question"].duplicate_of == samples[0].id


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("which codes does warden1 guard", "what code does warden1 guards", True),
        ("please name the river of chad", "which is the river of chad", True),
        ("how long is the function load in imp", "how long is the function save in imp", False),
        ("the capital of austria", "the capital of australia", False),
        ("the capital of niger", "the capital of nigeria", False),
        ("rain in 2001", "rain in 2002", False),
        ("rain in oslo", "rain in oslo in 2002", True),  # one only says more
        ("", "", True),
    ],
)
def test_asks_the_same(a, b, same):
    assert asks_the_same(a.split(), b.split()) is same


def test_one_template_with_other_names_is_no_duplicate():
    template = "What is the capital of {}?"
    countries = ["Chad", "Mali", "Peru", "Iran", "Iraq", "Oman"]
    samples = [
        make(
            template.format(c),
            f"city {i}",
            id=str(i),
            documents=[Document(id=c, text=c)],
            evidence=[Evidence(doc=c, start=0, end=4)],
        )
        for i, c in enumerate(countries)
    ]
    assert find_duplicates(samples, 90.0) == {}
    # The same answer, another name: still another question.
    same = [s.model_copy(update={"answers": ["city"]}) for s in samples]
    assert find_duplicates(same, 90.0) == {}
    # A template without names asks something new of every document ...
    text = "How many lines has the poem?"
    poems = [
        make(
            text,
            str(n),
            id=str(n),
            documents=[Document(id=str(n), text="poem")],
            evidence=[Evidence(doc=str(n), start=0, end=4)],
        )
        for n in range(5)
    ]
    assert find_duplicates(poems, 90.0) == {}
    # ... but the same of the same one, and a repeated id is a repeated sample.
    assert find_duplicates([*poems, poems[2]], 90.0) == {5: "2"}


def leak(sample, how):
    answer = sample.answers[0]
    if how == 0:
        return sample.model_copy(update={"question": f"{sample.question} (It is {answer}.)"})
    if how == 1:
        return sample.model_copy(update={"instructions": f"Write it like {answer.upper()}."})
    if how == 2:
        only = next(d for d in sample.documents if d.role == "evidence")
        only = only.model_copy(update={"title": f"About {answer}"})
        documents = [only, *(d for d in sample.documents if d.role == "distractor")]
        evidence = [e for e in sample.evidence if e.doc == only.id]
        return sample.model_copy(update={"documents": documents, "evidence": evidence})
    documents = [
        d.model_copy(update={"text": f"{d.text}\nSo: {answer}."}) if d.role == "distractor" else d
        for d in sample.documents
    ]
    return sample.model_copy(update={"documents": documents})


def test_leaks_are_caught():
    samples = clean_samples(CLEAN)
    ask = ScriptedAsker(samples)
    planted = {samples[i * 4].id: i % 4 for i in range(PLANTED)}
    mixed = [leak(s, planted[s.id]) if s.id in planted else s for s in samples]
    results = verified(mixed)
    caught = {s.id: failed(s) for s in results if failed(s)}
    assert set(caught) == set(planted)
    for sample_id, how in planted.items():
        assert caught[sample_id] == {"distractor_leak" if how == 3 else "answer_leak"}
    assert ask.calls == 0
    verified([m for m in mixed if m.id in planted], ask=ask)
    assert ask.calls == 0  # nothing is paid for what a rule rejects


def contaminate(sample, i, rng):
    """An evaluation entry that overlaps with ``sample``, of one of five kinds."""
    if i % 5 == 0:
        return "question", sample.question
    if i % 5 == 1:
        return "question", sample.question.lower().replace("which", "what").replace("?", "")
    evidence = next(d for d in sample.documents if d.role == "evidence")
    if i % 5 == 2:
        return "document", evidence.text
    if i % 5 == 3:  # a paragraph of it inside other text
        words = evidence.text.split()
        return "document", " ".join(["Other", "words", *words[20:50], "follow", "here"])
    return "question", " ".join(evidence.text.split()[5:13])  # a short question inside a document


def test_contaminated_are_caught_and_clean_ones_pass():
    samples = clean_samples(CLEAN)
    # Whatever shares a document with a planted sample would be contaminated as well.
    taken, planted, rest = set(), [], []
    for sample in samples:
        ids = {d.id for d in sample.documents if d.role == "evidence"}
        if len(planted) < PLANTED and not ids & taken:
            planted.append(sample)
            taken |= ids
        else:
            rest.append(sample)
    rng = random.Random(2)
    entries = [contaminate(sample, i, rng) for i, sample in enumerate(planted)]
    contamination = Contamination(DecontaminateConfig(), entries)
    for sample in planted:
        assert contamination.sample(sample, {}.get)["verdict"] == "fail", sample.question
    clean = [s for s in rest if not {d.id for d in s.documents if d.role == "evidence"} & taken]
    clean += clean_samples(CLEAN, seed=9, start=400)
    assert len(clean) > CLEAN
    wrong = [s for s in clean if contamination.sample(s, {}.get)["verdict"] == "fail"]
    assert len(wrong) / len(clean) <= 0.01


# --- rules -------------------------------------------------------------------


def test_evidence_must_lie_in_evidence_documents():
    good = make("What?", "nothing")
    assert verified([good])[0].filters["evidence"].verdict == "pass"
    beyond = good.model_copy(update={"evidence": [Evidence(doc="d", start=5, end=500)]})
    empty = good.model_copy(update={"evidence": [Evidence(doc="d", start=7, end=8)]})  # a space
    none = good.model_copy(update={"evidence": []})
    for bad in (beyond, empty, none):
        assert "evidence" in failed(verified([bad])[0])
    distractor = Document(id="e", text="other", role="distractor")
    misplaced = good.model_copy(
        update={
            "documents": [*good.documents, distractor],
            "evidence": [Evidence(doc="e", start=0, end=3)],
        }
    )
    assert "evidence" in failed(verified([misplaced])[0])


@pytest.mark.parametrize(
    "choices, answer, verdict",
    [
        (["1", "2", "-1"], "A", "pass"),
        (["C", "C++", "C#"], "C", "pass"),
        (["0", '"0"', "1"], "A", "fail"),
        (["a fox", "An owl", "A fox."], "B", "fail"),
        (["1", "2"], "C", "fail"),
        (["1", "2"], "2", "pass"),
    ],
)
def test_choices_must_differ(choices, answer, verdict):
    sample = make("Which one?", answer, answer_type="choice", choices=choices)
    assert verified([sample])[0].filters["choices"].verdict == verdict


@pytest.mark.parametrize(
    "tokens, verdict", [(3276, "fail"), (3277, "pass"), (4096, "pass"), (4097, "fail")]
)
def test_length(tokens, verdict):
    sample = make("What?", "nothing").model_copy(
        update={
            "tokens": TokenCount(tokenizer="chars4", n=tokens),
            "placement": {"target_tokens": 4096},
        }
    )
    assert verified([sample])[0].filters["length"].verdict == verdict


def test_documents_of_the_other_split_fail():
    document = Document(id="d", ref="0" * 64)
    sample = make(
        "What?", "nothing", documents=[document], evidence=[Evidence(doc="d", start=0, end=3)]
    )
    for split, verdict in (("eval", "fail"), ("train", "pass"), (None, "pass")):
        result = verify_sample(
            sample, VerifyConfig(), resolve=lambda ref: "text", split_of=lambda ref, s=split: s
        )
        assert result.filters["split"].verdict == verdict


# --- guessing ------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, chance, allowed",
    [(4, 0.0, 0), (1, 0.25, 0), (4, 0.25, 3), (8, 0.25, 4), (4, 0.1, 2), (1, 0.0, 0)],
)
def test_guesses_allowed(k, chance, allowed):
    # k = 4: P(3 or more) = 0.0508 at chance 1/4, P(2 or more) = 0.0523 at 1/10; both above 0.05.
    assert guesses_allowed(k, chance, 0.05) == allowed


@pytest.mark.parametrize("k", [4, 8])
def test_guessing_seldom_fails_the_grounding_check(k):
    rng = random.Random(3)

    class Guesser:
        name = "guesser"

        def __call__(self, messages, k):
            return [f"The correct answer is ({rng.choice('ABCD')})" for _ in range(k)]

    choices = [f"option {w}" for w in WORDS[:4]]
    sample = make("Which one?", "C", answer_type="choice", choices=choices)
    config = VerifyConfig(k=k)
    runs = 400
    fails = sum(
        check_grounding(sample, Guesser(), config)["verdict"] == "fail" for _ in range(runs)
    )
    assert fails / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5  # alpha, two deviations


def test_a_refused_request_leaves_filters_not_run():
    samples = clean_samples(2)

    class Refuses(ScriptedAsker):
        def __call__(self, messages, k):
            if "<documents>" in messages[-1]["content"]:
                raise RequestRefused("the prompt has 9,999 tokens, the model takes 4,096")
            return super().__call__(messages, k)

    for sample in verified(samples, ask=Refuses(samples)):
        verdicts = {name: sample.filters[name].verdict for name in MODEL_FILTERS}
        assert verdicts == {"grounding": "pass", "robustness": "not_run", "difficulty": "not_run"}
        assert "4,096" in sample.filters["robustness"].reason
        assert sample.difficulty is None


def test_difficulty_bounds():
    samples = clean_samples(2)
    config = VerifyConfig(k=2, max_pass_rate=0.9)
    result = verify_sample(samples[0], config, resolve={}.get, ask=ScriptedAsker(samples))
    assert failed(result) == {"difficulty"}
    assert result.difficulty.k == 2
