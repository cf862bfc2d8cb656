"""Answers of table samples, worked out again without the code that made them.

``rederive`` reads the documents of a sample with a parser of its own (string cuts, no shared
code), loads what it read into DuckDB, runs the derivation's SQL there, and rounds as the sample
says. ``fold`` gives the answers of simple templates by plain Python over the same rows, no SQL.
"""

from __future__ import annotations

import functools
import statistics
from decimal import ROUND_HALF_UP, Decimal

import pytest

duckdb = pytest.importorskip("duckdb", reason="the second engine: pip install duckdb")
for package in ("airportsdata", "countryinfo", "vega_datasets"):
    pytest.importorskip(package, reason=f"a data package: pip install {package.replace('_', '-')}")


@functools.cache
def engine():
    return duckdb.connect(config={"threads": 1})


_TYPES = {"integer": "BIGINT", "real": "DOUBLE", "text": "VARCHAR"}
_UNKNOWN = ("n/a", "not given", "")


def read_cell(text, column):
    text = text.strip()
    if column["unit"] and text.endswith(" " + column["unit"]):
        text = text[: -len(column["unit"]) - 1]
    if text in _UNKNOWN:
        return None
    if column["type"] == "text":
        return text
    plain = text.replace(",", "")
    return int(plain) if column["type"] == "integer" else float(plain)


def read_document(text, schema):
    """Rows of the document, the partition's value first, in the order of the schema's columns."""
    columns, lines = schema["columns"], text.split("\n")
    label = schema["partition"]["label"]
    prefix = (label[0].upper() + label[1:] + ": ").casefold()
    named = [line[len(prefix) :] for line in lines if line.casefold().startswith(prefix)]
    value = read_cell(named[0], schema["partition"])
    dashes = next((i for i, line in enumerate(lines) if line.startswith("| ---")), None)
    rows = []
    for number, line in enumerate(lines):
        if line.startswith("| ") and dashes is not None and number > dashes:
            cells = line[2:-2].replace("\\|", "\x00").split(" | ")
            cells = [cell.replace("\x00", "|").replace("\\\\", "\\") for cell in cells]
        elif line.startswith("- "):
            cells = [part.split(": ", 1)[1] for part in line[2:].split("; ")]
        elif line.startswith("For ") and line.endswith("."):
            cells = read_sentence(line, columns)
        else:
            continue
        rows.append((value, *(read_cell(c, col) for c, col in zip(cells, columns, strict=True))))
    return rows


def read_sentence(line, columns):
    """``For K, the A is 1, the B is 2 and the C is 3.``"""
    key = next(c for c in columns if c["role"] == "key")
    rest, cells = line[: -len(".")], {}
    for column in reversed([c for c in columns if c is not key]):
        mark = f" the {column['label']} is "
        at = rest.rindex(mark)
        cells[column["name"]] = rest[at + len(mark) :]
        rest = rest[:at]
        rest = rest.removesuffix(" and").removesuffix(",")
    cells[key["name"]] = rest.removeprefix("For ")
    return [cells[column["name"]] for column in columns]


def rows_of(sample):
    schema = sample.derivation["tables"][0]
    return [row for document in sample.documents for row in read_document(document.text, schema)]


def rederive(sample):
    """The answer of the sample by DuckDB, as the sample writes it."""
    schema = sample.derivation["tables"][0]
    columns = [schema["partition"], *schema["columns"]]
    declared = ", ".join(f'"{c["name"]}" {_TYPES[c["type"]]}' for c in columns)
    lists = ", ".join(f"unnest(?::{_TYPES[c['type']]}[])" for c in columns)
    values = [list(column) for column in zip(*rows_of(sample), strict=True)]
    engine().execute(f'CREATE OR REPLACE TABLE "{schema["name"]}" ({declared})')
    engine().execute(f'INSERT INTO "{schema["name"]}" SELECT {lists}', values)
    (value,) = engine().execute(sample.derivation["sql"]).fetchone()
    return written(value, sample.derivation["decimals"])


def written(value, decimals):
    if isinstance(value, str):
        return value
    number = Decimal(repr(value))
    if decimals is not None:
        number = number.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fold(sample):
    """The answer by Python for templates over one column and no filter, or None for others."""
    schema = sample.derivation["tables"][0]
    names = [schema["partition"]["name"], *(c["name"] for c in schema["columns"])]
    sql, template = sample.derivation["sql"], sample.derivation["template"]
    functions = {
        "total": ("SUM(", sum),
        "mean": ("AVG(", statistics.fmean),
        "extreme": ("MAX(" if "MAX(" in sql else "MIN(", max if "MAX(" in sql else min),
        "value_range": ("MAX(", lambda numbers: max(numbers) - min(numbers)),
    }
    if template not in functions:
        return None
    mark, function = functions[template]
    at = names.index(sql.split(mark, 1)[1].split(")", 1)[0])
    numbers = [row[at] for row in rows_of(sample) if row[at] is not None]
    return written(function(numbers), sample.derivation["decimals"])


@functools.cache
def package_documents():
    from qwenlong.data.tables import table_documents

    return tuple(table_documents())
