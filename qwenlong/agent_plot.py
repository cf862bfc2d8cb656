"""The picture of a reading: how the memory grew, what stayed in it for how long, and the plans."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import IO, NamedTuple

from matplotlib.figure import Figure

from qwenlong.data.documents import split_sentences
from qwenlong.memory_agent import Step

_COLORS = {"kept": "#1b6ca8", "new": "#4f8f46", "dropped": "#b8532a", "gone": "#9a9a9a"}
_MOST_ROWS = 28
_LABEL_CHARACTERS = 84
_PLANS = 5
# Events that a reader of the picture wants to see, with a mark each.
_MARKS = {"kept_memory": "x", "took_reply": "x", "long_memory": "v", "stop": "s"}


class Entry(NamedTuple):
    """A sentence of the memory, in the memories after chunks ``first`` to ``last``."""

    text: str
    first: int
    last: int


def memory_entries(memories: Sequence[str]) -> list[Entry]:
    """Every sentence that was ever in a memory, with its stay; one that came back has two."""
    open_at: dict[str, int] = {}
    entries: list[Entry] = []
    for t, memory in enumerate(memories):
        here = dict.fromkeys(_sentences(memory))
        for text in [text for text in open_at if text not in here]:
            entries.append(Entry(text, open_at.pop(text), t - 1))
        for text in here:
            open_at.setdefault(text, t)
    last = len(memories) - 1
    entries += [Entry(text, first, last) for text, first in open_at.items()]
    return sorted(entries, key=lambda entry: (entry.first, entry.last))


def memory_changes(memories: Sequence[str]) -> list[tuple[float, float, float]]:
    """After each chunk: shares of the memory that were kept and are new, and the share of the
    memory before it that was dropped. By characters of whole sentences.
    """
    changes, before = [], {}
    for memory in memories:
        here = {text: len(text) for text in _sentences(memory)}
        total, earlier = sum(here.values()), sum(before.values())
        kept = sum(n for text, n in here.items() if text in before)
        dropped = sum(n for text, n in before.items() if text not in here)
        changes.append(
            (
                kept / total if total else 0.0,
                1 - kept / total if total else 0.0,
                dropped / earlier if earlier else 0.0,
            )
        )
        before = here
    return changes


def _sentences(memory: str) -> list[str]:
    """Sentences and lines, without list marks, white space as single spaces."""
    found = []
    for start, end in split_sentences(memory):
        for line in memory[start:end].split("\n"):
            line = " ".join(line.split()).lstrip("-*• ")
            if line:
                found.append(line)
    return found


def draw_memory(file: IO[bytes], steps: Sequence[Step], *, limit_tokens: int, title: str) -> None:
    """Write a PNG of one question's steps.

    Args:
        file: opened for bytes.
        steps: in order; those that are not of kind ``"read"`` give the answer.
        limit_tokens: the most tokens of a memory.
        title: one line, the question.
    """
    reads = [step for step in steps if step.kind == "read"]
    entries = _shown(memory_entries([step.memory for step in reads]), len(reads) - 1)
    height = 2.6 + 0.22 * max(4, len(entries)) + 0.36 * (_PLANS + 2)
    figure = Figure(figsize=(12, height), dpi=110, layout="constrained")
    top, middle, bottom = figure.subplots(
        3,
        1,
        gridspec_kw={"height_ratios": [2.6, 0.22 * max(4, len(entries)), 0.36 * (_PLANS + 2)]},
    )
    _draw_sizes(top, reads, limit_tokens)
    _draw_entries(middle, entries, len(reads))
    middle.sharex(top)
    answer = next((step.text for step in steps if step.kind == "answer"), None)
    _draw_words(bottom, reads, answer)
    figure.suptitle(_shortened(title, 130), fontsize=11, x=0.01, ha="left", parse_math=False)
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png")


def _shortened(text: str, characters: int) -> str:
    """At most so many characters on one line, without control characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    short = textwrap.shorten(text, characters, placeholder=" ...")
    # A single word that is too long is cut, where shorten leaves nothing of it.
    return short if short.strip(" .") else text.strip()[:characters]


def _shown(entries: list[Entry], last: int) -> list[Entry]:
    """What is in the last memory, then what stayed longest; in order of arrival."""
    by_weight = sorted(entries, key=lambda e: (e.last != last, e.first - e.last))
    chosen = set(by_weight[:_MOST_ROWS])
    return [entry for entry in entries if entry in chosen]


def _draw_sizes(axes, reads: Sequence[Step], limit_tokens: int) -> None:
    x = range(1, len(reads) + 1)
    tokens = [step.memory_tokens for step in reads]
    changes = memory_changes([step.memory for step in reads])
    kept = [share * n for (share, _, _), n in zip(changes, tokens, strict=True)]
    new = [share * n for (_, share, _), n in zip(changes, tokens, strict=True)]
    before = [0, *tokens][: len(tokens)]
    dropped = [-share * n for (_, _, share), n in zip(changes, before, strict=True)]
    axes.bar(x, kept, color=_COLORS["kept"], width=0.8, label="kept")
    axes.bar(x, new, bottom=kept, color=_COLORS["new"], width=0.8, label="new")
    axes.bar(x, dropped, color=_COLORS["dropped"], width=0.8, label="dropped")
    if tokens and max(tokens) > 0.5 * limit_tokens:
        axes.axhline(limit_tokens, color="0.35", linestyle=":", linewidth=1, label="limit")
    for event, mark in _MARKS.items():
        at = [i for i, step in zip(x, reads, strict=True) if event in step.events]
        if at:
            axes.plot(
                at, [tokens[i - 1] for i in at], mark, color="black", markersize=6,
                linestyle="none", label=event.replace("_", " "),
            )  # fmt: skip
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("tokens of memory")
    axes.margins(x=0.01)
    axes.tick_params(axis="x", labelbottom=False)
    if reads:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False, ncols=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_entries(axes, entries: Sequence[Entry], chunks: int) -> None:
    for row, entry in enumerate(entries):
        stays = entry.last == chunks - 1
        color = _COLORS["kept" if stays else "gone"]
        left, right = entry.first + 0.6, entry.last + 1.4
        axes.barh(row, right - left, left=left, color=color, alpha=0.35)
        # From the side that has more room.
        is_late = left - 1 > chunks - right and left > 0.6 * chunks
        axes.text(
            right if is_late else left, row, f" {_shortened(entry.text, _LABEL_CHARACTERS)} ",
            fontsize=7, va="center", ha="right" if is_late else "left", parse_math=False,
            clip_on=True,
        )  # fmt: skip
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("chunk")
    axes.set_ylabel("stay in memory")
    axes.locator_params(axis="x", integer=True)
    if not entries:
        axes.text(0.5, 0.5, "the memory stayed empty", ha="center", transform=axes.transAxes)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_words(axes, reads: Sequence[Step], answer: str | None) -> None:
    axes.axis("off")
    spread = sorted({round(i * (len(reads) - 1) / max(1, _PLANS - 1)) for i in range(_PLANS)})
    lines = [(f"plan after chunk {i + 1}", reads[i].plan or "(none)") for i in spread if reads]
    lines.append(("answer", "(not yet)" if answer is None else answer or "(empty)"))
    for row, (name, text) in enumerate(lines):
        y = 1 - (row + 0.5) / (_PLANS + 1)
        weight = "bold" if name == "answer" else "normal"
        axes.text(0, y, name, fontsize=8, color="0.35", transform=axes.transAxes)
        axes.text(
            0.13, y, _shortened(text, 150), fontsize=8,
            transform=axes.transAxes, parse_math=False, weight=weight,
        )  # fmt: skip
