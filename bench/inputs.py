"""Seeded inputs shaped like a trained policy's: peaked (mean entropy about 0.2 nats) and random
ones.
"""

from __future__ import annotations

import math

import torch

from qlkernels.testing import peaked_logits

MEAN_ENTROPY = 0.2  # nats, as RL on a reasoning model shows it
_BASE_ROWS = 1024


def logits_and_targets(
    T: int, V: int, dtype: torch.dtype, device: str, data: str, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[T + 1, V]`` and targets ``[T]`` int64; the extra row serves peers that drop the
    last one.

    ``data`` is ``peaked`` or ``random`` (standard normal, uniform targets). Peaked rows past the
    first 1024 repeat those, rotated along the vocabulary, so that a large case is built on the
    device in seconds.
    """
    if data == "random":
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.empty(T + 1, V, dtype=dtype, device=device)
        for rows in logits.split(_BASE_ROWS):
            rows.normal_(generator=generator)
        return logits, torch.randint(V, (T,), generator=generator, device=device)
    if data != "peaked":
        raise ValueError(f"bench: data is 'peaked' or 'random', got {data!r}")
    base, base_ids = peaked_logits(min(T + 1, _BASE_ROWS), V, dtype, device, seed=seed)
    if T + 1 <= _BASE_ROWS:
        return base, base_ids[:T]
    logits = torch.empty(T + 1, V, dtype=dtype, device=device)
    target_ids = torch.empty(T + 1, dtype=torch.int64, device=device)
    for block, start in enumerate(range(0, T + 1, _BASE_ROWS)):
        rows = slice(start, min(T + 1, start + _BASE_ROWS))
        count, shift = rows.stop - start, block * 7919 % V
        logits[rows] = base[:count].roll(shift, dims=1)
        target_ids[rows] = (base_ids[:count] + shift) % V
    return logits, target_ids[:T]


def hidden_weight_targets(
    T: int, H: int, V: int, dtype: torch.dtype, device: str, data: str, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ``[T, H]``, lm-head weight ``[V, H]`` and targets ``[T]`` int64.

    Weight rows have norm about 1. A random hidden state is a standard normal vector (logits of
    standard deviation 1). A peaked one adds the weight rows of two candidates, apart by a gap that
    varies from row to row, at a margin found by bisection so that the mean entropy is
    ``MEAN_ENTROPY`` (on at most 256 rows); the target is one of the two.
    """
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(generator=generator, device=device)
    weight = torch.empty(V, H, dtype=dtype, device=device).normal_(generator=generator)
    weight *= H**-0.5
    noise = torch.randn(T, H, **options)
    if data == "random":
        return noise.to(dtype), weight, torch.randint(V, (T,), **options)
    if data != "peaked":
        raise ValueError(f"bench: data is 'peaked' or 'random', got {data!r}")
    first, second = torch.randint(V, (2, T), **options)
    gap = 4.0 * torch.rand(T, **options).clamp_min(1e-6).log().neg()  # exponential, mean 4 nats
    w_first, w_second = weight[first].float(), weight[second].float()
    along = w_first + w_second  # [T, H]
    offset = noise - gap[:, None] * w_second
    probe = slice(0, min(T, 256))
    head = weight.float().T
    u_along, u_offset = along[probe] @ head, offset[probe] @ head  # [256, V]
    low, high = 0.0, 100.0
    for _ in range(20):
        margin = (low + high) / 2
        logp = torch.add(u_offset, u_along, alpha=margin).log_softmax(dim=1)
        entropy = -(logp.exp() * logp).sum(dim=1).mean()
        low, high = (margin, high) if entropy > MEAN_ENTROPY else (low, margin)
    hidden = torch.add(offset, along, alpha=high).to(dtype)
    takes_second = torch.rand(T, **options) < torch.sigmoid(-gap)
    return hidden, weight, torch.where(takes_second, second, first)


def upstream(T: int, device: str, *, live: float = 1.0, seed: int = 1) -> torch.Tensor:
    """Upstream gradient ``[T]`` fp32: advantages over ``T``, exactly zero on all but a fraction
    ``live`` of the rows.
    """
    generator = torch.Generator(device).manual_seed(seed)
    g = torch.randn(T, generator=generator, device=device) / max(T, 1)
    if live < 1.0:
        order = torch.randperm(T, generator=generator, device=device)
        g[order[math.ceil(live * T) :]] = 0.0
    return g
