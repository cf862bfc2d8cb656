"""Checkpoints that a kill cannot tear, and the way back from them.

    OUT/recipe.json                      what the run was started with
    OUT/checkpoints/step-00000012/       complete, or not there at all
        model/           the model in the format of transformers, fp32 (with LoRA: adapter.pt)
        optimizer.pt     (fsdp2: optimizer-0.safetensors and so on; DeepSpeed: deepspeed/)
        random-0.pt      random states of rank 0, and so on
        state.json       step, sampler, AEPO; and the size of every file, written last

A checkpoint is made in a hidden folder beside it, flushed to the disk, and renamed. A folder whose
files do not have the sizes of its ``state.json`` is refused.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from qwenlong.config import Recipe
from qwenlong.engines import Engine
from qwenlong.errors import InputError
from qwenlong.models import DTYPES
from qwenlong.storage import write_json

T = TypeVar("T")

FORMAT = 2
ADAPTER_FILE = "adapter.pt"
RECIPE_FILE = "recipe.json"
_NAME = re.compile(r"^step-(\d{8})$")
# Settings that may change when a run goes on: they do not decide what is computed.
_FREE = {("steps",), ("checkpoint",), ("rollout", "saved_per_step"), ("model", "export_dtype")}


# --- random states -----------------------------------------------------------


def seed_everything(seed: int) -> None:
    """The global random states, which dropout and plugins may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states() -> dict[str, Any]:
    """States of torch, Python and NumPy; plain types, so that they load without unpickling code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, values, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(values), following],
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
    }


def restore_random_states(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, values, following = state["python"]
    random.setstate((version, tuple(values), following))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


# --- finding -----------------------------------------------------------------


def checkpoint_folders(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = out / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint, its files checked against their recorded sizes."""
    folders = checkpoint_folders(out)
    if not folders:
        return None
    read_state(folders[-1])
    return folders[-1]


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        InputError: it is of another format, or a file is missing or has another size.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder} is no checkpoint: its state.json cannot be read.") from None
    if state.get("format") != FORMAT:
        raise InputError(
            f"{folder} has format {state.get('format')!r}; this version reads {FORMAT}."
        )
    for name, size in state["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(
                f"{folder} is damaged: {name} should have {size} bytes; delete this folder to go "
                "on from the checkpoint before it."
            )
    return state


def check_recipe(out: Path, recipe: Recipe) -> None:
    """Compare with the ``recipe.json`` of the run, if it was begun.

    Raises:
        InputError: it was started with other settings; the first three are named.
    """
    if not (out / RECIPE_FILE).exists():
        return
    mine = recipe.model_dump(mode="json")
    theirs = json.loads((out / RECIPE_FILE).read_text())
    changed = [
        f"{'.'.join(path)} was {old!r} and is {new!r}"
        for path, old, new in _differences(theirs, mine)
        if not any(path[: len(free)] == free for free in _FREE)
    ]
    if changed:
        raise InputError(
            f"{out} is a run of another recipe ({'; '.join(changed[:3])}); choose another --out, "
            "or go on with the recipe it was started with."
        )


def _differences(old: Any, new: Any, path: tuple = ()) -> list[tuple[tuple, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in _differences(old.get(k), new.get(k), (*path, k))]
    return [] if old == new else [(path, old, new)]


# --- writing -----------------------------------------------------------------


@dataclass(frozen=True)
class DiskPolicy:
    """What happens on a full disk: older checkpoints but the newest are given up first, then the
    call waits for room.
    """

    wait_s: float
    report: Callable[[str], None]


def save_checkpoint(
    out: Path,
    engine: Engine,
    tokenizer: Any,
    state: dict[str, Any],
    *,
    keep: int,
    disk: DiskPolicy,
) -> Path:
    """Write one checkpoint and delete old ones, so that ``keep`` remain. A collective call.

    Args:
        out: folder of the run.
        state: JSON types; holds ``step``.
        disk: what to do when it is full.

    Raises:
        InputError: no room. The checkpoint before is still there.
    """
    what = f"the checkpoint of step {state['step']}"
    folder = _with_room(out, engine, disk, what, lambda: _write(out, engine, tokenizer, state))
    if engine.rank == 0:
        _prune(out, keep)
    return folder


class _Elsewhere(Exception):
    """Another rank could not write."""


def _with_room(out: Path, engine: Engine, disk: DiskPolicy, what: str, write: Callable[[], T]) -> T:
    deadline = time.monotonic() + disk.wait_s
    while True:
        problem, result = None, None
        try:
            result = write()
        except Exception as error:  # torch and safetensors have errors of their own for it
            problem = error
        is_full = problem is not None and _means_full_disk(problem, out)
        is_other = not (problem is None or is_full or isinstance(problem, _Elsewhere))
        worst = engine.largest(2 if is_other else 1 if is_full else 0)
        if worst == 0:
            return result
        if worst == 2:
            raise problem or _Elsewhere("another rank could not write")
        if engine.rank == 0:
            remove_partial(out)
            _prune(out, keep=1)
        if engine.largest(int(time.monotonic() >= deadline)):
            raise InputError(
                f"{out} is full: {what} cannot be written; make room and go on with --resume."
            )
        disk.report(f"{out} is full: {what} waits for room")
        time.sleep(min(5.0, max(0.05, disk.wait_s / 20)))


def _together(engine: Engine, work: Callable[[], None], *, main_only: bool = False) -> None:
    """``work()``, after which all ranks raise if one failed, so that none waits for another."""
    problem: Exception | None = None
    if engine.rank == 0 or not main_only:
        try:
            work()
        except Exception as error:
            problem = error
    failed = [text for text in engine.gather(problem and repr(problem)) if text]
    if failed:
        raise problem or _Elsewhere(failed[0])


def _write(out: Path, engine: Engine, tokenizer: Any, state: dict[str, Any]) -> Path:
    folder = out / "checkpoints" / f"step-{state['step']:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    if engine.gather(folder.exists())[0]:  # saved in time, before what stops the run now
        return folder

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        files = [p for p in sorted(partial.rglob("*")) if p.is_file()]
        for file in files:
            _sync(file)
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in files}
        write_json(
            partial / "state.json",
            {**state, "format": FORMAT, "world_size": engine.world_size, "files": sizes},
        )
        _sync(partial)
        os.rename(partial, folder)
        _sync(folder.parent)

    _together(engine, begin, main_only=True)
    if engine.recipe.model.lora is not None:  # the adapter alone
        weights = engine.weights()
        save = partial / ADAPTER_FILE
        _together(engine, lambda: torch.save(weights, save), main_only=True)
    else:
        _together(engine, lambda: engine.save_model(partial / "model", torch.float32))
        _together(engine, lambda: tokenizer.save_pretrained(partial / "model"), main_only=True)
    _together(engine, lambda: engine.save_optimizer(partial))
    _together(engine, lambda: torch.save(random_states(), partial / f"random-{engine.rank}.pt"))
    _together(engine, finish, main_only=True)
    return folder


def write_export(folder: Path, engine: Engine, tokenizer: Any, *, disk: DiskPolicy) -> None:
    """The model of a finished run, adapters added to its weights. A collective call."""
    out = folder.parent
    _with_room(out, engine, disk, "the final model", lambda: _export(folder, engine, tokenizer))


def _export(folder: Path, engine: Engine, tokenizer: Any) -> None:
    partial = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def finish() -> None:
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            _sync(file)
        os.rename(partial, folder)

    _together(engine, begin, main_only=True)
    dtype = DTYPES[engine.recipe.model.export_dtype]
    _together(engine, lambda: engine.save_model(partial, dtype))
    _together(engine, finish, main_only=True)


def load_random_states(folder: Path, rank: int) -> None:
    file = folder / f"random-{rank}.pt"
    if file.is_file():  # more ranks than before: the new ones keep their own
        restore_random_states(torch.load(file, weights_only=True))


def remove_partial(out: Path) -> None:
    """Delete what a kill left behind."""
    for leftover in (*out.glob(".*.partial"), *out.glob("checkpoints/.*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)


def _prune(out: Path, keep: int) -> None:
    for folder in checkpoint_folders(out)[:-keep]:
        doomed = folder.with_name(f".{folder.name}.partial")  # never half a checkpoint by name
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _means_full_disk(error: Exception, out: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(out).free < 1 << 20


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
