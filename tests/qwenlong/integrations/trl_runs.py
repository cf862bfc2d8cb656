"""Runs of real TRL trainers on random models of a few thousand weights, for the tests here."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwenlong.tiny import tiny_tokenizer

GROUP = 4
VOWELS = "aeiou"


def tiny_model(moe: bool = True):
    tokenizer = tiny_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    )


def dataset(n: int = 12) -> Dataset:
    """Prompts of different lengths; two thirds are of the task "sums"."""
    return Dataset.from_dict(
        {
            "prompt": [f"question {i} " + "of many words " * (i % 3) for i in range(n)],
            "task": ["needle" if i % 3 == 0 else "sums" for i in range(n)],
        }
    )


def vowels(completions, **_columns) -> list[float]:
    """Between 0 and 1, and rarely equal within a group."""
    return [sum(c in VOWELS for c in text) / max(len(text), 1) for text in completions]


def settings(folder, **changes) -> dict:
    """Two optimizer steps for each generation batch: ratios differ from 1 in the second."""
    return dict(
        output_dir=str(folder), use_cpu=True, bf16=False, fp16=False, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=5, learning_rate=3e-3,
        per_device_train_batch_size=2 * GROUP, num_generations=GROUP, num_iterations=2,
        max_completion_length=10, max_steps=4, temperature=0.9, log_level="error",
    ) | changes  # fmt: skip


def run(trainer_class, config, *, moe: bool = True, model=None, resume=None, **arguments):
    """Train and return the trainer, with its losses (not rounded) as ``trainer.losses``."""

    class Recording(trainer_class):
        losses: list[float] = []

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses = [*self.losses, loss.item()]
            return loss

    arguments = {"reward_funcs": vowels, "train_dataset": dataset()} | arguments
    trainer = Recording(
        tiny_model(moe) if model is None else model,
        args=config,
        processing_class=tiny_tokenizer(),
        **arguments,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]
