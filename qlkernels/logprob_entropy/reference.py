"""The specification: eager, differentiable, any device."""

from __future__ import annotations

import torch

from qlkernels._scores import TokenScores


def logprob_entropy_ref(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    row_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenScores:
    """Ground truth: eager, differentiable, any device. fp64 stays fp64, everything else is computed
    in fp32.
    """
    r = logits if logits.dtype == torch.float64 else logits.float()
    if row_mask is not None:
        r = torch.where(row_mask[:, None], r, 0.0)
        target_ids = torch.where(row_mask, target_ids, 0)
        if isinstance(temperature, torch.Tensor):
            temperature = torch.where(row_mask, temperature, 1.0)
    z = r * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = temperature[:, None].to(z.dtype) if isinstance(temperature, torch.Tensor) else temperature
    u = z / tau  # [T, V]
    logp = u.log_softmax(dim=1)
    p = logp.exp()
    logprobs = logp.gather(1, target_ids[:, None]).squeeze(1)
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(dim=1)
    lse = u.logsumexp(dim=1)
    if row_mask is None:
        return TokenScores(logprobs, entropy, lse)
    return TokenScores(*(torch.where(row_mask, x, 0.0) for x in (logprobs, entropy, lse)))
