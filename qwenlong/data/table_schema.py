"""What a table is: columns with types, labels, units and roles; and how they are found by rule.

A value is None, int, float or str. It is written by ``format_value`` and read back by
``parse_value``; one undoes the other exactly, so that a table parsed out of a document equals the
table that was rendered into it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from qwenlong.data.sql import ColumnType, SqlTable

Value = int | float | str | None
ValueType = Literal["integer", "real", "text"]
# key: names the row. category: groups rows. measure: a quantity. period: a point in time.
Role = Literal["key", "category", "measure", "period", "other"]

MISSING = "n/a"
# "NA" and "NAN" are codes of real things, and missing numbers.
_MISSING_TEXT = frozenset({"", "n/a", "none", "-", "–", "—"})
_MISSING_NUMBER = _MISSING_TEXT | {"na", "nan", "null"}
_SQL_TYPES: dict[ValueType, ColumnType] = {"integer": "INTEGER", "real": "REAL", "text": "TEXT"}
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_LONG = re.compile(r"[+-]?[1-9]\d{18,}")
_RESERVED = frozenset(
    "all and as asc between by case cast check column create cross current date default desc "
    "distinct drop else end exists false for from full group having if in index inner insert into "
    "is join key left like limit natural not null offset on or order outer over primary range "
    "references right row rows select set table then time to true union unique using values when "
    "where window with year month day".split()
)

# Sums of these mean nothing, whatever their type.
_INTENSIVE = re.compile(
    r"temperature|price|rate|ratio|percent|share|index|average|mean|median|density|elevation"
    r"|altitude|latitude|longitude|speed|wind|age|score|grade|rank|yield|wage|per\b|level|efficiency"
    r"|acceleration|displacement|horsepower|weight|length|width|height|depth",
    re.IGNORECASE,
)
_IDENTIFIER = re.compile(
    r"\b(id|code|number|no|zip|postcode|phone|latitude|longitude|lat|lon)\b", re.IGNORECASE
)
_PERIOD = re.compile(r"\b(year|month|quarter|date|day|decade|week)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """One column. ``name`` is an SQL identifier, ``label`` stands in running text.

    ``additive``: a sum over rows means something. A column that is one says so only by its source
    or by rule (``discover_columns``).
    """

    name: str
    label: str
    type: ValueType
    unit: str | None = None
    role: Role = "other"
    additive: bool = False

    @property
    def header(self) -> str:
        """The column's head in a rendered table: ``Area (km²)``."""
        head = self.label[:1].upper() + self.label[1:]
        return f"{head} ({self.unit})" if self.unit else head


@dataclass(frozen=True)
class Schema:
    """A table without its rows.

    ``partition`` is the column by which the table is spread over documents: each document holds
    the rows of one value and names it once, so that the column is not among ``columns``.
    ``preposition`` joins it in a sentence: "in 2004", "at Duluth".
    """

    name: str
    title: str
    entity: str
    entities: str
    columns: tuple[Column, ...]
    partition: Column
    preposition: str = "in"
    ratios: tuple[tuple[str, str], ...] = ()  # columns whose totals may be divided

    def column(self, name: str) -> Column:
        for column in (self.partition, *self.columns):
            if column.name == name:
                return column
        raise KeyError(f"table {self.name!r} has no column {name!r}")

    def of_role(self, role: Role) -> list[Column]:
        return [column for column in self.columns if column.role == role]

    @property
    def key(self) -> Column | None:
        return next(iter(self.of_role("key")), None)

    def sql_columns(self) -> dict[str, ColumnType]:
        """The partition first, then the columns."""
        return {c.name: _SQL_TYPES[c.type] for c in (self.partition, *self.columns)}

    def sql_table(self, rows: Sequence[Sequence[Value]]) -> SqlTable:
        return SqlTable(self.name, self.sql_columns(), rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``from_json`` reads them back."""
        value = asdict(self)
        value["columns"] = list(value["columns"])
        value["ratios"] = [list(pair) for pair in self.ratios]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Schema:
        columns = tuple(Column(**column) for column in value["columns"])
        ratios = tuple(tuple(pair) for pair in value.get("ratios", ()))
        known = {**value, "columns": columns, "ratios": ratios}
        return cls(**{**known, "partition": Column(**value["partition"])})


@dataclass(frozen=True)
class Table:
    """A whole table. Each row is the partition's value, then those of ``schema.columns``."""

    schema: Schema
    rows: list[tuple[Value, ...]] = field(repr=False)
    source: str = ""


# --- values ------------------------------------------------------------------


def clean_value(value: Any) -> Value:
    """A value as tables hold it: white space and semicolons folded, missing marks and NaN None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, int):
        return value
    text = " ".join(str(value).replace(";", ",").split())
    return None if text.casefold() in _MISSING_TEXT else text


def format_value(value: Value, column: Column) -> str:
    """As documents write it: measures with thousands separators, never an exponent."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        value = int(value) if value.is_integer() else Decimal(repr(value))
    comma = "," if column.role == "measure" else ""
    return format(value, f"{comma}f" if isinstance(value, Decimal) else f"{comma}d")


def parse_value(text: str, column: Column) -> Value:
    """The value that a cell states; the unit may stand behind it.

    Raises:
        ValueError: the cell holds no value of the column's type.
    """
    text = text.strip()
    if column.unit and text.endswith(f" {column.unit}"):
        text = text[: -len(column.unit)].rstrip()
    if text.casefold() in (_MISSING_TEXT if column.type == "text" else _MISSING_NUMBER):
        return None
    if column.type == "text":
        return text
    number = parse_plain_number(text)
    if column.type == "real" and number is None and _LONG.fullmatch(text.replace(",", "")):
        number = float(text.replace(",", ""))  # beyond the digits that an integer may have
    if number is None or (column.type == "integer" and isinstance(number, float)):
        raise ValueError(f"{text[:40]!r} is no {column.type} (column {column.label!r})")
    return float(number) if column.type == "real" else number


def parse_plain_number(text: str) -> int | float | None:
    """An int or a float, thousands separators allowed; None for anything else, "007" included."""
    plain = text.replace(",", "") if _GROUPED.fullmatch(text) else text
    if not _NUMBER.fullmatch(plain):
        return None
    if re.fullmatch(r"[+-]?\d+", plain):
        digits = plain.lstrip("+-")
        is_code = len(digits) > 18 or (len(digits) > 1 and digits.startswith("0"))
        return None if is_code else int(plain)
    return float(plain)


def sql_name(label: str) -> str:
    """An SQL identifier for a label: ``Area (km²)`` -> ``area_km``."""
    name = re.sub(r"[^a-z0-9]+", "_", label.casefold()).strip("_") or "column"
    if name[0].isdigit() or name.startswith("sqlite"):
        name = f"c_{name}"
    return f"{name}_value" if name in _RESERVED else name


def sql_literal(value: int | float | str) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def period_key(value: Value) -> tuple[int, ...] | None:
    """Where ``2004``, ``2004-03``, ``March 2004``, ``2004-03-05`` or ``1960s`` lies in time."""
    if isinstance(value, int):
        return (value,) if 1000 <= value <= 2999 else None
    if not isinstance(value, str):
        return None
    if re.fullmatch(r"[12]\d{3}s?", value):
        return (int(value[:4]),)
    for pattern, parts in (("%Y-%m-%d", 3), ("%Y/%m/%d", 3), ("%Y-%m", 2), ("%B %Y", 2)):
        try:
            date = datetime.strptime(value, pattern)
        except ValueError:
            continue
        return (date.year, date.month, date.day)[:parts]
    return None


# --- discovery ---------------------------------------------------------------


def discover_columns(
    headers: Sequence[str], rows: Sequence[Sequence[Value | str]], units: dict[str, str]
) -> tuple[Column, ...]:
    """Columns of an unknown table, by rule.

    Args:
        headers: as the table writes them; ``Area (km²)`` has unit ``km²``.
        rows: cells, as text or as values, one for each header.
        units: header -> unit, where the header does not hold it.

    Returns:
        Types that hold for every cell that is not missing; the first column whose values are all
        there and all different is the key.
    """
    columns: list[Column] = []
    has_key = False
    for index, header in enumerate(headers):
        label, unit = split_header(header)
        unit = units.get(header) or unit
        cells = [clean_value(row[index]) for row in rows]
        present = [cell for cell in cells if cell is not None]
        numeric = [cell for cell in present if str(cell).casefold() not in _MISSING_NUMBER]
        kind = _value_type(numeric, unit)
        present = present if kind == "text" else numeric
        role = _role(label, kind, present, len(cells), has_key)
        has_key = has_key or role == "key"
        additive = role == "measure" and not _INTENSIVE.search(label) and unit not in ("%", "°C")
        name = sql_name(label)
        while name in {column.name for column in columns}:
            name += "_2"
        columns.append(Column(name, label, kind, unit, role, additive))
    return tuple(columns)


def split_header(header: str) -> tuple[str, str | None]:
    """``Area (km²)`` -> ``("area", "km²")``. An acronym at the start keeps its case."""
    header = " ".join(header.replace("_", " ").split())
    match = re.fullmatch(r"(.+?)\s*[(\[]([^()\[\]]+)[)\]]", header)
    label, unit = (match.group(1), match.group(2).strip()) if match else (header, None)
    if len(label) > 1 and label[0].isupper() and not label[1].isupper():
        label = label[0].lower() + label[1:]
    return label, unit


def _value_type(present: list[Value], unit: str | None) -> ValueType:
    probe = Column("probe", "probe", "text", unit)
    numbers = [
        parse_plain_number(str(parse_value(cell, probe))) if isinstance(cell, str) else cell
        for cell in present
    ]
    if not numbers or any(number is None for number in numbers):
        return "text"
    return "real" if any(isinstance(number, float) for number in numbers) else "integer"


def _role(label: str, kind: ValueType, present: list[Value], count: int, has_key: bool) -> Role:
    distinct = len(set(present))
    if present and all(period_key(_as_number(cell)) is not None for cell in present):
        if _PERIOD.search(label) or kind == "text":
            # Dates that differ in every row name the row.
            return "key" if distinct == count and not has_key and kind == "text" else "period"
    if kind == "text":
        if distinct == count and count > 1 and not has_key:
            return "key"
        return "category" if 2 <= distinct <= min(40, count // 2) else "other"
    is_counter = kind == "integer" and distinct == count and count > 2 and _is_run(present)
    return "other" if _IDENTIFIER.search(label) or is_counter else "measure"


def _as_number(cell: Value) -> Value:
    number = parse_plain_number(cell) if isinstance(cell, str) else cell
    return cell if number is None else number


def _is_run(present: list[Value]) -> bool:
    numbers = sorted(_as_number(cell) for cell in present)
    return numbers[-1] - numbers[0] == len(numbers) - 1 and numbers[0] in (0, 1)


def choose_partition(
    columns: Sequence[Column], rows: Sequence[Sequence[Value]], *, most: int = 400
) -> Column | None:
    """The column to spread a table over documents by, or None.

    A period or a category without gaps, of 3 to ``most`` values with at least two rows each in the
    median; periods first, then the column of most values.
    """
    best: tuple[tuple[bool, int], Column] | None = None
    for index, column in enumerate(columns):
        if column.role not in ("category", "period"):
            continue
        counts = Counter(row[index] for row in rows)
        sizes = sorted(counts.values())
        if None in counts or not 3 <= len(sizes) <= most or sizes[len(sizes) // 2] < 2:
            continue
        rank = (column.role == "period", len(sizes))
        if best is None or rank > best[0]:
            best = (rank, column)
    return best[1] if best else None
