"""One rank that loads a model in shards, streams it out and saves it, and notes its peak memory.

python -m tests.qwenlong.load_worker RECIPE.json SMALL MODEL OUT

SMALL is a model of the same type, loaded before, so that libraries are there already.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import deepspeed
except ImportError:
    deepspeed = None

from qwenlong.config import Recipe
from qwenlong.run_setup import ENGINES


def megabytes(field: str) -> float:
    """``VmHWM`` (the peak) or ``VmRSS`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(recipe: Path, small: Path, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = Recipe.model_validate_json(recipe.read_text())
    kind = ENGINES[settings.engine.kind]
    kind.load(settings, small)
    gc.collect()
    found: dict[str, float] = {}
    forget_peak()
    before = megabytes("VmRSS")
    if settings.engine.kind == "deepspeed":
        # Masters and gradients of DeepSpeed's own are made after the weights are loaded.
        original = deepspeed.initialize

        def initialize(**arguments):
            found["load"] = megabytes("VmHWM") - before
            return original(**arguments)

        deepspeed.initialize = initialize
    engine = kind.load(settings, model)
    found.setdefault("load", megabytes("VmHWM") - before)
    for name in ("stream", "save"):
        forget_peak()
        before = megabytes("VmRSS")
        if name == "stream":
            engine.stream().save(out, torch.bfloat16, file="policy.safetensors")
        else:
            engine.save_model(out / "saved", torch.bfloat16)
        found[name] = megabytes("VmHWM") - before
    everyone = engine.gather(found)
    if engine.rank == 0:
        (out / "memory.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(Path(p) for p in sys.argv[1:5]))
