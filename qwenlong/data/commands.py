"""``qwenlong synth``: run, show, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwenlong.errors import InputError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Long-context data synthesis.")

Out = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command("run")
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    limit: Annotated[int | None, typer.Option(help="Compose at most this many samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core, at most 16.")] = 0,
) -> None:
    """Make a dataset. Killed at any moment, the same command continues."""
    from qwenlong.data.pipeline import run_pipeline
    from qwenlong.data.recipe import load_recipe
    from qwenlong.data.report import draw_report, print_summary
    from qwenlong.llm import LLMError

    if workers < 0:
        raise InputError(f"--workers is {workers}; it must be at least 0")
    loaded = load_recipe(recipe)
    if seed is not None:
        loaded = dataclasses.replace(loaded, seed=seed)
    if limit is not None:
        if limit < 1:
            raise InputError(f"--limit is {limit}; it must be at least 1")
        loaded = loaded.with_limit(limit)
    console = Console(stderr=True)
    started = time.monotonic()
    workers = workers or min(16, len(os.sched_getaffinity(0)))
    try:
        with _watch(console) as watch:
            summary = run_pipeline(loaded, out, workers=workers, watch=watch)
    except LLMError as error:
        raise InputError(
            f"the model failed: {error}. Answers that came are kept in {out / 'calls'}; run the "
            "same command again to continue"
        ) from None
    except KeyboardInterrupt:
        raise InputError(f"interrupted; run the same command again to continue in {out}") from None
    print_summary(console, summary)
    _print_usage(console, out)
    picture = draw_report(out, summary)
    console.print(f"{out / 'samples.jsonl'}, {picture}, {time.monotonic() - started:.0f} s")


@app.command("show")
def show(
    stage: Annotated[str, typer.Argument(help="collect, extract, compose, extend, ...")],
    out: Annotated[Path, typer.Option(help="Folder of a run.")],
    count: Annotated[int, typer.Option(help="Rows to print.")] = 3,
) -> None:
    """Print the first rows of a stage."""
    from qwenlong.data.report import show_stage

    show_stage(Console(), out, stage, count)


@app.command("report")
def report(out: Out, samples: Annotated[int, typer.Option(help="Samples to print.")] = 5) -> None:
    """Draw report.png of a finished run, print its counts and some samples."""
    from qwenlong.data.report import draw_report, print_samples, print_summary

    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{out} holds no summary.json: `qwenlong synth run` writes it when it ends"
        ) from None
    except ValueError:
        raise InputError(f"{out / 'summary.json'} is damaged; run the recipe again") from None
    console = Console()
    print_summary(console, summary)
    _print_usage(console, out)
    print_samples(console, out, samples)
    console.print(f"drawn: {draw_report(out, summary)}")


def _print_usage(console: Console, out: Path) -> None:
    path = out / "usage.json"
    if path.exists():
        usage = json.loads(path.read_text(encoding="utf-8"))
        console.print(
            f"model {usage['model']}: {usage['answers']:,} answers, "
            f"{usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens, "
            f"{usage['cost_usd']:.2f} USD"
        )


@contextlib.contextmanager
def _watch(console: Console) -> Iterator[Callable]:
    """A progress bar for every stage; where the output is no terminal, a line when it ends."""
    columns = (
        TextColumn("{task.description:>13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        @contextlib.contextmanager
        def watch(stage: str, total: int | None) -> Iterator[Callable[[], None]]:
            task = progress.add_task(stage, total=total)
            started = time.monotonic()
            yield lambda: progress.advance(task)
            progress.update(task, total=total or 1, completed=total or 1)
            if not console.is_terminal:
                console.print(f"{stage}: {time.monotonic() - started:.1f} s")

        yield watch
