"""Near-duplicate documents: MinHash signatures, banded, in memory that does not hold the texts.

A signature has 128 16-bit minima over the word 5-grams of a text; two signatures agree in a share
of places that estimates the Jaccard similarity J of the two sets (standard deviation below 0.045).
18 bands of 7 rows make a pair a candidate with probability 1 - (1 - J^7)^18: 0.99 at J = 0.8,
0.15 at J = 0.5. A candidate is a duplicate when its estimate reaches the threshold.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PERMUTATIONS = 128
BANDS, ROWS = 18, 7
_SEED = 42
_PAIR_CHUNK = 16_384
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


def near_duplicates(signature_files: Iterable[Path], threshold: float, work: Path) -> np.ndarray:
    """For every document, the index of the earliest document of its cluster (often itself).

    Args:
        signature_files: ``.npy`` files of ``[n, 128]`` uint16, in document order.
        threshold: similarity from which two documents count as the same, in ``(0, 1]``.
        work: folder for a temporary file of 256 bytes a document.

    Returns:
        ``[N]`` int64. Memory: about 40 bytes a document.
    """
    path = work / ".signatures.tmp"
    try:
        count, bands = 0, []
        with open(path, "wb") as file:
            for part in signature_files:
                signatures = np.load(part)
                file.write(np.ascontiguousarray(signatures).tobytes())
                count += len(signatures)
        parent = np.arange(count, dtype=np.int64)
        if count < 2:
            return parent
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for band in range(BANDS):
                bands = _band_hashes(data, count, band)
                _join_band(data, bands, parent, threshold)
        return np.array([_find(parent, i) for i in range(count)], dtype=np.int64)
    finally:
        path.unlink(missing_ok=True)


def _rows(data: mmap.mmap, start: int, stop: int) -> np.ndarray:
    """Signatures ``[start, stop)`` as a copy, so that the mapped pages can be given back."""
    width = PERMUTATIONS * 2
    raw = data[start * width : stop * width]
    return np.frombuffer(raw, dtype=np.uint16).reshape(-1, PERMUTATIONS)


def _band_hashes(data: mmap.mmap, count: int, band: int) -> np.ndarray:
    hashes = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _PAIR_CHUNK):
        stop = min(count, start + _PAIR_CHUNK)
        rows = _rows(data, start, stop)[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        value = np.zeros(stop - start, dtype=np.uint64)
        for column in rows.T:
            value = (value ^ column) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        hashes[start:stop] = value
    data.madvise(mmap.MADV_DONTNEED)
    return hashes


def _join_band(data: mmap.mmap, hashes: np.ndarray, parent: np.ndarray, threshold: float) -> None:
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
    width = PERMUTATIONS * 2
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        root_a, root_b = _find(parent, a), _find(parent, b)
        if root_a == root_b:
            continue
        x = np.frombuffer(data[a * width : (a + 1) * width], dtype=np.uint16)
        y = np.frombuffer(data[b * width : (b + 1) * width], dtype=np.uint16)
        if np.count_nonzero(x == y) >= threshold * PERMUTATIONS:
            parent[max(root_a, root_b)] = min(root_a, root_b)
    data.madvise(mmap.MADV_DONTNEED)


def _find(parent: np.ndarray, i: int) -> int:
    root = i
    while parent[root] != root:
        root = parent[root]
    while parent[i] != root:
        parent[i], i = root, parent[i]
    return int(root)
