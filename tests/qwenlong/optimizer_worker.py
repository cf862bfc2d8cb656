"""One rank that updates a model, two parameters of it late or never, and saves Adam's state.

python -m tests.qwenlong.optimizer_worker RECIPE.json OUT

Writes the optimizer's files, and all values of its state as a whole to ``OUT/state.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qwenlong.config import Recipe
from qwenlong.run_setup import ENGINES

NEVER, LATE = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def whole_state(engine) -> dict[str, torch.Tensor]:
    """Adam's values, collected from all ranks."""
    state = engine._optimizer.state
    return {
        f"{key}.{name}": value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, parameter in engine._named.items()
        if parameter in state
        for key, value in state[parameter].items()
    }


def update(engine, absent) -> None:
    """One update with gradients that follow from values, all parameters but ``absent``."""
    for name, parameter in engine._named.items():
        if name not in absent:
            parameter.grad = parameter.detach().sin()
    engine.step(1e-3)


def main(recipe: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = Recipe.model_validate_json(recipe.read_text())
    engines = ENGINES[settings.engine.kind]
    engine = engines.load(settings, settings.model.path)
    update(engine, {NEVER, LATE})
    update(engine, {NEVER})
    engine.save_optimizer(out)
    saved = whole_state(engine)
    again = engines.load(settings, settings.model.path)
    again.load_optimizer(out)
    loaded = whole_state(again)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    if engine.rank == 0:
        torch.save(saved, out / "state.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(Path(p) for p in sys.argv[1:3]))
