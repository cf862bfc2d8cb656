"""Sentences hidden in real text, after the families of RULER (arXiv 2404.06654).

``needle_single`` hides one code, ``needle_multikey`` many and asks for one, ``needle_multivalue``
asks for all codes of one name, ``needle_multiquery`` for those of several names, and
``variable_tracking`` for every variable that holds a value through a chain of assignments. The
score is the share of the wanted strings that the answer names (reward ``needle_recall``).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import replace

from qwenlong.evals.haystack import Context, Haystack, Insertion, compose
from qwenlong.evals.samples import (
    build,
    names,
    numbers,
    sample_rng,
    single_depth,
    spread_depths,
    states_any,
)
from qwenlong.prompts import TEXT_INSTRUCTIONS
from qwenlong.types import Sample

KEYS = 8  # of needle_multikey
VALUES = 4  # of needle_multivalue
QUERIES = 4  # of needle_multiquery, among twice as many keys
CHAIN = 5  # variables of a chain of variable_tracking
CHAINS = 3  # of which one is asked for

_CODE = "The access code of the {name} is {value}."
_SINGLE = "What is the access code of the {name}?"
_ALL = "The text gives {count} access codes of the {name}. What are they?"
_SEVERAL = "What are the access codes of {names}?"
_ASSIGN, _COPY = "VAR {name} = {value}", "VAR {name} = VAR {other}"
_TRACE = (
    "The text holds lines that begin with VAR and give a value to a variable, either a number or "
    "the value of another variable. Which {count} variables have the value {value}?"
)


def needle_single(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """One code; over the samples its depth covers the context evenly."""
    for index in range(count):
        rng = sample_rng(seed, "needle_single", length, index)
        depth = single_depth(seed, "needle_single", length, index, count)
        [name], [value] = names(rng, 1), numbers(rng, 1)
        context = compose(
            haystack,
            rng,
            length,
            insertions=[Insertion(_CODE.format(name=name, value=value), depth)],
            refuses=states_any([name, value]),
        )
        yield build(
            haystack,
            context,
            subtype="needle_single",
            length=length,
            seed=seed,
            index=index,
            question=_SINGLE.format(name=name),
            answers=[value],
            instructions=TEXT_INSTRUCTIONS,
            derivation={"codes": {name: [value]}, "asked": [name]},
            depth=round(depth, 4),
        )


def _codes(
    haystack: Haystack,
    subtype: str,
    *,
    length: int,
    count: int,
    seed: int,
    keys: int,
    values: int,
    asked: int,
) -> Iterator[Sample]:
    """``keys`` names with ``values`` codes each, of which ``asked`` names are asked for."""
    for index in range(count):
        rng = sample_rng(seed, subtype, length, index)
        known, codes = names(rng, keys), numbers(rng, keys * values)
        told = {name: codes[i * values : (i + 1) * values] for i, name in enumerate(known)}
        lines = [_CODE.format(name=n, value=v) for n in known for v in told[n]]
        rng.shuffle(lines)
        depths = spread_depths(rng, len(lines))
        context = compose(
            haystack,
            rng,
            length,
            insertions=[Insertion(*pair) for pair in zip(lines, depths, strict=True)],
            refuses=states_any([*known, *codes]),
        )
        wanted = rng.sample(known, asked)
        if asked > 1:
            listed = [f"the {name}" for name in wanted]
            question = _SEVERAL.format(names=", ".join(listed[:-1]) + f" and {listed[-1]}")
        else:
            template = _ALL if values > 1 else _SINGLE
            question = template.format(name=wanted[0], **({"count": values} if values > 1 else {}))
        yield build(
            haystack,
            _with_spans_of(context, lines, [v for name in wanted for v in told[name]]),
            subtype=subtype,
            length=length,
            seed=seed,
            index=index,
            question=question,
            answers=[v for name in wanted for v in told[name]],
            derivation={"codes": told, "asked": wanted},
        )


def _with_spans_of(context: Context, lines: list[str], answers: list[str]) -> Context:
    """``context`` with the spans of those lines alone that state an answer."""
    kept = [
        span
        for span, line in zip(context.evidence, lines, strict=True)
        if any(answer in line for answer in answers)
    ]
    return replace(context, evidence=kept)


def needle_multikey(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """One of ``KEYS`` codes is asked for; the others are there to be confused with it."""
    sizes = {"keys": KEYS, "values": 1, "asked": 1}
    return _codes(haystack, "needle_multikey", length=length, count=count, seed=seed, **sizes)


def needle_multivalue(
    haystack: Haystack, *, length: int, count: int, seed: int
) -> Iterator[Sample]:
    """All ``VALUES`` codes of one name, among those of another."""
    sizes = {"keys": 2, "values": VALUES, "asked": 1}
    return _codes(haystack, "needle_multivalue", length=length, count=count, seed=seed, **sizes)


def needle_multiquery(
    haystack: Haystack, *, length: int, count: int, seed: int
) -> Iterator[Sample]:
    """The codes of ``QUERIES`` names, among as many others."""
    sizes = {"keys": 2 * QUERIES, "values": 1, "asked": QUERIES}
    return _codes(haystack, "needle_multiquery", length=length, count=count, seed=seed, **sizes)


def variable_tracking(
    haystack: Haystack, *, length: int, count: int, seed: int
) -> Iterator[Sample]:
    """``CHAINS`` chains of ``CHAIN`` variables each; all variables of one chain are asked for.

    A variable is read only after the line that sets it.
    """
    for index in range(count):
        rng = sample_rng(seed, "variable_tracking", length, index)
        variables, values = _variables(rng, CHAINS * CHAIN), numbers(rng, CHAINS)
        chains = [variables[i * CHAIN : (i + 1) * CHAIN] for i in range(CHAINS)]
        queues = []
        for chain, value in zip(chains, values, strict=True):
            lines = [_ASSIGN.format(name=chain[0], value=value)]
            lines += [
                _COPY.format(name=name, other=other)
                for other, name in zip(chain, chain[1:], strict=False)
            ]
            queues.append(lines)
        turns = [number for number, lines in enumerate(queues) for _ in lines]
        rng.shuffle(turns)
        left = [iter(lines) for lines in queues]
        lines = [next(left[number]) for number in turns]
        depths = spread_depths(rng, len(lines))
        context = compose(
            haystack,
            rng,
            length,
            insertions=[Insertion(*pair) for pair in zip(lines, depths, strict=True)],
            refuses=states_any([*variables, *values, "VAR "]),
        )
        asked = rng.randrange(CHAINS)
        mine = set(queues[asked])
        kept = [span for span, line in zip(context.evidence, lines, strict=True) if line in mine]
        yield build(
            haystack,
            replace(context, evidence=kept),
            subtype="variable_tracking",
            length=length,
            seed=seed,
            index=index,
            question=_TRACE.format(count=CHAIN, value=values[asked]),
            answers=chains[asked],
            derivation={"chains": dict(zip(values, chains, strict=True)), "asked": values[asked]},
        )


def _variables(rng: random.Random, count: int) -> list[str]:
    """Different names of five capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(found)
