"""Plots from the results files: time against T, and percent of the same run's roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench import long_context_plot
from bench.ceilings import Roof
from bench.results import Row, latest, read_rows

_OURS = ("#b3261e", "#e8710a", "#7b1fa2", "#c2185b")
_PEERS = ("#546e7a", "#1e88e5", "#00897b", "#8d6e63", "#5c6bc0", "#9e9d24", "#37474f", "#26a69a")
_MARKERS = "osD^vPX*"


def plot_folder(folder: Path, run: str | None = None) -> list[Path]:
    """Draw every op of every CSV in ``folder`` beside it as ``<device>-<op>.png``; the files
    written.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        rows = read_rows(path)
        written += long_context_plot.draw_file(path, rows, run)
        without = ("ceiling", "scorer", "scorer_part")
        for op in dict.fromkeys(row.op for row in rows if row.op not in without):
            chosen = latest(rows, op, run)
            if chosen:
                written.append(plot_op(op, chosen, path.with_name(f"{path.stem}-{op}.png")))
    return written


def _series(row: Row) -> tuple[str, str, str]:
    """What a panel holds fixed: the case, the dtype and the shape without what grows with T."""
    rest = ";".join(pair for pair in row.shape.split(";") if pair[:2] not in ("T=", "B="))
    return row.case, row.dtype, rest


def plot_op(op: str, runs: Sequence[Sequence[Row]], path: Path) -> Path:
    """One column per case and shape (but for T). ``runs`` hold the op's rows and their ceilings."""
    roofs = {rows[0].run: Roof.of(rows) for rows in runs}
    own = [row for rows in runs for row in rows if row.op == op]
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in own:
        panels.setdefault(_series(row), []).append(row)
    impls = sorted(dict.fromkeys(row.impl for row in own), key=lambda i: not i.startswith("ours-"))
    ours = [i for i in impls if i.startswith("ours-")]
    theirs = [i for i in impls if i not in ours]
    colors = {i: _OURS[n % len(_OURS)] for n, i in enumerate(ours)}
    colors |= {i: _PEERS[n % len(_PEERS)] for n, i in enumerate(theirs)}
    markers = {i: _MARKERS[n % len(_MARKERS)] for n, i in enumerate(impls)}

    n = len(panels)
    figure, axes = plt.subplots(
        2, n, figsize=(max(6.5, 4.3 * n), 7.4), squeeze=False, layout="constrained"
    )
    try:
        for column, (key, panel) in enumerate(panels.items()):
            _panel(axes[0][column], axes[1][column], key, panel, roofs, colors, markers)
        axes[0][0].set_ylabel("milliseconds (p20, median, p80)")
        axes[1][0].set_ylabel("% of this machine's measured roof")
        handles = {}
        for ax in axes[0]:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8
        )
        first = own[0]
        named = "runs " + ", ".join(roofs) if len(roofs) > 1 else f"run {first.run}"
        versions = f"torch {first.torch}" + (f", Triton {first.triton}" if first.triton else "")
        figure.suptitle(f"{op}: {first.gpu}\n{versions}, {named}", fontsize=11)
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=130, metadata={"Software": None})
        temporary.replace(path)
    finally:
        plt.close(figure)
    return path


def _panel(
    top: Axes,
    bottom: Axes,
    key: tuple[str, str, str],
    rows: Sequence[Row],
    roofs: dict[str, Roof],
    colors: dict[str, str],
    markers: dict[str, str],
) -> None:
    case, dtype, rest = key
    sizes = sorted({int(row.size("T") or 0) for row in rows})
    for impl in colors:
        mine = sorted((r for r in rows if r.impl == impl), key=lambda r: int(r.size("T") or 0))
        if not mine:
            continue
        T = [int(r.size("T") or 0) for r in mine]
        is_ours = mine[0].is_ours
        label = impl + (" (computes less)" if mine[0].peer_scope == "less" else "")
        style = dict(
            color=colors[impl],
            marker=markers[impl],
            linestyle="-" if is_ours else "--",
            linewidth=2.4 if is_ours else 1.2,
            markersize=8 if is_ours else 5,
            zorder=3 if is_ours else 2,
        )
        ms = [r.ms_p50 for r in mine]
        spread = [
            [max(0.0, r.ms_p50 - r.ms_p20) for r in mine],
            [max(0.0, r.ms_p80 - r.ms_p50) for r in mine],
        ]
        top.errorbar(T, ms, yerr=spread, label=label, capsize=2, **style)
        percents = [(t, p) for t, r in zip(T, mine, strict=True) if (p := roofs[r.run].percent(r))]
        if percents:
            bottom.plot(*zip(*percents, strict=True), **style)
    floors = {int(r.size("T") or 0): roofs[r.run].floor_ms(r) for r in rows}
    known = [(t, f) for t, f in sorted(floors.items()) if f]
    if known:
        top.plot(*zip(*known, strict=True), color="black", linestyle=":", marker="_", label="roof")
    for ax in (top, bottom):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{t:,}" for t in sizes])
        ax.minorticks_off()
        ax.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
        ax.grid(alpha=0.3)
    top.set_yscale("log")
    bottom.set_ylim(0, max(105.0, bottom.get_ylim()[1]))
    bottom.axhline(100, color="black", linestyle=":", linewidth=1)
    bottom.set_xlabel("T (tokens)")
    top.set_title(f"{case}, {dtype}\n{rest.replace(';', '  ')}", fontsize=9)
