"""Command line: ``python -m bench [OP...]``, ``python -m bench plot|tables``."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bench.cases  # noqa: F401  (fills the registry)
from bench import machine, peers, plot, profile, registry, results, run, tables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    help="Speed, memory and accuracy of every op beside its peers. "
    "Without a command, the arguments are those of `run`.",
)
SCRATCH = machine.ROOT / ".cache" / "bench"  # profiles and quick runs; not committed


class Device(str, enum.Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Profiler(str, enum.Enum):
    torch = "torch"
    ncu = "ncu"


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(message, highlight=False, soft_wrap=True, markup=False)
    return typer.Exit(2)


@app.command("run")
def _run(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops, or all (the default).")] = None,
    device: Annotated[Device, typer.Option(help="auto: cuda where there is one.")] = Device.auto,
    case: Annotated[list[str] | None, typer.Option(help="Pattern of cases, e.g. 'fwd*'.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Pattern of shapes, e.g. 'T=8192;*'.")
    ] = None,
    impl: Annotated[list[str] | None, typer.Option(help="Pattern of providers: 'ours-*'.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smallest shape of each case; rows go to .cache/bench.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Time budget of one shape [20, quick: 2].")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file [bench/results/<device>.csv].")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where this is not a git checkout.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show ops, shapes, providers.")] = False,
    profiler: Annotated[
        Profiler | None, typer.Option("--profile", help="Profile the smallest shape of each case.")
    ] = None,
    in_range: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Check, time and append to the results file of this device."""
    chosen = device.value
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise _fail("--device cuda: torch sees no CUDA device here")
    console = Console(width=None if sys.stdout.isatty() else 120)
    names, cases, shapes, impls = ops or ["all"], case or [], shape or [], impl or []
    try:
        points = registry.select(names, chosen, cases, shapes, quick=quick or profiler is not None)
    except ValueError as error:
        raise _fail(str(error)) from None

    if list_:
        _print_list(points, chosen, console)
        return
    if profiler is Profiler.ncu and chosen != "cuda":
        raise _fail("--profile ncu profiles CUDA kernels: it needs a GPU and --device cuda")
    if profiler is not None:
        points = [point for point in points if point.op != "ceiling"]
    if in_range:
        profile.run_in_range(points, chosen, impls, console)
        return
    if profiler is Profiler.torch:
        if not profile.profile_torch(points, chosen, impls, out or SCRATCH / "profile", console):
            raise _fail("nothing was profiled: no provider matches, or none can run here")
        return
    if profiler is Profiler.ncu:
        arguments = [*names, "--device", chosen, "--profile", "ncu", "--in-range"]
        for option, values in (("--case", cases), ("--shape", shapes), ("--impl", impls)):
            arguments += [word for value in values for word in (option, value)]
        report = out or SCRATCH / "profile" / "-".join(names)
        raise typer.Exit(profile.profile_ncu(report, arguments, console))

    if not any(point.op == "ceiling" for point in points):
        points = registry.select(["ceiling"], chosen, quick=quick) + points
    folder = SCRATCH if quick else results.RESULTS
    path = out or folder / f"{machine.slug(chosen)}.csv"
    try:
        results.append_rows(path, [])  # a file that does not fit must not show after the work
    except (results.BadFile, OSError) as error:
        raise _fail(str(error)) from None
    try:
        report = run.run_points(
            points,
            chosen,
            path,
            impls=impls,
            seconds=seconds or (2.0 if quick else 20.0),
            commit=commit,
            console=console,
        )
    except KeyboardInterrupt:
        console.print(f"interrupted; the finished shapes are in {path}", highlight=False)
        raise typer.Exit(130) from None
    console.print(f"run {report.run}: {len(report.rows)} rows -> {path}", highlight=False)
    if report.failed:
        for line in report.failed:
            console.print(f"[red]failed[/] {escape(line)}", highlight=False)
        raise typer.Exit(1)
    if impls and all(row.op == "ceiling" for row in report.rows):
        raise _fail(f"no provider that runs here matches {', '.join(impls)}; see --list")


def _print_list(points: list[registry.Point], device: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("op", "case", "shape", "dtype"):
        table.add_column(column)
    for point in points:
        table.add_row(point.op, point.case, point.shape_text, point.dtype)
    console.print(table)
    for op in dict.fromkeys(point.op for point in points if point.op != "ceiling"):
        console.print(f"\n[bold]{op}[/] on {device}: {', '.join(registry.OPS[op].ours(device))}")
        found, scopes, absent = peers.find(op, device, backward=False)
        for name in found:
            console.print(f"  {name} ({scopes[name]})", highlight=False)
        for name, reason in absent.items():
            console.print(f"  [yellow]absent[/] {name}: {escape(reason)}", highlight=False)


@app.command("plot")
def _plot(
    folder: Annotated[Path, typer.Option(help="Where the CSV files are.")] = results.RESULTS,
    run_id: Annotated[
        str | None, typer.Option("--run", help="A run id [the last one with the op].")
    ] = None,
) -> None:
    """Draw every op of every results file: time, and percent of the roof of the same run."""
    try:
        written = plot.plot_folder(folder, run_id)
    except ValueError as error:
        raise _fail(str(error)) from None
    if not written:
        raise _fail(f"{folder} holds no rows to draw; run `python -m bench` first")
    for path in written:
        typer.echo(path)


@app.command("tables")
def _tables(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where a table is stale.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where the CSV files are.")] = results.RESULTS,
    root: Annotated[Path, typer.Option(help="Holds README.md and docs/.")] = machine.ROOT,
) -> None:
    """Rewrite the tables between `<!-- bench:OP -->` and `<!-- /bench -->` in README.md and
    docs/*.md.
    """
    try:
        stale = tables.update(root, folder, write=not check)
    except ValueError as error:
        raise _fail(str(error)) from None
    for path in stale:
        typer.echo(f"{path} {'is stale: run python -m bench tables' if check else 'rewritten'}")
    if check and stale:
        raise typer.Exit(1)


def main() -> None:
    arguments = sys.argv[1:]
    commands = {"run", "plot", "tables", "--help", "-h"}
    if not arguments or arguments[0] not in commands:
        arguments = ["run", *arguments]
    app(arguments, prog_name="python -m bench")


if __name__ == "__main__":
    main()
