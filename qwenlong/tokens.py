"""Reading a document and tokenizing it piece by piece, exactly as the whole would be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenlong.errors import InputError

# A tokenizer needs some 600 bytes a token while it works, so that long texts go through in pieces.
PIECE_CHARACTERS = 1 << 18
_CONTEXT, _MARGIN = 256, 64  # characters


class Tokens(NamedTuple):
    """A tokenized document."""

    ids: np.ndarray  # [T] int64
    offsets: np.ndarray  # [T, 2] int64, characters [start, end) of the text; (0, 0) for the prefix
    n_prefix: int  # tokens that the tokenizer puts before any text


def read_document(source: str) -> str:
    """The UTF-8 text of a file, or of standard input for ``"-"``; line ends stay as they are."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.") from error
    if not data:
        raise InputError(f"{name} is empty; give a text of at least two tokens.")
    if b"\0" in data:
        raise InputError(f"{name} is not text (it holds zero bytes); give a UTF-8 text.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 at byte {error.start}; convert it, for example with iconv."
        ) from error


def tokenize(tokenizer: Any, text: str, max_tokens: int | None = None) -> Tokens:
    """The first ``max_tokens`` tokens of ``text``, exactly those of the whole text; all if None."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    n_prefix = next((i for i, bit in enumerate(probe.special_tokens_mask) if not bit), 0)
    ids, offsets = _pieces(tokenizer, text, max_tokens)
    return Tokens(
        np.concatenate([np.array(probe.input_ids[:n_prefix], dtype=np.int64), ids[:max_tokens]]),
        np.concatenate([np.zeros((n_prefix, 2), dtype=np.int64), offsets[:max_tokens]]),
        n_prefix,
    )


def _pieces(tokenizer: Any, text: str, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[T]`` and offsets ``[T, 2]`` of at least ``max_tokens`` tokens.

    What a tokenizer makes of a pre-token depends on that pre-token alone, and its borders on the
    text up to the next white space. So a piece ends before white space, and its last pre-token and
    whatever ends in its last characters is left to the next piece. That one begins a little
    earlier, and what it makes of the text known already must agree; where it does not, the text is
    tokenized whole. A tokenizer that splits nothing sees one pre-token: its piece grows until it
    is the whole text.
    """
    ids, offsets = np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64)
    parts, count, done = [], 0, 0  # tokens kept, and the characters that they reach
    step = PIECE_CHARACTERS
    if max_tokens is not None:
        step = min(step, 8 * max_tokens + 4 * _MARGIN)
    while True:
        left = max(0, done - _CONTEXT)
        while left and not text[left].isspace():
            left -= 1
        right = done + step
        while right < len(text) and not text[right].isspace():
            right += 1
        known_ids, known_offsets = ids, offsets
        ids, offsets, words = _encode(tokenizer, text, left, right)
        new = int(np.searchsorted(offsets[:, 0], done)) if done else 0
        end = len(ids)
        if right < len(text):
            while end and (words[end - 1] == words[-1] or offsets[end - 1, 1] > right - _MARGIN):
                end -= 1
        if end <= new and right < len(text):
            step *= 2
            ids, offsets = known_ids, known_offsets
            continue
        # Tokens of the context, less those that its beginning may have cut.
        shared = int(np.count_nonzero(offsets[:new, 0] >= left + _MARGIN)) if left else new
        if done and not (
            shared
            and np.array_equal(ids[new - shared : new], known_ids[-shared:])
            and np.array_equal(offsets[new - shared : new], known_offsets[-shared:])
        ):
            return _encode(tokenizer, text, 0, len(text))[:2]
        parts.append((ids[new:end], offsets[new:end]))
        count += end - new
        if right >= len(text) or (max_tokens is not None and count >= max_tokens):
            return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        ids, offsets = ids[:end], offsets[:end]
        done = int(offsets[-1, 1])


def _encode(
    tokenizer: Any, text: str, left: int, right: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Ids, offsets in ``text``, and the pre-token of each token of ``text[left:right]``."""
    encoding = tokenizer(
        text[left:right], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = np.array(encoding.offset_mapping, dtype=np.int64).reshape(-1, 2)
    return np.array(encoding.input_ids, dtype=np.int64), offsets + left, encoding.word_ids()
