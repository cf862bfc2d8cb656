"""``qwenlong train-demo``: a small real model is trained, and asked about held-out documents.

    python -m qwenlong.train_demo RUN/result.json ... OUT.md      a table of several runs

The recipe's task must be ``qwenlong.data.needle``'s. The questions of its other side, ``split``
eval, are asked of the model before and after, at the temperature of the training; a document is one
unit of the intervals, because its questions are not independent.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from qwenlong import prompts
from qwenlong.config import Recipe, load_recipe
from qwenlong.data.needle import needle_samples
from qwenlong.episodes import prompt_ids
from qwenlong.errors import InputError
from qwenlong.evals.statistics import Estimate, difference, estimate
from qwenlong.metrics import METRICS_FILE, read_metrics
from qwenlong.models import load_causal_lm, load_tokenizer, pick_device
from qwenlong.rewards import score
from qwenlong.rollout import EmbeddedRollouts
from qwenlong.storage import atomic_write, lock_folder, read_jsonl, write_json, write_jsonl
from qwenlong.tiny import model_folder
from qwenlong.train_command import run_locked_stage
from qwenlong.types import Sample

RECIPE = Path("recipes/train-demo.yaml")
EVAL_SEED = 1_000_003  # of the facts that are planted for the test, and of its answers
BOTH = ("before", "after")


def train_demo(
    recipe: Annotated[Path, typer.Option(help="Recipe with the task needle.")] = RECIPE,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("train-demo"),
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.")] = None,
    passages: Annotated[int, typer.Option(help="Held-out passages to ask about.")] = 20,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Ask for the most likely answers as well.")
    ] = False,
) -> None:
    """Train SmolLM2-135M-Instruct to find facts in real text. The same command continues a run."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = load_recipe(recipe)
    if not isinstance(loaded, Recipe):
        raise InputError(f"{recipe} is a merge; give a recipe that trains.")
    if seed is not None:
        loaded = loaded.model_copy(update={"seed": seed})
    with lock_folder(out):
        result = run_demo(loaded, out, passages, greedy=greedy, console=Console(stderr=True))
    print(describe(result))
    print(out / "train-demo.png")


def run_demo(
    recipe: Recipe, out: Path, passages: int, *, greedy: bool, console: Console
) -> dict[str, Any]:
    """Ask, train, ask again; writes ``result.json`` and ``train-demo.png`` into ``out``."""
    started = time.monotonic()
    base = model_folder(recipe.model.path)
    samples = held_out(recipe, load_tokenizer(base), passages)
    temperatures = (recipe.rollout.temperature, 0.0) if greedy else (recipe.rollout.temperature,)
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for when in BOTH:
        folder, name = base, when
        if when == "after":
            folder = run_locked_stage(recipe, out, resume=True, console=console)
            name = f"after-{recipe.steps}"  # a run may go on with more steps
        for temperature in temperatures:
            path = out / "held-out" / f"{name}-t{temperature:g}.jsonl"
            found = list(read_jsonl(path)) if path.exists() else []
            if [row["sample_id"] for row in found] != [sample.id for sample in samples]:
                console.print(f"{len(samples)} held-out questions, {when} the training ...")
                found = ask(folder, samples, recipe, temperature)
                write_jsonl(path, found)
            rows[when, temperature] = found
    result = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "prompts": len(samples),
        "passages": passages,
        "device": _device_name(recipe),
        "seconds": round(time.monotonic() - started, 1),  # of this process
        "rewards": [
            _compared(rows["before", t], rows["after", t], t, task)
            for t in temperatures
            for task in (None, *sorted({sample.task for sample in samples}))
        ],
    }
    write_json(out / "result.json", result)
    draw_demo(result, out / METRICS_FILE, out / "train-demo.png")
    return result


def held_out(recipe: Recipe, tokenizer: Any, passages: int) -> list[Sample]:
    """The questions of ``passages`` held-out passages whose prompts fit the recipe's lengths.

    Raises:
        InputError: the recipe has no task ``needle``, or there are fewer such passages; none is
            asked for.
    """
    if passages < 1:
        raise InputError(f"--passages is {passages}; it must be at least 1.")
    task = next((task for task in recipe.data.tasks if task.name == "needle"), None)
    if task is None:
        raise InputError("train-demo: the recipe must have the task needle under data.tasks.")
    per_passage = task.options.get("questions", 10)
    made = needle_samples(None, EVAL_SEED, **{**task.options, "split": "eval"})
    kept: list[Sample] = []
    for start in range(0, len(made), per_passage):
        group = made[start : start + per_passage]
        lengths = [len(prompt_ids(tokenizer, prompts.render(sample))) for sample in group]
        if (
            min(lengths) > recipe.data.above_tokens
            and max(lengths) <= recipe.data.max_prompt_tokens
        ):
            kept += group
    if len(kept) < passages * per_passage:
        raise InputError(
            f"train-demo: {len(kept) // per_passage} held-out passages fit the recipe's lengths, "
            f"not {passages}; ask for fewer or raise eval_fraction."
        )
    return kept[: passages * per_passage]


def ask(
    folder: Path, samples: Sequence[Sample], recipe: Recipe, temperature: float
) -> list[dict[str, Any]]:
    """One answer to each question and its reward; prompts of a passage share its keys and values.

    The model runs in the dtype in which the recipe trains it.
    """
    tokenizer = load_tokenizer(folder)
    lm = load_causal_lm(folder, dtype=recipe.model.compute_dtype, device=recipe.model.device)
    rollouts = EmbeddedRollouts(lm.model)
    groups = rollouts.generate(
        [prompt_ids(tokenizer, prompts.render(sample)) for sample in samples],
        group_size=1,
        max_new_tokens=recipe.rollout.max_new_tokens,
        temperature=temperature,
        seed=EVAL_SEED,
    )
    rows = []
    for sample, (turn,) in zip(samples, groups, strict=True):
        response = tokenizer.decode(turn.response_ids, skip_special_tokens=True)
        rows.append(
            {
                "sample_id": sample.id,
                "passage": sample.documents[0].id,
                "task": sample.task,
                "reward": score(sample, response).value,
                "prompt_tokens": len(turn.prompt_ids),
                "response": response,
                "answers": sample.answers,
            }
        )
    return rows


def _by_passage(rows: Sequence[dict[str, Any]], task: str | None) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if task is None or row["task"] == task:
            found[row["passage"]].append(row["reward"])
    return dict(found)


def _compared(
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    temperature: float,
    task: str | None,
) -> dict[str, Any]:
    """Means with 95 % intervals and their paired difference; ``task`` None is all of them."""
    first, second = _by_passage(before, task), _by_passage(after, task)
    gain = difference(second, first)
    return {
        "task": task or "all",
        "temperature": temperature,
        "prompts": sum(map(len, first.values())),
        "before": _plain(estimate(list(first.values()))),
        "after": _plain(estimate(list(second.values()))),
        "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
    }


def _plain(value: Estimate) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high}


def describe(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [
        f"{result['prompts']} held-out prompts over {result['passages']} passages, 95 % intervals; "
        f"{result['steps']} steps, seed {result['seed']}"
    ]
    for row in result["rewards"]:
        first, last, gain = (
            f"{row[key]['mean']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]"
            for key in (*BOTH, "gain")
        )
        lines.append(
            f"  {row['task']:<12} temperature {row['temperature']:g}: reward {first} before, "
            f"{last} after, gain {gain}"
        )
    return "\n".join(lines)


def _device_name(recipe: Recipe) -> str:
    if pick_device(recipe.model.device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def seeds_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of several runs, a row for each seed and kind of question."""
    lines = [
        "| seed | questions | temperature | prompts | reward before | reward after | gain | steps "
        "| device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: r["seed"]):
        for row in result["rewards"]:
            cells = [
                f"{row[key]['mean']:.3f} ({row[key]['low']:.3f} to {row[key]['high']:.3f})"
                for key in (*BOTH, "gain")
            ]
            first = [result["seed"], row["task"], f"{row['temperature']:g}", row["prompts"]]
            cells = [*map(str, first), *cells, str(result["steps"]), result["device"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_demo(result: dict[str, Any], metrics_path: Path, out_png: Path) -> None:
    """Held-out reward before and after with its intervals, beside the reward while training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = result["rewards"]
    for i, when in enumerate(BOTH):
        values = [row[when] for row in rows]
        left.bar(
            [x + 0.38 * (i - 0.5) for x in range(len(rows))],
            [v["mean"] for v in values],
            width=0.36,
            yerr=[
                [v["mean"] - v["low"] for v in values],
                [v["high"] - v["mean"] for v in values],
            ],
            capsize=3,
            color=("#9fb8cc", "#1b6ca8")[i],
            label=f"{when} the training",
        )
    names = [f"{row['task']}\nat {row['temperature']:g}" for row in rows]
    left.set_xticks(range(len(rows)), names, fontsize=7)
    left.set_ylim(0, 1.2)  # room for the legend above full reward
    left.set_title(
        f"{result['prompts']} held-out prompts, by temperature, 95 %", loc="left", fontsize=9
    )
    left.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    metrics = read_metrics(metrics_path)
    tasks = dict.fromkeys(row["task"] for row in rows if row["task"] != "all")
    for i, task in enumerate(tasks):
        name = f"reward/{task}"
        found = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        right.plot(*zip(*found, strict=True), color=("#b8532a", "#4f8f46")[i % 2], label=task)
    right.set_ylim(0, 1.05)
    right.set_xlabel("step", fontsize=8)
    right.set_title("reward while training", loc="left", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(out_png, "wb") as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m qwenlong.train_demo RESULT.json ... OUT.md")
    with atomic_write(sys.argv[-1]) as file:
        file.write(seeds_table([json.loads(Path(path).read_text()) for path in sys.argv[1:-1]]))
    print(sys.argv[-1])
