"""Questions by rule from real text: each answer derived again by a reader of another kind."""

import datetime
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from checkers_text import (
    first_sentence,
    is_rewarded,
    plain,
    read_source,
    read_transcript,
    reports,
    squeezed,
    statements,
)

from qwenlong.data.documents import SourceDocument
from qwenlong.data.loaders import clean_text, python_topics
from qwenlong.data.python_facts import module_facts
from qwenlong.data.samples import contains_term
from qwenlong.data.text_tasks import choice_samples, dialogue_samples, reading_samples
from qwenlong.types import Sample

PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "xml")


@pytest.fixture(scope="module")
def documents():
    """The help topics, the modules of a few packages and those at the top of the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(python_topics())
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in PACKAGES or (len(parts) == 1 and parts[0][0] in "cdhimpst"):
            title = ".".join(p for p in parts if p != "__init__")
            text = clean_text(path.read_bytes().decode("utf-8", "replace"))
            if text.strip():
                found.append(SourceDocument(title=title, text=text, source="lib", kind="python"))
    return found


@pytest.fixture(scope="module")
def choices(documents):
    return list(choice_samples(documents, seed=1, limit=600))


@pytest.fixture(scope="module")
def readings(documents):
    return list(reading_samples(documents, seed=1, limit=600))


@pytest.fixture(scope="module")
def dialogues(documents):
    return list(dialogue_samples(documents, seed=1, limit=600, tokens=(2_000, 40_000)))


# --- choice and reading, checked by tokens ------------------------------------


class Checker:
    """Answers of template samples from the document alone; sources are read once."""

    def __init__(self):
        self._readings = {}

    def source(self, document):
        if document.id not in self._readings:
            self._readings[document.id] = read_source(document.text)
        return self._readings[document.id]

    def fits(self, sample):
        """A function that says whether a text answers the question."""
        (document,) = sample.documents
        program = sample.derivation
        return getattr(self, program["template"])(document, program)

    def default_value(self, document, program):
        parameters = dict(self.source(document).parameters[program["function"]])
        default = parameters[program["parameter"]]
        return lambda answer: answer in (default, plain(default))

    def constant_value(self, document, program):
        (value,) = self.source(document).constants[program["name"]]
        return lambda answer: answer in (value, plain(value))

    def returned_value(self, document, program):
        (value,) = self.source(document).returns[program["function"]]
        return lambda answer: answer in (value, plain(value))

    def parameter_count(self, document, program):
        count = len(self.source(document).parameters[program["function"]])
        return lambda answer: answer == str(count)

    def method_count(self, document, program):
        count = len(set(self.source(document).methods[program["class"]]))
        return lambda answer: answer == str(count)

    def class_of_method(self, document, program):
        methods = self.source(document).methods
        return lambda answer: program["method"] in methods[answer]

    def imported_module(self, document, program):
        return lambda answer: answer in self.source(document).imports

    def described_function(self, document, program):
        docstrings = self.source(document).docstrings
        return lambda answer: (
            answer in docstrings and first_sentence(docstrings[answer]) == program["summary"]
        )

    def exception_of_message(self, document, program):
        raised = {e for _, e, m in self.source(document).raises if m == program["message"]}
        return lambda answer: answer in raised

    def message_of_exception(self, document, program):
        wanted = program["function"], program["exception"]
        raised = {m for f, e, m in self.source(document).raises if (f, e) == wanted}
        return lambda answer: answer in raised

    def next_sentence(self, document, program):
        text = squeezed(document.text)
        assert text.count(program["before"]) == 1
        after = text[text.index(program["before"]) + len(program["before"]) :].lstrip()
        return lambda answer: after.startswith(answer)

    def defined_term(self, document, program):
        text = squeezed(document.text)
        assert text.count(program["description"]) == 1
        before = text[: text.index(program["description"])]
        (name,) = re.findall(r"([\w.]+)\((?:[^()]|\([^()]*\))*\) *$", before)
        return lambda answer: answer == name

    def number_in_text(self, document, program):
        head, tail = map(re.escape, program["sentence"].split("____"))
        (number,) = re.findall(rf"{head}(\d[\d,]*(?:\.\d+)?){tail}", squeezed(document.text))
        return lambda answer: answer == number.replace(",", "")


def test_each_option_is_right_or_wrong_as_said(choices):
    assert len(choices) == 600
    checker = Checker()
    for sample in choices:
        fits = checker.fits(sample)
        right = "ABCD".index(sample.answers[0])
        verdicts = [fits(option) for option in sample.choices]
        assert verdicts == [i == right for i in range(4)], (sample.question, sample.choices)
    assert {s.subtype for s in choices} == {
        *("default_value", "class_of_method", "described_function", "imported_module"),
        *("exception_of_message", "next_sentence", "defined_term"),
    }


def test_each_reading_answer_is_derived_again(readings):
    assert len(readings) == 600
    checker = Checker()
    for sample in readings:
        assert checker.fits(sample)(sample.answers[0]), (sample.question, sample.answers)
    assert {s.subtype for s in readings} == {
        *("default_value", "constant_value", "returned_value", "parameter_count", "method_count"),
        *("described_function", "exception_of_message", "message_of_exception"),
        *("defined_term", "number_in_text"),
    }


def test_evidence_holds_the_answer(choices, readings):
    counted = {"parameter_count", "method_count"}
    for sample in [*choices, *readings]:
        text = sample.documents[0].text
        shown = squeezed(" ".join(text[e.start : e.end] for e in sample.evidence))
        answer = squeezed(sample.derivation["answer"])
        if sample.subtype == "described_function" or sample.subtype == "class_of_method":
            assert re.search(rf"\b{re.escape(answer.rpartition('.')[2])}\b", shown)
        elif sample.subtype == "number_in_text":
            assert answer in shown.replace(",", "")
        elif sample.subtype == "message_of_exception":
            joined = re.sub(r"[\"'] +[\"']", "", shown)
            assert answer in joined or answer.replace("'", "\\'") in joined
        elif sample.subtype not in counted:
            assert answer in shown or repr(answer)[1:-1] in shown, (sample.subtype, answer, shown)


def test_shape_of_samples(choices, readings, dialogues):
    for samples in (choices, readings, dialogues):
        assert len({s.id for s in samples}) == len(samples)
        for sample in samples:
            assert Sample.model_validate(sample.to_json()) == sample
            assert is_rewarded(sample)
            (document,) = sample.documents
            assert SourceDocument(text=document.text, source="x").split == sample.split
            assert all(e.start < e.end <= len(document.text) for e in sample.evidence)
            assert sample.evidence
            if sample.answer_type != "choice":
                assert not contains_term(sample.question, sample.answers[0])
        assert {s.split for s in samples} == {"train", "eval"}
    assert len({s.question for s in readings}) == len({s.question for s in dialogues}) == 600
    assert len({s.question for s in choices}) == 600


def test_counting_how_often_the_options_are_named_is_guessing(choices):
    """Whoever always takes the option named most often, or least often, or in between."""
    right, asked = Counter(), Counter()
    for sample in choices:
        text = sample.documents[0].text
        counts = [len(re.findall(rf"(?<!\w){re.escape(c)}(?!\w)", text)) for c in sample.choices]
        answer = counts["ABCD".index(sample.answers[0])]
        asked[sample.subtype] += 1
        for place, count in enumerate(sorted(counts)):
            right[sample.subtype, place] += (count == answer) / counts.count(answer)
    for (subtype, place), found in right.items():
        n = asked[subtype]  # without balance, 1.0 for imports and 0.86 for exceptions
        assert abs(found / n - 0.25) < 3 * (0.25 * 0.75 / n) ** 0.5, (subtype, place, found / n, n)
    assert min(asked[name] for name in ("imported_module", "exception_of_message")) >= 50


def test_wrong_options_of_imports_and_defaults_are_not_told_by_their_kind(choices):
    for sample in choices:
        if sample.subtype == "imported_module":
            assert not any("." in choice for choice in sample.choices)
        if sample.subtype == "default_value":
            assert not {"None", "True", "False", "0", "1", "-1"} & set(sample.choices)


def test_places_of_the_right_option_are_uniform(choices):
    counts = Counter(s.answers[0] for s in choices)
    assert all(abs(counts[letter] - 150) < 45 for letter in "ABCD")  # over four deviations
    assert all(len({" ".join(c.casefold().split()) for c in s.choices}) == 4 for s in choices)


def test_no_open_answer_is_the_usual_one(readings):
    given = {}
    for sample in readings:
        given.setdefault(sample.subtype, Counter())[sample.answers[0]] += 1
    for subtype, answers in given.items():
        assert max(answers.values()) <= max(2, 0.15 * answers.total()), (subtype, answers)


def test_thousands_of_questions(documents):
    for route in (choice_samples, reading_samples):
        samples = list(route(documents, seed=5, limit=1500))
        assert len(samples) == 1500
        assert len({s.question for s in samples}) == 1500


@pytest.mark.parametrize("route", [choice_samples, reading_samples, dialogue_samples])
def test_deterministic_in_the_seed(documents, route):
    some = documents[:60] + documents[100:130]
    one, again = (list(route(some, seed=2, limit=40)) for _ in range(2))
    assert one == again
    other = list(route(some, seed=3, limit=40))
    assert len({s.question for s in other} & {s.question for s in one}) < 20


def test_awkward_documents_give_nothing():
    awkward = [
        SourceDocument(title="broken", text="def (:\n", source="x", kind="python"),
        SourceDocument(title="empty", text="# nothing\n", source="x", kind="python"),
        SourceDocument(title="short", text="Hi.", source="x"),
        SourceDocument(title="", text="A document without a title. " * 40, source="x"),
        SourceDocument(title="grid", text="| a |\n| 1 |\n", source="x", kind="table"),
        SourceDocument(title="long", text="x = 5\n" * 80_000, source="x", kind="python"),
    ]
    for route in (choice_samples, reading_samples):
        assert list(route(awkward, seed=0, limit=10)) == []
        assert list(route([], seed=0, limit=10)) == []
    twins = [
        SourceDocument(title="twin", text=f"LIMIT = {n}\nNAME = 'abc'\n", source="x", kind="python")
        for n in (512, 513)
    ]
    assert list(reading_samples(twins, seed=0, limit=10)) == []  # the title names two documents
    (sample,) = [
        s for s in reading_samples(twins[:1], seed=0, limit=10) if s.answer_type == "number"
    ]
    assert sample.answers == ["512"] and "LIMIT" in sample.question


# --- facts of a source ---------------------------------------------------------

SOURCE = '''"""Ü: offsets are characters."""
import os, re as regex
from xml.dom import minidom

LIMIT = 512
TWICE = 1
NAME = "Grüße"
if LIMIT:
    TWICE = 2


class Box:
    """A box."""

    size = 3

    def fill(self, what, /, times=4, *more, fast=False, label='ß', **rest):
        """Put things in.  And more

        than that. No.
        """
        if times < 0:
            raise ValueError("the number of times must not "
                             "be negative")
        def inner():
            return 9
        return 7

    async def wait(self): return 'later'


def change():
    global NAME
    NAME = "x"
'''


def test_facts_of_a_source_by_hand():
    facts = module_facts(SOURCE)
    fill, wait, change = facts.functions
    assert [f.name for f in facts.functions] == ["Box.fill", "Box.wait", "change"]
    assert fill.parameters == ["self", "what", "times", "more", "fast", "label", "rest"]
    assert fill.defaults == {"times": "4", "fast": "False", "label": "'ß'"}
    assert fill.summary == "Put things in."
    assert [(e, m) for e, m, _ in fill.raises] == [
        ("ValueError", "the number of times must not be negative")
    ]
    assert [v for v, _ in fill.returned] == ["7"]
    assert [v for v, _ in wait.returned] == ["'later'"]
    assert {n: v for n, (v, _) in facts.constants.items()} == {"LIMIT": "512"}
    assert set(facts.imports) == {"os", "re", "xml.dom"}
    (box,) = facts.classes
    assert list(box.methods) == ["fill", "wait"]
    start, end = fill.header
    assert SOURCE[start:end].startswith("def fill(") and SOURCE[start:end].endswith("**rest):")
    start, end = wait.returned[0][1]
    assert SOURCE[start:end] == "return 'later'"
    assert module_facts("def (:") is None


def test_the_checker_reads_the_same_source():
    reading = read_source(SOURCE)
    assert dict(reading.parameters["Box.fill"])["label"] == "'ß'"
    assert [n for n, _ in reading.parameters["Box.fill"]] == module_facts(SOURCE).functions[
        0
    ].parameters
    assert reading.returns == {"Box.fill": ["7"], "Box.wait": ["'later'"]}
    assert reading.methods == {"Box": ["fill", "wait"]}
    assert reading.imports == {"os", "re", "xml.dom"}


# --- dialogues, replayed --------------------------------------------------------

ACTIVITIES = {
    "ran {} kilometres": r"\bran (\d+) kilometres",
    "swam {} lengths": r"\bswam (\d+) lengths",
    "read {} pages of the novel": r"\bread (\d+) pages of the novel",
    "baked {} loaves": r"\bbaked (\d+) loaves",
    "planted {} bulbs": r"\bplanted (\d+) bulbs",
    "picked {} baskets of apples": r"\bpicked (\d+) baskets of apples",
    "knitted {} rows of the scarf": r"\bknitted (\d+) rows of the scarf",
    "translated {} letters": r"\btranslated (\d+) letters",
    "repaired {} bicycles": r"\brepaired (\d+) bicycles",
    "climbed {} routes": r"\bclimbed (\d+) routes",
}


def replay(sample):
    """The answer of a dialogue question from the transcript."""
    people, sessions = read_transcript(sample.documents[0].text)
    numbers = {s.date: s.number for s in sessions}
    dates = {s.number: s.date for s in sessions}
    assert len(numbers) == len(sessions)
    program = sample.derivation
    person, topic, template = program["speaker"], program["topic"], program["template"]
    asked = [numbers[d] for d in re.findall(r"\d+ [A-Z]\w+ \d{4}", sample.question) if d in numbers]
    if topic in ACTIVITIES:
        found = reports(sessions, person, ACTIVITIES[topic], numbers)
        if template == "total":
            return str(sum(last for _, last in found.values()))
        if template == "session_count":
            return str(len(found))
        if template == "reported_on":
            return str(found[asked[0]][1])
        assert template == "date_of_most"
        ordered = sorted(found, key=lambda n: found[n][1])
        assert found[ordered[-1]][1] > found[ordered[-2]][1]
        return dates[ordered[-1]]
    said = [(s.number, kind, v) for s, kind, v in statements(people, sessions, person, topic)]
    assert f'"my {topic}"' in sample.question
    if template == "said_on":
        (value,) = [v for n, _, v in said if n == asked[0]]
        return value
    if template == "latest":
        return said[-1][2]
    if template == "as_of":
        return [v for n, _, v in said if n <= asked[0]][-1]
    if template == "taken_back":
        (index,) = [i for i, (_, kind, _) in enumerate(said) if kind == "correct"]
        return said[index - 1][2]
    if template == "changes":
        return str(sum(kind == "change" for _, kind, _ in said))
    everyone = [
        (dates[s.number], v)
        for p in (people if template == "date_of_value" else [person])
        for s, _, v in statements(people, sessions, p, topic)
    ]
    (date,) = [d for d, v in everyone if contains_term(sample.question, v)]
    return date


def test_every_dialogue_answer_by_replay(dialogues):
    assert len(dialogues) == 600
    for sample in dialogues:
        answer = replay(sample)
        assert answer.removesuffix(" euros") == sample.answers[0], sample.question
    assert set(Counter(s.subtype for s in dialogues)) == {
        *("said_on", "latest", "as_of", "taken_back", "date_of", "changes", "date_of_value"),
        *("total", "session_count", "date_of_most", "reported_on"),
    }


def test_dialogue_evidence_is_what_was_said(dialogues):
    for sample in dialogues:
        text = sample.documents[0].text
        shown = [text[e.start : e.end] for e in sample.evidence]
        for _, _, value in sample.derivation["statements"]:
            assert any(value in s for s in shown)
        if sample.derivation["session"]:
            assert any(s.startswith(f"Session {sample.derivation['session']}:") for s in shown)


def test_conversations_quote_their_own_split(documents, dialogues):
    split_of_title = {d.title: d.split for d in documents if d.kind == "text"}
    quoted = Counter()
    for sample in dialogues:
        text = sample.documents[0].text
        titles = set(re.findall(r'"(Python help: [\w-]+)"', text))
        quoted.update((sample.split, split_of_title[t]) for t in titles)
    assert quoted["train", "train"] > 0 and quoted["train", "eval"] == 0
    assert quoted["eval", "train"] == 0


def test_dialogues_are_long_and_dated(documents):
    samples = list(
        dialogue_samples(documents, seed=8, limit=4, tokens=(120_000, 128_000), per_dialogue=2)
    )
    for sample in samples:
        assert 110_000 < len(sample.documents[0].text) / 4 < 135_000
        people, sessions = read_transcript(sample.documents[0].text)
        assert 2 <= len(people) <= 4 and len(sessions) > 100
        days = [datetime.datetime.strptime(s.date, "%d %B %Y") for s in sessions]
        assert days == sorted(set(days))
        assert all(
            speaker in {p.split()[0] for p in people} for s in sessions for speaker, _ in s.turns
        )
        assert replay(sample).removesuffix(" euros") == sample.answers[0]
    short = list(dialogue_samples([], seed=8, limit=30, tokens=(500, 1_000)))
    assert len(short) == 30 and max(len(s.documents[0].text) for s in short) < 12_000


@pytest.mark.parametrize("options", [{"tokens": (5_000, 2_000)}, {"tokens": (10, 20)}])
def test_dialogue_options_are_checked(options):
    with pytest.raises(ValueError, match="tokens is"):
        list(dialogue_samples([], seed=0, limit=1, **options))
    with pytest.raises(ValueError, match="per_dialogue"):
        list(dialogue_samples([], seed=0, limit=1, per_dialogue=0))


def test_small_talk_seldom_says_a_sentence_twice():
    """A conversation of 60,000 tokens without documents to quote from."""
    (sample,) = dialogue_samples([], seed=3, limit=1, tokens=(60_000, 60_001), per_dialogue=1)
    _, sessions = read_transcript(sample.documents[0].text)
    turns = [text for session in sessions for _, text in session.turns]
    said = Counter(s for text in turns for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text))
    long = Counter({s: n for s, n in said.items() if len(s) > 40 and " my " not in s})
    assert sum(long.values()) > 1_500
    assert max(long.values()) <= 0.03 * sum(long.values())
    assert sum(n == 1 for n in long.values()) > 0.5 * len(long)
