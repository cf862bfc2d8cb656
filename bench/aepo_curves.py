"""AEPO beside GRPO and task-level advantages: curves of reward and entropy of a real model.

    python -m bench.aepo_curves --out runs/aepo-curves

    calibration   task-level advantages alone, of a seed that is not compared
    grpo          advantages over the std of the group (arXiv 2512.12967, eq. 3)
    task          over the std of the task in the batch (eq. 7)
    task+aepo     the same, and AEPO with bounds from the calibration

The arms differ in ``loss.advantage`` and ``aepo`` alone. Samples, their order and the random
numbers of the answers follow from the seed, so that the arms of a seed see the same prompts at
every step. Bounds are quantiles of the entropies of the calibration's steps (``bounds_of``). Every
arm is asked the same held-out questions as the model that it began with.

A command that was stopped goes on where it was: finished runs are left alone, the one that was
begun continues from its last checkpoint. ``bench.aepo_curves_page`` draws what is written here.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import transformers
import typer
from rich.console import Console

from bench.aepo_curves_page import draw, page
from bench.machine import device_name
from qwenlong.checkpoint import check_recipe
from qwenlong.config import Recipe, load_recipe, recipe_from
from qwenlong.errors import InputError
from qwenlong.metrics import METRICS_FILE, read_metrics
from qwenlong.models import load_tokenizer, pick_device
from qwenlong.storage import atomic_write, read_jsonl, write_jsonl
from qwenlong.tiny import model_folder
from qwenlong.train_command import EXPORTED, run_stage
from qwenlong.train_demo import ask, held_out
from qwenlong.types import Sample

RECIPE = Path("recipes/aepo-curves.yaml")
RESULTS = "aepo-curves"  # .jsonl, .png, .md
HELD_OUT = "held-out.jsonl"
CALIBRATION_SEED = 0
QUANTILES = (1 / 3, 2 / 3)  # of the calibration's entropies: AEPO's low and high
ADVANTAGE_OF = {"grpo": "group", "task": "task", "task+aepo": "task"}  # arm: loss.advantage


def bounds_of(entropies: Sequence[float]) -> tuple[float, float]:
    """AEPO's low and high in nats: ``QUANTILES`` of the entropies of a run's steps, interpolated
    linearly and rounded to 0.001.
    """
    low, high = np.quantile(np.asarray(entropies, dtype=np.float64), QUANTILES)
    return round(float(low), 3), round(float(high), 3)


def arm_recipe(base: Recipe, arm: str, seed: int, bounds: tuple[float, float] | None) -> Recipe:
    """``base`` with the arm's advantages and this seed; ``bounds`` turn AEPO on."""
    plain = base.model_dump()
    plain["name"] = _name(arm, seed)
    plain["seed"] = seed
    plain["loss"]["advantage"] = ADVANTAGE_OF[arm]
    plain["aepo"] = None if bounds is None else {"low": bounds[0], "high": bounds[1]}
    return recipe_from(Recipe, plain)


def run_arms(
    base: Recipe, out: Path, seeds: Sequence[int], passages: int, *, console: Console
) -> list[dict[str, Any]]:
    """Every run of the comparison, each in a folder below ``out``, seed by seed.

    Returns:
        The rows of the results file: one of the setting (``kind`` setup), then one a run, the
        calibration first. Entropies are nats.

    Raises:
        InputError: no seed, one twice, or that of the calibration; a recipe that brings its own
            ``aepo``, has fewer than two tasks or no prompt of each in a step; ``out`` holds runs of
            another recipe.
    """
    _check(base, seeds)
    model = model_folder(base.model.path)
    samples = held_out(base, load_tokenizer(model), passages)
    tasks = sorted({sample.task for sample in samples})
    if len(tasks) < 2:
        raise InputError(f"all samples are of the task {tasks[0]}; the arms need two or more.")
    if base.batch.prompts < len(tasks):
        raise InputError(
            f"batch.prompts is {base.batch.prompts}, and there are {len(tasks)} tasks; every step "
            "needs a prompt of each."
        )
    # First, because it refuses a folder of another recipe, whose answers would be taken for ours.
    calibration = _train(base, out, console, "task", CALIBRATION_SEED)
    before = _answers(out / f"before-{HELD_OUT}", model, samples, base, console)
    bounds = bounds_of(calibration["entropy"])
    console.print(f"AEPO's bounds: {bounds[0]} and {bounds[1]} nats", highlight=False)
    runs = [{**calibration, "arm": "calibration"}]
    for seed in seeds:
        for arm in ADVANTAGE_OF:
            limits = bounds if arm == "task+aepo" else None
            run = _train(base, out, console, arm, seed, limits)
            folder = out / _name(arm, seed)
            answers = _answers(folder / HELD_OUT, folder / EXPORTED, samples, base, console)
            runs.append({**run, "held_out": _by_task(answers)})
    setup = {
        "kind": "setup",
        "recipe": base.name,
        "model": base.model.path,
        "device": device_name(pick_device(base.model.device).type),
        "steps": base.steps,
        "prompts": base.batch.prompts,
        "group_size": base.batch.group_size,
        "max_new_tokens": base.rollout.max_new_tokens,
        "temperature": base.rollout.temperature,
        "learning_rate": base.optimizer.learning_rate,
        "seeds": list(seeds),
        "calibration_seed": CALIBRATION_SEED,
        "quantiles": list(QUANTILES),
        "low": bounds[0],
        "high": bounds[1],
        "held_out": _by_task(before),
    }
    return [setup, *runs]


def _check(base: Recipe, seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or CALIBRATION_SEED in seeds:
        raise InputError(
            f"seeds are {list(seeds)}; give one or more, each once, and none of them "
            f"{CALIBRATION_SEED}, which is the calibration's."
        )
    if base.aepo is not None:
        raise InputError("the recipe has the section aepo, whose bounds are measured here.")


def _name(arm: str, seed: int) -> str:
    return f"{arm.replace('+', '-')}-{seed}"


def _train(
    base: Recipe,
    out: Path,
    console: Console,
    arm: str,
    seed: int,
    bounds: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The curves of one run, which is trained where that is still to do."""
    recipe = arm_recipe(base, arm, seed, bounds)
    folder = out / recipe.name
    check_recipe(folder, recipe)
    if not (_is_trained(folder, recipe) and (folder / EXPORTED).is_dir()):
        (folder / HELD_OUT).unlink(missing_ok=True)  # of another number of steps
        run_stage(recipe, folder, resume=True, console=console)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # three times the model each
    rows = read_metrics(folder / METRICS_FILE)
    tasks = sorted({n.removeprefix("reward/") for r in rows for n in r if n.startswith("reward/")})
    return {
        "kind": "run",
        "arm": arm,
        "seed": seed,
        "reward": {task: [_rounded(row.get(f"reward/{task}")) for row in rows] for task in tasks},
        "entropy": [_rounded(row["entropy"]) for row in rows],
        "drops": [int(row.get("aepo/drops_negatives", 0)) for row in rows],
        "kept": [_rounded(row.get("aepo/kept_fraction", 1.0)) for row in rows],
        "grad_norm": [_rounded(row["grad_norm"]) for row in rows],
        "response_tokens": [_rounded(row["response_tokens"]) for row in rows],
        "seconds": round(
            math.fsum(v for row in rows for k, v in row.items() if k.startswith("seconds/")), 1
        ),
    }


def _is_trained(folder: Path, recipe: Recipe) -> bool:
    path = folder / METRICS_FILE
    return path.exists() and len(read_metrics(path)) == recipe.steps


def _answers(
    path: Path, model: Path, samples: Sequence[Sample], recipe: Recipe, console: Console
) -> list[dict[str, Any]]:
    """Answers of ``model`` to the held-out questions; those that ``path`` has are not asked for."""
    found = list(read_jsonl(path)) if path.exists() else []
    if [row["sample_id"] for row in found] != [sample.id for sample in samples]:
        console.print(f"{len(samples)} held-out questions: {path}", highlight=False)
        found = ask(model, samples, recipe, recipe.rollout.temperature)
        write_jsonl(path, found)
    return found


def _by_task(answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Rewards by task and passage."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in answers:
        found[row["task"]][row["passage"]].append(_rounded(row["reward"]))
    return {task: dict(found[task]) for task in sorted(found)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def main(
    recipe: Annotated[Path, typer.Option(help="Recipe with the task needle.")] = RECIPE,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/aepo-curves"),
    seeds: Annotated[str, typer.Option(help="Seeds that are compared, with commas.")] = "1,2",
    passages: Annotated[int, typer.Option(help="Held-out passages to ask about.")] = 25,
    results: Annotated[
        Path | None, typer.Option(help="Folder for the curves and their page; --out if not given.")
    ] = None,
) -> None:
    """Train every arm, then write the curves, their picture and their page."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = load_recipe(recipe)
    if not isinstance(loaded, Recipe):
        raise InputError(f"{recipe} is a merge; give a recipe that trains.")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds is {seeds!r}; give whole numbers such as 1,2.") from None
    rows = run_arms(loaded, out, numbers, passages, console=Console(stderr=True))
    path = (results or out) / f"{RESULTS}.jsonl"
    write_jsonl(path, rows)
    draw(rows, path.with_suffix(".png"))
    with atomic_write(path.with_suffix(".md")) as file:
        file.write(page(rows, path.with_suffix(".png").name))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        # A single stage is resumed by an option; here the same command goes on by itself.
        why = str(error).replace("go on with --resume", "the same command goes on")
        sys.exit(f"aepo_curves: {why}")
