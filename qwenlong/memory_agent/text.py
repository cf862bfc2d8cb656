"""A long text in chunks of at most so many tokens, read from disk as they are needed.

A ``TextSource`` is one or several documents, one after the other, as bytes that can be read from
any position; files stay on disk. A ``ChunkStream`` cuts it: a chunk ends at the last sentence end
of its last part, else at a line, a word or a token. Chunks put together are the text, byte for
byte. What is held: the ends of the chunks found so far, and a few chunks.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenlong import prompts
from qwenlong.data.documents import split_sentences
from qwenlong.errors import InputError
from qwenlong.tokens import tokenize
from qwenlong.types import Sample

_BYTES_PER_TOKEN = 6  # read at first; more where it does not fill a chunk
# A chunk is cut there whatever its tokens: white space may run on for ever in one of them.
_MOST_BYTES_PER_TOKEN = 256
_LOOK_AHEAD = 256  # characters behind a cut that tell whether a sentence ends before it
_LOOK_BEHIND = 64  # and before it, so that an abbreviation there is known
_BLOCK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


# --- tokens ------------------------------------------------------------------


class CharacterTokenizer:
    """An estimate where a model's tokenizer is not at hand: so many characters are a token."""

    def __init__(self, characters: int = 4):
        if characters < 1:
            raise ValueError(f"CharacterTokenizer: characters is {characters}; at least 1")
        self.characters = characters

    def token_ends(self, text: str, max_tokens: int | None = None) -> np.ndarray:
        length = len(text)
        if max_tokens is not None:
            length = min(length, max_tokens * self.characters)
        ends = np.arange(self.characters, length + self.characters, self.characters)
        return np.minimum(ends, length)


def token_ends(tokenizer: Any, text: str, max_tokens: int | None = None) -> np.ndarray:
    """``[n]`` int64: the character at which each of the first ``max_tokens`` tokens ends.

    Args:
        tokenizer: a fast tokenizer of transformers, or an object with such a method ``token_ends``.
        text: special tokens are not added.
        max_tokens: all tokens if None.
    """
    if hasattr(tokenizer, "token_ends"):
        return np.asarray(tokenizer.token_ends(text, max_tokens), dtype=np.int64)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
            "(tokenizer.json)."
        )
    if not text:
        return np.empty(0, dtype=np.int64)
    tokens = tokenize(tokenizer, text, max_tokens)
    return tokens.offsets[tokens.n_prefix :, 1]


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of ``text``, without special ones."""
    return len(token_ends(tokenizer, text))


def cut_at(tokenizer: Any, text: str, max_tokens: int, snap_tokens: int = 0) -> tuple[int, int]:
    """Where ``text`` is cut so that the piece before has at most ``max_tokens``, and its tokens.

    Args:
        tokenizer: of ``token_ends``.
        text: may go on behind the piece, which shows where its last sentence ends.
        max_tokens: at least 1.
        snap_tokens: how many of the last tokens may be given up to end at a sentence, else at a
            line, else at a word. With 0 the cut is behind the last token that fits.

    Returns:
        Characters and tokens of the piece: ``len(text)`` if all of it fits, and at least one
        character where there is text.
    """
    limit = max_tokens
    while True:
        ends = token_ends(tokenizer, text, limit + 1)
        if len(ends) <= limit:
            cut = len(text)
        else:
            cut = max(1, int(ends[limit - 1]))
            if snap_tokens:
                first = max(0, limit - snap_tokens)
                low = int(ends[first - 1]) if first else 0
                cut = _snap(text, low, cut)
        # A piece may have more tokens by itself than as a part of the text.
        count = count_tokens(tokenizer, text[:cut])
        if count <= max_tokens or limit == 1:
            return cut, count
        limit = max(1, limit - (count - max_tokens))


def _snap(text: str, low: int, high: int) -> int:
    """The best place to cut in ``[low, high]``, not 0."""
    begin = max(0, low - _LOOK_BEHIND)
    region = text[begin : high + _LOOK_AHEAD]
    # The last span may end where the region does, which is no end of a sentence.
    ends = [begin + end for _, end in split_sentences(region)[:-1]]
    ends = [end for end in ends if max(1, low) <= end <= high]
    if ends:
        return ends[-1]
    line = text.rfind("\n", low, high)
    if line >= 0:
        return line + 1
    for position in range(high, low, -1):
        if text[position - 1].isspace():
            return position
    return high


# --- text --------------------------------------------------------------------


class _Part(NamedTuple):
    """Bytes in memory, or ``size`` bytes of a file from ``skip``."""

    data: bytes | Path
    skip: int
    size: int


class TextSource:
    """Documents one after the other, as bytes of UTF-8 that can be read from any position.

    Make one with ``from_text``, ``from_files`` or ``from_sample``. Several documents carry the tags
    and titles of ``prompts.DOCUMENT``, as in a full-context prompt.
    """

    def __init__(self, parts: Iterable[_Part], name: str):
        self._parts = [part for part in parts if part.size]
        self.name = name
        self.size = sum(part.size for part in self._parts)

    @classmethod
    def from_text(cls, text: str, name: str = "text") -> TextSource:
        return cls([_in_memory(text)], name)

    @classmethod
    def from_documents(
        cls, documents: Sequence[tuple[str, str | Path]], name: str = "documents"
    ) -> TextSource:
        """Documents ``(title, text or file)``, numbered from 1; a single one comes without tags."""
        loaded = [(title, [_part(content)]) for title, content in documents]
        if len(loaded) == 1:
            return cls(loaded[0][1], name)
        # The mark takes the place of a text, and cannot stand in a title.
        shown = tuple((title.replace("\0", ""), "\0", None) for title, _ in loaded)
        between = prompts.document_block(shown).split("\0")
        parts = [_in_memory(between[0])]
        for (_, content), piece in zip(loaded, between[1:], strict=True):
            parts += [*content, _in_memory(piece)]
        return cls(parts, name)

    @classmethod
    def from_files(cls, paths: Sequence[str | Path]) -> TextSource:
        """Text files, in order. Only their sizes are held.

        Raises:
            InputError: a file is missing, empty, or not text.
        """
        if not paths:
            raise InputError("no input file; give at least one.")
        files = [Path(path) for path in paths]
        name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
        return cls.from_documents([(path.name, path) for path in files], name)

    @classmethod
    def from_sample(cls, sample: Sample, resolve: Callable[[str], str] | None = None) -> TextSource:
        """The documents of a sample, as its full-context prompt shows them: nothing else of it."""
        shown = prompts.document_block(prompts.view(sample).documents, resolve)
        return cls([_in_memory(shown)], sample.id)

    def read(self, start: int, count: int) -> bytes:
        """At most ``count`` bytes from position ``start``; fewer only at the end of the text."""
        found, position = [], 0
        for part in self._parts:
            low, high = max(start, position), min(start + count, position + part.size)
            if low < high:
                found.append(_read_part(part, low - position, high - low))
            position += part.size
        return b"".join(found)

    def fingerprint(self) -> str:
        """sha256 of the bytes, read in blocks."""
        digest = hashlib.sha256()
        for start in range(0, self.size, _BLOCK):
            digest.update(self.read(start, _BLOCK))
        return digest.hexdigest()


def _in_memory(text: str) -> _Part:
    data = text.encode("utf-8", "replace")  # a lone surrogate cannot be sent to a server
    return _Part(data, 0, len(data))


def _part(content: str | Path) -> _Part:
    if isinstance(content, str):
        return _in_memory(content)
    try:
        size = content.stat().st_size
        with open(content, "rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise InputError(f"{content} cannot be read: {error.strerror}.") from error
    if not size:
        raise InputError(f"{content} is empty; give a text.")
    if b"\0" in head:
        raise InputError(f"{content} is not text (it holds zero bytes); give a UTF-8 text.")
    skip = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    return _Part(content, skip, size - skip)


def _read_part(part: _Part, start: int, count: int) -> bytes:
    if isinstance(part.data, bytes):
        return part.data[start : start + count]
    try:
        with open(part.data, "rb") as file:
            file.seek(part.skip + start)
            data = file.read(count)
    except OSError as error:
        raise InputError(f"{part.data} cannot be read: {error.strerror}.") from error
    if len(data) < count:
        raise InputError(f"{part.data} became shorter while it was read; start again.")
    return data


# --- chunks ------------------------------------------------------------------


class Chunk(NamedTuple):
    """Bytes ``[start, end)`` of a source, as text; bytes that are not UTF-8 show as U+FFFD."""

    index: int
    text: str
    tokens: int
    start: int
    end: int


class ChunkStream:
    """The chunks of a source, by index, for any number of readers; safe in threads.

    Args:
        source: the text.
        tokenizer: of ``token_ends``.
        chunk_tokens: the most tokens of a chunk, at least 16.
        snap: the share of a chunk that may be given up so that it ends with a sentence, in
            ``[0, 0.5]``.
        keep: chunks held in memory; others are read again when a slower reader needs them.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        chunk_tokens: int,
        *,
        snap: float = 0.125,
        keep: int = 4,
    ):
        if chunk_tokens < 16:
            raise ValueError(f"ChunkStream: chunk_tokens is {chunk_tokens}; it must be at least 16")
        if not 0 <= snap <= 0.5:
            raise ValueError(f"ChunkStream: snap is {snap}; it must be in [0, 0.5]")
        self.source, self.tokenizer = source, tokenizer
        self._chunk_tokens, self._snap_tokens = chunk_tokens, int(snap * chunk_tokens)
        self._ends: list[int] = []  # bytes
        self._counts: dict[int, int] = {}  # tokens of a chunk, where they are known
        self._keep = max(keep, 2)
        self._lock = threading.Lock()
        self._pending: OrderedDict[int, asyncio.Future[Chunk | None]] = OrderedDict()

    def know(self, ends: Sequence[int]) -> None:
        """Take the byte ends of the first chunks from an earlier run over the same text."""
        with self._lock:
            if len(ends) > len(self._ends):
                self._ends = list(ends)

    def get(self, index: int) -> Chunk | None:
        """Chunk ``index``, or None behind the last."""
        with self._lock:
            while len(self._ends) <= index:
                start = self._ends[-1] if self._ends else 0
                if start >= self.source.size:
                    return None
                text, tokens = self._next(start)
                self._counts[len(self._ends)] = tokens
                self._ends.append(start + len(text.encode("utf-8", "surrogateescape")))
            start, end = self._ends[index - 1] if index else 0, self._ends[index]
        text = _valid(self.source.read(start, end - start).decode("utf-8", "surrogateescape"))
        if index not in self._counts:
            self._counts[index] = count_tokens(self.tokenizer, text)
        return Chunk(index, text, self._counts[index], start, end)

    async def aget(self, index: int) -> Chunk | None:
        """``get`` in a thread; the chunk behind it is prepared meanwhile, for the next call."""
        wanted = self._started(index)
        self._started(index + 1)
        return await asyncio.shield(wanted)

    def _started(self, index: int) -> asyncio.Future[Chunk | None]:
        if index not in self._pending:
            future = asyncio.ensure_future(asyncio.to_thread(self.get, index))
            # Seen here: nobody may ask for a chunk that was prepared and could not be read.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._pending[index] = future
            while len(self._pending) > self._keep:
                self._pending.popitem(last=False)
        self._pending.move_to_end(index)
        return self._pending[index]

    def _next(self, start: int) -> tuple[str, int]:
        """The text from byte ``start`` to the next cut, and its tokens."""
        most = _MOST_BYTES_PER_TOKEN * self._chunk_tokens
        count = _BYTES_PER_TOKEN * self._chunk_tokens + 4 * _LOOK_AHEAD
        while True:
            count = min(count, most)
            data = self.source.read(start, count)
            is_end = start + len(data) >= self.source.size
            # Bytes that are not UTF-8 become lone surrogates, and bytes again when encoded.
            decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            text = decoder.decode(data, is_end)
            cut, tokens = cut_at(
                self.tokenizer, _valid(text), self._chunk_tokens, self._snap_tokens
            )
            # Where the text ends inside the look-ahead, more of it may show a later sentence end.
            if is_end or cut + _LOOK_AHEAD <= len(text) or count >= most:
                return text[:cut], tokens
            count *= 2


def _valid(text: str) -> str:
    """``text`` of the same length, with U+FFFD for lone surrogates."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
