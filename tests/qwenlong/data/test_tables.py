"""Tables in documents: rendered, parsed back by two parsers, joined, and discovered by rule."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from checkers_tables import package_documents, read_document
from hypothesis import given
from hypothesis import strategies as st

from qwenlong.data.documents import SourceDocument
from qwenlong.data.table_schema import (
    Column,
    Schema,
    choose_partition,
    clean_value,
    discover_columns,
    format_value,
    parse_value,
    period_key,
    split_header,
    sql_literal,
    sql_name,
)
from qwenlong.data.table_sources import PACKAGE_TABLES
from qwenlong.data.tables import (
    STYLES,
    corpus_tables,
    markdown_tables,
    parse_document,
    render_document,
    split_rows,
    table_documents,
)

AREA = Column("area", "area", "real", "km²", "measure", additive=True)
PEOPLE = Column("people", "population", "integer", "people", "measure", additive=True)
TOWN = Column("town", "town", "text", None, "key")
SCHEMA = Schema(
    "towns",
    "Towns of",
    "town",
    "towns",
    (TOWN, PEOPLE, AREA),
    Column("region", "region", "text", None, "category"),
)
ROWS = [("Ōsaka | west", 2_691_000, 225.21), ("St. Ives", 11_226, None), ("Nil", None, 0.5)]


# --- values ------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, column, text",
    [
        (1234567, PEOPLE, "1,234,567"),
        (1234567.25, AREA, "1,234,567.25"),
        (12.0, AREA, "12"),
        (1e-7, AREA, "0.0000001"),
        (-1e20, AREA, "-100,000,000,000,000,000,000"),
        (None, AREA, "n/a"),
        (1984, Column("year", "year", "integer", None, "period"), "1984"),
        ("a|b", TOWN, "a|b"),
    ],
)
def test_values_are_written_and_read_back(value, column, text):
    assert format_value(value, column) == text
    assert parse_value(text, column) == value
    unit = f" {column.unit}" if column.unit and value is not None else ""
    assert parse_value(text + unit, column) == value


@given(st.integers(-(10**17), 10**17) | st.none())
def test_any_integer_survives(value):
    assert parse_value(format_value(value, PEOPLE), PEOPLE) == value


@given(st.floats(allow_nan=False, allow_infinity=False, width=64).filter(lambda x: abs(x) < 1e16))
def test_any_float_survives(value):
    assert parse_value(format_value(value, AREA), AREA) == value


@pytest.mark.parametrize("text", ["12a", "1,23", "0x10", "007", "1.5", "--3", "3,14"])
def test_what_is_no_integer_is_an_error(text):
    with pytest.raises(ValueError, match="is no integer"):
        parse_value(text, PEOPLE)


def test_codes_that_look_missing_are_kept_in_text_columns():
    code = Column("code", "code", "text")
    assert [parse_value(text, code) for text in ("NA", "NAN", "null", "n/a", "-")] == [
        "NA", "NAN", "null", None, None,
    ]  # fmt: skip
    assert [parse_value(text, AREA) for text in ("NA", "nan", "null", "—")] == [None] * 4


def test_clean_value():
    assert clean_value("  a ;\n b ") == "a , b"
    assert clean_value(float("nan")) is None and clean_value(float("inf")) is None
    assert clean_value(True) == "true" and clean_value(0) == 0


def test_names_and_literals():
    assert sql_name("Area (km²)") == "area_km"
    assert sql_name("2nd place") == "c_2nd_place"
    assert sql_name("Order") == "order_value"
    assert sql_name("気温") == "column_value"
    assert sql_literal("O'Higgins") == "'O''Higgins'" and sql_literal(2.5) == "2.5"
    assert split_header("Maximum_temperature [°C]") == ("maximum temperature", "°C")
    assert split_header("IATA code") == ("IATA code", None)


def test_periods_in_order():
    assert period_key(2004) == (2004,) and period_key("1960s") == (1960,)
    assert period_key("March 2004") == (2004, 3) == period_key("2004-03")
    assert period_key("2004-03-05") == (2004, 3, 5)
    assert period_key("Polynesia") is None and period_key(12) is None and period_key(1.5) is None


# --- rendering and parsing ---------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_both_parsers_read_what_was_rendered(style):
    document = render_document(SCHEMA, "Kansai", ROWS, style=style)
    (table,) = parse_document(document)
    rows = [tuple(map(parse_value, row, SCHEMA.columns)) for row in table.rows]
    assert rows == ROWS
    assert read_document(document.text, SCHEMA.to_json()) == [("Kansai", *row) for row in ROWS]
    for (name, *_), (start, end) in zip(ROWS, table.spans, strict=True):
        assert "\n" not in document.text[start:end]
        assert name.split(" |")[0] in document.text[start:end]
    assert [list(span) for span in table.spans] == document.meta["spans"]


def test_the_text_is_the_expected_one():
    document = render_document(SCHEMA, "Kansai", ROWS[:2], style="markdown")
    assert document.text == (
        "# Towns of Kansai\n\nRegion: Kansai\n\nEvery town in Kansai that the record holds is "
        "listed once. Units: population in people, area in km². A value that is not known is "
        'written "n/a".\n\n'
        "| Town | Population (people) | Area (km²) |\n| --- | --- | --- |\n"
        "| Ōsaka \\| west | 2,691,000 | 225.21 |\n| St. Ives | 11,226 | n/a |\n"
    )
    assert document.title == "Towns of Kansai" and document.kind == "table"
    prose = render_document(SCHEMA, "Kansai", ROWS[:1], style="prose").text.splitlines()[-1]
    assert prose == (
        "For Ōsaka | west, the population is 2,691,000 people and the area is 225.21 km²."
    )


def test_prose_needs_a_key():
    schema = Schema("t", "T", "row", "rows", (AREA,), SCHEMA.partition)
    with pytest.raises(ValueError, match="no key column"):
        render_document(schema, "x", [(1.0,)], style="prose")


def test_every_package_document_is_read_back_by_both_parsers():
    styles = Counter()
    for document in package_documents():
        schema = document.meta["schema"]
        rows = read_document(document.text, schema)
        assert [list(row[1:]) for row in rows] == document.meta["rows"], document.title
        assert {row[0] for row in rows} == {document.meta["partition"]}
        styles[document.meta["style"]] += 1
    assert len(package_documents()) > 300 and set(styles) == set(STYLES)
    dropped = Counter()
    tables = corpus_tables(package_documents(), dropped=dropped)
    assert not dropped
    read = {(table.schema.name, table.split): len(table.rows()) for table in tables}
    assert sum(n for (name, _), n in read.items() if name == "cars") == 406
    assert all(part.document.split == table.split for table in tables for part in table.parts)


def test_documents_survive_json():
    for document in package_documents()[::40]:
        assert SourceDocument.model_validate(json.loads(json.dumps(document.to_json()))) == document


def test_package_tables_hold_known_facts():
    tables = {name: make() for name, make in PACKAGE_TABLES.items()}
    france = next(row for row in tables["countries"].rows if row[1] == "France")
    assert france[:3] == ("Western Europe", "France", "Paris") and france[4] == 640679.0
    assert len(tables["us_employment"].rows) == 120 and len(tables["stocks"].rows) == 560
    assert len(tables["seattle_weather"].rows) == 1461 and len(tables["barley"].rows) == 120
    assert tables["crimean_war"].rows[0] == (1854, "April 1854", 0, 110, 110)
    namibia = [row for row in tables["airports"].rows if row[0] == "Namibia"]
    assert len(namibia) >= 5
    for name, table in tables.items():
        columns = (table.schema.partition, *table.schema.columns)
        kinds = {"integer": int, "real": float, "text": str}
        for row in table.rows:
            for column, value in zip(columns, row, strict=True):
                assert value is None or type(value) is kinds[column.type], (name, column.name)
        key = table.schema.key
        if key is not None:
            at = columns.index(key)
            assert len({(row[0], row[at]) for row in table.rows}) == len(table.rows), name


def test_unknown_package_table():
    with pytest.raises(ValueError, match="'moon' is unknown; choose of"):
        list(table_documents(["moon"]))


def test_a_missing_package_is_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.resources.files", absent)
    for name, package in (("cars", "vega-datasets"), ("countries", "countryinfo")):
        with pytest.raises(RuntimeError, match=f"pip install {package}"):
            PACKAGE_TABLES[name]()


# --- foreign documents -------------------------------------------------------


def test_markdown_tables_of_all_shapes():
    text = (
        "Intro | not a table\n\n| A | B |\n|:--|--:|\n| 1 | x \\| y |\n| 2 | a \\\\ |\n\n"
        "C | D\n--- | ---\n3 | 4\n5 | 6 | 7\n8 | 9\n\n|lonely|\n|---|\n\n"
        "```\n| no | dashes |\n```\n"
    )
    first, second, third = markdown_tables(text)
    assert first.headers == ["A", "B"] and first.rows == [["1", "x | y"], ["2", "a \\"]]
    assert [text[a:b] for a, b in first.spans] == ["| 1 | x \\| y |", "| 2 | a \\\\ |"]
    assert second.headers == ["C", "D"] and second.rows == [["3", "4"]]
    assert third.headers == ["lonely"] and third.rows == []
    assert markdown_tables("") == [] and markdown_tables("| a | b |\n") == []
    assert markdown_tables("| a |  |\n|---|---|\n|  | 1 |\n")[0].rows == [["", "1"]]


def test_columns_are_discovered():
    headers = ["Country", "Population (people)", "Area (km²)", "Currency", "Code", "Founded year"]
    rows = [
        ["Aland", "1,200", "10.5", "EUR", "NA", "1921"],
        ["Bland", "900", "n/a", "EUR", "NB", "1845"],
        ["Cland", "nan", "7", "USD", "NC", "1700"],
        ["Dland", "5", "8", "USD", "ND", "1701"],
    ]
    columns = discover_columns(headers, rows, {})
    assert [c.type for c in columns] == ["text", "integer", "real", "text", "text", "integer"]
    assert [c.unit for c in columns] == [None, "people", "km²", None, None, None]
    assert [c.role for c in columns] == ["key", "measure", "measure", "category", "other", "period"]
    assert [c.additive for c in columns] == [False, True, True, False, False, False]
    assert columns[0].name == "country" and columns[1].label == "population"


def test_discovery_does_not_sum_what_has_no_sum_or_count_identifiers():
    rows = [[i, 20.5 + i, f"{i:03}", 5] for i in range(6)]
    number, heat, zipped, same = discover_columns(["Row", "Temperature", "Zip code", "N"], rows, {})
    assert number.role == "other"  # 0, 1, 2, ... only counts
    assert heat.role == "measure" and not heat.additive
    assert zipped.type == "text"
    assert discover_columns(["a", "a"], [], {})[1].name == "a_2"


def test_a_table_is_split_by_a_rule():
    headers = ["city", "year", "kind", "visits"]
    rows = [[f"c{i}", 2000 + i % 4, "ab"[i % 2], i * 10] for i in range(24)]
    columns = discover_columns(headers, rows, {})
    assert choose_partition(columns, rows).name == "year_value"
    documents = split_rows("Museum visits", headers, rows, units={"visits": "people"})
    assert [document.meta["partition"] for document in documents] == [2000, 2001, 2002, 2003]
    assert all("Year: 200" in document.text for document in documents)
    (table,) = [t for t in corpus_tables(documents) if t.split == documents[0].split]
    assert table.is_temporal and table.schema.column("visits").unit == "people"
    by_kind = split_rows("Museum visits", headers, rows, partition="kind")
    assert [document.meta["partition"] for document in by_kind] == ["a", "b"]
    with pytest.raises(ValueError, match="no column to spread it over"):
        split_rows("ids", ["id"], [["a"], ["b"]])


def _page(year, rows, kind="markdown"):
    text = f"# Report\n\nYear: {year}\n\n| Shop | Sales (EUR) |\n|---|---|\n"
    return SourceDocument(
        title=f"Report {year}",
        text=text + "".join(f"| {shop} | {sales} |\n" for shop, sales in rows),
        source="reports",
        kind=kind,
    )


def test_foreign_pages_join_by_their_heads():
    pages = [_page(year, [("A", f"{year},500.5"), ("B", "n/a")]) for year in (3, 1, 2)]
    tables = corpus_tables([page.model_copy() for page in pages])
    by_value = {part.value: part for table in tables for part in table.parts}
    assert sum(len(table.parts) for table in tables) == 3
    assert by_value["1"].rows == [("A", 1500.5), ("B", None)]
    assert {table.schema.partition.label for table in tables} == {"year"}


def test_pages_without_a_label_join_by_title():
    pages = []
    for name in ("North", "South", "East"):
        page = _page(1, [("A", 5), ("B", len(name))])
        pages.append(
            SourceDocument(
                title=f"Region {name}", text=f"{name}\n\n{page.text}", source="s", kind="markdown"
            )
        )
    (table,) = corpus_tables(pages)
    assert table.schema.partition.label == "document"
    assert [part.value for part in table.parts] == ["Region North", "Region South", "Region East"]


def test_what_cannot_be_used_is_dropped_with_the_reason():
    good = package_documents()[:3]
    schema = Schema.from_json(good[0].meta["schema"])
    tampered = good[1].to_json()
    tampered["text"] = tampered["text"].replace("1", "2")
    again = render_document(
        schema, good[0].meta["partition"], [tuple(good[2].meta["rows"][0])], style="markdown"
    )
    broken = _page("1999", [("A", "many"), ("B", "3")])
    dropped = Counter()
    documents = [*good, SourceDocument(**tampered | {"id": ""}), again, good[0], broken]
    tables = corpus_tables(documents, min_documents=1, dropped=dropped)
    assert sum(len(table.parts) for table in tables if table.schema.name == "countries") == 3
    assert dropped["the text does not say what was recorded"] == 1
    assert sum(n for reason, n in dropped.items() if "a second document" in reason) == 1


def test_a_document_with_two_tables_of_one_head_is_dropped():
    pages = [_page(year, [("A", year), ("B", 2)]) for year in (1990, 1991, 1992, 1993, 1994)]
    double = pages[0].text + "\nMore:\n\n| Shop | Sales (EUR) |\n|---|---|\n| C | 7 |\n"
    pages[0] = SourceDocument(title="Report 1990", text=double, source="reports", kind="markdown")
    dropped = Counter()
    tables = corpus_tables(pages, min_documents=1, dropped=dropped)
    assert sorted(part.value for table in tables for part in table.parts) == [
        1991,
        1992,
        1993,
        1994,
    ]
    assert dropped == {"several tables of one head in a document": 2}


def test_a_grid_without_dashes_is_read_by_its_recorded_head():
    rows = [["a", 1, None], ["b", 2, 2.5]]
    text = "| name | n | x |\n| a | 1 | None |\n| b | 2 | 2.5 |\n"
    meta = {"table": "grid", "columns": ["name", "n", "x"], "rows": rows, "units": {"x": "m"}}
    documents = [
        SourceDocument(title=f"grid, rows {i}", text=text + f"| c{i} | {i} | 1.5 |\n", source="csv",
                       kind="table", meta={**meta, "rows": [*rows, [f"c{i}", i, 1.5]]})
        for i in range(40)
    ]  # fmt: skip
    table = max(corpus_tables(documents), key=lambda t: len(t.parts))
    assert table.parts[0].rows[:2] == [("a", 1, None), ("b", 2, 2.5)]
    assert table.schema.column("x").unit == "m" and len(table.parts) > 30


def test_text_documents_are_left_alone():
    assert corpus_tables([SourceDocument(text="| a |\n|---|\n| 1 |", source="x")]) == []
    assert corpus_tables([]) == []
