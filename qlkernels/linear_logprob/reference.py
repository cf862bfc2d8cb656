"""Token scores from hidden states as formulas: eager, differentiable by autograd, any device."""

from __future__ import annotations

import torch

from qlkernels._scores import TokenScores


def linear_logprob_ref(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_mask: torch.Tensor | None = None,
) -> TokenScores:
    """Ground truth: eager, differentiable, any device, all logits at once. fp64 stays fp64, the
    rest is fp32.
    """
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    x, w = hidden_states.to(dtype), lm_head_weight.to(dtype)
    if row_mask is not None:
        x = torch.where(row_mask[:, None], x, 0.0)
        target_ids = torch.where(row_mask, target_ids, 0)
        if isinstance(temperature, torch.Tensor):
            temperature = torch.where(row_mask, temperature, 1.0)
    z = x @ w.t()  # [T, V]
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = temperature[:, None].to(dtype) if isinstance(temperature, torch.Tensor) else temperature
    logp = (z / tau).log_softmax(dim=1)
    logprobs = logp.gather(1, target_ids[:, None]).squeeze(1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(dim=1)
    lse = (z / tau).logsumexp(dim=1)
    if row_mask is None:
        return TokenScores(logprobs, entropy, lse)
    return TokenScores(*(torch.where(row_mask, v, 0.0) for v in (logprobs, entropy, lse)))
