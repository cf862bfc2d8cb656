"""Numerical questions over corpus tables (route B): a template, its SQL, and the answer it gives.

The answer is what SQLite returns for the SQL over the table that the documents state; nothing is
computed from the source of the table. A question is kept when its answer is unique, stable under
the rounding that it asks for, and not written in the question itself. ``derivation`` holds all that
a second engine needs: schema, SQL, result and number of decimals.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import AnswerFinder, normalise
from qwenlong.data.sql import Sandbox, SqlError
from qwenlong.data.table_schema import MISSING
from qwenlong.data.table_scope import Draft, Scope
from qwenlong.data.table_templates import SUBTYPES, TEMPLATES
from qwenlong.data.tables import CorpusTable, Part, corpus_tables
from qwenlong.prompts import TEXT_INSTRUCTIONS
from qwenlong.types import Sample

if TYPE_CHECKING:
    from qwenlong.llm import Client

TOLERANCE = 0.0015  # relative, of rounded answers (0.15 %, as DocMath and SPELL have it)
_SAME = 1e-9  # relative: two floats closer than this are a tie
_ROUNDING = {2: "two decimals", 4: "four decimals"}
_BUDGETS = (8_000, 16_000, 16_000, 40_000, 100_000)  # characters of the documents of a question
_PART_COUNTS = (3, 3, 4, 4, 5, 6, 8)
_TRIES = 24  # at one subtype, before the next one has its turn
_GIVE_UP = 10 * _TRIES  # failures in a row after which the tables hold no more questions


class _Unfit(Exception):
    """A draft that gives no sample; the message is the reason that is counted."""


def table_samples(
    documents: Sequence[SourceDocument],
    *,
    seed: int,
    limit: int,
    client: Client | None = None,
    paraphrase: bool = True,
    written_share: float = 0.25,
    read_tables: bool = False,
    max_tokens: int = 2048,
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Samples of task ``corpus_numeric``, all different, the subtypes in turn.

    Deterministic in (documents, seed); a smaller ``limit`` gives the first of the same samples.

    Args:
        documents: those of kind ``table`` and ``markdown`` are used (``tables.corpus_tables``).
        limit: how many samples at most; fewer where the tables give no more different ones.
        client: a model. It words template questions anew (``paraphrase``), and writes questions and
            SQL of its own for about ``written_share`` of the tries. None: templates alone.
        read_tables: the model also reads tables out of the other documents, those of one source
            together (``extract.model_tables``). The rows that it read are in the derivation.
        max_tokens: of a reply of the model.
        dropped: counts documents and drafts that were not used, by reason.
    """
    dropped = dropped if dropped is not None else Counter()
    tables = corpus_tables(documents, dropped=dropped)
    writer = None
    if client is None:
        written_share = 0.0
    else:
        from qwenlong.data.table_writing import TableWriter

        writer = TableWriter(client, dropped, max_tokens=max_tokens)
        if read_tables:
            tables += _read_tables(client, documents, dropped, max_tokens)
    rng = random.Random(f"{seed}/tables")
    seen: set[str] = set()
    made = failures = 0
    with ExitStack() as stack:
        sandboxes = {
            id(table): stack.enter_context(Sandbox([table.schema.sql_table(table.rows())]))
            for table in tables
        }
        while tables and made < limit and failures < _GIVE_UP:
            subtype = SUBTYPES[(made + failures // _TRIES) % len(SUBTYPES)]
            table = rng.choices(tables, [min(len(table.parts), 40) for table in tables])[0]
            scope = Scope(table, choose_parts(table, rng), rng)
            is_written = written_share > 0 and rng.random() < written_share
            try:
                if is_written:
                    sample = _written(writer, scope, subtype, sandboxes[id(table)])
                else:
                    sample = _from_template(scope, subtype, sandboxes[id(table)], seen)
                keys = {normalise(sample.question), sample.derivation["sql"]}
                if keys & seen:
                    raise _Unfit("asked before")
                if writer is not None and paraphrase and not is_written:
                    sample = _reworded(writer, sample, scope, sandboxes[id(table)])
            except _Unfit as unfit:
                dropped[str(unfit)] += 1
                failures += 1
                continue
            seen |= keys | {normalise(sample.question)}
            made, failures = made + 1, 0
            yield sample


def _read_tables(
    client: Client, documents: Sequence[SourceDocument], dropped: Counter[str], max_tokens: int
) -> list[CorpusTable]:
    from qwenlong.data.extract import Reader, model_tables

    by_source: dict[str, list[SourceDocument]] = {}
    for document in documents:
        if document.kind not in ("table", "markdown"):
            by_source.setdefault(document.source, []).append(document)
    reader = Reader(client, max_tokens=max_tokens, dropped=dropped)
    return [
        table
        for source, members in by_source.items()
        for table in model_tables(reader, source, members)
    ]


def choose_parts(table: CorpusTable, rng: random.Random) -> list[Part]:
    """A few documents of the table, in its order: half of the time neighbours in time.

    Their number and their length together are drawn; three at least, where the table has them.
    """
    budget, count = rng.choice(_BUDGETS), min(rng.choice(_PART_COUNTS), len(table.parts))
    first = rng.randrange(len(table.parts) - count + 1)
    chosen = list(range(first, first + count))
    if not (table.is_temporal and rng.random() < 0.5):
        chosen = rng.sample(range(len(table.parts)), count)
    size = 0
    kept: list[int] = []
    for index in chosen:
        size += len(table.parts[index].document.text)
        if len(kept) >= 3 and size > budget:
            break
        kept.append(index)
    return [table.parts[index] for index in sorted(kept)]


# --- from a draft to a sample ------------------------------------------------


def _from_template(scope: Scope, subtype: str, sandbox: Sandbox, seen: set[str]) -> Sample:
    template = scope.rng.choice(TEMPLATES[subtype])
    draft = template(scope)
    if draft is None:
        raise _Unfit("the template does not fit the table")
    key = f"draft: {draft.sql}"
    if key in seen:
        raise _Unfit("asked before")  # known without running it
    seen.add(key)
    return finish(draft, scope, sandbox, subtype, template=template.__name__)


def _written(writer: Any, scope: Scope, subtype: str, sandbox: Sandbox) -> Sample:
    draft = writer.draft(scope, subtype, sandbox)
    if draft is None:
        raise _Unfit("the model's question was not usable")
    return finish(draft, scope, sandbox, subtype, template="written by a model")


def _reworded(writer: Any, sample: Sample, scope: Scope, sandbox: Sandbox) -> Sample:
    """The sample in the model's words where these ask the same, else as it is."""
    wording = writer.paraphrase(sample.question, sample.derivation["value"], scope, sandbox)
    if wording is None:
        return sample
    derivation = {**sample.derivation, "original_question": sample.question}
    new = sample.model_copy(update={"question": wording, "derivation": derivation})
    leaks = AnswerFinder(new).is_in(normalise(wording))
    return sample if leaks else new.model_copy(update={"id": _sample_id(new)})


def finish(draft: Draft, scope: Scope, sandbox: Sandbox, subtype: str, *, template: str) -> Sample:
    """Run the SQL of a draft and make the sample.

    Raises:
        _Unfit: the answer is missing, trivial, not unique or given away.
    """
    try:
        result = sandbox.run(draft.sql)
        value = result.rows[0][0] if result.rows else None
        if value is None or value == 0 or (draft.unit == "%" and value == 100):
            raise _Unfit("the answer is missing or trivial")
        _check_ranking(draft, sandbox)
        _check_distances(draft, sandbox)
    except SqlError as error:
        raise _Unfit(f"SQL: {error}") from None
    decimals = None
    if isinstance(value, str):
        answer = value
        named = f"the {draft.answer_column.label}" if draft.answer_column else "the name"
        form = f"Answer with {named} alone, exactly as the documents write it."
    elif draft.exact or isinstance(value, int):
        answer = _plain(Decimal(repr(value)))
        form = "Answer with one number, not rounded."
        if isinstance(value, int):
            form = "Answer with one whole number."
    else:
        answer, decimals = round_answer(value)
        form = f"Answer with one number, rounded to {_ROUNDING[decimals]}."
    is_number = not isinstance(value, str)
    unit = {"%": "percent"}.get(draft.unit, draft.unit) if is_number else None
    if unit:
        form = f"{form[:-1]}, in {unit}."
    tolerance = None
    if is_number:
        half_a_digit = 0.5 * 10.0**-decimals / abs(value) if decimals is not None else 0.0
        tolerance = round(max(TOLERANCE, half_a_digit), 6) if decimals is not None else 0.0
    schema = scope.table.schema
    sample = Sample(
        id="tables-",
        task="corpus_numeric",
        subtype=subtype,
        split=scope.table.split,
        question=draft.question,
        instructions=(
            f"{form} Where a value is not known ({MISSING}), leave that entry out of every "
            f"calculation that needs the value. {TEXT_INSTRUCTIONS}"
        ),
        documents=[
            {"id": part.document.id, "title": part.document.title, "text": part.document.text}
            for part in scope.parts
        ],
        answers=[answer],
        answer_type="number" if is_number else "text",
        unit=draft.unit if is_number else None,
        tolerance=tolerance,
        reward="numeric" if is_number else "exact_match",
        evidence=list(_evidence(draft, scope)),
        derivation={
            "kind": "sql",
            "sql": result.sql,
            "engine": "sqlite",
            "tables": [schema.to_json()],
            "columns": result.columns,
            "value": value,
            "decimals": decimals,
            "template": template,
        },
    )
    if scope.table.by_model:
        sample.derivation["rows"] = {
            part.document.id: [list(row) for row in part.rows] for part in scope.parts
        }
    finder = AnswerFinder(sample)
    if finder.is_in(normalise(sample.question)) or finder.is_in(normalise(sample.instructions)):
        raise _Unfit("the question gives the answer away")
    return sample.model_copy(update={"id": _sample_id(sample)})


def round_answer(value: float) -> tuple[str, int]:
    """The number as an answer, and its decimals: two from 1 up, four below.

    Raises:
        _Unfit: less than 0.01, or so near to the middle of two roundings that the last bit of a sum
            would decide.
    """
    size = abs(value)
    if size < 0.01:
        raise _Unfit("the answer is too small to round")
    decimals = 2 if size >= 1 else 4
    scaled = Decimal(repr(value)).scaleb(decimals)
    if abs(scaled % 1).copy_abs() != 0 and abs(abs(scaled % 1) - Decimal("0.5")) < Decimal("1e-5"):
        raise _Unfit("the answer lies between two roundings")
    rounded = scaled.to_integral_value(ROUND_HALF_UP).scaleb(-decimals)
    return _plain(rounded), decimals


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _check_ranking(draft: Draft, sandbox: Sandbox) -> None:
    if draft.ranking is None:
        return
    rows = sandbox.run(draft.ranking).rows
    if len(rows) <= max(1, draft.position):
        raise _Unfit("the order is too short")
    name, value = rows[draft.position]
    if [row[0] for row in rows].count(name) != 1:
        raise _Unfit("the name is not the only one")
    for neighbour in (draft.position - 1, draft.position + 1):
        if 0 <= neighbour < len(rows) and _is_tie(rows[neighbour][1], value):
            raise _Unfit("a tie")


def _check_distances(draft: Draft, sandbox: Sandbox) -> None:
    if draft.distances is None:
        return
    values = [row[0] for row in sandbox.run(draft.distances).rows]
    scale = max((abs(value) for value in values), default=0.0)
    if not values or min(abs(value) for value in values) <= _SAME * max(scale, 1.0):
        raise _Unfit("a tie")


def _is_tie(a: float, b: float) -> bool:
    return abs(a - b) <= _SAME * max(abs(a), abs(b), 1.0)


def _evidence(draft: Draft, scope: Scope) -> Iterator[dict[str, Any]]:
    """The rows that the SQL reads; rows that follow each other make one span.

    A document in which the filters leave nothing is evidence as a whole: that is what it tells.
    """
    names = [column.name for column in scope.table.schema.columns]
    for part in scope.parts:
        used = [
            span
            for row, span in zip(part.rows, part.spans, strict=True)
            if all(dict(zip(names, row, strict=True))[k] == v for k, v in draft.filters)
        ]
        merged: list[tuple[int, int]] = []
        for start, end in used or part.spans:
            if merged and not part.document.text[merged[-1][1] : start].strip():
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        for start, end in merged:
            yield {"doc": part.document.id, "start": start, "end": end}


def _sample_id(sample: Sample) -> str:
    content = [sample.question, sample.answers, sorted(d.id for d in sample.documents)]
    content.append(sample.derivation["sql"])
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return f"tables-{digest}"[:24]
