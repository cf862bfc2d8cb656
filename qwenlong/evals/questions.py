"""Questions over documents that state the answer in pieces, in a context of a given length.

The questions are those of ``qwenlong.data``: ``multihop`` walks a graph of countries, airports and
time zones (in the shape of HotpotQA: evidence pages among pages of the same kind), ``tables`` asks
for a number that SQL computes over a table spread over documents. Half of the context around the
evidence is other pages of that kind, as far as there are any; the rest is the haystack. A document
that states the answer, bears the title of an evidence document, or belongs to the table that is
asked about stays out.

The documents are real data of small packages (extra ``synth-demo``).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence

from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import AnswerFinder, normalise
from qwenlong.errors import InputError
from qwenlong.evals.haystack import Haystack, Page, Placed, compose
from qwenlong.evals.samples import sample_rng, spread_depths
from qwenlong.types import Sample, TokenCount

EVIDENCE_SHARE = 0.6  # of the context: longer evidence leaves nothing to search
KIND_SHARE = 0.5  # of the distractors are of the kind of the evidence
_PATIENCE = 40  # questions that may be too long for one that fits


def multihop(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """Multi-hop questions among pages of countries, airports and time zones."""
    from qwenlong.data.graph import multihop_samples

    documents = _world()
    questions = multihop_samples(documents, seed=seed, limit=count * _PATIENCE)
    return _in_context(haystack, "multihop", questions, documents, length, count, seed)


def tables(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """Numerical questions over tables that several documents hold together."""
    from qwenlong.data.table_questions import table_samples

    documents = _tables()
    questions = table_samples(documents, seed=seed, limit=count * _PATIENCE)
    return _in_context(haystack, "tables", questions, documents, length, count, seed)


@functools.cache
def _world() -> tuple[SourceDocument, ...]:
    from qwenlong.data.graph_sources import structured_documents

    return tuple(_loaded(structured_documents))


@functools.cache
def _tables() -> tuple[SourceDocument, ...]:
    from qwenlong.data.tables import table_documents

    return tuple(_loaded(table_documents))


def _loaded(load) -> Iterator[SourceDocument]:
    try:
        yield from load()
    except RuntimeError as error:  # a data package is missing; the message names it
        raise InputError(f"{error} (or the extra qlkernels[synth-demo])") from None


def _in_context(
    haystack: Haystack,
    subtype: str,
    questions: Iterator[Sample],
    documents: Sequence[SourceDocument],
    length: int,
    count: int,
    seed: int,
) -> Iterator[Sample]:
    made = 0
    tables_of = {d.id: d.meta.get("table") for d in documents}
    pages = [Page(d.id, d.title, d.title, d.text.strip()) for d in documents]
    for question in questions:
        if made == count:
            return
        needed = sum(haystack.tokens(d.text) for d in question.documents)
        if needed > EVIDENCE_SHARE * length:
            continue
        rng = sample_rng(seed, subtype, length, made)
        yield _fit(haystack, subtype, question, pages, tables_of, rng, length, seed, made)
        made += 1
    if made < count:
        raise InputError(
            f"{subtype}: {made} of {count} questions fit into {length:,} tokens; ask for fewer or "
            "longer ones"
        )


def _fit(
    haystack: Haystack,
    subtype: str,
    question: Sample,
    pages: list[Page],
    tables_of: dict[str, str | None],
    rng: random.Random,
    length: int,
    seed: int,
    index: int,
) -> Sample:
    finder = AnswerFinder(question)
    evidence_ids = {d.id for d in question.documents}
    titles = {normalise(d.title) for d in question.documents}
    asked_tables = {tables_of.get(name) for name in evidence_ids} - {None}

    def refuses(page: Page) -> bool:
        return (
            page.id in evidence_ids
            or normalise(page.title) in titles
            or tables_of.get(page.id) in asked_tables
            or finder.is_in(haystack.normalised(page))
        )

    depths = spread_depths(rng, len(question.documents))
    order = rng.sample(range(len(question.documents)), len(question.documents))
    placed = [
        Placed(
            question.documents[number],
            depth,
            tuple(e for e in question.evidence if e.doc == question.documents[number].id),
        )
        for number, depth in zip(order, depths, strict=True)
    ]
    context = compose(
        haystack,
        rng,
        length,
        placed=placed,
        refuses=refuses,
        kin=rng.sample(pages, len(pages)),
        kin_share=KIND_SHARE,
    )
    return question.model_copy(
        update={
            "id": f"{subtype}-{length}-s{seed}-{index:04d}",
            "subtype": subtype,
            "question_kind": question.subtype,
            "documents": context.documents,
            "evidence": context.evidence,
            "tokens": TokenCount(tokenizer=haystack.tokens.name, n=context.n_tokens),
            "length": length,
            "laps": context.laps,
        }
    )
