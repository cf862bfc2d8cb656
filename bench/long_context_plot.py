"""The picture of long-context scoring: time and memory over tokens, parts, and one prompt with
several answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.results import Row, latest

_OURS = ("#b3261e", "#e8710a", "#7b1fa2", "#c2185b")
_PEERS = ("#546e7a", "#1e88e5")
_PARTS = {
    "attention": "#b3261e", "experts": "#e8710a", "mlp": "#e8710a", "projections": "#1e88e5",
    "elementwise": "#90a4ae", "head": "#00897b", "embedding": "#5c6bc0",
    "weights": "#37474f",
}  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Draw the rows of one model as a PNG.

    Args:
        rows: of ``bench.long_context``, ceilings among them or not.
        path: of the picture.
    """
    own = [row for row in rows if row.op == "scorer"]
    parts = [row for row in rows if row.op == "scorer_part"]
    impls = sorted(dict.fromkeys(row.impl for row in own), key=lambda i: not i.startswith("ours-"))
    ours = [i for i in impls if i.startswith("ours-")]
    theirs = [i for i in impls if i not in ours]
    colors = {i: _OURS[n % len(_OURS)] for n, i in enumerate(ours)}
    colors |= {i: _PEERS[n % len(_PEERS)] for n, i in enumerate(theirs)}
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), dpi=110, layout="constrained")
    _lines(axes[0, 0], own, colors, lambda row: row.ms_p50 / 1e3, "seconds", log=True)
    _lines(axes[0, 1], own, colors, _gigabytes, "GB at the peak, weights included", log=False)
    _stack(axes[1, 0], own, parts)
    _bars(axes[1, 1], own, colors)
    if own:
        one = own[0]
        runs = list(dict.fromkeys(row.run for row in own))
        named = f"run{'s' * (len(runs) > 1)} {', '.join(runs)}"
        figure.suptitle(
            f"Scoring with {one.size('model')}, {one.size('layers')} layers, random weights, "
            f"{one.dtype} on {one.gpu} ({named})",
            x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def draw_file(path: Path, rows: Sequence[Row], run: str | None = None) -> list[Path]:
    """Draw every model of a results file beside it; the files written.

    Args:
        path: of the CSV file.
        rows: all of its rows.
        run: a run id; the last measurement of every case and length if None.
    """
    runs = [*latest(rows, "scorer", run), *latest(rows, "scorer_part", run)]
    chosen = [row for own in runs for row in own]
    models = dict.fromkeys(row.size("model") for row in chosen if row.op == "scorer")
    return [
        draw([row for row in chosen if row.size("model") == model], picture_path(path, model))
        for model in models
    ]


def picture_path(results: Path, model: str) -> Path:
    """The picture of a model beside its results file."""
    return results.with_name(f"{results.stem}-long-context-{model}.png")


def _gigabytes(row: Row) -> float | None:
    if row.peak_mb is None:
        return None
    return (row.peak_mb + float(row.size("weights_mb"))) / 1e3


def _tokens(row: Row) -> int:
    return int(row.size("T"))


def _lines(axes: Axes, rows: Sequence[Row], colors: dict, value, unit: str, *, log: bool) -> None:
    shown = set()
    for case, style in (("resident", "o-"), ("streamed", "D:")):
        for impl, color in colors.items():
            points = [
                (_tokens(row), value(row)) for row in rows if (row.case, row.impl) == (case, impl)
            ]
            points = sorted(p for p in points if p[1] is not None)
            if points:
                label = impl if case == "resident" else f"{impl}, streamed"
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
                shown |= {x for x, _ in points}
    _token_axis(axes, shown)
    axes.set_ylabel(unit)
    if log and shown:
        axes.set_yscale("log")
    elif shown:
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "not measured on this device", ha="center", transform=axes.transAxes)
    axes.grid(alpha=0.25)
    if shown:
        axes.legend(fontsize=8, frameon=False)


def _token_axis(axes: Axes, shown: set[int]) -> None:
    axes.set_xlabel("tokens")
    if shown:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))


def _short(tokens: float) -> str:
    if tokens < 1000:
        return f"{tokens:.0f}"
    return f"{tokens / 1024:.0f}K" if tokens % 1024 == 0 else f"{tokens / 1000:.0f}k"


def _stack(axes: Axes, rows: Sequence[Row], parts: Sequence[Row]) -> None:
    """Share of each part, for the first of ours."""
    first = next((row.impl for row in rows if row.impl.startswith("ours-")), None)
    chosen = [r for r in parts if r.impl == first and r.case.startswith("resident/")]
    lengths = sorted({_tokens(row) for row in chosen})
    bottom = [0.0] * len(lengths)
    totals = {T: sum(r.ms_p50 for r in chosen if _tokens(r) == T) for T in lengths}
    names = sorted({row.case.partition("/")[2] for row in chosen}, key=list(_PARTS).index)
    for name in names:
        shares, rates = [], []
        for T in lengths:
            found = [r for r in chosen if _tokens(r) == T and r.case == f"resident/{name}"]
            ms = sum(r.ms_p50 for r in found)
            shares.append(100 * ms / totals[T])
            rates.append(sum(r.useful_flops for r in found) / ms * 1e-9 if ms else 0.0)
        axes.bar(range(len(lengths)), shares, bottom=bottom, color=_PARTS[name], label=name)
        for i, (share, rate) in enumerate(zip(shares, rates, strict=True)):
            if share > 6 and rate >= 1:
                where = bottom[i] + share / 2
                axes.text(i, where, f"{rate:.0f}", ha="center", va="center", fontsize=7, color="w")
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    axes.set_xticks(range(len(lengths)), [_short(T) for T in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"% of the time of {first or 'ours'}; TFLOP/s inside")
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """One prompt with several answers: the layout that reads it once beside full sequences."""
    groups = sorted((row for row in rows if row.case == "group"), key=lambda row: row.ms_p50)
    if not groups:
        axes.text(0.5, 0.5, "no group was measured", ha="center", transform=axes.transAxes)
        axes.axis("off")
        return
    one = groups[0]
    seconds = [row.ms_p50 / 1e3 for row in groups]
    axes.barh([row.impl for row in groups], seconds, color=[colors[r.impl] for r in groups])
    for i, row in enumerate(groups):
        note = " (one sequence times G)" if row.size("measured") else ""
        axes.text(row.ms_p50 / 1e3, i, f" {row.ms_p50 / 1e3:.3g} s{note}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.45 * max(seconds))
    axes.set_xlabel(
        f"seconds; a prompt of {int(one.size('P')):,} tokens, {one.size('G')} answers of "
        f"{int(one.size('R')):,}"
    )
    axes.spines[["top", "right"]].set_visible(False)
