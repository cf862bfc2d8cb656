"""Run by torchrun: two steps of our trainer on every rank, and what each rank saw.

trl_worker.py OUT
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from trl_runs import GROUP, dataset, logged, run, settings

from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer


def main(out: str) -> None:
    seen = []

    class Spy(AEPOGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append(
                dict(
                    advantages=output["advantages"].tolist(),
                    everyone=list(self._logs["advantages"]),
                    rewards=list(self._logs["rewards"]["vowels"]),
                    tasks=[example["task"] for example in inputs],
                    prompts=[example["prompt"] for example in inputs],
                )
            )
            return output

    # three groups of four over two ranks: the second group lies on both
    config = AEPOGRPOConfig(
        **settings(
            out, per_device_train_batch_size=3 * GROUP // 2, max_steps=2, num_iterations=1,
            scale_rewards="task", balance_tasks=True, aepo_low=0.5, aepo_high=1.0,
            shared_prefix=True, ddp_backend="gloo",
        )
    )  # fmt: skip
    trainer = run(Spy, config, train_dataset=dataset(12))
    rank = trainer.accelerator.process_index
    weights = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())
    found = dict(
        seen=seen,
        entropy=trainer._controller.last_entropy,
        dropping=logged(trainer, "aepo/dropping") if rank == 0 else [0.0, 1.0],
        weights=weights,
    )
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
