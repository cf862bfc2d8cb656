"""Facts and tables read out of documents by a model: several readings, a majority, a place.

A model reads each document several times. What most readings say is kept; a fact that cannot be
found where the model says it stands is no fact. A document whose readings of a table do not agree
is dropped. Every loss is counted by reason.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qwenlong.data.documents import SourceDocument, split_sentences
from qwenlong.data.graph_sources import Triple
from qwenlong.data.json_replies import parse_json, text_field
from qwenlong.data.leaks import normalise
from qwenlong.data.table_schema import (
    Column,
    Schema,
    Value,
    parse_plain_number,
    parse_value,
    sql_name,
)
from qwenlong.data.tables import CorpusTable, Part
from qwenlong.llm import Request, RequestRefused
from qwenlong.prompts import fill, user
from qwenlong.prompts_synth import EXTRACT_ROWS, EXTRACT_SCHEMA, EXTRACT_TRIPLES

if TYPE_CHECKING:
    from qwenlong.llm import Client

_T = TypeVar("_T", bound=Hashable)
_MAX_COLUMNS = 8
_MAX_TRIPLES = 20
_MAX_QUOTE_CHARS = 2_000
_SHOWN_CHARS = 2_000  # of each text, when a schema is asked for


class Reader:
    """A model that reads a text several times.

    Args:
        client: any client of ``qwenlong.llm``; its cache makes a run resumable.
        samples: readings of each text. What more than half of them say counts; readings that are
            no JSON count as readings that say nothing.
        chunk_chars: a longer text is read in pieces that end with a sentence.
        dropped: losses by reason.
    """

    def __init__(
        self,
        client: Client,
        *,
        samples: int = 3,
        temperature: float = 0.7,
        max_tokens: int = 2048,
        chunk_chars: int = 24_000,
        dropped: Counter[str] | None = None,
    ):
        if samples < 1:
            raise ValueError(f"Reader: samples is {samples}; it must be at least 1")
        self._client, self.samples, self._chunk_chars = client, samples, chunk_chars
        self._sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self.dropped = dropped if dropped is not None else Counter()

    def readings(self, prompt: str) -> list[dict[str, Any]]:
        """The replies that are JSON objects."""
        try:
            replies = self._client.sample(
                Request.chat(user(prompt), **self._sampling), self.samples
            )
        except RequestRefused:
            self.dropped["the server refused the request"] += 1
            return []
        values = []
        for reply in replies:
            try:
                values.append(parse_json(reply.text))
            except ValueError as error:
                self.dropped[str(error)] += 1
        return values

    def is_majority(self, votes: int) -> bool:
        return 2 * votes > self.samples

    def chunks(self, text: str) -> Iterator[tuple[int, str]]:
        """``(start, piece)``: pieces of at most ``chunk_chars``, cut between sentences."""
        start = end = 0
        for _, sentence_end in split_sentences(text):
            if sentence_end - start > self._chunk_chars and end > start:
                yield start, text[start:end]
                start = end
            end = sentence_end
        if text[start:].strip():
            yield start, text[start:]


# --- triples -----------------------------------------------------------------


def model_triples(reader: Reader, documents: Iterable[SourceDocument]) -> Iterator[Triple]:
    """Triples that most readings of a document give, each with the span of its quote."""
    for document in documents:
        for start, text in reader.chunks(document.text):
            prompt = fill(EXTRACT_TRIPLES, text=text, most=str(_MAX_TRIPLES))
            votes: dict[tuple[str, str, str], list[Triple]] = defaultdict(list)
            for reading in reader.readings(prompt):
                found = {}
                for raw in _dicts(reading.get("triples"), _MAX_TRIPLES):
                    triple = _located_triple(raw, document, start, text, reader.dropped)
                    if triple is not None:
                        found[tuple(map(normalise, triple[:3]))] = triple
                for key, triple in found.items():
                    votes[key].append(triple)
            for same in votes.values():
                if reader.is_majority(len(same)):
                    yield _most_common(same)
                else:
                    reader.dropped["a triple without a majority"] += 1


def _located_triple(
    raw: dict[str, Any], document: SourceDocument, offset: int, text: str, dropped: Counter[str]
) -> Triple | None:
    try:
        fields = [text_field(raw, name, most=300) for name in ("subject", "relation", "object")]
        quote = text_field(raw, "quote", most=_MAX_QUOTE_CHARS)
    except ValueError as error:
        dropped[f"triple: {error}"] += 1
        return None
    span = locate(quote, text)
    if span is None:
        dropped["a triple whose quote is not in the text"] += 1
        return None
    stated = normalise(text[span[0] : span[1]])
    if normalise(fields[0]) not in stated or normalise(fields[2]) not in stated:
        dropped["a triple that its quote does not state"] += 1
        return None
    return Triple(*fields, document.id, offset + span[0], offset + span[1])


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where ``quote`` stands in ``text``, white space and the form of quotation marks apart.

    A quote beyond 2,000 characters is copied text, no place: None.
    """
    if len(quote) > _MAX_QUOTE_CHARS:
        return None
    at = text.find(quote)
    if at >= 0:
        return at, at + len(quote)
    words = [_quotes_in_any_form(re.escape(word)) for word in quote.split()]
    match = re.search(r"\s+".join(words), text) if words else None
    return match.span() if match else None


def _quotes_in_any_form(pattern: str) -> str:
    return re.sub('["“”]', '["“”]', re.sub("['’‘]", "['’‘]", pattern))


# --- tables ------------------------------------------------------------------


def model_schema(
    reader: Reader, name: str, documents: Sequence[SourceDocument], *, shown: int = 4
) -> Schema | None:
    """The columns that most readings of the first ``shown`` documents name; None without a key.

    The partition is the document itself, by its title.
    """
    texts = "\n\n".join(
        f"<text>\n{document.text[:_SHOWN_CHARS]}\n</text>" for document in documents[:shown]
    )
    prompt = fill(EXTRACT_SCHEMA, texts=texts, most=str(_MAX_COLUMNS))
    nouns: list[tuple[str, str]] = []
    votes: Counter[str] = Counter()
    kinds: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    keys: list[str] = []
    for reading in reader.readings(prompt):
        try:
            noun = (
                text_field(reading, "entity", most=80),
                text_field(reading, "entities", most=80),
            )
            columns = [_raw_column(c) for c in _dicts(reading.get("columns"), _MAX_COLUMNS + 1)]
        except ValueError as error:
            reader.dropped[f"schema: {error}"] += 1
            continue
        nouns.append(noun)
        keys += [columns[0][0]] if columns and columns[0][1] == "text" else []
        for label, kind, unit in {column[0]: column for column in columns}.values():
            votes[label] += 1
            kinds[label].append((kind, unit))
    key = _most_common(keys) if keys else None
    if key is None or not reader.is_majority(keys.count(key)):
        reader.dropped["no majority for the column that names the rows"] += 1
        return None
    labels = [key, *(label for label in votes if label != key and reader.is_majority(votes[label]))]
    columns = []
    for label in labels:
        kind, unit = _most_common(kinds[label])
        role = "key" if label == key else "measure" if kind != "text" else "other"
        columns.append(Column(sql_name(label), label, kind, unit, role))
    if len({column.name for column in columns}) < len(columns) or len(columns) < 2:
        reader.dropped["the schema has too few columns, or two of one name"] += 1
        return None
    entity, entities = _most_common(nouns)
    partition = Column("document_title", "document", "text", None, "category")
    return Schema(
        sql_name(name),
        f"{entities[:1].upper()}{entities[1:]} in",
        entity,
        entities,
        tuple(columns),
        partition,
        preposition="in the documents",
    )


def model_part(reader: Reader, schema: Schema, document: SourceDocument) -> Part | None:
    """The rows of ``schema`` that most readings of a document agree on, value by value.

    None, with the reason counted, where a row or a value that some reading gives has no clear
    majority, or where a value does not stand in the quote of its row.
    """
    label = schema.key.label
    columns = "\n".join(
        f"- {c.label} ({c.type}{f', in {c.unit}' if c.unit else ''})" for c in schema.columns
    )
    rows: list[tuple[Value, ...]] = []
    spans: list[tuple[int, int]] = []
    for start, text in reader.chunks(document.text):
        prompt = fill(EXTRACT_ROWS, entity=schema.entity, columns=columns, text=text)
        cells: dict[str, dict[str, list[Value]]] = defaultdict(lambda: defaultdict(list))
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for reading in reader.readings(prompt):
            named: set[str] = set()
            for raw in _dicts(reading.get("rows"), 2_000):
                read = _read_row(raw, schema, text, reader.dropped)
                if read is None:
                    continue
                values, span = read
                name = normalise(str(values[label]))
                if name in named:
                    continue
                named.add(name)
                places[name].append((start + span[0], start + span[1]))
                for column, value in values.items():
                    cells[name][column].append(value)
        for name, fields in cells.items():
            row = []
            for column in schema.columns:
                value = _most_common(fields[column.label])
                if not reader.is_majority(fields[column.label].count(value)):
                    reader.dropped["a document without a clear majority"] += 1
                    return None
                row.append(value)
            rows.append(tuple(row))
            spans.append(_most_common(places[name]))
    if not rows:
        reader.dropped["a document without rows"] += 1
        return None
    order = sorted(range(len(rows)), key=lambda i: spans[i])
    return Part(document, document.title, [rows[i] for i in order], [spans[i] for i in order])


def model_tables(
    reader: Reader, name: str, documents: Sequence[SourceDocument], *, min_documents: int = 3
) -> list[CorpusTable]:
    """Corpus tables read by a model from documents of one kind, train and eval apart."""
    schema = model_schema(reader, name, documents)
    if schema is None:
        return []
    parts: dict[str, list[Part]] = {"train": [], "eval": []}
    titles: set[str] = set()
    for document in documents:
        if document.title in titles:
            reader.dropped["a second document of one title"] += 1
            continue
        titles.add(document.title)
        part = model_part(reader, schema, document)
        if part is not None:
            parts[document.split].append(part)
    return [
        CorpusTable(schema, members, split, by_model=True)
        for split, members in parts.items()
        if len(members) >= min_documents
    ]


def _read_row(
    raw: dict[str, Any], schema: Schema, text: str, dropped: Counter[str]
) -> tuple[dict[str, Value], tuple[int, int]] | None:
    """Values by label and the place of the quote, each value checked against the quote."""
    given = raw.get("values")
    span = locate(raw["quote"], text) if isinstance(raw.get("quote"), str) else None
    if not isinstance(given, dict) or span is None:
        dropped["a row whose quote is not in the text"] += 1
        return None
    given = {normalise(str(key)): value for key, value in given.items()}
    quote = text[span[0] : span[1]]
    numbers = {_number_in(match) for match in re.findall(r"-?\d[\d,]*(?:\.\d+)?", quote)}
    values: dict[str, Value] = {}
    for column in schema.columns:
        value = given.get(normalise(column.label))
        try:
            cell = None if value is None else parse_value(str(value), column)
        except ValueError:
            dropped["a value of the wrong type"] += 1
            return None
        is_stated = (
            cell is None
            or (isinstance(cell, str) and normalise(cell) in normalise(quote))
            or (not isinstance(cell, str) and any(math.isclose(abs(cell), n) for n in numbers))
        )
        if not is_stated:
            dropped["a value that its quote does not state"] += 1
            return None
        values[column.label] = cell
    if values[schema.key.label] is None:
        dropped["a row without a name"] += 1
        return None
    return values, span


def _number_in(text: str) -> float:
    number = parse_plain_number(text.rstrip(",").lstrip("-"))
    return math.nan if number is None else abs(float(number))


def _raw_column(raw: dict[str, Any]) -> tuple[str, str, str | None]:
    label, kind, unit = text_field(raw, "label", most=80), raw.get("type"), raw.get("unit")
    if kind not in ("text", "integer", "real"):
        raise ValueError(f"column type {kind!r}")
    is_unit = isinstance(unit, str) and unit.strip().casefold() not in ("", "none", "null")
    return " ".join(label.split()).casefold(), kind, unit.strip()[:60] if is_unit else None


def _dicts(value: Any, most: int) -> list[dict[str, Any]]:
    return (
        [item for item in value if isinstance(item, dict)][:most] if isinstance(value, list) else []
    )


def _most_common(values: Sequence[_T]) -> _T:
    """The value that occurs most often; of several, the first."""
    return Counter(values).most_common(1)[0][0]
