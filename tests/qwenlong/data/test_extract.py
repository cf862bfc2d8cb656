"""Facts and tables read by a scripted model: majorities, places in the text, and lies."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter

import pytest

from qwenlong.data.documents import SourceDocument
from qwenlong.data.extract import (
    Reader,
    locate,
    model_part,
    model_schema,
    model_tables,
    model_triples,
)
from qwenlong.data.json_replies import parse_json, text_field
from qwenlong.data.table_questions import table_samples
from qwenlong.llm import RequestRefused, ScriptedClient

TEXT = (
    "Mount Ada rises to 2,310 m above the Lisse valley. "
    "It was first climbed by Ruth Ober in 1871.\n"
    "Mount Bree, at 1,944 m, lies\n  in the “Grey Range”."
)
DOCUMENT = SourceDocument(title="Peaks", text=TEXT, source="peaks")


class Readings(ScriptedClient):
    """Gives the replies in turn, whatever is asked."""

    def __init__(self, *replies):
        super().__init__()
        self._replies = itertools.cycle(r if isinstance(r, str) else json.dumps(r) for r in replies)

    def answer(self, request):
        return next(self._replies)


# --- replies -----------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, value",
    [
        ('{"a": 1}', {"a": 1}),
        ('Here you are:\n```json\n{"a": [1, 2]}\n```\nBye', {"a": [1, 2]}),
        ('<think>{"a": 0}</think> {"a": 1, }', {"a": 1}),
        ("{'a': 'b'}", {"a": "b"}),
        ('{"a": "cut sho', {"a": "cut sho"}),
    ],
)
def test_json_is_found_and_repaired(reply, value):
    assert parse_json(reply) == value


@pytest.mark.parametrize("reply", ["", "no", "<think>{}", "[1, 2]", "null", "{" * 0 + "]"])
def test_no_json_is_an_error(reply):
    with pytest.raises(ValueError, match="no JSON"):
        parse_json(reply)


@pytest.mark.parametrize("bomb", ["{" * 200_000, '{"a":' * 40_000, '{"' + '"' * 200_000, "[{" * 9])
def test_hostile_replies_take_no_time(bomb):
    start = time.thread_time()
    try:
        parse_json(bomb)
    except ValueError as error:
        assert "no JSON" in str(error)
    assert time.thread_time() - start < 2


def test_fields_are_checked():
    assert text_field({"a": " x "}, "a") == "x" and text_field({"a": 12}, "a") == "12"
    for value in ({}, {"a": ""}, {"a": None}, {"a": ["x"]}, {"a": True}):
        with pytest.raises(ValueError, match="no 'a'"):
            text_field(value, "a")
    with pytest.raises(ValueError, match="more than 3"):
        text_field({"a": "four"}, "a", most=3)


def test_quotes_are_located():
    assert TEXT[slice(*locate("2,310 m", TEXT))] == "2,310 m"
    assert TEXT[slice(*locate('lies in the "Grey Range"', TEXT))] == "lies\n  in the “Grey Range”"
    assert (
        locate("2310 m", TEXT) is None and locate("", TEXT) == (0, 0) and locate("  ", "a") is None
    )


# --- triples -----------------------------------------------------------------

ADA = {
    "subject": "Mount Ada",
    "relation": "was first climbed by",
    "object": "Ruth Ober",
    "quote": "Mount Ada rises to 2,310 m above the Lisse valley. It was first climbed by Ruth Ober",
}
BREE = {
    "subject": "Mount Bree",
    "relation": "lies in",
    "object": "Grey Range",
    "quote": "Mount Bree, at 1,944 m, lies in the “Grey Range”",
}


def test_triples_that_most_readings_give():
    client = Readings({"triples": [ADA, BREE]}, {"triples": [ADA]}, {"triples": [BREE, ADA]})
    triples = list(model_triples(Reader(client, samples=3), [DOCUMENT]))
    assert [triple[:3] for triple in triples] == [
        ("Mount Ada", "was first climbed by", "Ruth Ober"),
        ("Mount Bree", "lies in", "Grey Range"),
    ]
    for triple in triples:
        assert triple.doc == DOCUMENT.id and triple.object in TEXT[triple.start : triple.end]


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"quote": "Mount Ada is the home of Ruth Ober"}, "whose quote is not in the text"),
        ({"object": "Rome"}, "its quote does not state"),
        ({"subject": ""}, "no 'subject'"),
        ({"quote": None}, "no 'quote'"),
        ({"object": "x" * 301}, "more than 300"),
    ],
)
def test_lies_about_triples_are_dropped(changed, reason):
    reader = Reader(Readings({"triples": [ADA | changed]}), samples=3)
    assert list(model_triples(reader, [DOCUMENT])) == []
    assert any(reason in why for why in reader.dropped), reader.dropped


def test_triples_without_a_majority_and_malformed_readings():
    client = Readings({"triples": [ADA]}, {"triples": [BREE]}, "I see no facts.")
    reader = Reader(client, samples=3)
    assert list(model_triples(reader, [DOCUMENT])) == []
    assert reader.dropped["a triple without a majority"] == 2
    assert reader.dropped["the reply holds no JSON dict"] == 1
    odd = Reader(Readings({"triples": "many"}, {"triples": [1, None]}, {}), samples=3)
    assert list(model_triples(odd, [DOCUMENT])) == []


def test_a_repeated_triple_is_one_vote():
    reader = Reader(Readings({"triples": [ADA, ADA, ADA]}, {}, {}), samples=3)
    assert list(model_triples(reader, [DOCUMENT])) == []


def test_long_texts_are_read_in_pieces_with_right_spans():
    text = " ".join(f"Peak {i} rises to {1000 + i} m." for i in range(50))
    document = SourceDocument(title="t", text=text, source="s")

    class Copier(ScriptedClient):
        def answer(self, request):
            said = request.messages[0]["content"].split("<text>\n")[1].split("\n</text>")[0]
            quote = said.split(".")[0]
            subject, rest = quote.split(" rises to ")
            fact = {"subject": subject, "relation": "rises to", "object": rest, "quote": quote}
            return json.dumps({"triples": [fact]})

    reader = Reader(Copier(), samples=1, chunk_chars=200)
    triples = list(model_triples(reader, [document]))
    assert len(triples) == len(list(reader.chunks(text))) > 5
    assert "".join(piece for _, piece in reader.chunks(text)) == text
    for triple in triples:
        assert text[triple.start : triple.end] == f"{triple.subject} rises to {triple.object}"


def test_a_refused_request_is_counted():
    class Refuser(ScriptedClient):
        def answer(self, request):
            raise RequestRefused("too long")

    reader = Reader(Refuser(), samples=2)
    assert list(model_triples(reader, [DOCUMENT])) == []
    assert reader.dropped["the server refused the request"] == 1


def test_samples_must_be_positive():
    with pytest.raises(ValueError, match="samples is 0"):
        Reader(Readings(""), samples=0)


# --- tables ------------------------------------------------------------------

SCHEMA_REPLY = {
    "entity": "peak",
    "entities": "peaks",
    "columns": [
        {"label": "Name", "type": "text", "unit": None},
        {"label": "Height", "type": "integer", "unit": "m"},
        {"label": "First climbed", "type": "integer", "unit": "null"},
    ],
}
ROWS = [
    {"values": {"name": "Mount Ada", "height": "2,310", "first climbed": 1871},
     "quote": TEXT.split("\n")[0]},
    {"values": {"name": "Mount Bree", "height": 1944, "first climbed": None},
     "quote": "Mount Bree, at 1,944 m"},
]  # fmt: skip


def schema():
    return model_schema(Reader(Readings(SCHEMA_REPLY)), "peaks", [DOCUMENT])


def test_the_schema_that_most_readings_name():
    other = {**SCHEMA_REPLY, "columns": [*SCHEMA_REPLY["columns"][:2],
             {"label": "colour", "type": "text"}]}  # fmt: skip
    found = model_schema(Reader(Readings(SCHEMA_REPLY, other, SCHEMA_REPLY)), "Peaks!", [DOCUMENT])
    assert [(c.name, c.type, c.unit, c.role) for c in found.columns] == [
        ("name", "text", None, "key"),
        ("height", "integer", "m", "measure"),
        ("first_climbed", "integer", None, "measure"),
    ]
    assert (found.name, found.entity, found.entities) == ("peaks", "peak", "peaks")
    assert found.partition.label == "document"


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"entity": "peak", "entities": "peaks", "columns": []},
        {**SCHEMA_REPLY, "columns": SCHEMA_REPLY["columns"][1:]},  # no column names the rows
        {**SCHEMA_REPLY, "columns": SCHEMA_REPLY["columns"][:1]},
        {**SCHEMA_REPLY, "columns": [{"label": "a", "type": "date"}]},
        "nonsense",
    ],
)
def test_no_schema_from_bad_replies(reply):
    reader = Reader(Readings(reply))
    assert model_schema(reader, "peaks", [DOCUMENT]) is None and reader.dropped


def test_rows_are_read_with_their_places():
    part = model_part(Reader(Readings({"rows": ROWS[::-1]})), schema(), DOCUMENT)
    assert part.rows == [("Mount Ada", 2310, 1871), ("Mount Bree", 1944, None)]
    assert [TEXT[a:b] for a, b in part.spans] == [ROWS[0]["quote"], ROWS[1]["quote"]]
    assert part.value == "Peaks"


def _rows(**changes):
    first = {**ROWS[0], "values": {**ROWS[0]["values"], **changes}}
    return {"rows": [first, ROWS[1]]}


def test_the_majority_decides_value_by_value():
    replies = [_rows(), _rows(height=1871), _rows()]
    part = model_part(Reader(Readings(*replies), samples=3), schema(), DOCUMENT)
    assert part.rows[0] == ("Mount Ada", 2310, 1871)


@pytest.mark.parametrize(
    "replies, reason",
    [
        # three readings, three heights that all stand in the quote
        ([_rows(), _rows(height=1871), _rows(height=None)], "without a clear majority"),
        # a row that only one reading has
        ([{"rows": [ROWS[0]]}, {"rows": [ROWS[0]]}, {"rows": ROWS}], "without a clear majority"),
        ([{"rows": []}] * 3, "without rows"),
        (["?", "?", "?"], "without rows"),
        ([_rows(height=9999)] * 3, "a value that its quote does not state"),
        ([_rows(height="high")] * 3, "a value of the wrong type"),
        ([_rows(name=None)] * 3, "a row without a name"),
        ([{"rows": [{**ROWS[0], "quote": "Mount Ada is 2,310 m high"}]}] * 3, "quote is not in"),
        ([{"rows": [{"values": [1], "quote": TEXT}]}] * 3, "quote is not in"),
    ],
)
def test_documents_without_a_clear_reading_are_dropped(replies, reason):
    reader = Reader(Readings(*replies), samples=3)
    part = model_part(reader, schema(), DOCUMENT)
    assert part is None or ("stat" in reason or "type" in reason or "name" in reason
                            or "quote" in reason) and len(part.rows) == 1  # fmt: skip
    assert any(reason in why for why in reader.dropped), reader.dropped


# --- from reading to questions -----------------------------------------------


def _pages(count):
    rng = random.Random(0)
    pages = []
    for i in range(count):
        peaks = [(f"Mount {chr(65 + j)}{i}", rng.randint(900, 3000)) for j in range(6)]
        text = f"The range number {i}.\n" + "\n".join(f"{n} is {h} m high." for n, h in peaks)
        pages.append(SourceDocument(title=f"Range {i}", text=text, source="ranges"))
    return pages


class PeakReader(ScriptedClient):
    """Reads the pages rightly, except that every third reading of "Range 2" is wrong by one row."""

    def answer(self, request):
        prompt = request.messages[0]["content"]
        if prompt.startswith("Several texts"):
            return json.dumps({**SCHEMA_REPLY, "columns": SCHEMA_REPLY["columns"][:2]})
        if prompt.startswith("Fill a table"):
            lines = prompt.split("<text>\n")[1].split("\n</text>")[0].split("\n")[1:]
            rows = []
            for line in lines:
                name, rest = line.split(" is ")
                values = {"name": name, "height": rest.removesuffix(" m high.")}
                rows.append({"values": values, "quote": line})
            is_wrong = "number 2." in prompt and request.sample_index == 2
            return json.dumps({"rows": rows[1:] if is_wrong else rows})
        return "no"


def test_tables_read_by_a_model_give_questions():
    pages = _pages(8)
    dropped = Counter()
    made = list(
        table_samples(
            pages, seed=1, limit=20, client=PeakReader(), read_tables=True, written_share=0.0,
            paraphrase=False, dropped=dropped,
        )
    )  # fmt: skip
    assert len(made) == 20
    texts = {page.id: page.text for page in pages}
    for sample in made:
        for span in sample.evidence:
            assert " m high." in texts[span.doc][span.start : span.end]
        rows = sample.derivation["rows"]
        assert set(rows) == {document.id for document in sample.documents}
        for doc, members in rows.items():
            assert all(f"{name} is {height} m high." in texts[doc] for name, height in members)
    tops = [s for s in made if s.derivation["template"] == "extreme"]
    for sample in tops:
        heights = [h for members in sample.derivation["rows"].values() for _, h in members]
        assert sample.answers[0] in (str(max(heights)), str(min(heights)))


def test_titles_must_differ_and_documents_must_suffice():
    reader = Reader(PeakReader())
    pages = _pages(3)
    twice = [*pages, SourceDocument(title="Range 0", text=pages[0].text + " ", source="ranges")]
    tables = model_tables(reader, "ranges", twice, min_documents=1)
    assert sum(len(table.parts) for table in tables) == 3
    assert reader.dropped["a second document of one title"] == 1
    assert model_tables(Reader(PeakReader()), "ranges", pages[:2]) == []
