"""Contexts of a target length: evidence documents among distractors, with the spread measured.

Distractors come from a pool of the same split, a share of them hard (BM25 against the question),
the rest random. One is refused if it states the answer, is an evidence document or bears the title
of one, holds rows of an evidence table, or comes from a source that could state a fact of the
evidence in another way (a shared topic). An answer that a graph proved to be the only one was
proved over the documents that the route saw at once (``group``): other documents with facts stay
out. Evidence goes to drawn positions of the context; what came
out is measured: for every evidence document the position of its spans as a fraction of the context,
and ``documents_apart``, the most evidence documents of which any two are more than 25 % apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenlong.data.documents import count_tokens
from qwenlong.data.leaks import AnswerFinder, normalise
from qwenlong.data.recipe import ExtendConfig, SourceConfig
from qwenlong.data.store import DocumentStore, sha256
from qwenlong.prompts import document_block, view
from qwenlong.types import Document, Sample, TokenCount

APART = 0.25
HARD_CANDIDATES = 400
_INDEXED_CHARACTERS = 3000
_WORD = re.compile(r"[^\W_]{2,}")
_HEADER_TOKENS = 14  # of `<document index=... title=...>` and its end, without the title
_FULL = 0.97  # a context is full from this share of its target


def seeded(*parts: object) -> np.random.Generator:
    """A generator that depends on ``parts`` alone: the same in any process and order of work."""
    digest = hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


# --- pool --------------------------------------------------------------------


class DistractorPool:
    """Documents of one split to draw distractors from, with a BM25 index over how they begin."""

    def __init__(self, store: DocumentStore, folder: Path):
        import bm25s

        self.numbers = np.load(folder / "numbers.npy")  # [n] into the store, ascending
        self.n_tokens = np.asarray(store.index["n_tokens"][self.numbers])
        self._bm25 = None
        if len(self.numbers):
            self._bm25 = bm25s.BM25.load(folder, mmap=True, show_progress=False)

    @staticmethod
    def build(store: DocumentStore, numbers: np.ndarray, size: int, folder: Path) -> None:
        """Choose at most ``size`` documents by the hash of their text, index them in ``folder``."""
        import bm25s

        folder.mkdir(parents=True, exist_ok=True)
        if len(numbers) > size:
            by_hash = np.argsort(store.index["key"][numbers], kind="stable")[:size]
            numbers = np.sort(numbers[by_hash])
        np.save(folder / "numbers.npy", numbers)
        if not len(numbers):
            return
        vocabulary: dict[str, int] = {}
        ids = []
        for number in numbers:
            row = store.row(number)
            words = bm25_words(f"{row['title']} {row['text'][:_INDEXED_CHARACTERS]}")
            ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        vocabulary.setdefault("", len(vocabulary))
        bm25 = bm25s.BM25()
        bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        bm25.save(folder, show_progress=False)

    def hard(self, query: str) -> np.ndarray:
        """Places in the pool, best BM25 score first, positive scores only."""
        if self._bm25 is None:
            return np.empty(0, dtype=np.int64)
        words = [w for w in dict.fromkeys(bm25_words(query)) if w in self._bm25.vocab_dict]
        if not words:
            return np.empty(0, dtype=np.int64)
        scores = self._bm25.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:HARD_CANDIDATES]
        return order[scores[order] > 0]


def bm25_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


# --- extension ---------------------------------------------------------------


@dataclass
class _Piece:
    """A document on its way into a context."""

    document: Document
    cost: int  # tokens with its header, as estimated from the cached count


class Extender:
    """Extends samples of one split; holds the pool and the caches of one process."""

    def __init__(
        self,
        store: DocumentStore,
        pool: DistractorPool,
        sources: Sequence[SourceConfig],
        config: ExtendConfig,
        *,
        tokenizer: str,
        seed: int,
        resolve: Callable[[str], str],
    ):
        self.store, self.pool, self.sources, self.config = store, pool, sources, config
        self.tokenizer, self.seed, self.resolve = tokenizer, seed, resolve

    def extend(self, sample: Sample) -> Sample:
        """``sample`` with distractors up to a drawn target, its documents in their final order.

        Sets ``tokens`` (real tokens of the rendered documents) and the extra field ``placement``:
        ``target_tokens``, ``positions`` (document id, fraction), ``documents_apart``, ``hard`` and
        ``random`` (how many distractors of each kind).
        """
        rng = seeded(self.seed, "extend", sample.id)
        evidence = [
            self._piece(d, self.resolve(d.ref) if d.ref else d.text) for d in sample.documents
        ]
        used = sum(piece.cost for piece in evidence)
        target = self._target(used, rng)
        hard, random = self._distractors(sample, target - used, rng)
        wants_spread = rng.random() < self.config.spread_share
        while True:
            distractors = hard + random
            pieces = _best_order(evidence, distractors, wants_spread, rng)
            documents = [piece.document for piece in pieces]
            extended = sample.model_copy(update={"documents": documents})
            block = document_block(view(extended).documents, self.resolve)
            n_tokens = count_tokens(block, self.tokenizer)
            if n_tokens <= target or not distractors:
                break
            (random or hard).pop()  # the estimate was low: drop the last one and count again
        positions = evidence_positions(extended, [piece.cost for piece in pieces], self.resolve)
        placement = {
            "target_tokens": target,
            "positions": [[doc, round(p, 4)] for doc, p in positions.items()],
            "documents_apart": documents_apart(positions.values()),
            "hard": len(hard),
            "random": len(random),
        }
        tokens = TokenCount(tokenizer=self.tokenizer, n=n_tokens)
        return extended.model_copy(update={"tokens": tokens, "placement": placement})

    def _piece(self, document: Document, text: str) -> _Piece:
        number = self.store.find(document.ref or sha256(text))
        if number is None:
            n_tokens = count_tokens(text, self.tokenizer)
        else:
            n_tokens = int(self.store.index["n_tokens"][number])
        return _Piece(document, n_tokens + self._header_tokens(document.title))

    def _header_tokens(self, title: str) -> int:
        return _HEADER_TOKENS + (len(title) + 2) // 3

    def _target(self, used: int, rng: np.random.Generator) -> int:
        """A length by weight among those that hold the evidence and that the pool can fill.

        The shortest that holds the evidence where the pool fills none, the longest where none holds
        it: ``verify`` judges what came out.
        """
        lengths = sorted(self.config.lengths)
        draw = rng.random()
        most = used + 0.9 * float(self.pool.n_tokens.sum())  # a small pool fills no long context
        fitting = [n for n in lengths if used <= n <= most and self.config.lengths[n] > 0]
        if not fitting:
            return next((n for n in lengths if n >= used), lengths[-1])
        weights = np.array([self.config.lengths[n] for n in fitting])
        place = np.searchsorted(np.cumsum(weights) / weights.sum(), draw, side="right")
        return fitting[min(int(place), len(fitting) - 1)]

    def _distractors(
        self, sample: Sample, budget: int, rng: np.random.Generator
    ) -> tuple[list[_Piece], list[_Piece]]:
        refuses = _Refusal(sample, self.store, self.sources)
        taken: set[int] = set()
        full = budget * (1 - _FULL)

        def take(places: np.ndarray, room: float, pieces: list[_Piece]) -> float:
            for place in places:
                if room < full:
                    break
                place = int(place)
                if place in taken or self.pool.n_tokens[place] + _HEADER_TOKENS > room:
                    continue
                number = int(self.pool.numbers[place])
                row = self.store.row(number)
                cost = int(row["n_tokens"]) + self._header_tokens(row["title"])
                if cost > room or refuses(number, row):
                    continue
                taken.add(place)
                refuses.ids.add(row["id"])
                document = Document(
                    id=row["id"], title=row["title"], role="distractor", ref=self.store.sha(number)
                )
                pieces.append(_Piece(document, cost))
                room -= cost
            return room

        query = " ".join([sample.question, *(sample.choices or [])])
        hard: list[_Piece] = []
        random: list[_Piece] = []
        hard_room = budget * self.config.hard_share
        spent = hard_room - take(self.pool.hard(query), hard_room, hard) if hard_room else 0.0
        room = budget - spent
        small = np.flatnonzero(self.pool.n_tokens <= room)
        take(small[rng.permutation(len(small))], room, random)
        return hard, random


class _Refusal:
    """Whether a document must stay out of the context of one sample."""

    def __init__(
        self,
        sample: Sample,
        store: DocumentStore,
        sources: Sequence[SourceConfig],
    ):
        self._finder = AnswerFinder(sample)
        self._titles = {normalise(d.title) for d in sample.documents if d.title}
        self._refs, self._tables, self._sources = set(), set(), set()
        self.ids = {d.id for d in sample.documents}  # of the whole context, once it grows
        for document in sample.documents:
            sha = document.ref or sha256(document.text)
            self._refs.add(sha)
            number = store.find(sha)
            if number is not None:
                row = store.row(number)
                self._sources.add(row["source"])
                self._tables.add(row["meta"].get("table"))
        self._tables.discard(None)
        by_name = {source.name: set(source.topics) for source in sources}
        topics = set().union(*(by_name[name] for name in self._sources))
        is_graph = sample.derivation.get("kind") == "graph"
        self._group = getattr(sample, "group", None) if is_graph else None
        self._rivals = {name for name, others in by_name.items() if topics & others} - self._sources
        self._store = store

    def __call__(self, number: int, row: dict) -> bool:
        return (
            row["source"] in self._rivals
            or row["id"] in self.ids
            or self._store.sha(number) in self._refs
            or row["meta"].get("table") in self._tables
            or self._is_unseen(number, row)
            or normalise(row["title"]) in self._titles
            or self._finder.is_in(self._store.normalised(number))
        )

    def _is_unseen(self, number: int, row: dict) -> bool:
        if self._group is None or self._group[0] <= number <= self._group[1]:
            return False
        return bool(row["meta"].get("triples")) or row["source"] in self._sources


# --- order and spread --------------------------------------------------------


def _best_order(
    evidence: list[_Piece],
    distractors: list[_Piece],
    wants_spread: bool,
    rng: np.random.Generator,
) -> list[_Piece]:
    """Evidence at drawn positions among shuffled distractors; of eight tries the widest spread."""
    wanted = min(3, len(evidence))
    best, best_apart = [], -1
    for _ in range(8 if wants_spread else 1):
        pieces = _place(evidence, distractors, wants_spread, rng)
        apart = documents_apart(_starts(pieces))
        if apart > best_apart:
            best, best_apart = pieces, apart
        if best_apart >= wanted:
            break
    return best


def _place(
    evidence: list[_Piece], distractors: list[_Piece], spread: bool, rng: np.random.Generator
) -> list[_Piece]:
    targets = np.sort(rng.random(len(evidence)))
    wanted = min(3, len(evidence)) if spread else 0
    for _ in range(200):  # three uniform draws are that far apart in one of eight
        if documents_apart(targets) >= wanted:
            break
        targets = np.sort(rng.random(len(evidence)))
    queue = [evidence[i] for i in rng.permutation(len(evidence))]
    fillers = [distractors[i] for i in rng.permutation(len(distractors))]
    room = sum(piece.cost for piece in fillers)
    pieces, filled = [], 0
    for piece, target in zip(queue, targets, strict=True):
        while fillers and filled + fillers[-1].cost / 2 < target * room:
            filled += fillers[-1].cost
            pieces.append(fillers.pop())
        pieces.append(piece)
    return pieces + fillers[::-1]


def _starts(pieces: list[_Piece]) -> list[float]:
    """Middle of every evidence document as a fraction of the context."""
    total = sum(piece.cost for piece in pieces)
    at, middles = 0, []
    for piece in pieces:
        if piece.document.role == "evidence":
            middles.append((at + piece.cost / 2) / max(1, total))
        at += piece.cost
    return middles


def evidence_positions(
    sample: Sample, costs: Sequence[int], resolve: Callable[[str], str]
) -> dict[str, float]:
    """For every evidence document, where its spans lie: their mean as a fraction of the context.

    Args:
        costs: tokens of each document of ``sample``, in order.
    """
    total = max(1, sum(costs))
    positions, at = {}, 0
    for document, cost in zip(sample.documents, costs, strict=True):
        if document.role == "evidence":
            spans = [(e.start + e.end) / 2 for e in sample.evidence if e.doc == document.id]
            text = document.text if document.text is not None else resolve(document.ref)
            within = sum(spans) / len(spans) / max(1, len(text)) if spans else 0.5
            positions[document.id] = (at + within * cost) / total
        at += cost
    return positions


def documents_apart(positions: Sequence[float], apart: float = APART) -> int:
    """The most of ``positions`` of which any two are more than ``apart`` from each other."""
    count, last = 0, -np.inf
    for position in sorted(positions):
        if position > last + apart:
            count, last = count + 1, position
    return count
