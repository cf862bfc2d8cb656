"""Check, time, append: one pass over the chosen points."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bench.cases  # noqa: F401  (fills the registry)
from bench import machine, timing
from bench.ceilings import Roof
from bench.gate import WrongResult
from bench.registry import Outputs, Point, Problem, Unavailable, build
from bench.results import Row, append_rows, rate_unit
from qlkernels.testing import nan_filled_memory

WARM_UP_CALLS = 3  # after the check, which compiles and autotunes


@dataclass
class Report:
    """What one invocation did. ``failed`` holds our own providers that are wrong or raised: exit
    status 1.
    """

    run: str
    commit: str
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run_points(
    points: Sequence[Point],
    device: str,
    out: Path,
    *,
    impls: Sequence[str] = (),
    seconds: float = 20.0,
    commit: str | None = None,
    clock: timing.Clock | None = None,
    console: Console | None = None,
) -> Report:
    """Measure ``points`` and append their rows to ``out``, point by point, so that an interruption
    keeps what it has.

    ``impls`` are patterns of provider names (all where empty; ceilings are always measured);
    ``seconds`` is the time budget of one point.
    """
    console = console or Console()
    clock = clock or timing.clock_for(device)
    report = Report(machine.new_run_id(), machine.git_commit() if commit is None else commit)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(points))
        for point in points:
            progress.update(task, description=str(point))
            patterns = () if point.op == "ceiling" else impls
            rows = _measure(point, device, patterns, seconds, clock, report, console)
            if rows:
                append_rows(out, rows)
                report.rows += rows
            progress.advance(task)
    return report


def _measure(
    point: Point,
    device: str,
    impls: Sequence[str],
    seconds: float,
    clock: timing.Clock,
    report: Report,
    console: Console,
) -> list[Row]:
    try:
        problem = build(point, device)
    except Unavailable as error:
        console.print(f"[yellow]absent[/]  {point}: {escape(str(error))}", highlight=False)
        return []
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        console.print(f"[yellow]skipped[/] {point}: the inputs do not fit on this device")
        return []

    refused: dict[str, str] = {}  # provider -> reason
    accepted: dict[str, float] = {}  # provider -> rel_err
    for name, call in problem.impls.items():
        if impls and not any(fnmatch.fnmatchcase(name, pattern) for pattern in impls):
            continue
        try:
            rel_err = gate(problem, name, call)
            call()  # a graph is captured at its second call, which may fail
            accepted[name] = rel_err
        except Unavailable as error:
            problem.absent[name] = str(error)
        except torch.cuda.OutOfMemoryError:
            problem.absent[name] = "out of memory at this shape"
        except Exception as error:  # a failing peer must not stop the run
            reason = str(error).splitlines()[0] if str(error) else ""
            wrong = isinstance(error, WrongResult)
            refused[name] = f"wrong: {reason}" if wrong else f"{type(error).__name__}: {reason}"
            if name.startswith("ours-") or point.op == "ceiling":
                report.failed.append(f"{point} {name}: {refused[name]}")
        if device == "cuda":
            torch.cuda.empty_cache()

    calls = {name: problem.impls[name] for name in accepted}
    peaks: dict[str, float | None] = dict.fromkeys(calls)
    for name, call in calls.items():
        for _ in range(WARM_UP_CALLS):
            call()
        if device == "cuda":
            peaks[name] = timing.peak_extra_bytes(call) / 1e6
    timings = timing.time_interleaved(
        {f"bench.{point.op}.{point.case}.{name}": call for name, call in calls.items()},
        clock,
        seconds=seconds,
    )
    shape = point.shape_text
    if device == "cpu":
        shape += f";threads={torch.get_num_threads()}"
    rows = [
        Row(
            run=report.run,
            op=point.op,
            case=point.case,
            impl=name,
            peer_scope=problem.peer_scope.get(name, ""),
            shape=shape,
            dtype=point.dtype,
            ms_p20=timed.percentile(20),
            ms_p50=timed.percentile(50),
            ms_p80=timed.percentile(80),
            useful_flops=problem.useful_flops,
            bytes=problem.bytes,
            peak_mb=peaks[name],
            rel_err=accepted[name],
            gpu=machine.device_name(device),
            torch=torch.__version__,
            triton=machine.package_version("triton"),
            commit=report.commit,
            date=machine.utc_now(),
        )
        for name, timed in zip(calls, timings.values(), strict=True)
    ]
    samples = {name: len(t.ms) for name, t in zip(calls, timings.values(), strict=True)}
    _print(console, point, rows, samples, refused, problem.absent, Roof.of(report.rows + rows))
    return rows


def gate(problem: Problem, name: str, call: Callable[[], Outputs]) -> float:
    """Relative error of a provider; raises ``WrongResult``, or ``Unavailable`` where it cannot run
    here.

    Ours runs with uninitialised memory full of NaN, so that an element that is never written shows.
    """
    ours = name.startswith("ours-")
    if not ours:
        return problem.check(call(), False, problem.peer_scope.get(name) != "less")
    try:
        with nan_filled_memory():
            outputs = call()
    except RuntimeError as error:
        if "cannot run here" in str(error):  # the sentence of qlkernels._dispatch.pick_impl
            raise Unavailable(str(error)) from None
        raise
    return problem.check(outputs, True, True)


def _print(
    console: Console,
    point: Point,
    rows: Sequence[Row],
    samples: dict[str, int],
    refused: dict[str, str],
    absent: dict[str, str],
    roof: Roof,
) -> None:
    table = Table(title=str(point), title_justify="left", box=None, pad_edge=False)
    for column in ("impl", "scope"):
        table.add_column(column)
    has_flops = any(row.useful_flops for row in rows)
    amount = "useful_flops" if has_flops else "bytes"
    unit, factor = rate_unit(rows, amount)
    for column in ("ms", "p20", "p80", "n", unit, "% roof", "extra MB", "rel err"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.ms_p50):
        percent = None if point.op == "ceiling" else roof.percent(row)
        table.add_row(
            f"[bold]{row.impl}[/]" if row.is_ours else row.impl,
            row.peer_scope,
            *(f"{ms:.4g}" for ms in (row.ms_p50, row.ms_p20, row.ms_p80)),
            str(samples[row.impl]),
            f"{factor * getattr(row, amount) / row.ms_p50:.4g}",
            "" if percent is None else f"{percent:.0f}",
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            f"{row.rel_err:.1e}",
        )
    console.print(table)
    for name, reason in refused.items():
        console.print(f"  [red]refused[/] {name}: {escape(reason)}", highlight=False)
    for name, reason in absent.items():
        console.print(f"  [yellow]absent[/]  {name}: {escape(reason)}", highlight=False)
    console.print()
