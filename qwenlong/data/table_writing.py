"""A model writes questions over tables, their SQL, and other wordings; the engine decides.

A question counts when two independent attempts at its SQL give the same answer; a new wording
counts when the SQL written for it gives the answer of the old one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from qwenlong.data.json_replies import parse_json, text_field
from qwenlong.data.leaks import normalise
from qwenlong.data.sql import QueryResult, Sandbox, SqlError
from qwenlong.data.table_schema import format_value
from qwenlong.data.table_scope import Draft, Scope
from qwenlong.llm import Request, RequestRefused
from qwenlong.prompts import fill, user
from qwenlong.prompts_synth import TABLE_KINDS, TABLE_PARAPHRASE, TABLE_QUESTION, TABLE_SQL

if TYPE_CHECKING:
    from qwenlong.llm import Client

_SHOWN_ROWS = 5
_TERM = re.compile(r"\"[^\"]+\"|\d[\d,.]*\d|\d")


class TableWriter:
    """Asks ``client``; counts what it could not use in ``dropped``."""

    def __init__(
        self,
        client: Client,
        dropped: Counter[str],
        *,
        temperature: float = 0.7,
        max_tokens: int = 1024,
    ):
        self._client, self._dropped = client, dropped
        self._sampling = {"temperature": temperature, "max_tokens": max_tokens}

    def draft(self, scope: Scope, subtype: str, sandbox: Sandbox) -> Draft | None:
        """A question of the model's own, with SQL that two attempts agree on.

        Args:
            sandbox: the whole table. The SQL must give the same over the documents of the scope
                alone: it selects them by name.
        """
        rows = [", ".join(f"{k}={v!r}" for k, v in row.items()) for row in scope.rows]
        prompt = fill(
            TABLE_QUESTION,
            table=scope.table.schema.name,
            entity=scope.table.schema.entity,
            schema=_schema_text(scope),
            place=scope.place(),
            rows="\n".join(scope.rng.sample(rows, min(_SHOWN_ROWS, len(rows)))),
            kind=TABLE_KINDS[subtype],
        )
        reply = self._ask(prompt, 1)
        if not reply:
            return self._drop("the question was refused")
        try:
            value = parse_json(reply[0])
            question = text_field(value, "question", most=1_000)
        except ValueError as error:
            return self._drop(str(error))
        unit = value.get("unit")
        unit = unit.strip()[:60] if isinstance(unit, str) and unit.strip() else None
        asked = normalise(question)
        for part in scope.parts:
            if normalise(format_value(part.value, scope.partition)) not in asked:
                return self._drop("the question does not name every document")
        results = self.answers(question, scope, sandbox, attempts=2)
        if len(results) < 2 or not same_answer(results[0], results[1]):
            return self._drop("two attempts at the SQL do not agree")
        with Sandbox([scope.table.schema.sql_table(_scope_rows(scope))]) as alone:
            try:
                if not same_answer(alone.run(results[0].sql), results[0]):
                    return self._drop("the SQL does not select the documents")
            except SqlError as error:
                return self._drop(f"SQL: {error}")
        with Sandbox([scope.table.schema.sql_table([])]) as empty:
            if empty.run(results[0].sql).rows == results[0].rows:
                return self._drop("the SQL states its answer itself")
        answer = results[0].rows[0][0]
        return Draft(
            question,
            results[0].sql,
            unit,
            is_text=isinstance(answer, str),
            exact=isinstance(answer, int),
        )

    def paraphrase(self, question: str, answer: Any, scope: Scope, sandbox: Sandbox) -> str | None:
        """Other words for ``question``, or None where the model found none that ask the same."""
        reply = self._ask(fill(TABLE_PARAPHRASE, question=question), 1)
        if not reply:
            return self._drop("the wording was refused")
        try:
            new = text_field(parse_json(reply[0]), "question", most=3 * len(question) + 100)
        except ValueError as error:
            return self._drop(str(error))
        if normalise(new) == normalise(question):
            return self._drop("the wording is the same")
        if Counter(_TERM.findall(new)) != Counter(_TERM.findall(question)):
            return self._drop("the wording changes a number or a quoted term")
        for result in self.answers(new, scope, sandbox, attempts=1):
            if same_answer(result, QueryResult(["answer"], [(answer,)], "")):
                return new
        return self._drop("the wording asks something else")

    def answers(
        self, question: str, scope: Scope, sandbox: Sandbox, *, attempts: int
    ) -> list[QueryResult]:
        """Results of the SQL of those attempts that could be run; each is one cell."""
        prompt = fill(
            TABLE_SQL,
            table=scope.table.schema.name,
            entity=scope.table.schema.entity,
            schema=_schema_text(scope),
            partition=scope.partition.name,
            values=", ".join(repr(part.value) for part in scope.parts),
            question=question,
        )
        results = []
        for reply in self._ask(prompt, attempts):
            try:
                result = sandbox.run(_sql_of(reply))
                if len(result.rows) != 1 or len(result.columns) != 1 or result.rows[0][0] is None:
                    raise SqlError("The result is not one value.")
            except ValueError as error:  # SqlError is one
                self._drop(f"SQL: {error}")
            else:
                results.append(result)
        return results

    def _ask(self, prompt: str, n: int) -> list[str]:
        try:
            replies = self._client.sample(Request.chat(user(prompt), **self._sampling), n)
        except RequestRefused:
            return []
        return [reply.text for reply in replies]

    def _drop(self, reason: str) -> None:
        self._dropped[reason] += 1


def same_answer(one: QueryResult, other: QueryResult) -> bool:
    """One cell each, with equal texts or numbers (1e-9 of their size apart at most)."""
    a, b = one.rows[0][0], other.rows[0][0]
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _sql_of(reply: str) -> str:
    fence = re.search(r"```sql\s*(.+?)```", reply, re.DOTALL | re.IGNORECASE)
    return fence.group(1) if fence else text_field(parse_json(reply), "sql", most=10_000)


def _scope_rows(scope: Scope) -> list[tuple]:
    return [row for part in scope.parts for row in part.full_rows()]


def _schema_text(scope: Scope) -> str:
    lines = []
    for column in (scope.partition, *scope.table.schema.columns):
        unit = f", in {column.unit}" if column.unit else ""
        lines.append(f"- {column.name} ({column.type}): {column.label}{unit}")
    return "\n".join(lines)
