"""Tables in documents: rendered with exact spans, parsed back, joined into corpus tables.

One table becomes several documents, one for each value of its partition (a year, a region), as a
Markdown table, a list of records or prose. The way back reads the text alone: ``parse_document``
knows of the schema only what is needed to read prose, so an answer computed over a ``CorpusTable``
is an answer from what the documents say.

Documents of other origin take the same way: a Markdown table anywhere in a text is read, its
columns found by rule, and documents with equal heads join into one corpus table.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qwenlong.data.documents import SourceDocument
from qwenlong.data.table_schema import (
    MISSING,
    Column,
    Schema,
    Table,
    Value,
    choose_partition,
    clean_value,
    discover_columns,
    format_value,
    parse_value,
    period_key,
    split_header,
    sql_name,
)
from qwenlong.data.table_sources import PACKAGE_TABLES
from qwenlong.types import Split

STYLES = ("markdown", "records", "prose")
_MAX_PROSE_COLUMNS = 8  # wider rows are unreadable as a sentence


# --- table -> documents ------------------------------------------------------


def table_documents(names: Sequence[str] | None = None) -> Iterator[SourceDocument]:
    """The real tables of the data packages (extra ``synth-demo``), spread over documents.

    Args:
        names: of ``qwenlong.data.table_sources.PACKAGE_TABLES``; None gives all.
    """
    for name in PACKAGE_TABLES if names is None else names:
        if name not in PACKAGE_TABLES:
            raise ValueError(f"table {name!r} is unknown; choose of {sorted(PACKAGE_TABLES)}")
        yield from split_table(PACKAGE_TABLES[name]())


def split_table(table: Table) -> Iterator[SourceDocument]:
    """One document for each value of the partition, in the order in which the values appear.

    The style of a document follows the hash of its title, so that one table comes in several.
    """
    groups: dict[Value, list[tuple[Value, ...]]] = defaultdict(list)
    for row in table.rows:
        groups[row[0]].append(tuple(row[1:]))
    for value, rows in groups.items():
        if value is not None:
            yield render_document(table.schema, value, rows, source=table.source)


def split_rows(
    name: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[Value]],
    *,
    units: dict[str, str] | None = None,
    partition: str | None = None,
    source: str = "",
) -> list[SourceDocument]:
    """Documents of a table of unknown schema: columns and, unless named, partition by rule.

    Raises:
        ValueError: no column is fit to spread the table over documents.
    """
    cells = [[clean_value(cell) for cell in row] for row in rows]
    columns = discover_columns(headers, cells, units or {})
    if partition is None:
        chosen = choose_partition(columns, cells)
    else:
        named = [c for c, head in zip(columns, headers, strict=True) if head == partition]
        chosen = named[0] if named else None
    if chosen is None:
        raise ValueError(
            f"table {name!r}: no column to spread it over documents by; give partition=, one of "
            f"{list(headers)}"
        )
    at = columns.index(chosen)
    rest = tuple(column for column in columns if column is not chosen)
    preposition = "in" if chosen.role == "period" else "for"
    schema = Schema(
        sql_name(name), f"{name}:", "row", "rows", rest, chosen, preposition=preposition
    )
    typed = [
        tuple(_typed(cell, column) for cell, column in zip(row, columns, strict=True))
        for row in cells
    ]
    moved = [(row[at], *row[:at], *row[at + 1 :]) for row in typed]
    return list(split_table(Table(schema, moved, source)))


def _typed(cell: Value, column: Column) -> Value:
    if cell is None or isinstance(cell, str):
        return None if cell is None else parse_value(cell, column)
    if column.type == "text":
        return str(cell)
    return float(cell) if column.type == "real" else cell


def render_document(
    schema: Schema,
    value: Value,
    rows: Sequence[Sequence[Value]],
    *,
    source: str = "",
    style: str | None = None,
) -> SourceDocument:
    """The rows of one partition value as a document of kind ``table``.

    ``meta`` holds ``table``, ``columns``, ``rows`` and ``units`` as every table document does, and
    ``schema``, ``partition``, ``style`` and ``spans`` (characters of each row).
    """
    shown = format_value(value, schema.partition)
    title = f"{schema.title} {shown}"
    if style is None:
        style = _style_of(title, schema)
    text = f"# {title}\n\n{schema.partition.header}: {shown}\n\n{_introduction(schema, shown)}\n\n"
    pieces = {"markdown": _markdown_rows, "records": _record_rows, "prose": _prose_rows}[style]
    spans: list[tuple[int, int]] = []
    for line, is_row in pieces(schema, rows):
        if is_row:
            spans.append((len(text), len(text) + len(line)))
        text += line + "\n"
    units = {c.name: c.unit for c in schema.columns if c.unit}
    meta = {
        "table": schema.name,
        "columns": [c.name for c in schema.columns],
        "rows": [list(row) for row in rows],
        "units": units,
        "schema": schema.to_json(),
        "partition": value,
        "style": style,
        "spans": [list(span) for span in spans],
    }
    return SourceDocument(title=title, text=text, source=source, kind="table", meta=meta)


def _style_of(title: str, schema: Schema) -> str:
    styles = ["markdown", "records"]
    if schema.key is not None and len(schema.columns) <= _MAX_PROSE_COLUMNS:
        styles.append("prose")
    if len(schema.columns) > 2 * _MAX_PROSE_COLUMNS:
        styles.remove("records")
    return styles[hashlib.sha256(title.encode()).digest()[0] % len(styles)]


def _introduction(schema: Schema, shown: str) -> str:
    units = [f"{c.label} in {c.unit}" for c in schema.columns if c.unit]
    text = (
        f"Every {schema.entity} {schema.preposition} {shown} that the record holds is listed once."
    )
    if units:
        text += f" Units: {', '.join(units)}."
    return text + f' A value that is not known is written "{MISSING}".'


def _markdown_rows(schema: Schema, rows: Sequence[Sequence[Value]]) -> Iterator[tuple[str, bool]]:
    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    yield line(column.header for column in schema.columns), False
    yield "|" + " --- |" * len(schema.columns), False
    for row in rows:
        yield line(map(format_value, row, schema.columns)), True


def _record_rows(schema: Schema, rows: Sequence[Sequence[Value]]) -> Iterator[tuple[str, bool]]:
    for row in rows:
        parts = [
            f"{column.label[:1].upper()}{column.label[1:]}: {_with_unit(value, column)}"
            for value, column in zip(row, schema.columns, strict=True)
        ]
        yield f"- {'; '.join(parts)}", True


def _prose_rows(schema: Schema, rows: Sequence[Sequence[Value]]) -> Iterator[tuple[str, bool]]:
    key = schema.key
    if key is None:
        raise ValueError(f"table {schema.name!r} has no key column; prose needs one")
    for row in rows:
        values = dict(zip(schema.columns, row, strict=True))
        parts = [
            f"the {column.label} is {_with_unit(value, column)}"
            for column, value in values.items()
            if column is not key
        ]
        yield f"For {format_value(values[key], key)}, {_joined(parts)}.", True


def _joined(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _with_unit(value: Value, column: Column) -> str:
    text = format_value(value, column)
    return f"{text} {column.unit}" if column.unit and value is not None else text


# --- documents -> table ------------------------------------------------------


@dataclass(frozen=True)
class ParsedTable:
    """A table as a document states it: heads, cells as text, and the span of each row."""

    headers: list[str]
    rows: list[list[str]]
    spans: list[tuple[int, int]]


def markdown_tables(text: str) -> list[ParsedTable]:
    """The pipe tables of a text. Rows with another number of cells than the head end a table."""
    tables: list[ParsedTable] = []
    current: ParsedTable | None = None
    previous: list[str] | None = None  # cells of the line before
    start = 0
    for line in text.splitlines(keepends=True):
        content = line.strip()
        begin = start + len(line) - len(line.lstrip())
        start += len(line)
        cells = _cells(content) if "|" in content else None
        if cells is None:
            current = previous = None
        elif current is not None and len(cells) == len(current.headers):
            if not all(re.fullmatch(r":?-{3,}:?", cell) for cell in cells):
                current.rows.append(cells)
                current.spans.append((begin, begin + len(content)))
        elif all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            current = None
            if previous is not None and len(previous) == len(cells):
                current = ParsedTable(previous, [], [])
                tables.append(current)
        else:
            current, previous = None, cells
    return tables


def _cells(line: str) -> list[str] | None:
    """Cells of a line with pipes; the ones at its ends do not count."""
    cells = re.findall(r"((?:[^|\\]|\\.|\\$)*)(?:\||$)", line)[:-1]  # the last matches nothing
    if line.startswith("|"):
        cells = cells[1:]
    return [re.sub(r"\\([\\|])", r"\1", cell.strip()) for cell in cells] or None


def parse_records(text: str, schema: Schema) -> ParsedTable:
    """The ``- Label: value; Label: value`` lines of a text that have every label of ``schema``."""
    labels = [column.label.casefold() for column in schema.columns]
    table = ParsedTable([column.header for column in schema.columns], [], [])
    for match in re.finditer(r"^- (.+)$", text, re.MULTILINE):
        pairs = [part.partition(": ") for part in match.group(1).split("; ")]
        found = {label.casefold(): value for label, _, value in pairs}
        if list(found) == labels:
            table.rows.append(list(found.values()))
            table.spans.append(match.span())
    return table


def parse_prose(text: str, schema: Schema) -> ParsedTable:
    """The ``For X, the L is V ... and the L is V.`` lines of a text."""
    key = schema.key
    table = ParsedTable([column.header for column in schema.columns], [], [])
    if key is None:
        return table
    rest = [column for column in schema.columns if column is not key]
    joints = [", "] * (len(rest) - 1) + [" and "] if len(rest) > 1 else [", "]
    joints[0] = ", "
    pattern = "^For (.+?)" + "".join(
        re.escape(f"{joint}the {column.label} is ") + "(.+?)"
        for joint, column in zip(joints, rest, strict=True)
    )
    at = schema.columns.index(key)
    for match in re.finditer(pattern + r"\.$", text, re.MULTILINE):
        name, *values = match.groups()
        table.rows.append([*values[:at], name, *values[at:]])
        table.spans.append(match.span())
    return table


def parse_document(document: SourceDocument) -> list[ParsedTable]:
    """Every table that the text of a document holds."""
    schema = document.meta.get("schema")
    style = document.meta.get("style", "markdown")
    if schema is None or style == "markdown":
        return markdown_tables(document.text)
    parse = {"records": parse_records, "prose": parse_prose}[style]
    return [parse(document.text, Schema.from_json(schema))]


# --- corpus tables -----------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one document adds to a corpus table: typed rows and the span of each."""

    document: SourceDocument
    value: Value  # of the partition
    rows: list[tuple[Value, ...]] = field(repr=False)
    spans: list[tuple[int, int]] = field(repr=False)

    def full_rows(self) -> list[tuple[Value, ...]]:
        return [(self.value, *row) for row in self.rows]


@dataclass(frozen=True)
class CorpusTable:
    """One table over several documents of one split, in the order of the partition.

    ``by_model``: the rows were read by a model, so that the text alone does not give them back.
    """

    schema: Schema
    parts: list[Part]
    split: Split
    by_model: bool = False

    @property
    def is_temporal(self) -> bool:
        return all(period_key(part.value) is not None for part in self.parts)

    def rows(self) -> list[tuple[Value, ...]]:
        return [row for part in self.parts for row in part.full_rows()]


def corpus_tables(
    documents: Iterable[SourceDocument],
    *,
    min_documents: int = 2,
    dropped: Counter[str] | None = None,
) -> list[CorpusTable]:
    """The tables that documents of one split hold together, train and eval apart.

    Documents join by table name and column heads. The partition is what their ``Label: value`` line
    says, or else the document's title. A document is dropped with a reason when a cell does not
    parse, when another document has the same partition value, or when the text no longer says what
    its ``meta`` recorded.
    """
    dropped = dropped if dropped is not None else Counter()
    groups: dict[tuple, list[tuple[SourceDocument, ParsedTable]]] = defaultdict(list)
    seen: set[str] = set()
    for document in documents:
        if document.kind not in ("table", "markdown") or document.id in seen:
            continue
        seen.add(document.id)
        for table in parse_document(document) or _grid(document):
            heads = tuple(split_header(head)[0].casefold() for head in table.headers)
            name = document.meta.get("table", "")
            groups[name, heads, document.split].append((document, table))
    for key, members in groups.items():
        counts = Counter(document.id for document, _ in members)
        groups[key] = [member for member in members if counts[member[0].id] == 1]
        # A question about "the rows of the document" would mean the rows of all of them.
        dropped["several tables of one head in a document"] += len(members) - len(groups[key])
    dropped += Counter()  # leaves the zeros out
    tables = [
        _join(split, members, dropped) for (_, _, split), members in groups.items() if members
    ]
    return [table for table in tables if table and len(table.parts) >= min_documents]


def _grid(document: SourceDocument) -> list[ParsedTable]:
    """A pipe table without the dashed line: the head is the first line, as ``meta`` names it."""
    columns = document.meta.get("columns")
    if not columns:
        return []
    table = ParsedTable([str(column) for column in columns], [], [])
    start = 0
    for line in document.text.splitlines(keepends=True):
        content = line.rstrip("\n")
        cells = _cells(content.strip()) if content.startswith("|") else None
        if cells is not None and len(cells) == len(columns) and cells != table.headers:
            table.rows.append(cells)
            table.spans.append((start, start + len(content)))
        start += len(line)
    return [table] if table.rows else []


def _join(
    split: Split, members: list[tuple[SourceDocument, ParsedTable]], dropped: Counter[str]
) -> CorpusTable | None:
    first = members[0][0]
    known = first.meta.get("schema")
    if known is not None:
        schema = Schema.from_json(known)
    else:
        cells = [row for _, table in members for row in table.rows]
        columns = discover_columns(members[0][1].headers, cells, first.meta.get("units") or {})
        label, values = _partition(members)
        name = sql_name(first.meta.get("table") or f"{first.source} table")
        partition = Column(
            sql_name(label), label, "integer" if _all_int(values) else "text", role="category"
        )
        if partition.name in {column.name for column in columns}:
            partition = replace(partition, name=f"{partition.name}_of_document")
        preposition = "in the documents" if label == "document" else "for"
        schema = Schema(name, name, "row", "rows", columns, partition, preposition)
    parts: list[Part] = []
    taken: set[Value] = set()
    for document, table in members:
        try:
            value = _partition_value(document, schema)
            rows = [tuple(map(parse_value, row, schema.columns)) for row in table.rows]
        except ValueError as error:
            dropped[f"unreadable: {error}"] += 1
            continue
        recorded = document.meta.get("rows") if known is not None else None
        if not rows or (recorded is not None and [list(row) for row in rows] != recorded):
            dropped["the text does not say what was recorded"] += 1
        elif value in taken:
            dropped[f"a second document for {value!r}"] += 1
        else:
            taken.add(value)
            parts.append(Part(document, value, rows, table.spans))
    if all(period_key(part.value) is not None for part in parts):
        parts.sort(key=lambda part: period_key(part.value))
    return CorpusTable(schema, parts, split)


def _labelled_line(text: str) -> tuple[str, str] | None:
    match = re.search(r"^([^\n:|#]{2,40}): ([^\n|]{1,100})$", text[:2_000], re.MULTILINE)
    return (match.group(1).strip(), match.group(2).strip()) if match else None


def _partition(members: list[tuple[SourceDocument, ParsedTable]]) -> tuple[str, list[str]]:
    """Label and values of what tells the documents apart: a line that all have, or the title."""
    lines = [_labelled_line(document.text) for document, _ in members]
    labels = {line[0] for line in lines if line}
    if len(labels) == 1 and all(lines) and len({line[1] for line in lines}) == len(lines):
        return split_header(labels.pop())[0], [line[1] for line in lines]
    return "document", [document.title for document, _ in members]


def _all_int(values: list[str]) -> bool:
    return all(re.fullmatch(r"[12]\d{3}", value) for value in values)


def _partition_value(document: SourceDocument, schema: Schema) -> Value:
    if schema.partition.label == "document":
        text = document.title
    else:
        head = re.escape(schema.partition.header)
        match = re.search(rf"^{head}: (.+)$", document.text, re.MULTILINE | re.IGNORECASE)
        text = match.group(1) if match else ""
    value = parse_value(text, schema.partition)
    if value is None:
        raise ValueError(f"no {schema.partition.label} is named")
    return value
