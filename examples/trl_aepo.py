"""AEPO with TRL: two tasks, task-level advantages, one forward for each prompt.

    python examples/trl_aepo.py                                     # a random model, for a look
    python examples/trl_aepo.py Qwen/Qwen3-0.6B --steps 200 --low 0.14 --high 0.25

The lines that are not plain TRL are marked.
"""

import argparse
import random

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer  # ours
from qwenlong.tiny import model_folder

WORDS = "river stone lamp cloud bread violin harbor maple".split()


def make_dataset(n: int) -> Dataset:
    """Half the prompts ask for a code in a text, half for a sum."""
    draw = random.Random(0)
    rows = []
    for i in range(n):
        if i % 2:
            text = [f"the {draw.choice(WORDS)} is {draw.randint(10, 99)}." for _ in range(6)]
            code = str(draw.randint(100, 999))
            text.insert(draw.randrange(6), f"the code is {code}.")
            rows.append((" ".join(text) + " what is the code? ", code, "needle"))
        else:
            a, b = draw.randint(1, 40), draw.randint(1, 40)
            rows.append((f"what is {a} + {b}? ", str(a + b), "sums"))
    prompts, answers, tasks = zip(*rows, strict=True)
    return Dataset.from_dict(
        {"prompt": list(prompts), "answer": list(answers), "task": list(tasks)}
    )


def contains(completions, answer, **_columns) -> list[float]:
    """1 for the answer, and a tenth for any digit, so that a random model learns something too."""
    return [
        1.0 if a in text else 0.1 * any(c.isdigit() for c in text)
        for text, a in zip(completions, answer, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="builtin:tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--low", type=float, default=0.138, help="nats")
    parser.add_argument("--high", type=float, default=0.248, help="nats")
    parser.add_argument("--out", default="trl-aepo")
    arguments = parser.parse_args()

    path = arguments.model
    if path.startswith("builtin:"):
        path = str(model_folder(path))
    config = AEPOGRPOConfig(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=16,
        learning_rate=2e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        scale_rewards="task",  # ours: (r - mean of the group) / std of the task
        balance_tasks=True,  # ours: two prompts of each task in every batch of four
        aepo_low=arguments.low,  # ours: above `high` nats negative advantages are dropped,
        aepo_high=arguments.high,  # until the entropy is below `low`
        shared_prefix=True,  # ours: a prompt goes through the model once, not four times
    )
    trainer = AEPOGRPOTrainer(  # ours; GRPOTrainer takes the same arguments
        AutoModelForCausalLM.from_pretrained(path),
        contains,
        config,
        make_dataset(64),
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    trainer.train()
    for line in trainer.state.log_history:
        if "aepo/entropy" in line:
            print(
                f"step {line['step']}: entropy {line['aepo/entropy']:.3f} nats, "
                f"dropped {line['aepo/dropped_fraction']:.0%} of the sequences, "
                f"reward {line['reward']:.3f}"
            )


if __name__ == "__main__":
    main()
