"""Generated contexts: lengths, places, answers, the same bytes for the same seed."""

import json
import random
import re
from collections import Counter

import pytest

from qwenlong.data.documents import count_tokens
from qwenlong.errors import InputError
from qwenlong.evals.dataset import TASKS, generate, write_dataset
from qwenlong.evals.haystack import SLACK_TOKENS, Haystack, Insertion, Page, Placed, compose
from qwenlong.evals.requests import passages_by_topic
from qwenlong.evals.samples import names, numbers, single_depth
from qwenlong.evals.texts import TokenCounter
from qwenlong.prompts import document_block, view
from qwenlong.types import Document, Evidence
from tests.qwenlong.evals.conftest import SEED

CHARS = TokenCounter("chars4")


def block(sample):
    return document_block(view(sample).documents)


# --- lengths -----------------------------------------------------------------


def assert_length(sample, target, tokenizer):
    counted = sample.tokens.n
    assert target - max(SLACK_TOKENS, target // 1000) <= counted <= target
    real = count_tokens(block(sample), tokenizer)
    assert abs(real - counted) <= max(8, 0.005 * target)


def test_lengths_are_exact(samples):
    assert len(samples) == 2 * len(TASKS)
    for sample in samples:
        assert_length(sample, 6_000, "chars4")


@pytest.fixture(scope="module")
def qwen_haystack(haystack):
    return Haystack(haystack.pages, TokenCounter("qwen"), name="python")


@pytest.mark.parametrize("length", [1_500, 100_000])
@pytest.mark.parametrize("task", ["variable_tracking", "frequent_words", "multihop"])
def test_lengths_are_exact_in_tokens_of_a_real_tokenizer(qwen_haystack, task, length):
    for sample in generate(qwen_haystack, tasks=[task], lengths=[length], count=1, seed=SEED):
        assert_length(sample, length, "qwen")


def test_too_short_is_one_sentence(haystack):
    for task in ("variable_tracking", "common_words", "repeated_requests", "needle_single"):
        with pytest.raises(InputError, match="too short"):
            list(generate(haystack, tasks=[task], lengths=[20], count=1, seed=0))
    with pytest.raises(InputError, match="0 of 1 questions fit"):
        list(generate(haystack, tasks=["tables"], lengths=[60], count=1, seed=0))
    with pytest.raises(InputError, match="unknown task 'needle'; choose of needle_single"):
        list(generate(haystack, tasks=["needle"], lengths=[4096], count=1, seed=0))
    with pytest.raises(InputError, match="at least one"):
        list(generate(haystack, tasks=["needle_single"], lengths=[], count=1, seed=0))


# --- repeatability -----------------------------------------------------------


def test_the_same_seed_gives_the_same_samples(haystack, samples):
    again = {}
    for task in reversed(TASKS):  # alone, and in another order
        for sample in generate(haystack, tasks=[task], lengths=[6_000], count=2, seed=SEED):
            again[sample.id] = sample.to_json()
    assert {s.id: s.to_json() for s in samples} == again


def test_another_seed_gives_other_samples(haystack, samples):
    ours = {s.subtype: s for s in samples}
    for sample in generate(haystack, tasks=list(TASKS), lengths=[6_000], count=1, seed=SEED + 1):
        assert sample.question != ours[sample.subtype].question or "words" in sample.question
        assert sample.answers != ours[sample.subtype].answers


# --- answers -----------------------------------------------------------------


def texts_of(sample):
    return {d.id: d.text for d in sample.documents}


def evidence_texts(sample):
    return [texts_of(sample)[e.doc][e.start : e.end] for e in sample.evidence]


def test_evidence_states_the_answers(samples):
    for sample in samples:
        spans = evidence_texts(sample)
        if sample.subtype in ("common_words", "frequent_words"):
            assert not spans  # every word counts
        elif sample.subtype == "repeated_requests":
            assert sample.answers[0].removeprefix(sample.answer_prefix) in spans
            assert len(set(spans)) == 4
        elif sample.task == "needle":
            assert all(any(answer in span for span in spans) for answer in sample.answers)
            assert all(any(answer in span for answer in sample.answers) for span in spans)
        else:
            assert spans and all(spans)


def test_needles_stand_only_where_they_were_put(samples):
    for sample in samples:
        if sample.task != "needle" or "words" in sample.subtype:
            continue
        context = block(sample)
        for answer in sample.answers:
            text = context
            for span in evidence_texts(sample):
                text = text.replace(span, "", 1)
            if sample.subtype == "variable_tracking":  # read by the next line, put there as well
                text = re.sub(r"^VAR .*$", "", text, flags=re.MULTILINE)
            assert answer not in text


def test_evidence_documents_are_marked(samples):
    for sample in samples:
        holding = {span.doc for span in sample.evidence}
        marked = {d.id for d in sample.documents if d.role == "evidence"}
        assert holding <= marked


def test_needle_questions_name_what_they_ask(samples):
    for sample in samples:
        if "codes" in sample.derivation:
            told, asked = sample.derivation["codes"], sample.derivation["asked"]
            assert [v for name in asked for v in told[name]] == sample.answers
            assert all(f"the {name}" in sample.question for name in asked)
            assert not any(name in sample.question for name in told if name not in asked)


def test_counts_are_those_of_the_text(samples):
    for sample in samples:
        if sample.subtype in ("common_words", "frequent_words"):
            counts = Counter(word for d in sample.documents for word in d.text.split())
            wanted = len(sample.answers)
            ranked = counts.most_common(wanted + 1)
            assert {word for word, _ in ranked[:wanted]} == set(sample.answers)
            assert ranked[wanted - 1][1] >= 1.25 * ranked[wanted][1]
            assert sample.derivation["n_words"] == counts.total()


def test_a_small_part_of_the_words_misleads(haystack):
    for task, most in (("common_words", 0.2), ("frequent_words", 0.7)):
        shares = []
        for sample in generate(haystack, tasks=[task], lengths=[40_000], count=3, seed=SEED):
            words = [word for d in sample.documents for word in d.text.split()]
            part = Counter(words[: len(words) // 10]).most_common(len(sample.answers))
            shares.append(len({word for word, _ in part} & set(sample.answers)) / len(part))
        assert sum(shares) / len(shares) <= most


def test_chains_are_solved_by_hand(samples):
    sample = next(s for s in samples if s.subtype == "variable_tracking")
    values = {}
    for name, other in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", block(sample), re.MULTILINE):
        assert other.isdigit() or other in values  # set before it is read
        values[name] = values.get(other, other)
    asked = sample.derivation["asked"]
    assert [n for n, v in values.items() if v == asked] == sample.answers
    assert len(values) == 15 and len(sample.answers) == 5


def test_repeated_requests_are_repeated(samples):
    for sample in samples:
        if sample.subtype == "repeated_requests":
            topic, which = sample.derivation["topic"], sample.derivation["which"]
            turns = f"\n\n{block(sample)}".split(f"User: Quote a passage of {topic}.\n\n")[1:]
            given = [re.split(r"\n\n|\n</doc", turn)[0] for turn in turns]
            assert len(given) == 4
            assert given[which - 1] == "Assistant: " + sample.answers[0][10:]


def test_distractors_do_not_state_the_answer(samples):
    from qwenlong.data.leaks import AnswerFinder, normalise

    for sample in samples:
        if sample.subtype in ("multihop", "tables"):
            finder = AnswerFinder(sample)
            for document in sample.documents:
                if document.role == "distractor":
                    assert not finder.is_in(normalise(document.text))
            kin = [d for d in sample.documents if len(d.text) < 2_000]
            assert len(kin) >= 2


# --- depths ------------------------------------------------------------------


def depth_of(sample):
    context, [line] = block(sample), evidence_texts(sample)
    return context.index(line) / len(context)


def test_single_needles_cover_the_context_evenly(haystack):
    made = list(generate(haystack, tasks=["needle_single"], lengths=[20_000], count=10, seed=3))
    for sample in made:
        assert abs(depth_of(sample) - sample.depth) < 0.05
    assert sorted(int(10 * sample.depth) for sample in made) == list(range(10))


def test_depths_are_a_permutation():
    depths = [single_depth(0, "t", 1, i, 50) for i in range(50)]
    assert sorted(int(50 * depth) for depth in depths) == list(range(50))


def test_names_and_numbers_differ():
    rng = random.Random(0)
    assert len(set(names(rng, 500))) == 500
    assert len(set(numbers(rng, 500))) == 500 and all(len(n) == 7 for n in numbers(rng, 20))


# --- composing ---------------------------------------------------------------


def pages(*texts):
    return [Page(f"p{i}", f"Page {i}", f"Page {i}", text) for i, text in enumerate(texts)]


def test_insertions_of_one_place_keep_their_order():
    haystack = Haystack(pages("one\ntwo\nthree"), CHARS, name="t")
    lines = [Insertion(f"line {i}", 0.5) for i in range(3)]
    context = compose(haystack, random.Random(0), 40, insertions=lines)
    text = context.documents[0].text
    assert text.index("line 0") < text.index("line 1") < text.index("line 2")
    spans = [text[e.start : e.end] for e in context.evidence]
    assert spans == ["line 0", "line 1", "line 2"]


def test_pages_repeat_when_they_run_out():
    haystack = Haystack(pages("alpha " * 50, "beta " * 50), CHARS, name="t")
    context = compose(haystack, random.Random(0), 500)
    assert context.laps == 4
    ids = [d.id for d in context.documents]
    assert len(set(ids)) == len(ids) > 4 and any(i.endswith("-lap2") for i in ids)
    assert 500 - SLACK_TOKENS <= context.n_tokens <= 500


def test_refused_pages_stay_out_and_all_refused_is_an_error():
    haystack = Haystack(pages("alpha " * 50, "beta " * 50), CHARS, name="t")
    context = compose(haystack, random.Random(0), 300, refuses=lambda p: "beta" in p.text)
    assert "beta" not in document_block(tuple((d.title, d.text, None) for d in context.documents))
    with pytest.raises(InputError, match="every page"):
        compose(haystack, random.Random(0), 300, refuses=lambda p: True)


def test_placed_documents_stand_at_their_depth_whole():
    haystack = Haystack(pages(*(f"word{i} " * 60 for i in range(20))), CHARS, name="t")
    document = Document(id="e", title="Evidence", text="The fact.")
    placed = [Placed(document, 0.5, (Evidence(doc="e", start=0, end=9),))]
    context = compose(haystack, random.Random(0), 1_500, placed=placed)
    at = [d.id for d in context.documents].index("e")
    assert 0.4 < at / len(context.documents) < 0.6
    assert context.documents[at].text == "The fact." and context.evidence[0].doc == "e"


def test_an_empty_haystack_is_refused(tmp_path):
    with pytest.raises(InputError, match="no text"):
        Haystack([], CHARS, name="t")
    with pytest.raises(InputError, match="not a folder"):
        Haystack.load(CHARS, tmp_path / "none")
    with pytest.raises(InputError, match="no text, Markdown, HTML or Python"):
        Haystack.load(CHARS, tmp_path)


def test_texts_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("A real text.\n" * 100, encoding="utf-8")
    (tmp_path / "b.md").write_text("# Titel\n\n" + "Ein Satz über Übung.\n" * 100, encoding="utf-8")
    (tmp_path / "c.txt").write_text('<document index="1">' + "x " * 400, encoding="utf-8")
    haystack = Haystack.load(CHARS, tmp_path)
    assert [page.title for page in haystack.pages] == ["a", "Titel"]  # c would end a document
    [sample] = generate(haystack, tasks=["needle_single"], lengths=[300], count=1, seed=0)
    assert_length(sample, 300, "chars4")


def test_passages_are_different_whole_lines(haystack):
    found = passages_by_topic(haystack)
    every = [passage for passages in found.values() for passage in passages]
    assert len(set(every)) == len(every) > 1_000 and all(found)
    assert all(200 <= len(p) <= 500 and "\n\n" not in p for p in every)


# --- the folder --------------------------------------------------------------


def test_a_dataset_holds_every_text_once_and_reads_back(tmp_path, samples):
    from qwenlong.data.export import load_samples

    summary = write_dataset(tmp_path, samples, about={"seed": SEED})
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").open(encoding="utf-8")]
    assert len({row["sha256"] for row in rows}) == len(rows) == summary["documents"]
    assert summary["samples"] == len(samples) and summary["seed"] == SEED
    assert [s.to_json() for s in load_samples(tmp_path)] == [s.to_json() for s in samples]


def test_equal_ids_and_empty_sets_are_refused(tmp_path, samples):
    with pytest.raises(InputError, match="two samples"):
        write_dataset(tmp_path, [samples[0], samples[0]])
    with pytest.raises(InputError, match="no sample"):
        write_dataset(tmp_path, [])
    assert not list(tmp_path.iterdir())
