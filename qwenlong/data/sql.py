"""Run one SELECT over a few small tables, safely: for SQL that a model wrote and for our own.

Three lines of defence, each enough for most attacks:

1. ``check_query`` parses the text (sqlglot) and admits a single SELECT (or WITH, UNION of SELECTs)
   that reads known columns of known tables. What runs is the SQL written again from the parsed
   tree, so that checker and engine cannot read one text in two ways.
2. SQLite's authorizer denies everything but reading those columns and calling listed functions.
3. Limits stop what is legal and too large: time, rows, size of a value and of the result, length
   and depth of the statement, memory.

The database is in memory, holds the given tables alone, and is read-only once they are loaded.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlglot import Dialect, exp
from sqlglot.errors import ErrorLevel, SqlglotError, UnsupportedError
from sqlglot.tokens import Token, TokenType

ColumnType = Literal["INTEGER", "REAL", "TEXT"]

# Deterministic, and bounded by the size of what they read. No printf, replace, zeroblob or
# randomblob (memory), no random or date functions (the answer must be the same tomorrow), no
# load_extension, readfile or sqlite_* (outside world).
FUNCTIONS = frozenset(
    "count sum total avg min max abs round coalesce ifnull nullif iif lower upper length substr "
    "substring trim ltrim rtrim instr like row_number rank dense_rank percent_rank lag lead "
    "first_value last_value ntile sign floor ceil ceiling".split()
)

# Parts of a SELECT that read nothing dangerous but that two engines read differently or that are
# no part of the question; refused with their name.
_REFUSED_NODES: dict[type[exp.Expression], str] = {
    exp.Into: "SELECT INTO writes a table",
    exp.Lock: "A locking clause is no part of a read",
    exp.TableSample: "TABLESAMPLE is random",
    exp.Values: "VALUES is not a table of the documents",
    exp.Unnest: "UNNEST is not available",
    exp.Lateral: "LATERAL is not available",
    exp.Command: "Only SELECT may run",
    exp.Placeholder: "Parameters are not available",
    exp.Parameter: "Parameters are not available",
    exp.Collate: "Collations are not available",
    exp.Glob: "GLOB is not available",
    exp.RegexpLike: "Regular expressions are not available",
}
_REFUSED = tuple(_REFUSED_NODES)
_DIALECT = Dialect.get_or_raise("sqlite")

_SQLITE_LIMITS = {  # sqlite3.Connection.setlimit, in Python 3.11 and later
    "SQLITE_LIMIT_COLUMN": 200,
    "SQLITE_LIMIT_EXPR_DEPTH": 100,
    "SQLITE_LIMIT_COMPOUND_SELECT": 20,
    "SQLITE_LIMIT_VDBE_OP": 25_000,
    "SQLITE_LIMIT_FUNCTION_ARG": 20,
    "SQLITE_LIMIT_ATTACHED": 0,
    "SQLITE_LIMIT_LIKE_PATTERN_LENGTH": 100,
    "SQLITE_LIMIT_TRIGGER_DEPTH": 1,
    "SQLITE_LIMIT_WORKER_THREADS": 0,
}
_PROGRESS_OPS = 2_000  # virtual machine steps between two looks at the clock
_MAX_TABLE_REFERENCES = 12
_MAX_BRACKETS = 24  # nesting; sqlglot's parser is recursive


class SqlError(ValueError):
    """The query gave no result; the message is one sentence."""


class SqlRefused(SqlError):
    """The query is not one that may run."""


class SqlStopped(SqlError):
    """The query ran into a limit."""


@dataclass(frozen=True)
class SqlLimits:
    """Bounds of one query. ``seconds`` are of processor time: a busy machine changes no result.

    ``heap_bytes`` holds for SQLite in the whole process.

    SQLite lets the heap limit of a process only be lowered, so the lowest value asked for stays.
    ``joined_rows`` bounds the product of the sizes of tables joined without a condition.
    """

    seconds: float = 2.0
    rows: int = 10_000
    result_bytes: int = 1_000_000
    value_bytes: int = 65_536
    sql_chars: int = 10_000
    joined_rows: int = 2_000_000
    heap_bytes: int = 128 << 20


@dataclass(frozen=True)
class SqlTable:
    """A table to query: columns in order with their types, and rows of plain values."""

    name: str
    columns: Mapping[str, ColumnType]
    rows: Sequence[Sequence[Any]] = field(repr=False)


class QueryResult(NamedTuple):
    columns: list[str]
    rows: list[tuple[Any, ...]]
    sql: str  # what ran


# --- checking ----------------------------------------------------------------


def check_query(
    sql: str, tables: Mapping[str, SqlTable], *, limits: SqlLimits | None = None
) -> str:
    """The statement to run, written from the parsed tree.

    Args:
        sql: SQLite's dialect; one statement, a final semicolon allowed.
        tables: what may be read, by name (case does not matter).

    Raises:
        SqlRefused: with the reason.
    """
    limits = limits or SqlLimits()
    tree = _parse(sql, limits)
    nodes = list(tree.walk())
    for node in nodes:
        if isinstance(node, _REFUSED):
            reason = next(why for kind, why in _REFUSED_NODES.items() if isinstance(node, kind))
            raise SqlRefused(f"{reason}.")
        if isinstance(node, exp.Anonymous) and node.name.lower() not in FUNCTIONS:
            raise SqlRefused(f"Function {node.name.lower()!r} is not available.")
    known = {name.lower(): table for name, table in tables.items()}
    _check_tables(nodes, known)
    _check_columns(nodes, known)
    _check_joins(nodes, known, limits)
    try:
        return tree.sql("sqlite", comments=False, unsupported_level=ErrorLevel.RAISE)
    except (UnsupportedError, RecursionError) as error:
        raise SqlRefused(f"SQLite cannot run a part of the query ({_one_line(error)}).") from None


def _parse(sql: str, limits: SqlLimits) -> exp.Expression:
    if len(sql) > limits.sql_chars:
        raise SqlRefused(f"The query has {len(sql)} characters, more than {limits.sql_chars}.")
    if "\x00" in sql:
        raise SqlRefused("The query contains a NUL character.")
    try:
        tokens = _DIALECT.tokenize(sql)
        _check_tokens(tokens)
        trees = [
            tree
            for tree in _DIALECT.parser().parse(tokens, sql)
            if tree is not None and not isinstance(tree, exp.Semicolon)
        ]
    except SqlglotError as error:
        raise SqlRefused(f"The query is not SQL ({_one_line(error)}).") from None
    except RecursionError:
        raise SqlRefused("The query is nested too deeply.") from None
    if len(trees) != 1:
        raise SqlRefused(f"Exactly one statement may run, not {len(trees)}.")
    tree = trees[0]
    if isinstance(tree, exp.Subquery) and not tree.alias:
        tree = tree.unnest()
    if not isinstance(tree, (exp.Select, exp.SetOperation)):
        raise SqlRefused(f"Only SELECT may run, not {tree.key.upper()}.")
    return tree


def _check_tokens(tokens: Sequence[Token]) -> None:
    """What must hold before the recursive parser sees the text."""
    if tokens and tokens[0].text.upper() not in ("SELECT", "WITH", "("):
        raise SqlRefused(f"Only SELECT may run, not {tokens[0].text[:20].upper()}.")
    depth = 0
    for token in tokens:
        depth += (token.token_type == TokenType.L_PAREN) - (token.token_type == TokenType.R_PAREN)
        if depth > _MAX_BRACKETS:
            raise SqlRefused(f"Brackets are nested deeper than {_MAX_BRACKETS}.")


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:200].rstrip(".")


def _check_tables(nodes: Sequence[exp.Expression], known: Mapping[str, SqlTable]) -> None:
    """Every table is known or a WITH table, none hides another, none reads itself."""
    derived: set[str] = set()
    for node in nodes:
        if isinstance(node, exp.With) and node.args.get("recursive"):
            raise SqlRefused("Recursive WITH is not available.")
        if isinstance(node, exp.CTE):
            name = node.alias.lower()
            if name in known or name in derived:
                raise SqlRefused(f"The WITH table {name!r} hides a table of the same name.")
            derived.add(name)
            if any(table.name.lower() == name for table in node.this.find_all(exp.Table)):
                raise SqlRefused("Recursive WITH is not available.")
    tables = [node for node in nodes if isinstance(node, exp.Table)]
    for table in tables:
        if not isinstance(table.this, exp.Identifier):
            raise SqlRefused("Table functions are not available.")
        if table.db or table.catalog:
            raise SqlRefused(f"Table {table.sql()!r} names a schema; use the bare table name.")
        if table.name.lower() not in known and table.name.lower() not in derived:
            raise SqlRefused(f"Table {table.name!r} is unknown; the tables are {sorted(known)}.")
    if len(tables) > _MAX_TABLE_REFERENCES:
        raise SqlRefused(f"The query names {len(tables)} tables, at most {_MAX_TABLE_REFERENCES}.")


def _check_columns(nodes: Sequence[exp.Expression], known: Mapping[str, SqlTable]) -> None:
    """Every column is one of a known table or an alias. SQLite would read others as strings."""
    names = {column.lower() for table in known.values() for column in table.columns}
    for node in nodes:
        if isinstance(node, exp.Alias):
            names.add(node.alias.lower())
        elif isinstance(node, exp.TableAlias):
            names.update(column.name.lower() for column in node.columns)
    for node in nodes:
        if isinstance(node, exp.Column) and not isinstance(node.this, exp.Star):
            if node.name.lower() not in names:
                raise SqlRefused(
                    f"Column {node.name!r} is unknown; the columns are {sorted(names)}."
                )


def _check_joins(
    nodes: Sequence[exp.Expression], known: Mapping[str, SqlTable], limits: SqlLimits
) -> None:
    """Refuse a product of tables without a condition that is larger than ``joined_rows``."""
    for select in nodes:
        joins = select.args.get("joins") if isinstance(select, exp.Select) else None
        source = select.args.get("from_") or select.args.get("from")
        if source is None or not joins:
            continue
        product = _size(source.this, known)
        for join in joins:
            if not join.args.get("on") and not join.args.get("using"):
                product *= _size(join.this, known)
        if product > limits.joined_rows:
            raise SqlRefused(
                f"A join without a condition makes {product} rows, more than {limits.joined_rows}."
            )


def _size(node: exp.Expression, known: Mapping[str, SqlTable]) -> int:
    """Rows of a table; those of a subquery or WITH table are at most the largest table's here."""
    if isinstance(node, exp.Table) and node.name.lower() in known:
        return max(1, len(known[node.name.lower()].rows))
    return max([1, *(len(table.rows) for table in known.values())])


# --- running -----------------------------------------------------------------


class Sandbox:
    """Tables in a private in-memory SQLite, and ``run`` over them. Close it, or use ``with``.

    Args:
        tables: table and column names must be plain identifiers; values None, int, float or str.
    """

    def __init__(self, tables: Iterable[SqlTable], *, limits: SqlLimits | None = None):
        self.limits = limits or SqlLimits()
        self.tables: dict[str, SqlTable] = {}
        self._readable: set[tuple[str, str]] = set()
        self._denied = ""
        self._deadline = math.inf
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        try:
            for table in tables:
                self._load(table)
            self._lock()
        except MemoryError:
            self._connection.close()
            raise SqlStopped("The tables need more memory than SQLite may use here.") from None
        except BaseException:
            self._connection.close()
            raise

    def _load(self, table: SqlTable) -> None:
        for name in (table.name, *table.columns):
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower().startswith(
                "sqlite"
            ):
                raise ValueError(f"sql: {name!r} is not a plain identifier")
        if table.name.lower() in self.tables:
            raise ValueError(f"sql: two tables are named {table.name!r}")
        self.tables[table.name.lower()] = table
        self._readable.update((table.name.lower(), column.lower()) for column in table.columns)
        columns = ", ".join(f'"{name}" {kind}' for name, kind in table.columns.items())
        self._connection.execute(f'CREATE TABLE "{table.name}" ({columns})')
        marks = ", ".join("?" * len(table.columns))
        self._connection.execute("BEGIN")
        self._connection.executemany(f'INSERT INTO "{table.name}" VALUES ({marks})', table.rows)
        self._connection.execute("COMMIT")

    def _lock(self) -> None:
        connection, limits = self._connection, self.limits
        connection.execute(f"PRAGMA hard_heap_limit = {int(limits.heap_bytes)}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA query_only = ON")
        if hasattr(connection, "setlimit"):
            for name, value in _SQLITE_LIMITS.items():
                connection.setlimit(getattr(sqlite3, name), value)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes)
            connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4 * limits.sql_chars)
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._is_late, _PROGRESS_OPS)

    def _authorize(self, action: int, one: str | None, two: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            # An empty column is a table that is only counted, or the result of a subquery.
            is_system = (one or "").lower().startswith("sqlite_")
            if ((one or "").lower(), (two or "").lower()) in self._readable or (
                not two and not is_system
            ):
                return sqlite3.SQLITE_OK
            self._denied = f"Reading {one}.{two} is not allowed."
        elif action == sqlite3.SQLITE_FUNCTION:
            if (two or "").lower() in FUNCTIONS:
                return sqlite3.SQLITE_OK
            self._denied = f"Function {(two or '').lower()!r} is not available."
        elif action == sqlite3.SQLITE_RECURSIVE:
            self._denied = "Recursive WITH is not available."
        else:
            self._denied = "Only SELECT may run."
        return sqlite3.SQLITE_DENY

    def _is_late(self) -> int:
        return int(time.thread_time() > self._deadline)

    def run(self, sql: str) -> QueryResult:
        """Result of one query.

        Raises:
            SqlRefused: the query may not run. SqlStopped: it ran into a limit.
            SqlError: SQLite found a mistake in it, or the result holds a value that is no plain
                finite one.
        """
        statement = check_query(sql, self.tables, limits=self.limits)
        self._denied = ""
        self._deadline = time.thread_time() + self.limits.seconds
        try:
            cursor = self._connection.execute(statement)
            try:
                rows = list(self._fetch(cursor))
            finally:
                cursor.close()
        except MemoryError:
            raise SqlStopped(f"The query needs more than {self.limits.heap_bytes} bytes.") from None
        except sqlite3.Error as error:
            raise self._reason(error) from None
        finally:
            self._deadline = math.inf
        return QueryResult([column[0] for column in cursor.description], rows, statement)

    def _fetch(self, cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
        size = 0
        for number, row in enumerate(cursor, 1):
            if number > self.limits.rows:
                raise SqlStopped(f"The result has more than {self.limits.rows} rows.")
            for value in row:
                if isinstance(value, bytes) or (
                    isinstance(value, float) and not math.isfinite(value)
                ):
                    raise SqlError("The result holds a value that is neither text nor a number.")
                size += len(value) if isinstance(value, str) else 8
            if size > self.limits.result_bytes:
                raise SqlStopped(f"The result is larger than {self.limits.result_bytes} bytes.")
            yield row

    def _reason(self, error: sqlite3.Error) -> SqlError:
        text = str(error)
        if self._denied:
            return SqlRefused(self._denied)
        if text == "interrupted":
            return SqlStopped(f"The query ran longer than {self.limits.seconds:g} s.")
        if "too big" in text or "too many" in text or "too large" in text or "too complex" in text:
            return SqlStopped(f"The query is over a size limit ({text}).")
        return SqlError(f"SQLite cannot run the query ({text}).")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
