"""Overlap with evaluation sets: word n-grams and fuzzy match, for documents and for questions.

A document is contaminated where it shares ``min_document_ngrams`` different 13-grams of words with
the evaluation sets, or holds an evaluation question of at least 6 words whole. A question is
contaminated where it shares a 13-gram, or nearly equals an evaluation question (rapidfuzz) and
asks for the same thing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

from qwenlong.data.leaks import asks_the_same, normalise
from qwenlong.data.loaders import read_text
from qwenlong.data.recipe import DecontaminateConfig
from qwenlong.errors import InputError
from qwenlong.storage import read_jsonl
from qwenlong.types import Sample

MIN_WORDS = 6
_WORD = re.compile(r"\w+")
_QUESTION_KEYS = ("question", "input", "problem", "query", "prompt")
_TEXT_KEYS = ("context", "text", "passage", "document", "article")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


@lru_cache(maxsize=200_000)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """A 64-bit hash for every run of ``n`` words: ``[max(0, len - n + 1)]`` uint64."""
    if len(words) < n:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    count = len(words) - n + 1
    value = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        value = (value ^ hashes[offset : offset + count]) * _MULTIPLIER
        value ^= value >> np.uint64(31)
    return value


def read_evaluation_set(path: str | Path) -> Iterator[tuple[str, str]]:
    """``(kind, text)`` pairs, kind ``question`` or ``document``, of a JSONL file or a text file.

    A row is an object with a question (``question``, ``input``, ``problem``, ``query``, ``prompt``)
    or a text (``context``, ``text``, ``passage``, ``document``, ``article``) or both, or a
    ``Sample``. A list under ``documents`` holds texts or objects with ``text``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"evaluation set {path} does not exist")
    if path.suffix != ".jsonl":
        yield "document", read_text(path)
        return
    for number, row in enumerate(read_jsonl(path), 1):
        found = list(_row_texts(row)) if isinstance(row, dict) else []
        if not found:
            raise InputError(
                f"{path}, row {number}: no text under any of {_QUESTION_KEYS + _TEXT_KEYS}"
            )
        yield from found


def _row_texts(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for kind, keys in (("question", _QUESTION_KEYS), ("document", _TEXT_KEYS)):
        for key in keys:
            if isinstance(row.get(key), str) and row[key].strip():
                yield kind, row[key]
    documents = row.get("documents")
    for document in documents if isinstance(documents, list) else []:
        text = document.get("text") if isinstance(document, dict) else document
        if isinstance(text, str) and text.strip():
            yield "document", text


class Contamination:
    """Answers whether a document or a question overlaps with the evaluation sets of a recipe."""

    def __init__(
        self, config: DecontaminateConfig, entries: Iterable[tuple[str, str]] | None = None
    ):
        """``entries`` are ``(kind, text)`` pairs in place of the files of ``config.sets``."""
        if entries is None:
            entries = (entry for path in config.sets for entry in read_evaluation_set(path))
        self.config = config
        long: list[np.ndarray] = [np.empty(0, dtype=np.uint64)]
        whole: dict[int, set[int]] = {}
        questions: dict[str, None] = {}
        for kind, text in entries:
            words = words_of(text)
            long.append(np.unique(ngram_hashes(words, config.ngram)))
            if kind == "question":
                questions[" ".join(words)] = None
                # A longer question shares enough n-grams with a text that holds it.
                if MIN_WORDS <= len(words) < config.ngram + config.min_document_ngrams - 1:
                    hashes = ngram_hashes(words, len(words))
                    whole.setdefault(len(words), set()).add(int(hashes[0]))
        self._long = np.unique(np.concatenate(long))
        self._whole = {n: np.array(sorted(h), dtype=np.uint64) for n, h in sorted(whole.items())}
        self._questions = list(questions)

    def document(self, text: str) -> dict[str, Any]:
        """Verdict on one document."""
        words = words_of(text)
        shared = self._count(ngram_hashes(words, self.config.ngram))
        holds_question = any(
            _is_in(ngram_hashes(words, n), hashes).any()
            for n, hashes in self._whole.items()
            if n <= len(words)
        )
        clean = shared < self.config.min_document_ngrams and not holds_question
        return {
            "verdict": "pass" if clean else "fail",
            "ngrams": shared,
            "holds_question": bool(holds_question),
        }

    def question(self, text: str) -> dict[str, Any]:
        """Verdict on one question."""
        words = words_of(text)
        shared = self._count(ngram_hashes(words, self.config.ngram))
        alike = process.extract(
            " ".join(words),
            self._questions,
            scorer=fuzz.token_sort_ratio,
            score_cutoff=self.config.question_similarity,
            limit=None,
        )
        same = [score for other, score, _ in alike if asks_the_same(words, other.split())]
        similarity = round(max(same), 1) if same else None
        clean = shared == 0 and not same
        return {"verdict": "pass" if clean else "fail", "ngrams": shared, "similarity": similarity}

    def sample(self, sample: Sample, resolve: Callable[[str], str]) -> dict[str, Any]:
        """Verdict on a sample: its question with its choices, and its evidence documents.

        Distractors were judged when they entered the corpus.
        """
        question = self.question(" ".join([sample.question, *(sample.choices or [])]))
        if question["verdict"] == "pass" and sample.choices:
            question = self.question(sample.question)
        for document in sample.documents:
            if document.role != "evidence":
                continue
            text = document.text if document.text is not None else resolve(document.ref)
            found = self.document(text)
            if found["verdict"] == "fail":
                return {**found, "document": document.id}
        return question

    def _count(self, hashes: np.ndarray) -> int:
        return int(np.count_nonzero(_is_in(np.unique(hashes), self._long)))


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def describe(config: DecontaminateConfig) -> list[str]:
    """Name and content hash of every evaluation set, for a stage's key."""
    found = []
    for path in config.sets:
        if not Path(path).is_file():
            raise InputError(f"evaluation set {path} does not exist")
        found.append(json.dumps([path, hashlib.sha256(Path(path).read_bytes()).hexdigest()]))
    return found
