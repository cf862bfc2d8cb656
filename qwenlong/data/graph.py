"""Route A: multi-hop questions over a knowledge graph that spans many documents.

``multihop_samples`` builds the graph from facts that rendered documents carry (``graph_sources``,
``python_pages``) and from facts that a model extracted, draws paths through it, and yields
questions whose answer is proved to be the only one by a query over the whole graph. Each sample
holds the documents that state the facts, the characters where they do, and the query
(arXiv 2512.12967, section 3: the paper's route A, with rules in the place of a model).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.graph_draft import Draft
from qwenlong.data.graph_questions import (
    PARADIGMS,
    Asked,
    QuestionFunction,
    answer_from,
    draft_question,
)
from qwenlong.data.graph_sources import Triple, document_triples
from qwenlong.data.knowledge_graph import KnowledgeGraph, Node
from qwenlong.data.samples import (
    EVAL_SHARE,
    NUMBER_INSTRUCTIONS,
    PROSE_KINDS,
    REWARDS,
    contains_term,
    sample_id,
)
from qwenlong.prompts import TEXT_INSTRUCTIONS
from qwenlong.types import Document, Evidence, Sample

if TYPE_CHECKING:
    from qwenlong.llm import Client

WEIGHTS = {"multi_fact": 0.4, "temporal": 0.2, "causal": 0.2, "hypothetical": 0.2}
FEW_DOCUMENTS_SHARE = 0.1  # of the samples may rest on fewer than three documents
_TRIES = 25  # drafts for one sample
_PATIENCE = 8  # samples in a row that a question function may fail to give before it is dropped


def build_graph(
    documents: Sequence[SourceDocument], extracted: Iterable[Triple] = ()
) -> KnowledgeGraph:
    """The graph of the facts that ``documents`` carry, with ``extracted`` ones merged in."""
    aliases = {
        alias: document.meta["entity"]
        for document in documents
        for alias in document.meta.get("aliases", ())
        if "entity" in document.meta
    }
    stated = (triple for document in documents for triple in document_triples(document))
    return KnowledgeGraph(stated, aliases, extracted)


def multihop_samples(
    documents: Iterable[SourceDocument],
    *,
    seed: int,
    limit: int,
    hops: tuple[int, int] = (2, 6),
    extracted: Iterable[Triple] = (),
    client: Client | None = None,
    max_tokens: int = 2048,
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Multi-hop questions, deterministic in ``documents`` and ``seed``.

    Args:
        documents: those that carry facts in ``meta["triples"]`` and those that ``extracted`` names.
        limit: most samples to yield; fewer come when the graph gives no more.
        hops: fewest and most facts that lead to the answer; for comparisons and sums, to each
            side of it. Clauses that only tell entities apart are not counted.
        extracted: facts that a model read out of the documents.
        client: a model that reads facts out of the documents that carry none; None leaves those
            documents out.
        max_tokens: of a reply. With that of the readings that gave ``extracted``, the client's
            cache answers for documents that were read there.
        dropped: counts what the client's readings lost, by reason.

    Yields:
        Samples of task ``multihop_qa`` with subtype ``multi_fact``, ``temporal``, ``causal`` or
        ``hypothetical``; their documents are the evidence, all of one split.
    """
    low, high = hops
    if not 2 <= low <= high:
        raise ValueError(f"multihop_samples: hops is {hops}, expected 2 <= fewest <= most")
    documents = list(documents)
    by_id = {d.id: d for d in documents}
    extracted = list(extracted)
    if client is not None:
        from qwenlong.data.extract import Reader, model_triples

        unread = [d for d in documents if "triples" not in d.meta and d.kind in PROSE_KINDS]
        reader = Reader(client, max_tokens=max_tokens, dropped=dropped)
        extracted += model_triples(reader, unread)
    for triple in extracted:
        if triple.doc not in by_id or triple.end > len(by_id[triple.doc].text):
            raise ValueError(
                f"multihop_samples: extracted fact {triple[:3]} names characters "
                f"[{triple.start}, {triple.end}) of {triple.doc!r}, which the documents do not have"
            )
    graph = build_graph(documents, extracted)
    pages = {d.meta["entity"]: (d.id, len(d.text)) for d in documents if "entity" in d.meta}
    allowed: dict[str, set[str]] = {"train": set(), "eval": set()}
    for document in documents:
        allowed[document.split].add(document.id)
    pools: dict[str, dict[str, list[Node]]] = {"train": {}, "eval": {}}
    for document in documents:
        entity, kind = document.meta.get("entity"), document.meta.get("entity_type")
        if entity is not None:
            pools[document.split].setdefault(kind, []).append((kind, entity))
    for pool in pools.values():
        pool[""] = [("", name) for name in graph.names("")]  # evidence decides what can be used
    rng = random.Random(f"multihop {seed}")
    made = few = 0
    seen: set[tuple] = set()
    alive = {split: _Alive() for split in ("train", "eval")}
    while made < limit:
        split = "eval" if rng.random() < EVAL_SHARE and alive["eval"].any() else "train"
        if not alive[split].any():
            split = "eval"
            if not alive[split].any():
                return
        paradigm, make = alive[split].draw(rng)
        sample = None
        for _ in range(_TRIES):
            draft = Draft(graph, rng, allowed[split], pages, pools[split])
            asked = draft_question(draft, make, rng.randint(low, high))
            if asked is None:
                continue
            # The same facts in other words, or about an entity described otherwise, are no news.
            key = (asked.template, *sorted(draft.chain))
            if key in seen:
                continue
            if not low <= -(-len(draft.chain) // asked.sides) <= high:
                continue
            sample = _sample(draft, asked, paradigm, by_id)
            # The evaluation split is a twentieth of the documents: long chains are rare in it.
            is_small = sample is not None and split == "train" and len(sample.documents) < 3
            if is_small and few + 1 > FEW_DOCUMENTS_SHARE * (made + 1):
                sample = None
            if sample is not None:
                few += is_small
                break
        alive[split].note(make, sample is not None)
        if sample is not None:
            seen.add(key)
            made += 1
            yield sample


class _Alive:
    """The question functions of a split that still find something."""

    def __init__(self):
        self._left = {p: {make: _PATIENCE for make in makes} for p, makes in PARADIGMS.items()}

    def any(self) -> bool:
        return any(self._left.values())

    def draw(self, rng: random.Random) -> tuple[str, QuestionFunction]:
        paradigms = [p for p, makes in self._left.items() if makes]
        (paradigm,) = rng.choices(paradigms, [WEIGHTS[p] for p in paradigms])
        return paradigm, rng.choice(list(self._left[paradigm]))

    def note(self, make: QuestionFunction, found: bool) -> None:
        makes = next(makes for makes in self._left.values() if make in makes)
        makes[make] = _PATIENCE if found else makes[make] - 1
        if not makes[make]:
            del makes[make]


def _sample(
    draft: Draft, asked: Asked, paradigm: str, by_id: Mapping[str, SourceDocument]
) -> Sample | None:
    answer = answer_from(asked.compute, dict(zip(asked.select, asked.values, strict=True)))
    hidden = {answer, *asked.values, *draft.entities.values()}
    if any(contains_term(asked.question, term) for term in hidden):
        return None
    statements = [s for _, s in draft.facts] + draft.checked
    evidence = [Evidence(doc=s.doc, start=s.start, end=s.end) for s in dict.fromkeys(statements)]
    docs = [by_id[doc] for doc in dict.fromkeys(s.doc for s in statements)]
    if len(docs) < 2:
        return None  # one page tells it all
    derivation: dict[str, Any] = {
        "kind": "graph",
        "template": asked.template,
        "hops": -(-len(draft.chain) // asked.sides),
        "facts": len(draft.chain),
        "obfuscation": draft.obfuscation,
        "path": [list(fact) for fact in draft.chain],
        "triples": [[*fact, *statement] for fact, statement in draft.facts],
        "query": draft.query.to_json(),
        "compute": asked.compute,
    }
    kind = "number" if asked.is_number else "text"
    return Sample(
        id=sample_id("graph", [asked.question, answer, [d.id for d in docs]]),
        task="multihop_qa",
        subtype=paradigm,
        split=docs[0].split,
        question=asked.question,
        instructions=NUMBER_INSTRUCTIONS if asked.is_number else TEXT_INSTRUCTIONS,
        documents=[Document(id=d.id, title=d.title, text=d.text) for d in docs],
        answers=[answer],
        answer_type=kind,
        unit=asked.unit if asked.is_number else None,
        tolerance=0.0 if asked.is_number else None,
        reward=REWARDS[kind],
        evidence=evidence,
        derivation=derivation,
    )
