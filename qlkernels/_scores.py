"""TokenScores, the one result type of every scorer."""

from typing import NamedTuple

import torch


class TokenScores(NamedTuple):
    """Scores of the temperature-scaled distribution of each row, in nats. Masked rows hold 0."""

    logprobs: torch.Tensor  # [T] fp32, log-probability of the row's target
    entropy: torch.Tensor  # [T] fp32
    lse: torch.Tensor  # [T] fp32, log-sum-exp of the scaled logits
