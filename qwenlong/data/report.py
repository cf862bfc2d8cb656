"""``qwenlong synth report``: one picture and one table of a finished run."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwenlong.data.export import SPREAD_DOCUMENTS, load_samples
from qwenlong.errors import InputError
from qwenlong.storage import atomic_write, read_jsonl
from qwenlong.types import TASKS, Sample

_BLUE, _RED, _GREY = "#1b6ca8", "#b8532a", "#c9ccd1"


def draw_report(out: Path, summary: dict[str, Any]) -> Path:
    """Draw ``out/report.png`` from the exported samples; return its path."""
    lengths: dict[str, list[int]] = {}
    subtypes: Counter[tuple[str, str]] = Counter()
    rates: list[float] = []
    positions: list[float] = []
    apart: Counter[int] = Counter()
    for row in read_jsonl(out / "samples.jsonl"):
        lengths.setdefault(row["task"], []).append(row["tokens"]["n"])
        subtypes[row["task"], row["subtype"]] += 1
        if row["difficulty"]:
            rates.append(row["difficulty"]["pass_rate"])
        positions += [position for _, position in row["placement"]["positions"]]
        if row["task"] == "multihop_qa":
            apart[row["placement"]["documents_apart"]] += 1
    figure = Figure(figsize=(14, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    count = summary["samples"]["exported"]
    figure.suptitle(
        f"{summary['recipe']}: {count:,} samples, {summary['tokens']['total']:,} tokens "
        f"({summary['tokenizer']})"
    )
    _draw_lengths(axes[0, 0], lengths)
    _draw_tasks(axes[0, 1], subtypes)
    _draw_yield(axes[0, 2], summary)
    _draw_positions(axes[1, 0], positions)
    _draw_apart(axes[1, 1], apart, summary)
    _draw_difficulty(axes[1, 2], rates)
    path = out / "report.png"
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    return path


def _draw_lengths(axes: Axes, lengths: dict[str, list[int]]) -> None:
    axes.set_title("Length of the context")
    axes.set_xlabel("tokens")
    axes.set_ylabel("samples")
    if not lengths:
        return
    every = [n for values in lengths.values() for n in values]
    # Four bins an octave, a power of two in the middle of one: contexts end just below targets.
    low, high = np.log2(max(1, min(every))), np.log2(max(every) + 1)
    edges = 2.0 ** ((np.arange(np.floor(4 * low), np.ceil(4 * high) + 2) - 0.5) / 4)
    names = sorted(lengths, key=_task_order)
    colors = [f"C{i}" for i in range(len(names))]
    axes.hist([lengths[n] for n in names], bins=edges, stacked=True, label=names, color=colors)
    axes.margins(y=0.3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
    axes.legend(fontsize=7, ncols=2, loc="upper center")


def _draw_tasks(axes: Axes, subtypes: Counter[tuple[str, str]]) -> None:
    axes.set_title("Subtype (colour: task)")
    axes.set_xlabel("samples")
    keys = sorted(subtypes, key=lambda key: (_task_order(key[0]), key[1]), reverse=True)
    tasks = sorted({task for task, _ in keys}, key=_task_order)
    colors = [f"C{tasks.index(task)}" for task, _ in keys]  # as in the histogram of lengths
    places = list(range(len(keys)))
    bars = axes.barh(places, [subtypes[key] for key in keys], color=colors)
    size = min(8.0, 200 / max(1, len(keys)))  # points: all of them fit
    axes.bar_label(bars, padding=2, fontsize=size)
    axes.set_yticks(places, [subtype or task for task, subtype in keys], fontsize=size)
    axes.margins(x=0.12, y=0.02)


def _draw_yield(axes: Axes, summary: dict[str, Any]) -> None:
    axes.set_title("Verdicts of every filter")
    axes.set_xlabel("composed samples")
    names = list(summary["filters"])[::-1]
    left = np.zeros(len(names))
    for verdict, color in (("pass", _BLUE), ("fail", _RED), ("not_run", _GREY)):
        values = np.array([summary["filters"][name].get(verdict, 0) for name in names], float)
        axes.barh(names, values, left=left, color=color, label=verdict)
        left += values
    for place, name in enumerate(names):
        failed = summary["filters"][name].get("fail", 0)
        axes.text(left[place], place, f" {failed:,}" if failed else "", va="center", fontsize=8)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8, loc="lower left")


def _draw_positions(axes: Axes, positions: list[float]) -> None:
    axes.set_title("Where the evidence lies")
    axes.set_xlabel("fraction of the context")
    axes.set_ylabel("evidence documents")
    axes.hist(positions, bins=np.linspace(0, 1, 21), color=_BLUE)


def _draw_apart(axes: Axes, apart: Counter[int], summary: dict[str, Any]) -> None:
    share = summary["multihop"]["share"]
    note = "no multi-hop samples" if share is None else f"{share:.0%} from {SPREAD_DOCUMENTS} on"
    axes.set_title(f"Multi-hop: evidence more than 25 % apart ({note})")
    axes.set_xlabel("evidence documents of which any two are that far apart")
    axes.set_ylabel("samples")
    counts = range(1, max([*apart, SPREAD_DOCUMENTS + 1]) + 1)
    colors = [_BLUE if n >= SPREAD_DOCUMENTS else _GREY for n in counts]
    axes.bar(list(counts), [apart[n] for n in counts], color=colors)
    axes.set_xticks(list(counts))


def _draw_difficulty(axes: Axes, rates: list[float]) -> None:
    axes.set_title("Difficulty: pass rate of the model")
    axes.set_xlabel("pass rate")
    axes.set_ylabel("samples")
    axes.set_xlim(-0.05, 1.05)
    if rates:
        axes.hist(rates, bins=np.linspace(-0.05, 1.05, 12), color=_BLUE)
    else:
        axes.text(0.5, 0.5, "not run: no model", ha="center", transform=axes.transAxes)


def _task_order(task: str) -> int:
    return TASKS.index(task) if task in TASKS else len(TASKS)


# --- for a human -------------------------------------------------------------


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Counts of a run: documents, tasks, verdicts."""
    documents, samples = summary["documents"], summary["samples"]
    lost = {**documents["rejected"], **documents["duplicates"]}
    if documents["contaminated"]:
        lost["contaminated"] = documents["contaminated"]
    losses = ", ".join(f"{name} {n:,}" for name, n in lost.items()) or "none"
    console.print(f"documents: {documents['kept']:,} kept; left out: {losses}")
    tokens = summary["tokens"]
    console.print(
        f"samples: {samples['exported']:,} of {samples['composed']:,} composed; "
        f"{tokens['least']:,} to {tokens['most']:,} tokens, {tokens['total']:,} in all"
    )
    share = summary["multihop"]["share"]
    if share is not None:
        console.print(f"multi-hop: {share:.0%} with evidence in three documents over 25 % apart")
    table = Table("filter", "pass", "fail", "not run")
    for name, counts in summary["filters"].items():
        table.add_row(name, *(f"{counts.get(v, 0):,}" for v in ("pass", "fail", "not_run")))
    console.print(table)
    if summary.get("dropped"):  # none in the folder of an earlier version
        table = Table("made by", "came to nothing because", "times")
        for by, reasons in summary["dropped"].items():
            for reason, count in reasons.items():
                table.add_row(by, escape(reason), f"{count:,}")
        console.print(table)
    table = Table("task", "samples")
    for task in sorted(summary["tasks"], key=_task_order):
        table.add_row(task, f"{summary['tasks'][task]:,}")
    console.print(table)


def print_samples(console: Console, out: Path, count: int) -> None:
    """``count`` samples, one task after the other, as a person would check them."""
    by_task: dict[str, list[Sample]] = {}
    for sample in load_samples(out, with_text=False):
        kept = by_task.setdefault(sample.task, [])
        if len(kept) < count:
            kept.append(sample)
    chosen: list[Sample] = []
    for place in range(count):
        chosen += [by_task[t][place] for t in sorted(by_task) if place < len(by_task[t])]
    chosen = chosen[:count]
    wanted = {sample.id for sample in chosen}
    for sample in load_samples(out):
        if sample.id in wanted:
            _print_sample(console, sample)


def _print_sample(console: Console, sample: Sample) -> None:
    texts = {d.id: (d.title, d.text) for d in sample.documents}
    places = dict(sample.placement["positions"])
    console.rule(f"{sample.task} {sample.subtype}  {sample.id}")
    console.print(f"[bold]{escape(sample.question)}[/bold]")
    for index, choice in enumerate(sample.choices or ()):
        console.print(f"  ({chr(ord('A') + index)}) {escape(choice)}")
    console.print(f"answer: {escape(', '.join(sample.answers))} {escape(sample.unit or '')}")
    console.print(
        f"{sample.tokens.n:,} tokens, {len(sample.documents)} documents, "
        f"split {sample.split}, derivation {sample.derivation.get('kind', 'none')}"
    )
    for span in sample.evidence[:6]:
        title, text = texts[span.doc]
        quote = textwrap.shorten(text[span.start : span.end], 160, placeholder=" ...")
        console.print(f"  at {places[span.doc]:.0%}, {escape(title)}: {escape(quote)}")


def show_stage(console: Console, out: Path, stage: str, count: int) -> None:
    """The first ``count`` rows of a stage, long values cut."""
    folder = out / "work" / stage
    if not folder.is_dir():
        known = sorted(p.name for p in (out / "work").glob("*") if p.is_dir())
        if not known:
            raise InputError(f"{out} holds no run: `qwenlong synth run` makes one")
        raise InputError(f"{out} has no stage {stage!r}; it has {known}")
    parts = sorted(p for p in folder.glob("part-*.jsonl") if p.stem.count(".") == 0)
    done = (folder / "done.json").exists()
    console.print(f"{stage}: {len(parts)} parts, {'done' if done else 'not finished'}")
    shown = 0
    for part in parts:
        for row in read_jsonl(part):
            if shown == count:
                return
            console.print_json(data=_shortened(row))
            shown += 1


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 300 else f"{value[:300]} ... ({len(value):,} characters)"
    if isinstance(value, list):
        short = [_shortened(item) for item in value[:8]]
        return short + [f"... ({len(value)} items)"] if len(value) > 8 else short
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value
