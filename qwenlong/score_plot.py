"""The picture of a scored document: entropy, surprise and the most uncertain passages."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

_BINS = 1500  # about one per pixel; a longer document is drawn as the range of each bin
_QUOTE_CHARACTERS = 170
_COLORS = {"entropy": "#1b6ca8", "surprise": "#b8532a"}


class Passage(NamedTuple):
    """Tokens ``[first, last)`` of a document, where the model was unsure."""

    first: int
    last: int
    mean_entropy: float  # nats
    text: str


def uncertain_passages(
    entropy: np.ndarray, offsets: np.ndarray, text: str, *, count: int = 5, span: int = 24
) -> list[Passage]:
    """The passages of ``span`` tokens with the highest mean entropy, in order of the document.

    Args:
        entropy: ``[T]`` nats, NaN where a token has no score.
        offsets: ``[T, 2]`` characters of each token in ``text``.
        text: the document.
        count: how many; fewer where the document is too short for them to lie ``2 * span`` apart.
        span: tokens of a passage, or the whole document if it is shorter.
    """
    scored = np.flatnonzero(np.isfinite(entropy))
    if len(scored) == 0:
        return []
    origin, values = scored[0], entropy[scored[0] :].astype(np.float64)
    span = min(span, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[span:] - sums[:-span]) / span  # [T - span + 1]
    found = []
    while len(found) < count and np.isfinite(means).any():
        best = int(np.nanargmax(means))
        first, last = int(origin) + best, int(origin) + best + span
        quote = text[offsets[first, 0] : offsets[last - 1, 1]]
        found.append(Passage(first, last, float(means[best]), quote))
        means[max(0, best - 2 * span) : best + 2 * span + 1] = np.nan
    return sorted(found)


def _binned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre, least, mean and greatest of up to ``_BINS`` stretches; NaN is left out."""
    edges = np.linspace(0, len(values), min(_BINS, len(values)) + 1).astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch without a score
        parts = [values[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
        least, mean, most = (
            np.array([f(part) for part in parts]) for f in (np.nanmin, np.nanmean, np.nanmax)
        )
    return (edges[:-1] + edges[1:] - 1) / 2, least, mean, most


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a hundredth of the document, without its NaN, as long as ``values``."""
    width = max(1, len(values) // 100)
    kernel = np.ones(2 * (width // 2) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    weight = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)


def draw_scores(
    file: IO[bytes], scores: Any, borders: Sequence[int], passages: Sequence[Passage], title: str
) -> None:
    """Write a PNG.

    Args:
        file: opened for bytes.
        scores: with ``entropy`` and ``logprobs``, each ``[T]`` in nats.
        borders: the first scored token of each window after the first.
        passages: from ``uncertain_passages``; numbered in the plots and quoted below.
        title: one line.
    """
    figure = Figure(figsize=(12, 8.4), dpi=110, layout="constrained")
    top, middle, bottom = figure.subplots(
        3, 1, gridspec_kw={"height_ratios": [3, 3, 0.35 + 0.55 * max(1, len(passages))]}
    )
    middle.sharex(top)
    entropy, surprise = scores.entropy, -scores.logprobs
    for axes, values, name, unit in (
        (top, entropy, "entropy", "entropy before the token (nats)"),
        (middle, surprise, "surprise", "surprise at the token, -logprob (nats)"),
    ):
        color = _COLORS[name]
        centre, least, mean, most = _binned(values)
        if len(values) > _BINS:
            axes.fill_between(
                centre, least, most, color=color, alpha=0.16, linewidth=0, label="least to greatest"
            )
            line = _smoothed(mean)
        else:
            axes.plot(centre, mean, color=color, alpha=0.3, linewidth=0.7, label="each token")
            line = _smoothed(values)
        axes.plot(centre, line, color=color, linewidth=1.6, label="running mean (1 %)")
        axes.axhline(
            np.nanmean(values), color="0.35", linewidth=0.9, linestyle=":",
            label=f"mean {np.nanmean(values):.2f}",
        )  # fmt: skip
        for i, border in enumerate(borders):
            axes.axvline(
                border, color="0.55", linewidth=0.9, linestyle="--",
                label=None if i else "window border",
            )  # fmt: skip
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0.1,
            ncols=4,
            fontsize=8,
            frameon=False,
        )
    top.tick_params(labelbottom=False)
    middle.set_xlabel("token")
    middle.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    top.set_title(title, loc="left", fontsize=12, parse_math=False)
    for number, passage in enumerate(passages, 1):
        for axes in (top, middle):
            axes.axvspan(passage.first, passage.last, color="0.2", alpha=0.12)
        top.text(
            (passage.first + passage.last) / 2, 0.9, str(number), fontsize=8, color="white",
            ha="center", va="center", transform=top.get_xaxis_transform(),
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": "0.2", "linewidth": 0},
        )  # fmt: skip
    _draw_quotes(bottom, passages)
    with warnings.catch_warnings():
        # matplotlib's font lacks some scripts: it draws boxes and warns for each character.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png")


_NAMED_GROUPS = 60  # more have numbers on the axis


def draw_groups(
    file: IO[bytes], rows: Sequence[dict], by_position: dict[str, np.ndarray], title: str
) -> None:
    """Write a PNG of scored answers.

    Args:
        file: opened for bytes.
        rows: one per group, with ``answers`` of ``tokens``, ``logprob`` and ``mean_entropy``.
        by_position: ``entropy`` and ``surprise``, means over all answers of their r-th token, and
            how many ``answers`` have one; each ``[R_max]``.
        title: one line.
    """
    figure = Figure(figsize=(12, 7.2), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for name in ("entropy", "surprise"):
        values = [
            (g, a["mean_entropy"] if name == "entropy" else -a["logprob"] / a["tokens"])
            for g, row in enumerate(rows)
            for a in row["answers"]
            if a["tokens"]
        ]
        shift = -0.15 if name == "entropy" else 0.15
        at, mean = np.array(values).reshape(-1, 2).T
        top.scatter(at + shift, mean, s=16, alpha=0.6, color=_COLORS[name], label=f"mean {name}")
        line = by_position[name]
        where = np.arange(1, len(line) + 1)
        bottom.plot(where, line, color=_COLORS[name], alpha=0.3, linewidth=0.7)
        smooth = _smoothed(line) if len(line) else line
        bottom.plot(where, smooth, color=_COLORS[name], linewidth=1.6, label=f"mean {name}")
    top.set_ylabel("nats per token")
    top.set_xlabel("group")
    if len(rows) <= _NAMED_GROUPS:
        names = [row["id"] if row["id"] is not None else str(row["line"] + 1) for row in rows]
        top.set_xticks(
            range(len(rows)), [textwrap.shorten(name, 14) for name in names], fontsize=7,
            rotation=45 if len(rows) > 12 else 0, parse_math=False,
        )  # fmt: skip
    bottom.set_ylabel("nats, mean of all answers")
    bottom.set_xlabel("token of the answer")
    counts = bottom.twinx()
    answers = by_position["answers"]
    counts.fill_between(
        np.arange(1, len(answers) + 1), answers, color="0.5", alpha=0.12, step="mid"
    )
    counts.set_ylabel("answers that are this long", color="0.4")
    counts.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=2, fontsize=8,
                frameon=False,
            )  # fmt: skip
    top.set_title(title, loc="left", fontsize=12, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png")


def _draw_quotes(axes: Any, passages: Sequence[Passage]) -> None:
    axes.axis("off")
    if not passages:
        return
    step = 1.0 / (len(passages) + 0.6)
    axes.text(0, 1.0, "Most uncertain passages", fontsize=10, weight="bold", va="top")
    for number, passage in enumerate(passages, 1):
        quote = f"… {' '.join(passage.text.split())[:_QUOTE_CHARACTERS]} …"
        where = f"tokens {passage.first:,} to {passage.last - 1:,}, {passage.mean_entropy:.2f} nats"
        axes.text(
            0, 1.0 - (number - 0.4) * step, f"{number}  {where}", fontsize=8, va="top", color="0.3"
        )
        axes.text(
            0.235, 1.0 - (number - 0.4) * step, textwrap.fill(quote, 118), fontsize=8, va="top",
            parse_math=False, linespacing=1.15,
        )  # fmt: skip
