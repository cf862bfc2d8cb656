"""Tokens of texts: counting them, and cutting a text to a number of them.

Only a counting function is needed, so that every tokenizer of ``count_tokens`` serves. A cut is
made where a word ends or begins, so that counts of the parts nearly add up.
"""

from __future__ import annotations

from collections.abc import Callable

from qwenlong.data.documents import load_tokenizer

_CHARACTERS_PER_TOKEN = 5  # first guess; the search does not depend on it


class TokenCounter:
    """Counts and cuts under one tokenizer of ``qwenlong.data.documents.count_tokens``."""

    def __init__(self, tokenizer: str = "chars4"):
        self.name = tokenizer
        self._count: Callable[[str], int] = load_tokenizer(tokenizer)

    def __call__(self, text: str) -> int:
        return self._count(text)

    def head(self, text: str, n_tokens: int) -> str:
        """The longest beginning of ``text`` that ends with a word and has at most ``n_tokens``."""
        cut = self._search(len(text), n_tokens, lambda c: text[: _word_end(text, c)])
        return text[: _word_end(text, cut)]

    def tail(self, text: str, n_tokens: int) -> str:
        """The longest end of ``text`` that begins with a word and has at most ``n_tokens``."""
        cut = self._search(len(text), n_tokens, lambda c: text[_word_start(text, len(text) - c) :])
        return text[_word_start(text, len(text) - cut) :]

    def _search(self, length: int, n_tokens: int, part: Callable[[int], str]) -> int:
        """The most characters ``c`` for which ``part(c)`` has at most ``n_tokens`` tokens.

        Interpolation and bisection in turn, in a bracket that grows from the guess: what is counted
        is a few times what is kept, however long the text.
        """
        low, low_count = 0, 0  # fits
        high = min(length, _CHARACTERS_PER_TOKEN * max(0, n_tokens) + 1)
        while (high_count := self._count(part(high))) <= n_tokens:
            if high == length:
                return length
            low, low_count = high, high_count
            high = min(length, 2 * high)
        step = 0
        while high - low > 1 and low_count < n_tokens:
            middle = (low + high) // 2
            if step % 3 != 2:
                share = (n_tokens - low_count) / max(1, high_count - low_count)
                middle = min(high - 1, max(low + 1, low + int((high - low) * share)))
            step += 1
            count = self._count(part(middle))
            if count <= n_tokens:
                low, low_count = middle, count
            else:
                high, high_count = middle, count
        return low


def _word_end(text: str, at: int) -> int:
    """The last end of a word at or before ``at``; 0 where there is none."""
    if at >= len(text):
        return len(text)
    while at > 0 and not (text[at].isspace() and not text[at - 1].isspace()):
        at -= 1
    return at


def _word_start(text: str, at: int) -> int:
    """The first beginning of a word at or after ``at``; the text's end where there is none."""
    if at <= 0:
        return 0
    while at < len(text) and not (text[at - 1].isspace() and not text[at].isspace()):
        at += 1
    return at
