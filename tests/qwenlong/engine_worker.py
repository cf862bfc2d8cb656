"""One rank of a training run, started by ``test_engines``: writes what it measured.

python -m tests.qwenlong.engine_worker RECIPE.json OUT RESULT.json [resume]
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qwenlong.config import Recipe
from qwenlong.episodes import EPISODES, seed_of
from qwenlong.run_setup import build_run
from qwenlong.train import train
from qwenlong.train_report import Metrics
from qwenlong.types import Trajectory, Turn


def fixed_answers(environment, samples, seed, policy_step):
    """Answers that follow from the sample and the step alone, whatever the number of ranks."""
    rolled = []
    for sample in samples:
        for index in range(environment.group_size):
            g = torch.Generator().manual_seed(seed_of(sample.id, policy_step, index))
            prompt = environment.tokenizer(sample.question)["input_ids"]
            n = int(torch.randint(1, 8, (1,), generator=g))
            response = torch.randint(3, 8, (n,), generator=g).tolist()
            turn = Turn(prompt_ids=prompt, response_ids=response, finish_reason="stop")
            rolled.append(
                Trajectory(
                    sample_id=sample.id,
                    group_id=sample.id,
                    rollout_index=index,
                    policy_step=policy_step,
                    turns=[turn],
                )
            )
    return rolled


def main(recipe: Path, out: Path, result: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    settings = Recipe.model_validate_json(recipe.read_text())
    if settings.engine.kind != "torch":
        dist.init_process_group("gloo")
    EPISODES["full"] = fixed_answers
    rows: dict[int, Metrics] = {}
    run = build_run(settings, out, resume=resume)
    train(run, rows.__setitem__)
    generated = run.engine.rollout_model().state_dict()
    weights = run.engine.weights()
    if run.engine.rank == 0:
        torch.save({"weights": weights, "rollout": generated, "rows": rows}, result)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*(Path(p) for p in sys.argv[1:4]), resume="resume" in sys.argv[4:])
