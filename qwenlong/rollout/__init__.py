"""Where answers come from while a policy is trained: ``Rollouts`` and its implementations.

``embedded`` samples from a transformers model in this process; ``vllm`` asks a server. Both give
token ids, never text, so that what is trained on is exactly what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qwenlong.rollout.embedded import EmbeddedRollouts
from qwenlong.types import Turn
from qwenlong.weight_stream import WeightStream


class Rollouts(Protocol):
    """Samples groups of answers from the current policy."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Turn]]:
        """``group_size`` answers to each prompt, in order.

        Args:
            prompts: token ids, at least one each.
            group_size: G, answers a prompt.
            max_new_tokens: of an answer, its end token included.
            temperature: of the distribution that is sampled, untruncated (no top-p, no top-k); 0
                takes the most likely token.
            seed: the same seed, weights and prompts give the same answers; a server may round
                differently from run to run.

        Returns:
            For each prompt its turns. ``logprobs`` are of the temperature-scaled distribution, in
            nats, None at temperature 0. ``finish_reason`` is ``"stop"`` where the answer ends with
            an end token, which is its last id, and ``"length"`` where it was cut.
        """

    def sync_weights(self, model: torch.nn.Module | WeightStream, policy_step: int) -> None:
        """Answers that are generated from here on come from the weights of ``model``, which is what
        the engine's ``rollout_model`` gives: whole, or a stream where ``backend`` is ``vllm`` and
        the weights are sharded. A collective call.
        """

    def close(self) -> None:
        """Free what is held. Closing twice is fine."""
