"""Tiny recipes, runs in processes that can be killed, and what a run left behind."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qwenlong import train_command
from qwenlong.config import Recipe, recipe_from
from qwenlong.metrics import read_metrics
from qwenlong.tiny import tiny_model

LETTERS = Path(__file__).parents[2] / "recipes" / "tiny-ladder" / "letters.py"


def over(below: dict, above: dict) -> dict:
    """``above`` over ``below``, section by section."""
    joined = {
        k: over(below[k], v) if isinstance(v, dict) and k in below else v for k, v in above.items()
    }
    return {**below, **joined}


def tiny_recipe(folder: Path, /, **changes: Any) -> Recipe:
    """Four steps of 4 prompts and 4 answers on a random model."""
    raw = {
        "name": "tiny",
        "steps": 4,
        "plugins": [str(LETTERS)],
        "model": {"path": str(folder), "compute_dtype": "float32", "device": "cpu"},
        "data": {"tasks": [{"name": "letters", "count": 24}], "max_prompt_tokens": 400},
        "batch": {"prompts": 4, "group_size": 4, "micro_batch_tokens": 600},
        "rollout": {"max_new_tokens": 6, "temperature": 1.0, "saved_per_step": 2},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"disk_wait_s": 0.0},
    }
    return recipe_from(Recipe, over(raw, changes))


def tiny_needle_recipe(**changes: Any) -> Recipe:
    """Two steps that train the built-in model on two forms of questions about short passages."""
    options = {
        "forms": ["value", "sentence"],
        "questions": 4,
        "document_tokens": 20,
        "eval_fraction": 0.3,
    }
    raw = {
        "name": "tiny-needle",
        "steps": 2,
        "model": {"path": "builtin:tiny", "compute_dtype": "float32", "device": "cpu"},
        "data": {
            "tasks": [{"name": "needle", "count": 24, "options": options}],
            "max_prompt_tokens": 1500,
        },
        "batch": {"prompts": 4, "group_size": 2},
        "rollout": {"max_new_tokens": 5, "temperature": 1.0},
        "optimizer": {"learning_rate": 1e-2},
    }
    return recipe_from(Recipe, over(raw, changes))


class NoPicture:
    """In place of the dashboard, whose drawing takes longer than the runs of these tests."""

    problem = None

    def __init__(self, *paths: Path):
        pass

    def update(self) -> None:
        pass

    close = update


def make_model(folder: Path) -> Path:
    return tiny_model(folder / "model")


def start(function, *args, **kwargs) -> multiprocessing.Process:
    """``function`` in a fork of this process, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(function, args, kwargs), daemon=True
    )
    process.start()
    return process


def _child(function, args, kwargs) -> None:
    torch.set_num_threads(1)
    train_command.Dashboard = NoPicture
    os.environ["RICH_FORCE_TERMINAL"] = ""
    function(*args, console=Console(file=io.StringIO()), **kwargs)


def kill_after(
    process: multiprocessing.Process, seconds: float, out: Path | None = None, steps: int = 0
) -> bool:
    """Kill without warning, ``seconds`` after ``out`` has a checkpoint of ``steps`` steps; False if
    it was finished already.
    """
    newest = f"step-{steps:08d}"
    while steps and process.is_alive():
        if any(p.name >= newest for p in (out / "checkpoints").glob("step-*")):
            break
        time.sleep(0.001)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive():
        time.sleep(0.001)
    was_alive = process.is_alive()
    if was_alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return was_alive


def is_timing(name: str) -> bool:
    return name.startswith("seconds/") or name == "tokens_per_s"


def trace(out: Path) -> dict[str, Any]:
    """What two runs with the same result have in common, to the bit."""
    checkpoint = sorted((out / "checkpoints").glob("step-*"))[-1]
    rows = read_metrics(out / "metrics.jsonl")
    return {
        "model": (checkpoint / "model" / "model.safetensors").read_bytes(),
        "final": (out / "final" / "model.safetensors").read_bytes(),
        "optimizer": plain(torch.load(checkpoint / "optimizer.pt", weights_only=True)),
        "random": plain(torch.load(checkpoint / "random-0.pt", weights_only=True)),
        "state": json.loads((checkpoint / "state.json").read_text()),
        "metrics": [{k: v for k, v in row.items() if not is_timing(k)} for row in rows],
        "rollouts": {p.name: p.read_bytes() for p in sorted((out / "rollouts").iterdir())},
    }


def plain(value: Any) -> Any:
    """Tensors as lists, so that ``==`` compares them."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
