"""Windows over a document that is longer than the model's context."""

from __future__ import annotations

from typing import NamedTuple

from qwenlong.errors import InputError
from qwenlong.tokens import Tokens


class Window(NamedTuple):
    """The model reads tokens ``[start, end)`` after the prefix, scores ``[first_scored, end)``."""

    start: int
    first_scored: int
    end: int


def plan_windows(
    tokens: int, window_tokens: int, overlap_tokens: int, n_prefix: int = 0
) -> list[Window]:
    """Cover ``tokens`` tokens with windows of at most ``window_tokens``, the prefix included.

    Tokens ``1 ..`` (after a longer prefix: ``n_prefix ..``) are scored by exactly one window each.
    """
    windows = [Window(0, max(1, n_prefix), min(tokens, window_tokens))]
    while (end := windows[-1].end) < tokens:
        start = end - overlap_tokens
        windows.append(Window(start, end, min(tokens, start + window_tokens - n_prefix)))
    return windows


def choose_windows(
    tokens: Tokens,
    source: str,
    window_tokens: int | None,
    overlap_tokens: int | None,
    context_tokens: int | None,
) -> list[Window]:
    """The windows of a run, or an InputError that says which option to change."""
    T, window, overlap = len(tokens.ids), window_tokens, overlap_tokens
    if T <= max(1, tokens.n_prefix):
        raise InputError(f"{source} has {T - tokens.n_prefix} token; scoring needs at least two.")
    if window is None:
        if overlap is not None:
            raise InputError("--overlap-tokens needs --window-tokens; give both or neither.")
        if context_tokens is not None and T > context_tokens:
            raise InputError(
                f"{source} has {T} tokens and the model reads {context_tokens} at a time; "
                f"use --window-tokens {context_tokens} [--overlap-tokens N] or --max-tokens N."
            )
        return plan_windows(T, T, 1, tokens.n_prefix)
    if context_tokens is not None and window > context_tokens:
        raise InputError(
            f"--window-tokens {window} is more than the model reads at a time; "
            f"use at most {context_tokens}."
        )
    overlap = max(1, window // 8) if overlap is None else overlap
    room = window - tokens.n_prefix
    if overlap >= room:
        raise InputError(
            f"--overlap-tokens {overlap} leaves nothing new to score in a window of {room} tokens; "
            f"use less than {room}."
        )
    return plan_windows(T, window, overlap, tokens.n_prefix)
