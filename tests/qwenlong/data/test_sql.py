"""The SQL sandbox: what may run gives hand-checked answers, what may not is refused or stopped."""

from __future__ import annotations

import sqlite3
import time

import pytest

from qwenlong.data.sql import (
    Sandbox,
    SqlError,
    SqlLimits,
    SqlRefused,
    SqlStopped,
    SqlTable,
    check_query,
)

duckdb = pytest.importorskip("duckdb", reason="the second engine: pip install duckdb")

SECONDS = 0.25
COLUMNS = {"city": "TEXT", "year": "INTEGER", "rain": "REAL", "kind": "TEXT"}
ROWS = [
    ("Oslo", 2001, 1.5, "wet"),
    ("Oslo", 2002, 2.5, "wet"),
    ("Cairo", 2001, None, "dry"),
    ("Cairo", 2002, 0.25, "dry"),
    ("Lima", 2001, 0.0, "dry"),
    ("Ōsaka", 2002, 4.0, "wet"),
]
PLAIN = SqlTable("weather", COLUMNS, ROWS)


@pytest.fixture(scope="module")
def sandbox():
    """The small table beside one of 3,000 rows, which makes products and sorts expensive."""
    large = SqlTable(
        "numbers",
        {"n": "INTEGER", "word": "TEXT"},
        [(n, f"{'ab' * 40}{n}") for n in range(3_000)],
    )
    limits = SqlLimits(seconds=SECONDS, rows=1_000, result_bytes=20_000, joined_rows=10**12)
    with Sandbox([PLAIN, large], limits=limits) as opened:
        yield opened


# --- what may run ------------------------------------------------------------

ANSWERS = [
    ("SELECT COUNT(*) FROM weather", [(6,)]),
    ("SELECT count(rain) FROM Weather;", [(5,)]),
    ("SELECT SUM(rain) FROM weather WHERE kind = 'wet'", [(8.0,)]),
    ("SELECT AVG(rain) FROM weather WHERE city IN ('Oslo', 'Cairo')", [(4.25 / 3,)]),
    ("SELECT MAX(year) - MIN(year) FROM weather", [(1,)]),
    (
        "SELECT city FROM weather WHERE rain IS NOT NULL ORDER BY rain DESC LIMIT 1 OFFSET 1",
        [("Oslo",)],
    ),
    (
        "WITH means AS (SELECT city, AVG(rain) AS mean FROM weather GROUP BY city) "
        "SELECT city FROM means WHERE mean IS NOT NULL ORDER BY mean DESC LIMIT 1",
        [("Ōsaka",)],
    ),
    ("SELECT COUNT(*) FROM weather WHERE rain > (SELECT AVG(rain) FROM weather)", [(2,)]),
    (
        "SELECT a.city FROM weather AS a JOIN weather AS b ON a.city = b.city "
        "WHERE a.year = 2002 AND b.year = 2001 AND a.rain > b.rain",
        [("Oslo",)],
    ),
    (
        "SELECT place FROM (SELECT city AS place, RANK() OVER (ORDER BY rain DESC) AS position "
        "FROM weather WHERE rain IS NOT NULL) AS ranked WHERE position = 3",
        [("Oslo",)],
    ),
    ("SELECT COUNT(DISTINCT kind) FROM weather", [(2,)]),
    ("SELECT 100.0 * SUM(rain) / 8 FROM weather WHERE city = 'Oslo'", [(50.0,)]),
    ("SELECT kind, COUNT(*) AS c FROM weather GROUP BY kind HAVING c > 1 ORDER BY kind", None),
    ("SELECT city FROM weather WHERE year = 2001 UNION SELECT city FROM weather ORDER BY 1", None),
    ("SELECT CASE WHEN MAX(rain) > 3 THEN 'much' ELSE 'little' END FROM weather", [("much",)]),
]


@pytest.mark.parametrize("sql, expected", ANSWERS)
def test_both_engines_give_the_known_answer(sandbox, sql, expected):
    result = sandbox.run(sql)
    second = duckdb.connect()
    second.execute("CREATE TABLE weather (city VARCHAR, year BIGINT, rain DOUBLE, kind VARCHAR)")
    second.executemany("INSERT INTO weather VALUES (?, ?, ?, ?)", ROWS)
    rows = second.execute(result.sql).fetchall()
    assert [list(map(_plain, row)) for row in rows] == [list(map(_plain, r)) for r in result.rows]
    if expected is not None:
        assert result.rows == expected


def _plain(value):
    return pytest.approx(float(value), rel=1e-12) if isinstance(value, (int, float)) else value


def test_comments_after_the_statement_are_no_second_one(sandbox):
    assert sandbox.run("/* a ; b */ SELECT 1 ; -- the end").rows == [(1,)]


def test_what_runs_is_the_checked_statement(sandbox):
    assert sandbox.run("select  city from weather -- DROP\n where year=2001 ;").sql == (
        "SELECT city FROM weather WHERE year = 2001"
    )


# --- attacks -----------------------------------------------------------------

BIG = "numbers AS a, numbers AS b, numbers AS c"


def growing(steps: int) -> str:
    """WITH tables, each nine times as long as the one before; SQLite folds them into one."""
    nine = " || ".join("s" * 9)
    tables = [f"t{i} AS (SELECT {nine} AS s FROM t{i - 1})" for i in range(1, steps + 1)]
    return f"WITH {', '.join(['t0 AS (SELECT word AS s FROM numbers)', *tables])} "


ATTACKS = {
    # writing
    "insert": "INSERT INTO weather VALUES ('x', 1, 1.0, 'y')",
    "insert-returning": "INSERT INTO weather VALUES ('x', 1, 1.0, 'y') RETURNING city",
    "replace": "REPLACE INTO weather VALUES ('x', 1, 1.0, 'y')",
    "update": "UPDATE weather SET rain = 0",
    "delete": "DELETE FROM weather",
    "with-delete": "WITH a AS (SELECT 1) DELETE FROM weather",
    "drop": "DROP TABLE weather",
    "create": "CREATE TABLE mine (a INT)",
    "create-as": "CREATE TEMP TABLE mine AS SELECT * FROM weather",
    "create-view": "CREATE VIEW mine AS SELECT * FROM weather",
    "create-trigger": "CREATE TRIGGER z AFTER INSERT ON weather BEGIN DELETE FROM weather; END",
    "alter": "ALTER TABLE weather ADD COLUMN z INT",
    "select-into": "SELECT * INTO mine FROM weather",
    "virtual-table": "CREATE VIRTUAL TABLE f USING fts5(a)",
    # statements about the database
    "pragma": "PRAGMA table_info(weather)",
    "pragma-write": "PRAGMA query_only = OFF",
    "pragma-heap": "PRAGMA hard_heap_limit = 1",
    "attach": "ATTACH DATABASE '/tmp/stolen.db' AS stolen",
    "detach": "DETACH DATABASE main",
    "vacuum-into": "VACUUM INTO '/tmp/stolen.db'",
    "begin": "BEGIN EXCLUSIVE",
    "explain": "EXPLAIN SELECT * FROM weather",
    "reindex": "REINDEX weather",
    "analyze": "ANALYZE weather",
    "savepoint": "SAVEPOINT a",
    # several statements
    "stacked": "SELECT 1; DROP TABLE weather",
    "stacked-selects": "SELECT city FROM weather; SELECT 1",
    "stacked-comment": "SELECT 1 /* ; */ ; -- \n DELETE FROM weather",
    "nul": "SELECT 1\x00; DROP TABLE weather",
    "empty": "  ;  -- nothing\n",
    "not-sql": "The answer is 42, trust me.",
    # reading other things
    "schema": "SELECT sql FROM sqlite_master",
    "schema-count": "SELECT COUNT(*) FROM sqlite_schema",
    "schema-qualified": "SELECT * FROM main.sqlite_master",
    "qualified": "SELECT city FROM main.weather",
    "temp-schema": "SELECT * FROM temp.sqlite_temp_master",
    "pragma-function": "SELECT * FROM pragma_table_info('weather')",
    "pragma-database": "SELECT file FROM pragma_database_list",
    "dbstat": "SELECT * FROM dbstat",
    "unknown-table": "SELECT * FROM passwords",
    "unknown-column": "SELECT password FROM weather",
    "string-in-quotes": 'SELECT city FROM weather WHERE kind = "wet or dry"',
    "rowid": "SELECT rowid FROM weather",
    "rowid-alias": "SELECT _rowid_ AS n FROM weather",
    "table-function": "SELECT value FROM generate_series(1, 1000000000)",
    "json-each": "SELECT * FROM json_each('[1]')",
    "values": "SELECT * FROM (VALUES (1), (2))",
    "bare-values": "VALUES (1)",
    "parameter": "SELECT city FROM weather WHERE year = ?",
    "hidden-table": "WITH weather AS (SELECT 'Rome' AS city) SELECT city FROM weather",
    # functions
    "load-extension": "SELECT load_extension('/tmp/evil.so')",
    "readfile": "SELECT readfile('/etc/passwd')",
    "writefile": "SELECT writefile('/tmp/x', 'y')",
    "fts-tokenizer": "SELECT fts3_tokenizer('simple')",
    "sqlite-version": "SELECT sqlite_version()",
    "compile-options": "SELECT sqlite_compileoption_get(1)",
    "random": "SELECT random()",
    "order-random": "SELECT city FROM weather ORDER BY random()",
    "now": "SELECT date('now')",
    "current-time": "SELECT current_timestamp",
    "regexp": "SELECT city FROM weather WHERE city REGEXP '(a+)+$'",
    "glob": "SELECT city FROM weather WHERE city GLOB '*a*'",
    # memory
    "randomblob": "SELECT randomblob(1000000000)",
    "zeroblob": "SELECT length(zeroblob(2000000000))",
    "hex-zeroblob": "SELECT hex(zeroblob(1000000000))",
    "printf": "SELECT printf('%.*c', 1000000000, 'x')",
    "format": "SELECT format('%1000000000d', 1)",
    "replace-function": "SELECT replace(replace('aaaaaaaa', 'a', 'aaaaaaaa'), 'a', 'aaaaaaaa')",
    "group-concat": "SELECT group_concat(word) FROM numbers",
    "string-agg": "SELECT string_agg(a.word, '') FROM numbers AS a, numbers AS b",
    "json-array": "SELECT json_group_array(word) FROM numbers",
    "blob": "SELECT x'00ff'",
    "cast-blob": "SELECT CAST(city AS BLOB) FROM weather",
    "long-value": growing(4) + "SELECT length(s) FROM t4",
    "folding-bomb": growing(10) + "SELECT length(s) FROM t10",
    "many-rows": "SELECT a.n FROM numbers AS a, numbers AS b",
    "wide-rows": "SELECT word FROM numbers",
    "many-columns": "SELECT " + ", ".join(["1"] * 2_500),
    "sort-bomb": f"SELECT a.word FROM {BIG} ORDER BY a.word || b.word || c.word",
    "distinct-bomb": f"SELECT COUNT(DISTINCT a.n * 9000000 + b.n * 3000 + c.n) FROM {BIG}",
    "group-bomb": f"SELECT a.n, b.n, c.n, COUNT(*) FROM {BIG} GROUP BY 1, 2, 3",
    "window-bomb": f"SELECT SUM(a.n) OVER (ORDER BY b.n, c.n) FROM {BIG}",
    # time
    "cross-join": "SELECT COUNT(*) FROM numbers AS a CROSS JOIN numbers AS b "
    "CROSS JOIN numbers AS c",
    "comma-join": f"SELECT COUNT(*) FROM {BIG}",
    "true-join": "SELECT COUNT(*) FROM numbers AS a JOIN numbers AS b ON 1 = 1 "
    "JOIN numbers AS c ON a.n <> b.n + c.n",
    "many-joins": "SELECT COUNT(*) FROM " + ", ".join(f"weather AS w{i}" for i in range(40)),
    "correlated": "SELECT COUNT(*) FROM numbers AS a WHERE a.n < (SELECT COUNT(*) "
    "FROM numbers AS b, numbers AS c WHERE b.n + c.n > a.n)",
    "nested-products": "WITH p AS (SELECT a.n AS n FROM numbers AS a, numbers AS b), "
    "q AS (SELECT p.n AS n FROM p, numbers AS c) SELECT SUM(n) FROM q",
    "like-bomb": "SELECT COUNT(*) FROM numbers AS a, numbers AS b WHERE a.word || b.word LIKE "
    "'" + "%a" * 100 + "'",
    "long-like-pattern": "SELECT COUNT(*) FROM numbers WHERE word LIKE '" + "%a%b" * 60 + "'",
    "recursive": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
    "SELECT SUM(n) FROM r",
    "hidden-recursive": "WITH r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) "
    "SELECT MAX(n) FROM r",
    "recursive-string": "WITH RECURSIVE r(s) AS (SELECT 'ab' UNION ALL SELECT s || s FROM r) "
    "SELECT length(s) FROM r",
    # the parser
    "deep-brackets": "SELECT " + "(" * 4_000 + "1" + ")" * 4_000,
    "deep-case": "SELECT " + "CASE WHEN 1 THEN " * 400 + "1" + " END" * 400,
    "deep-not": "SELECT " + "NOT " * 2_000 + "1",
    "deep-sum": "SELECT 1" + "+1" * 4_000,
    "deep-subquery": "SELECT * FROM " + "(SELECT * FROM " * 300 + "weather" + ")" * 300,
    "many-unions": "SELECT 1" + " UNION ALL SELECT 1" * 300,
    "long": "SELECT '" + "x" * 1_000_000 + "'",
    "infinity": "SELECT 9e999",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_or_stopped(sandbox, name):
    start = time.thread_time()  # not the wall's: the machine may be busy with other work
    with pytest.raises(SqlError) as caught:
        sandbox.run(ATTACKS[name])
    seconds = time.thread_time() - start
    reason = str(caught.value)
    assert seconds < 2, f"{name} held the sandbox for {seconds:.1f} s"
    assert reason.endswith(".") and "\n" not in reason and len(reason) < 400, reason
    assert sandbox.run("SELECT COUNT(*), SUM(year) FROM weather").rows == [(6, 12009)]


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("stacked", SqlRefused, "Exactly one statement"),
        ("update", SqlRefused, "Only SELECT may run"),
        ("pragma", SqlRefused, "Only SELECT may run"),
        ("schema", SqlRefused, "unknown"),
        ("string-in-quotes", SqlRefused, "unknown"),
        ("load-extension", SqlRefused, "not available"),
        ("hidden-recursive", SqlRefused, "Recursive"),
        ("true-join", SqlStopped, "longer than 0.25 s"),
        ("wide-rows", SqlStopped, "larger than 20000 bytes"),
        ("many-rows", SqlStopped, "more than 1000 rows"),
        ("long-value", SqlStopped, "size limit"),
        ("folding-bomb", SqlStopped, "needs more than 134217728 bytes"),
    ],
)
def test_the_reason_is_the_right_one(sandbox, name, kind, words):
    with pytest.raises(kind, match=words):
        sandbox.run(ATTACKS[name])


def test_a_product_of_tables_is_refused_by_its_size():
    table = SqlTable("numbers", {"n": "INTEGER"}, [(n,) for n in range(2_000)])
    with Sandbox([table]) as sandbox:
        with pytest.raises(SqlRefused, match="makes 4000000 rows, more than 2000000"):
            sandbox.run("SELECT COUNT(*) FROM numbers AS a, numbers AS b")
        joined = "SELECT COUNT(*) FROM numbers AS a JOIN numbers AS b ON a.n = b.n"
        assert sandbox.run(joined).rows == [(2_000,)]


# Without the parser's check, the engine's own defence must hold.
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT sql FROM sqlite_master",
        "SELECT COUNT(*) FROM sqlite_master",
        "SELECT rowid FROM weather",
        "SELECT random()",
        "SELECT load_extension('x')",
        "SELECT * FROM pragma_database_list",
        "PRAGMA query_only = OFF",
        "ATTACH ':memory:' AS other",
        "DELETE FROM weather",
        "CREATE TEMP TABLE mine (a)",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
        "SELECT hex(zeroblob(100000000))",
    ],
)
def test_the_authorizer_alone_refuses(sandbox, sql, monkeypatch):
    monkeypatch.setattr("qwenlong.data.sql.check_query", lambda text, *a, **k: text)
    with pytest.raises(SqlRefused):
        sandbox.run(sql)


def test_memory_stops_what_time_does_not():
    rows = [("x" * 2_000, n) for n in range(2_000)]
    table = SqlTable("numbers", {"word": "TEXT", "n": "INTEGER"}, rows)
    limits = SqlLimits(seconds=60, heap_bytes=128 << 20)
    with Sandbox([table], limits=limits) as sandbox:
        start = time.thread_time()
        with pytest.raises(SqlStopped, match="needs more than 134217728 bytes"):
            sandbox.run(
                "SELECT COUNT(*) FROM (SELECT DISTINCT 2000 * a.n + b.n, a.word "
                "FROM numbers AS a JOIN numbers AS b ON 1 = 1) AS q"
            )
        assert time.thread_time() - start < 20


def test_one_bad_query_leaves_the_next_one_alone(sandbox):
    with pytest.raises(SqlError, match="no such column|unknown"):
        sandbox.run("SELECT weather.word FROM weather, numbers")
    with pytest.raises(SqlError):
        sandbox.run("SELECT SUM(SUM(rain)) FROM weather")
    assert sandbox.run("SELECT MAX(rain) FROM weather").rows == [(4.0,)]


def test_check_query_needs_no_database():
    with pytest.raises(SqlRefused, match="'snow' is unknown"):
        check_query("SELECT snow FROM weather", {"weather": PLAIN})


def test_empty_table_and_empty_result():
    with Sandbox([SqlTable("weather", COLUMNS, [])]) as sandbox:
        assert sandbox.run("SELECT SUM(rain) FROM weather").rows == [(None,)]
        assert sandbox.run("SELECT city FROM weather").rows == []


@pytest.mark.parametrize("name", ["two words", 'a"b', "", "1st", "sqlite_x"])
def test_names_are_plain_identifiers(name):
    with pytest.raises(ValueError, match="plain identifier"):
        Sandbox([SqlTable(name, {"a": "TEXT"}, [])])
    with pytest.raises(ValueError, match="plain identifier"):
        Sandbox([SqlTable("t", {name: "TEXT"}, [])])


def test_two_tables_of_one_name():
    with pytest.raises(ValueError, match="two tables"):
        Sandbox([PLAIN, PLAIN])


def test_closed_sandbox_says_so():
    sandbox = Sandbox([PLAIN])
    sandbox.close()
    with pytest.raises(sqlite3.ProgrammingError):
        sandbox._connection.execute("SELECT 1")
