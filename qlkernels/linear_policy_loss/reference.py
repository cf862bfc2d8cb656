"""The specification, and what every implementation returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlkernels._scores import TokenScores
from qlkernels.linear_logprob import linear_logprob_ref
from qlkernels.policy_loss import PolicyLossMetrics, policy_loss


class LinearPolicyLoss(NamedTuple):
    loss: torch.Tensor  # 0-d, differentiable w.r.t. hidden states, weight and bias
    metrics: PolicyLossMetrics
    scores: TokenScores  # without gradient; rows outside the response hold 0


def linear_policy_loss_ref(
    hidden_states, lm_head_weight, target_ids, old_logprobs, advantages, response_mask, *,
    cu_seqlens=None, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, entropy_coef=0.0,
    **policy_options,
) -> LinearPolicyLoss:  # fmt: skip
    """Ground truth: all logits at once, then the reference policy loss; autograd does the rest."""
    scores = linear_logprob_ref(
        hidden_states, lm_head_weight, target_ids, bias=bias, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, row_mask=response_mask,
    )  # fmt: skip
    result = policy_loss(
        scores.logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens,
        entropy=scores.entropy, entropy_coef=entropy_coef, impl="reference", **policy_options,
    )  # fmt: skip
    return LinearPolicyLoss(*result, scores)
