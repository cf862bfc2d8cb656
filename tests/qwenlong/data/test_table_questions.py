"""Questions over corpus tables: every answer worked out again on a second engine."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from functools import cache

import pytest
from checkers_tables import fold, package_documents, rederive

from qwenlong.data.sql import Sandbox
from qwenlong.data.table_questions import _Unfit, choose_parts, finish, round_answer, table_samples
from qwenlong.data.table_schema import Column, Schema
from qwenlong.data.table_scope import Draft, Scope
from qwenlong.data.table_templates import SUBTYPES, TEMPLATES
from qwenlong.data.table_wordings import WORDINGS
from qwenlong.data.tables import corpus_tables, render_document
from qwenlong.data.verify import check_answer_leak, check_evidence
from qwenlong.llm import ScriptedClient
from qwenlong.rewards import score
from qwenlong.types import Sample

COUNT = 300


@cache
def samples() -> tuple[Sample, ...]:
    return tuple(table_samples(package_documents(), seed=7, limit=COUNT))


# --- the whole ---------------------------------------------------------------


def test_a_second_engine_agrees_on_every_answer():
    """Documents parsed by another parser, SQL run by DuckDB: 100 % agreement."""
    for sample in samples():
        assert rederive(sample) == sample.answers[0], sample.question


def test_plain_arithmetic_agrees_on_the_simple_ones():
    folded = [(sample, fold(sample)) for sample in samples()]
    folded = [(sample, answer) for sample, answer in folded if answer is not None]
    assert len(folded) >= 15
    for sample, answer in folded:
        assert answer == sample.answers[0], sample.question


def test_other_documents_of_the_table_change_no_answer():
    """The SQL names its documents: over everything that there is, it gives the same."""
    tables = {(t.schema.name, t.split): t for t in corpus_tables(package_documents())}
    boxes = {}
    for sample in samples():
        key = (sample.derivation["tables"][0]["name"], sample.split)
        if key not in boxes:
            boxes[key] = Sandbox([tables[key].schema.sql_table(tables[key].rows())])
        (row,) = boxes[key].run(sample.derivation["sql"]).rows
        assert row == (sample.derivation["value"],)
    for box in boxes.values():
        box.close()


def test_samples_are_many_different_and_balanced():
    assert len(samples()) == COUNT
    assert len({sample.id for sample in samples()}) == COUNT
    assert len({sample.question.casefold() for sample in samples()}) == COUNT
    assert len({sample.derivation["sql"] for sample in samples()}) == COUNT
    subtypes = Counter(sample.subtype for sample in samples())
    assert set(subtypes) == set(SUBTYPES) and min(subtypes.values()) >= COUNT // 8
    assert len({sample.derivation["template"] for sample in samples()}) >= 25
    assert len({sample.derivation["tables"][0]["name"] for sample in samples()}) == 12
    with_three = sum(len(sample.documents) >= 3 for sample in samples())
    assert with_three > 0.9 * COUNT
    assert {sample.split for sample in samples()} == {"train", "eval"}


def test_samples_keep_the_contract():
    by_id = {document.id: document for document in package_documents()}
    for sample in samples():
        assert Sample.model_validate(json.loads(json.dumps(sample.to_json()))) == sample
        assert sample.task == "corpus_numeric" and sample.id.startswith("tables-")
        assert len(sample.id) == 24 and not sample.filters and sample.tokens is None
        assert {document.role for document in sample.documents} == {"evidence"}
        assert {by_id[document.id].split for document in sample.documents} == {sample.split}
        assert all(document.text == by_id[document.id].text for document in sample.documents)
        assert {span.doc for span in sample.evidence} == {d.id for d in sample.documents}
        assert check_evidence(sample, by_id.__getitem__)["verdict"] == "pass"
        assert check_answer_leak(sample)["verdict"] == "pass", (sample.question, sample.answers)


def test_evidence_is_the_rows_that_are_read():
    for sample in samples()[:100]:
        for span in sample.evidence:
            text = next(d.text for d in sample.documents if d.id == span.doc)
            lines = text[span.start : span.end].split("\n")
            assert all(line.startswith(("| ", "- ", "For ")) for line in lines)
            assert span.start == 0 or text[span.start - 1] == "\n"
            assert text[span.end] == "\n"


def test_the_reward_takes_the_answer_and_refuses_another():
    for sample in samples():
        (answer,) = sample.answers
        assert score(sample, f"Therefore, the answer is ({answer}).").value == 1, sample.question
        if sample.unit:
            unit = "%" if sample.unit == "%" else f" {sample.unit}"
            said = f"Therefore, the answer is ({answer}{unit})."
            assert score(sample, said).value == 1, said
        wrong = str(1.5 * float(answer)) if sample.answer_type == "number" else "Nowhere"
        assert score(sample, f"Therefore, the answer is ({wrong}).").value == 0


def test_it_is_deterministic_and_prefix_stable():
    again = list(table_samples(list(package_documents()), seed=7, limit=40))
    assert again == list(samples()[:40])
    other = list(table_samples(package_documents(), seed=8, limit=40))
    assert not {sample.id for sample in other} & {sample.id for sample in again}


@pytest.mark.real
def test_thousands_of_different_questions():
    many = list(table_samples(package_documents(), seed=0, limit=5_000))
    assert len({sample.question for sample in many}) == len(many) == 5_000
    assert all(rederive(sample) == sample.answers[0] for sample in many)


def test_nothing_from_nothing():
    assert list(table_samples([], seed=0, limit=5)) == []
    assert list(table_samples(package_documents(), seed=0, limit=0)) == []


def test_a_small_corpus_ends_by_itself():
    documents = [part.document for part in harvests().parts]
    dropped = Counter()
    few = list(table_samples(documents, seed=0, limit=100_000, dropped=dropped))
    assert 20 < len(few) < 500 and dropped["asked before"] > 40
    assert len({sample.question for sample in few}) == len(few)


# --- one table by hand -------------------------------------------------------

YEARS = Column("season", "season", "integer", None, "period")
SCHEMA = Schema(
    "harvests",
    "Harvests of",
    "farm",
    "farms",
    (
        Column("farm", "farm", "text", None, "key"),
        Column("crop", "crop", "text", None, "category"),
        Column("weight", "weight", "integer", "tonnes", "measure", additive=True),
        Column("sugar", "sugar content", "real", "%", "measure"),
    ),
    YEARS,
    ratios=(("weight", "weight"),),
)
HARVESTS = {
    2001: [("Alm", "beet", 10, 1.5), ("Birk", "beet", 20, None), ("Cove", "rye", 30, 2.5)],
    2002: [("Alm", "beet", 15, 3.5), ("Dale", "rye", None, 4.5)],
    2003: [("Alm", "rye", 40, 1.25), ("Birk", "rye", 40, 1.0), ("Eden", "beet", 5, None)],
}


@cache
def harvests():
    documents = [render_document(SCHEMA, year, rows) for year, rows in HARVESTS.items()]
    (table,) = corpus_tables(documents)
    return table


def finished(sql, *, years=(2001, 2002, 2003), question="A question?", **options):
    table = harvests()
    parts = [part for part in table.parts if part.value in years]
    with Sandbox([SCHEMA.sql_table(table.rows())]) as sandbox:
        draft = Draft(question, sql, **options)
        scope = Scope(table, parts, random.Random(0))
        return finish(draft, scope, sandbox, "aggregation", template="by hand")


@pytest.mark.parametrize(
    "sql, options, answer",
    [
        ("SELECT SUM(weight) FROM harvests WHERE weight IS NOT NULL", {"unit": "tonnes"}, "160"),
        ("SELECT AVG(weight) FROM harvests", {"unit": "tonnes"}, "22.86"),  # 160 / 7: no NULL
        ("SELECT AVG(sugar) FROM harvests WHERE season = 2001", {"unit": "%"}, "2"),
        ("SELECT MAX(sugar) FROM harvests", {"unit": "%", "exact": True}, "4.5"),
        ("SELECT COUNT(*) FROM harvests WHERE crop = 'rye'", {"exact": True}, "4"),
        ("SELECT SUM(sugar) / 100.0 FROM harvests WHERE season = 2003", {}, "0.0225"),
        ("SELECT farm FROM harvests WHERE sugar = 4.5", {"is_text": True}, "Dale"),
    ],
)
def test_answers_by_hand(sql, options, answer):
    sample = finished(sql, **options)
    assert sample.answers == [answer] and rederive(sample) == answer


def test_instructions_state_form_unit_and_missing_values():
    sample = finished("SELECT AVG(weight) FROM harvests", unit="tonnes")
    assert sample.instructions.startswith(
        "Answer with one number, rounded to two decimals, in tonnes. Where a value is not known "
        "(n/a), leave that entry out"
    )
    assert sample.instructions.endswith('"Therefore, the answer is (your answer here)".')
    assert sample.tolerance == pytest.approx(0.0015) and sample.unit == "tonnes"
    whole = finished("SELECT SUM(weight) FROM harvests", unit="tonnes")
    assert "one whole number, in tonnes." in whole.instructions and whole.tolerance == 0
    name = finished(
        "SELECT farm FROM harvests WHERE sugar = 4.5", answer_column=SCHEMA.column("farm")
    )
    assert name.instructions.startswith("Answer with the farm alone, exactly as")
    assert (name.answer_type, name.reward, name.tolerance) == ("text", "exact_match", None)


RANKED = "SELECT farm, weight FROM harvests WHERE season {} AND weight IS NOT NULL ORDER BY weight"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"ranking": RANKED.format("= 2003") + " DESC"}, "a tie"),  # Alm and Birk, 40 each
        ({"ranking": RANKED.format("= 2003"), "position": 1}, "a tie"),
        ({"ranking": RANKED.format("IN (2001, 2002)")}, "the name is not the only one"),
        ({"ranking": RANKED.format("= 2002")}, "too short"),
        ({"distances": "SELECT weight - 20 FROM harvests WHERE season = 2001"}, "a tie"),
        ({"question": "Is it 10?"}, "gives the answer away"),
        ({"sql": "SELECT SUM(weight) FROM harvests WHERE season = 1999"}, "missing or trivial"),
        ({"sql": "SELECT COUNT(*) FROM harvests WHERE season = 1999"}, "missing or trivial"),
        ({"sql": "SELECT nothing FROM harvests"}, "SQL: Column 'nothing' is unknown"),
        ({"sql": "SELECT 1.255"}, "between two roundings"),
    ],
)
def test_what_has_no_single_answer_is_refused(options, reason):
    sql = "SELECT weight FROM harvests WHERE season = 2001 AND farm = 'Alm'"
    with pytest.raises(_Unfit, match=reason):
        finished(**{"sql": sql, "unit": "tonnes", "exact": True, **options} if "sql" not in options
                 else {"unit": None, **options})  # fmt: skip


def test_a_clear_order_passes():
    sample = finished(
        "SELECT farm FROM harvests WHERE season = 2001 ORDER BY weight DESC LIMIT 1",
        ranking=RANKED.format("= 2001") + " DESC",
        years=(2001,),
    )
    assert sample.answers == ["Cove"] and len(sample.evidence) == 1


def test_evidence_follows_the_filters():
    sample = finished(
        "SELECT SUM(weight) FROM harvests WHERE crop = 'beet'", filters=(("crop", "beet"),)
    )
    texts = {d.id: d.text for d in sample.documents}
    quoted = [texts[span.doc][span.start : span.end] for span in sample.evidence]
    assert [("Alm" in q, "Birk" in q, "Cove" in q, "Eden" in q) for q in quoted] == [
        (True, True, False, False),  # two rows that follow each other are one span
        (True, False, False, False),
        (False, False, False, True),
    ]


@pytest.mark.parametrize(
    "value, answer, decimals",
    [
        (2.0, "2", 2),
        (1234.5678, "1234.57", 2),
        (-3.14159, "-3.14", 2),
        (0.123456, "0.1235", 4),
        (99.999, "100", 2),
        (1e9 + 0.25, "1000000000.25", 2),
    ],
)
def test_rounding(value, answer, decimals):
    assert round_answer(value) == (answer, decimals)


@pytest.mark.parametrize("value", [0.0099, 1.005, 2.675, -0.12345])
def test_values_that_do_not_round_safely(value):
    with pytest.raises(_Unfit):
        round_answer(value)


def test_scope_prefers_three_documents_and_table_order():
    table = harvests()
    for seed in range(50):
        parts = choose_parts(table, random.Random(seed))
        assert [part.value for part in parts] == [2001, 2002, 2003]


def test_every_template_has_wordings_and_gives_questions():
    names = {template.__name__ for templates in TEMPLATES.values() for template in templates}
    assert names == set(WORDINGS)
    assert all(len(set(wordings)) >= 3 for wordings in WORDINGS.values())
    made = {sample.derivation["template"] for sample in samples()}
    assert not made - names


# --- a model writes ----------------------------------------------------------

GOOD_SQL = "SELECT SUM(weight) FROM harvests WHERE season IN (2001, 2002, 2003)"
QUESTION = "How many tonnes did the farms bring in in 2001, 2002 and 2003 together?"


class Writer(ScriptedClient):
    """Replies by the kind of the prompt; ``sql`` replies are taken in turn."""

    def __init__(self, *, question=QUESTION, unit="tonnes", sql=(GOOD_SQL,), wording=None):
        super().__init__()
        self._sql = itertools.cycle(sql)
        self._question, self._unit, self._wording = question, unit, wording

    def answer(self, request):
        prompt = request.messages[0]["content"]
        if "Translate a question" in prompt:
            sql = next(self._sql)
            return sql if sql.startswith("!") else "```json\n" + json.dumps({"sql": sql}) + "\n```"
        if "in other words" in prompt:
            asked = prompt.split("Question: ")[1].split("\n")[0]
            return json.dumps({"question": self._wording(asked) if self._wording else asked})
        return "Sure!\n" + json.dumps({"question": self._question, "unit": self._unit})


@pytest.fixture(autouse=True)
def _ends_soon(monkeypatch):
    monkeypatch.setattr("qwenlong.data.table_questions._GIVE_UP", 60)


def written(client, **options):
    dropped = Counter()
    documents = [part.document for part in harvests().parts]
    made = list(
        table_samples(
            documents, seed=0, limit=3, client=client, written_share=1.0, dropped=dropped, **options
        )
    )
    return made, dropped


def test_a_good_model_writes_a_question_with_its_sql():
    (sample,), dropped = written(Writer())
    assert sample.question == QUESTION and sample.answers == ["160"] and sample.unit == "tonnes"
    assert sample.derivation["template"] == "written by a model"
    assert rederive(sample) == "160"
    assert dropped["asked before"] > 0


@pytest.mark.parametrize(
    "client, reason",
    [
        (Writer(sql=(GOOD_SQL, GOOD_SQL.replace("SUM", "AVG"))), "do not agree"),
        (Writer(sql=("DROP TABLE harvests",)), "Only SELECT may run"),
        (Writer(sql=("! I cannot",)), "holds no JSON"),
        (Writer(sql=("SELECT weight FROM harvests",)), "not one value"),
        (Writer(sql=("SELECT SUM(weight) FROM harvests, harvests AS b",)), "SQL"),
        (Writer(sql=("SELECT 160",)), "states its answer itself"),
        (Writer(question="How much in 2001?"), "does not name every document"),
        (Writer(question=""), "no 'question'"),
        (Writer(question=QUESTION + " It is 160 tonnes."), "gives the answer away"),
    ],
)
def test_a_lying_or_broken_model_gives_nothing(client, reason):
    made, dropped = written(client)
    assert made == []
    assert any(reason in why for why in dropped), dropped


def test_sql_must_select_its_documents_by_name():
    years = range(2001, 2007)
    documents = [render_document(SCHEMA, year, HARVESTS[2001][: year % 3 + 1]) for year in years]
    question = f"How many tonnes came in, over {', '.join(map(str, years))}?"
    client = Writer(question=question, sql=("SELECT SUM(weight) FROM harvests",))
    dropped = Counter()
    list(table_samples(documents, seed=0, limit=9, client=client, written_share=1.0,
                       dropped=dropped))  # fmt: skip
    assert dropped["the SQL does not select the documents"] > 0


def test_paraphrases_are_kept_when_their_sql_gives_the_same():
    class Translator(Writer):
        """Knows the SQL of every template question; rewords by a polite prefix."""

        known = {sample.question: sample.derivation["sql"] for sample in samples()[:30]}

        def answer(self, request):
            prompt = request.messages[0]["content"]
            if "Translate a question" in prompt:
                asked = prompt.split("Question: ")[1].split("\n")[0]
                return json.dumps({"sql": self.known[asked.removeprefix("Please tell me: ")]})
            return super().answer(request)

    client = Translator(wording=lambda asked: f"Please tell me: {asked}")
    made = list(
        table_samples(package_documents(), seed=7, limit=30, client=client, written_share=0.0)
    )
    reworded = [sample for sample in made if "original_question" in sample.derivation]
    assert len(made) == 30 and len(reworded) == 30
    for sample in reworded:
        assert sample.question == f"Please tell me: {sample.derivation['original_question']}"
        assert rederive(sample) == sample.answers[0]


@pytest.mark.parametrize(
    "wording, sql, reason",
    [
        (lambda q: q.replace("2001", "2003"), GOOD_SQL, "changes a number"),
        (lambda q: q, GOOD_SQL, "is the same"),
        (lambda q: "Say, " + q, "SELECT -12345", "asks something else"),
        (lambda q: "x" * 10_000, GOOD_SQL, "characters, more than"),
    ],
)
def test_bad_paraphrases_leave_the_question_alone(wording, sql, reason):
    dropped = Counter()
    documents = [part.document for part in harvests().parts]
    client = Writer(wording=wording, sql=(sql,))
    made = list(
        table_samples(
            documents, seed=3, limit=12, client=client, written_share=0.0, dropped=dropped
        )
    )
    assert made == list(table_samples(documents, seed=3, limit=12))
    assert any(reason in why for why in dropped), dropped
