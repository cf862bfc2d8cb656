"""``qwenlong train``: a recipe, or a folder of recipes as a ladder of stages."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import transformers
import typer
from rich.console import Console

from qwenlong.checkpoint import DiskPolicy, write_export
from qwenlong.config import Recipe, load_recipe
from qwenlong.errors import InputError
from qwenlong.llm import LLMError
from qwenlong.metrics import METRICS_FILE, MetricsLog
from qwenlong.rewards import JudgeError
from qwenlong.run_setup import build_run
from qwenlong.storage import lock_folder
from qwenlong.train import Run, Stopped, train
from qwenlong.train_plot import Dashboard
from qwenlong.train_report import Metrics

EXPORTED = "final"  # folder of a finished run: its model, in the format of transformers


def run_stage(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    stages: dict[str, Path] | None = None,
    console: Console | None = None,
) -> Path:
    """Train one stage to its end; returns the folder of its model. A finished one is left as it is.

    Raises:
        InputError: one sentence; all completed steps are saved where the run had begun.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with lock_folder(out) if is_main else contextlib.nullcontext():
        return run_locked_stage(recipe, out, resume=resume, stages=stages, console=console)


def run_locked_stage(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    stages: dict[str, Path] | None = None,
    console: Console | None = None,
) -> Path:
    """``run_stage`` for a caller that holds the lock of ``out``."""
    console = console or Console(stderr=True)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    log = run = None
    try:
        run = build_run(recipe, out, resume=resume, stages=stages, report=console.print)
        final = out / EXPORTED
        if run.step >= recipe.steps and final.is_dir():
            return final
        log = _Log(out, recipe, console) if is_main else None
        with _stopping_at_signals(run):
            train(run, log or (lambda step, metrics: None))
        disk = DiskPolicy(recipe.checkpoint.disk_wait_s, console.print)
        write_export(final, run.engine, run.environment.tokenizer, disk=disk)
        return final
    except (Stopped, JudgeError, LLMError, FloatingPointError, OSError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"{out}: {why}. Completed steps are saved; go on with --resume."
        ) from error
    finally:
        if run is not None:
            run.environment.close()
        if log is not None:
            log.close()


class _Log:
    """Metrics, dashboard and the progress line of a run."""

    def __init__(self, out: Path, recipe: Recipe, console: Console):
        self._metrics = MetricsLog(out)
        self._dashboard = Dashboard(out / METRICS_FILE, out / "dashboard.png")
        self._recipe, self._console = recipe, console

    def __call__(self, step: int, metrics: Metrics) -> None:
        self._metrics.log(step, metrics)
        self._dashboard.update()
        seconds = sum(v for name, v in metrics.items() if name.startswith("seconds/"))
        line = (
            f"{self._recipe.name} step {step}/{self._recipe.steps}"
            f"  reward {metrics['reward']:.3f}  loss {metrics['loss']:.4f}"
            f"  entropy {metrics.get('entropy', float('nan')):.3f}"
            f"  tokens {metrics['response_tokens']:.0f}"
            f"  {metrics['tokens_per_s']:.0f} tokens/s  {seconds:.1f} s"
        )
        if metrics.get("aepo/drops_negatives"):
            line += "  positives only"
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._metrics.close()
        if (self._metrics.path).stat().st_size:
            self._dashboard.close()
        if self._dashboard.problem:
            self._console.print(
                f"dashboard.png could not be drawn ({self._dashboard.problem})",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@contextlib.contextmanager
def _stopping_at_signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop between the phases of a step; a second Ctrl-C stops at once."""

    def stop(number: int, frame: object) -> None:
        if run.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_requested = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), or a folder of them: a ladder.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a ladder has one below per stage.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run was left, if it was begun.")
    ] = False,
) -> None:
    """Train a policy by a recipe; under torchrun on several devices."""
    transformers.utils.logging.disable_progress_bar()
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(stderr=True, quiet=not is_main)
    try:
        if recipe.is_dir():
            from qwenlong.ladder import run_ladder

            final = run_ladder(recipe, out, resume=resume, console=console)
        else:
            loaded = load_recipe(recipe)
            if not isinstance(loaded, Recipe):
                raise InputError(f"{recipe} is a merge; run its folder as a ladder.")
            if loaded.start_from is not None:
                raise InputError(
                    f"{recipe} goes on from the stage {loaded.start_from!r}; run its folder as a "
                    "ladder, or give its model as model.path and leave start_from out."
                )
            final = run_stage(loaded, out, resume=resume, console=console)
        console.print(f"the model is in {final}", soft_wrap=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
