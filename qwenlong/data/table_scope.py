"""What a question template draws from, and what it hands back.

The documents of a question are named in it ("in 2003, 2005 and 2011"), and its SQL selects them by
name: other documents of the same table may stand in the context and change nothing. Rows whose
value is missing are left out by every template.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from qwenlong.data.graph_sources import join_names
from qwenlong.data.table_schema import Column, Value, format_value, sql_literal
from qwenlong.data.table_wordings import WORDINGS
from qwenlong.data.tables import CorpusTable, Part


@dataclass(frozen=True)
class Draft:
    """A question before its SQL has run.

    ``ranking`` is SQL for ``(name, value)`` in the order that the answer is picked from at
    ``position``: the value there must differ from its neighbours and the name be the only one.
    ``distances`` is SQL for one column of values of which none may be (nearly) 0: the margins of
    comparisons that the answer rests on. ``filters`` are column = value pairs that narrow the rows
    used. ``exact``: the answer is a value of the table or a count, not to be rounded.
    """

    question: str
    sql: str
    unit: str | None = None
    is_text: bool = False
    exact: bool = False
    ranking: str | None = None
    position: int = 0
    distances: str | None = None
    filters: tuple[tuple[str, Value], ...] = ()
    answer_column: Column | None = None


@dataclass
class Scope:
    """What a template draws from."""

    table: CorpusTable
    parts: list[Part]
    rng: random.Random
    rows: list[dict[str, Value]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = [self.partition.name, *(column.name for column in self.table.schema.columns)]
        self.rows = [
            dict(zip(names, row, strict=True)) for part in self.parts for row in part.full_rows()
        ]

    @property
    def partition(self) -> Column:
        return self.table.schema.partition

    @property
    def is_temporal(self) -> bool:
        return self.table.is_temporal and self.partition.role == "period"

    # --- words ---------------------------------------------------------------

    def say(self, template: str, **fields: str) -> str:
        """One of the template's wordings, filled."""
        wording = self.rng.choice(WORDINGS[template])
        entities = self.table.schema.entities
        return wording.format(universe=self.universe(), entities=entities, **fields)

    def universe(self, parts: list[Part] | None = None) -> str:
        """``airports with an IATA code in Fiji, Peru and Chad``"""
        return f"{self.table.schema.entities} {self.place(parts)}"

    def place(self, parts: list[Part] | None = None) -> str:
        parts = self.parts if parts is None else parts
        return f"{self.table.schema.preposition} {self.names(parts)}"

    def names(self, parts: list[Part]) -> str:
        return join_names([format_value(part.value, self.partition) for part in parts])

    def amount(self, value: Value, column: Column) -> str:
        text = format_value(value, column)
        return f"{text} {column.unit}" if column.unit else text

    # --- columns -------------------------------------------------------------

    def measure(self, *, additive: bool = False, positive: bool = False) -> Column | None:
        """A measure with at least three different values in scope."""
        fit = [
            column
            for column in self.table.schema.of_role("measure")
            if (column.additive or not additive) and len(set(self.values(column))) >= 3
            and (not positive or min(self.values(column)) > 0)
        ]  # fmt: skip
        return self.rng.choice(fit) if fit else None

    def two_measures(self) -> tuple[Column, Column] | None:
        first = self.measure()
        others = [
            c
            for c in self.table.schema.of_role("measure")
            if c is not first and len(set(self.values(c))) >= 3
        ]
        return (first, self.rng.choice(others)) if first and others else None

    def category(self, *, least: int = 2) -> tuple[Column, list[Value]] | None:
        """A category and its values with at least ``least`` rows in scope, two of them or more."""
        fit = []
        for column in self.table.schema.of_role("category"):
            counts = Counter(row[column.name] for row in self.rows)
            values = sorted(v for v, n in counts.items() if v is not None and n >= least)
            if len(values) >= 2:
                fit.append((column, values))
        return self.rng.choice(fit) if fit else None

    def name_column(self) -> Column | None:
        """The key, or else the first column where it is text and names each row in scope."""
        first = self.table.schema.key or self.table.schema.columns[0]
        names = [row[first.name] for row in self.rows]
        is_unique = len(set(names)) == len(names) and None not in names
        return first if first.type == "text" and is_unique and len(names) >= 4 else None

    def values(self, column: Column) -> list:
        return [row[column.name] for row in self.rows if row[column.name] is not None]

    def threshold(self, column: Column) -> Value:
        """A round number between the 20th and the 80th percentile of the values in scope."""
        values = sorted(self.values(column))
        low, high = values[len(values) // 5], values[-1 - len(values) // 5]
        middle = low + (high - low) * self.rng.random()
        spread = (high - low) or abs(middle) or 1
        step = 10.0 ** (len(str(int(spread))) - 2) if spread >= 1 else 0.1
        rounded = round(round(middle / step) * step, 1)
        return int(rounded) if column.type == "integer" else rounded

    def mean_or_total(self, column: Column) -> tuple[str, str]:
        """SQL function and word."""
        if column.additive and self.rng.random() < 0.5:
            return "SUM", "total"
        return "AVG", "average"

    def two_groups(self) -> tuple[list[Part], list[Part]] | None:
        """Two disjoint groups that share out the scope, in its order."""
        if len(self.parts) < 2:
            return None
        cut = self.rng.randint(1, len(self.parts) - 1)
        return self.parts[:cut], self.parts[cut:]

    # --- SQL -----------------------------------------------------------------

    def where(
        self,
        *present: Column,
        parts: list[Part] | None = None,
        filters: tuple[tuple[str, Value], ...] = (),
    ) -> str:
        """``FROM table WHERE`` the partition is in scope and ``present`` columns have values."""
        parts = self.parts if parts is None else parts
        values = ", ".join(sql_literal(part.value) for part in parts)
        terms = [f"{self.partition.name} IN ({values})"]
        terms += [f"{column.name} IS NOT NULL" for column in present]
        terms += [f"{name} = {sql_literal(value)}" for name, value in filters]
        return f"FROM {self.table.schema.name} WHERE {' AND '.join(terms)}"

    def order(self) -> str:
        """SQL that numbers the partition values in the order of the scope."""
        cases = " ".join(
            f"WHEN {sql_literal(part.value)} THEN {i}" for i, part in enumerate(self.parts)
        )
        return f"CASE {self.partition.name} {cases} END"
