"""The corpus on disk: texts in JSON lines, and an index that finds any of them by number or sha256.

The index holds about 70 bytes a document and is memory-mapped; texts are read one by one from their
byte offset, so that a million documents need no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import normalise

INDEX_DTYPE = np.dtype(
    [
        ("key", "<u8"),  # first 8 bytes of the sha256, to sort and search by
        ("sha", "V32"),
        ("part", "<i4"),
        ("offset", "<i8"),
        ("length", "<i4"),  # bytes of the JSON line
        ("n_tokens", "<i4"),
        ("source", "<i2"),  # position in the recipe
        ("is_eval", "?"),
    ]
)
_CACHE_BYTES = 32_000_000  # of JSON; as objects about four times that


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def index_row(
    document: SourceDocument, part: int, offset: int, length: int, n_tokens: int, source: int
) -> tuple:
    """One row of ``INDEX_DTYPE``."""
    sha = hashlib.sha256(document.text.encode()).digest()
    key = int.from_bytes(sha[:8], "little")
    is_eval = document.split == "eval"
    return key, sha, part, offset, length, n_tokens, source, is_eval


class Texts:
    """Texts by sha256: of the corpus, or of the evidence texts that a route wrote itself."""

    def __init__(self, store: DocumentStore, files: Iterable[Path]):
        self._store = store
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in files:
            offset = 0
            with open(path, "rb") as file:
                for line in file:
                    sha = json.loads(line)["sha256"]
                    self._places.setdefault(sha, (path, offset, len(line)))
                    offset += len(line)

    def resolve(self, sha: str) -> str:
        """The text of ``sha``. Raises ``KeyError`` where nobody has it."""
        number = self._store.find(sha)
        if number is not None:
            return self._store.text(number)
        path, offset, length = self._places[sha]
        with open(path, "rb") as file:
            file.seek(offset)
            return json.loads(file.read(length))["text"]

    def split(self, sha: str) -> str | None:
        """Split of a document of the corpus; None for a text that a route wrote."""
        number = self._store.find(sha)
        if number is None:
            return None
        return "eval" if self._store.index["is_eval"][number] else "train"

    def normalised(self, sha: str) -> str:
        """``leaks.normalise`` of the text."""
        number = self._store.find(sha)
        return normalise(self.resolve(sha)) if number is None else self._store.normalised(number)


def part_name(part: int) -> str:
    return f"part-{part:06d}"


class DocumentStore:
    """Documents of a corpus by number (``0 .. len - 1``) or by sha256 of their text.

    ``folder`` holds ``index.npy`` (the kept documents) and ``parts`` the ``part-*.jsonl`` files.
    """

    def __init__(self, folder: str | Path, parts: str | Path):
        self.index = np.load(Path(folder) / "index.npy", mmap_mode="r")
        self._parts = Path(parts)
        self._order = np.argsort(self.index["key"], kind="stable")
        self._sorted = self.index["key"][self._order]
        self._cache: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    def find(self, sha: str) -> int | None:
        """Number of the document whose text has this sha256, or None."""
        raw = bytes.fromhex(sha)
        key = np.uint64(int.from_bytes(raw[:8], "little"))
        for at in range(int(np.searchsorted(self._sorted, key)), len(self._sorted)):
            if self._sorted[at] != key:
                return None
            number = int(self._order[at])
            if self.index["sha"][number].tobytes() == raw:
                return number
        return None

    def sha(self, number: int) -> str:
        return self.index["sha"][number].tobytes().hex()

    def row(self, number: int) -> dict[str, Any]:
        """The stored row: a ``SourceDocument`` with ``n_tokens`` and ``quality``."""
        with self._lock:
            return self._row(int(number))

    def _row(self, number: int) -> dict[str, Any]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        entry = self.index[number]
        with open(self._parts / f"{part_name(int(entry['part']))}.jsonl", "rb") as file:
            file.seek(int(entry["offset"]))
            row = json.loads(file.read(int(entry["length"])))
        self._cache[number] = row
        self._cached_bytes += int(entry["length"])
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            dropped, _ = self._cache.popitem(last=False)
            self._cached_bytes -= int(self.index["length"][dropped])
        return row

    def text(self, number: int) -> str:
        return self.row(number)["text"]

    def normalised(self, number: int) -> str:
        """The text as ``leaks.normalise`` gives it; kept as long as the row is."""
        row = self.row(number)
        if "normalised" not in row:
            row["normalised"] = normalise(row["text"])
        return row["normalised"]

    def document(self, number: int) -> SourceDocument:
        row = {k: v for k, v in self.row(number).items() if k != "normalised"}
        return SourceDocument.model_validate(row)

    def numbers(self, sources: list[int] | None) -> np.ndarray:
        """Numbers of the documents of some sources (None: all), in order."""
        if sources is None:
            return np.arange(len(self))
        return np.flatnonzero(np.isin(self.index["source"], sources))
