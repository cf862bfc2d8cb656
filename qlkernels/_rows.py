"""Row mathematics in plain torch, shared by the ops that hold a block of logits.

    z = s * r                      # r: raw logits, s: logit scale
    z = c * tanh(s * r / c)        # with a soft-cap c
    u = z / tau
    lse = m + log S,  H = log S - Q / S,  logprob = u_y - lse
    S = sum e^(u - m),  Q = sum (u - m) e^(u - m),  m = max u
    du_i = p_i (g_lse - g_l - g_H (log p_i + H)) + g_l 1[i = y],  dz = du / tau

A logit of -inf has p = 0: it adds nothing to Q and gets no gradient.
"""

from __future__ import annotations

import torch

Temperature = float | torch.Tensor


def column(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """``[T]`` -> ``[T, 1]`` in the dtype of ``like``; None stays None."""
    return None if x is None else x.to(like.dtype)[:, None]


def scale_and_cap(r: torch.Tensor, logit_scale: float, softcap: float | None) -> torch.Tensor:
    """Raw logits -> z. ``r`` is fp32 or fp64 and is not modified."""
    z = r * logit_scale if logit_scale != 1.0 else r
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def fold_rows(
    r: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: Temperature,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of a block of raw logits ``[T, V]`` (fp32 or fp64): logprobs, entropy, lse, each
    ``[T]``.
    """
    z = scale_and_cap(r, logit_scale, softcap)
    tau = temperature if isinstance(temperature, float) else column(temperature, z)
    m = z.amax(dim=1, keepdim=True)
    d = (z - m).div_(tau)  # [T, V], <= 0
    dead = d == -torch.inf
    e = d.exp()
    S = e.sum(dim=1)
    log_s = S.log()
    d_y = d.gather(1, target_ids[:, None]).squeeze(1)
    Q = e.mul_(d.masked_fill_(dead, 0.0)).sum(dim=1)
    lse = (m / tau).squeeze(1) + log_s
    return d_y - log_s, log_s - Q / S, lse


def row_gradient(
    r: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: Temperature,
    logit_scale: float,
    softcap: float | None,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    g_logprobs: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_lse: torch.Tensor | None,
) -> torch.Tensor:
    """dr ``[T, V]`` in the dtype of ``r``. log p is anchored at the target's logit, so that nothing
    large cancels.
    """
    z = scale_and_cap(r, logit_scale, softcap)
    tau = temperature if isinstance(temperature, float) else column(temperature, z)
    y = target_ids[:, None]
    z_y = z.gather(1, y)
    # log p_i = (z_i - z_y) / tau + logprob; a target of probability 0 cannot be the anchor
    reachable = (z_y > -torch.inf) & (column(logprobs, z) > -torch.inf)
    anchor_z = torch.where(reachable, z_y, 0.0)
    anchor_l = torch.where(reachable, column(logprobs, z), -column(lse, z))
    logp = (z - anchor_z).div_(tau).add_(anchor_l)
    p = logp.exp()
    du = torch.zeros_like(z)
    if g_entropy is not None:
        h = logp.masked_fill(p == 0, 0.0).add_(column(entropy, z))
        du = du - column(g_entropy, z) * h * p
    if g_lse is not None:
        du = du + column(g_lse, z) * p
    if g_logprobs is not None:
        g = column(g_logprobs, z)
        at_y = du.gather(1, y) - g * torch.expm1(column(logprobs, z))
        du = (du - g * p).scatter_(1, y, at_y)
    dz = du.div_(tau)
    if softcap is not None:
        dz = dz * (1.0 - (z / softcap) ** 2)
    return dz * logit_scale if logit_scale != 1.0 else dz


def live_rows(row_mask: torch.Tensor | None, *upstream: torch.Tensor | None) -> torch.Tensor:
    """``[T]`` bool: rows whose gradient is not exactly zero. A NaN upstream counts as live."""
    live = None
    for g in upstream:
        if g is not None:
            live = (g != 0) if live is None else live | (g != 0)
    if live is None:
        raise ValueError("live_rows needs at least one upstream gradient")
    return live if row_mask is None else live & row_mask
