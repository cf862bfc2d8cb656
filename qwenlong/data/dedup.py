"""Near-duplicate documents: MinHash signatures, banded, in memory that does not hold the texts.

A signature has 128 16-bit minima over the word 5-grams of a text; two signatures agree in a share
of places that estimates the Jaccard similarity J of the two sets (standard deviation below 0.045).
18 bands of 7 rows make a pair a candidate with probability 1 - (1 - J^7)^18: 0.99 at J = 0.8,
0.15 at J = 0.5. A candidate is a duplicate when its estimate reaches the threshold.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

PERMUTATIONS = 128
BANDS, ROWS = 18, 7
_SEED = 42
_WIDTH = 2 * PERMUTATIONS  # bytes of a signature
_CHUNK = 16_384
_WORD = re.compile(r"\w+")


def shingles(text: str) -> list[str]:
    """Word 5-grams of ``text``, or character 8-grams where it has no spaces between words."""
    text = text.lower()
    words = _WORD.findall(text)
    if not words or sum(map(len, words)) > 16 * len(words):
        joined = "".join(words) or text
        return [joined[i : i + 8] for i in range(max(1, len(joined) - 7))]
    return [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]


def signature(text: str) -> np.ndarray:
    """MinHash signature of ``text``: ``[128]`` uint16."""
    import rensa

    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=_SEED)
    minhash.update(shingles(text))
    return (np.array(minhash.digest(), dtype=np.uint64) & 0xFFFF).astype(np.uint16)


def exact_signature(text: str) -> np.ndarray:
    """A signature that equals that of the same text and resembles no other: ``[128]`` uint16."""
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(2 * PERMUTATIONS), dtype="<u2")


def exact_duplicates(keys: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """For every document, the index of the first with the same hash (often itself).

    Args:
        keys: ``[N]`` uint64, the first 8 bytes of ``hashes``: two equal hashes have equal keys.
            Of other hashes with one key (of N documents, N^2 / 2^65 pairs) some copies are missed.
        hashes: ``[N]`` of bytes.
    """
    first = np.arange(len(keys), dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    # Equal keys are neighbours, in document order.
    for place in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]).tolist():
        a, b = order[place], order[place + 1]
        if hashes[a].tobytes() == hashes[b].tobytes():
            first[b] = first[a]
    return first


def near_duplicates(signature_files: Iterable[Path], threshold: float, work: Path) -> np.ndarray:
    """For every document, the index of the earliest document of its cluster (often itself).

    Args:
        signature_files: ``.npy`` files of ``[n, 128]`` uint16, in document order.
        threshold: similarity from which two documents count as the same, in ``(0, 1]``.
        work: folder for a temporary file of 256 bytes a document.

    Returns:
        ``[N]`` int64. Memory: about 50 bytes a document.
    """
    path = work / ".signatures.tmp"
    try:
        count = 0
        with open(path, "wb") as file:
            for part in signature_files:
                signatures = np.load(part)
                file.write(np.ascontiguousarray(signatures).tobytes())
                count += len(signatures)
        parent = np.arange(count, dtype=np.int64)
        with open(path, "rb") as file:
            for band in range(BANDS if count > 1 else 0):
                _join_band(file, _band_hashes(file, count, band), parent, threshold)
        for number in range(count):
            parent[number] = _find(parent, number)
        return parent
    finally:
        path.unlink(missing_ok=True)


def _band_hashes(file: IO[bytes], count: int, band: int) -> np.ndarray:
    """One hash for each document of its rows in this band: ``[count]`` uint64."""
    hashes = np.empty(count, dtype=np.uint64)
    file.seek(0)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        chunk = np.frombuffer(file.read((stop - start) * _WIDTH), dtype=np.uint16)
        rows = chunk.reshape(-1, PERMUTATIONS)[:, band * ROWS : (band + 1) * ROWS]
        rows = rows.astype(np.uint64)
        value = np.zeros(stop - start, dtype=np.uint64)
        for column in rows.T:
            value = (value ^ column) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        hashes[start:stop] = value
    return hashes


def _join_band(file: IO[bytes], hashes: np.ndarray, parent: np.ndarray, threshold: float) -> None:
    """Join documents of one hash whose signatures agree; the root is the earliest."""
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    same = (
        np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    )  # positions with their like before them
    if not len(same):
        return
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    first = starts[np.searchsorted(starts, same, side="right") - 1]
    # The first of a bucket and the one before: a chain of near neighbours stays together.
    left = np.concatenate([order[first], order[same - 1]])
    right = np.concatenate([order[same], order[same]])
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        root_a, root_b = _find(parent, a), _find(parent, b)
        if root_a == root_b:
            continue
        x = np.frombuffer(os.pread(file.fileno(), _WIDTH, a * _WIDTH), dtype=np.uint16)
        y = np.frombuffer(os.pread(file.fileno(), _WIDTH, b * _WIDTH), dtype=np.uint16)
        if np.count_nonzero(x == y) >= threshold * PERMUTATIONS:
            parent[max(root_a, root_b)] = min(root_a, root_b)


def _find(parent: np.ndarray, i: int) -> int:
    root = i
    while parent[root] != root:
        root = parent[root]
    while parent[i] != root:
        parent[i], i = root, parent[i]
    return int(root)
