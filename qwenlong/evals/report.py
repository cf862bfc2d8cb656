"""One table and one plot of a run, or of several runs over the same questions."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qwenlong.evals.run import by_question
from qwenlong.evals.statistics import Difference, Estimate, difference, estimate
from qwenlong.storage import atomic_write, write_json
from qwenlong.types import EvalResult

ALL = "all"
METHOD = (
    "95 % intervals: Wilson's score interval over questions, at the effective sample size of the "
    "question means"
)
_COLOURS = ("#1f5aa6", "#c8553d", "#3a7d44", "#8a5a9e")


@dataclass(frozen=True)
class Row:
    """One kind of question at one length; ``length`` is None where the set has none."""

    kind: str
    length: int | None
    score: Estimate
    prompt_tokens: float  # mean over samples
    calls: float
    truncated: int
    refused: int


def summarise(results: Sequence[EvalResult]) -> list[Row]:
    """A row for each kind and length, in order, then one over all."""
    groups: dict[tuple[str, int | None], list[EvalResult]] = {}
    for result in results:
        extra = result.model_extra or {}
        groups.setdefault((extra.get("kind", ""), extra.get("length")), []).append(result)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0))
    rows = [_row(kind, length, members) for (kind, length), members in ordered]
    if len(rows) > 1:
        rows.append(_row(ALL, None, list(results)))
    return rows


def _row(kind: str, length: int | None, results: list[EvalResult]) -> Row:
    n = len(results)
    return Row(
        kind,
        length,
        estimate(list(by_question(results).values())),
        sum(r.tokens.get("prompt", 0) for r in results) / n,
        sum(r.tokens.get("calls", 0) for r in results) / n,
        sum(r.truncated for r in results),
        sum((r.model_extra or {}).get("refused") is not None for r in results),
    )


def write_report(out: str | Path, results: Sequence[EvalResult], title: str) -> list[Path]:
    """``table.md``, ``table.csv``, ``summary.json`` and ``plot.png`` in the folder of the run."""
    out = Path(out)
    rows = summarise(results)
    with atomic_write(out / "table.md") as file:
        file.write(f"{title}\n\n{as_markdown(rows)}\n\n{METHOD}.\n")
    with atomic_write(out / "table.csv") as file:
        writer = csv.DictWriter(file, list(_cells(rows[0])))
        writer.writeheader()
        writer.writerows(_cells(row) for row in rows)
    write_json(out / "summary.json", {"title": title, "rows": [_cells(row) for row in rows]})
    draw({title: rows}, out / "plot.png")
    return [out / name for name in ("table.md", "table.csv", "summary.json", "plot.png")]


def _cells(row: Row) -> dict[str, Any]:
    return {
        "task": row.kind,
        "length": row.length,
        "questions": row.score.questions,
        "samples": row.score.samples,
        "score": round(row.score.mean, 6),
        "low": round(row.score.low, 6),
        "high": round(row.score.high, 6),
        "prompt_tokens": round(row.prompt_tokens, 1),
        "calls": round(row.calls, 2),
        "truncated": row.truncated,
        "refused": row.refused,
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as the terminal and ``table.md`` show it; scores in percent."""
    lines = [
        "| task | length | questions | samples | score | 95 % interval | prompt tokens | calls "
        "| truncated | refused |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        s = row.score
        lines.append(
            f"| {row.kind} | {short_length(row.length)} | {s.questions} | {s.samples} "
            f"| {100 * s.mean:.1f} | {100 * s.low:.1f} to {100 * s.high:.1f} "
            f"| {row.prompt_tokens:,.0f} | {row.calls:.1f} | {row.truncated} | {row.refused} |"
        )
    return "\n".join(lines)


def short_length(length: int | None) -> str:
    """``131072`` as ``128K``, ``1048576`` as ``1M``; other numbers in full, none as ``-``."""
    if length is None:
        return "-"
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


# --- several runs ------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two runs at one kind and length: their means and the paired difference."""

    kind: str
    length: int | None
    first: Estimate
    second: Estimate
    difference: Difference


def compare(first: Sequence[EvalResult], second: Sequence[EvalResult]) -> list[Comparison]:
    """Both runs by kind and length, over the questions that both answered.

    Raises:
        ValueError: they share no question.
    """
    shared = by_question(first).keys() & by_question(second).keys()
    if not shared:
        raise ValueError("compare: the two runs share no question")
    keys: dict[tuple[str, int | None], set[str]] = {}
    for result in first:
        if result.sample_id in shared:
            extra = result.model_extra or {}
            key = (extra.get("kind", ""), extra.get("length"))
            keys.setdefault(key, set()).add(result.sample_id)
    compared = []
    for (kind, length), ids in sorted(keys.items(), key=lambda k: (k[0][0], k[0][1] or 0)):
        a, b = (
            {q: s for q, s in by_question(results).items() if q in ids}
            for results in (first, second)
        )
        means = (estimate(list(a.values())), estimate(list(b.values())))
        compared.append(Comparison(kind, length, *means, difference(a, b)))
    return compared


def comparison_markdown(names: tuple[str, str], rows: Sequence[Comparison]) -> str:
    """A table of two runs; the interval of the difference is ``statistics.difference``'s."""
    first, second = names
    lines = [
        f"| task | length | questions | {first} | {second} | difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]

    def shown(e: Estimate | Difference) -> str:
        return f"{100 * e.mean:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})"

    lines += [
        f"| {row.kind} | {short_length(row.length)} | {row.difference.questions} "
        f"| {shown(row.first)} | {shown(row.second)} | {shown(row.difference)} |"
        for row in rows
    ]
    return "\n".join(lines)


# --- plot --------------------------------------------------------------------


def draw(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Score with its interval: a panel for each task against length, or bars at one length."""
    rows = {name: [row for row in rows if row.kind != ALL] for name, rows in runs.items()}
    lengths = sorted({r.length for group in rows.values() for r in group if r.length is not None})
    draw_figure = _panels if len(lengths) > 1 else _bars
    figure = draw_figure(rows, lengths)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=10)
    else:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(runs), fontsize=9)
    figure.text(0.01, 0.01, METHOD, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.95))
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _panels(runs: Mapping[str, Sequence[Row]], lengths: list[int]) -> Figure:
    kinds = list(dict.fromkeys(row.kind for rows in runs.values() for row in rows))
    columns = min(len(kinds), 4 if len(kinds) > 6 else 3)
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(max(5.5, 3.0 * columns), 0.9 + 2.4 * lines))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(kinds):
            axes.set_visible(False)
            continue
        for place, (name, rows) in enumerate(runs.items()):
            # Runs stand a little apart, so that their intervals can be told from each other.
            shift = 2 ** (0.12 * (place - (len(runs) - 1) / 2))
            mine = [r for r in rows if r.kind == kinds[number] and r.length is not None]
            axes.errorbar(
                [row.length * shift for row in mine],
                [row.score.mean for row in mine],
                yerr=_errors(mine),
                label=name,
                marker="os^D"[place % 4],
                color=_COLOURS[place % len(_COLOURS)],
                markersize=4.5,
                linewidth=1.3,
                capsize=2.5,
            )
        axes.set_title(kinds[number], fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short_length(length) for length in lengths], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(labelbottom=number + columns >= len(kinds), labelsize=8)
        _frame(axes)
    figure.supxlabel("length of the context, tokens", fontsize=9, y=0.04)
    figure.supylabel("score", fontsize=9)
    return figure


def _bars(runs: Mapping[str, Sequence[Row]], lengths: list[int]) -> Figure:
    kinds = sorted({row.kind for rows in runs.values() for row in rows})
    figure = Figure(figsize=(max(5.5, 1.5 + 0.7 * len(kinds) * len(runs) ** 0.5), 4.4))
    axes = figure.add_subplot()
    width = 0.8 / len(runs)
    for place, (name, rows) in enumerate(runs.items()):
        axes.bar(
            [kinds.index(row.kind) + (place - (len(runs) - 1) / 2) * width for row in rows],
            [row.score.mean for row in rows],
            width,
            yerr=_errors(rows),
            label=name,
            color=_COLOURS[place % len(_COLOURS)],
            capsize=3,
        )
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize=8)
    axes.set_xlim(-0.7, len(kinds) - 0.3)
    at = f", contexts of {short_length(lengths[0])} tokens" if lengths else ""
    axes.set_ylabel(f"score{at}", fontsize=9)
    _frame(axes)
    return figure


def _frame(axes: Any) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", alpha=0.3)


def _errors(rows: Sequence[Row]) -> list[list[float]]:
    low = [max(0.0, row.score.mean - row.score.low) for row in rows]
    high = [max(0.0, row.score.high - row.score.mean) for row in rows]
    return [low, high]
