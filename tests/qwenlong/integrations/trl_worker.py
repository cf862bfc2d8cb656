"""Run by torchrun: two steps of our trainer on every rank, and what each rank saw.

trl_worker.py OUT [ONE_PASS]
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from trl_runs import GROUP, dataset, logged, run, settings, tiny_model

from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer


def size_of(model) -> float:
    return sum(p.detach().double().abs().sum().item() for p in model.parameters())


def main(out: str, one_pass: str = "") -> None:
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
            shared_prefix=True, ddp_backend="gloo", ddp_find_unused_parameters=True,
            one_pass_loss=bool(one_pass),
        )
    )  # fmt: skip
    trainer = run(Spy, config, train_dataset=dataset(12))
    rank = trainer.accelerator.process_index
    found = dict(
        seen=seen,
        losses=trainer.losses,
        entropy=trainer._controller.last_entropy,
        dropping=logged(trainer, "aepo/dropping") if rank == 0 else [0.0, 1.0],
        weights=size_of(trainer.model),
        first_weights=size_of(tiny_model()),
    )
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
