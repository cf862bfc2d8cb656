"""Advantages from rewards: centre by the prompt's group, scale by group, batch or task.

    A_i = (r_i - mean of the group of i) / (std + eps)                      (arXiv 2512.12967)
    std: over the group (eq. 3), over the batch, or over all rewards of the batch with the task of
    i (eq. 7), always of the raw rewards, not of the centred ones

Dense rewards (needle tasks, any value in [0, 1]) and sparse ones (0 or 1) differ in spread, so a
batch-wide std mixes tasks, and a group's std is noisy and large only where a prompt is of medium
difficulty. Tasks are compared with themselves, hence ``scale="task"``.

What the formulas leave open: a group of one sample has nothing to compare itself with, so its
advantage is 0 (the published snippet keeps r / std there, and r / 1e-6 where the task has one
sample too). Rewards that are all equal give exactly 0, whatever their rounding, so that such rows
cost nothing in the loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

BASELINES = ("group", "leave_one_out")
SCALES = ("group", "batch", "task", "none")


def group_advantages(
    rewards: torch.Tensor,
    group_ids: Sequence[Hashable] | torch.Tensor,
    *,
    task_ids: Sequence[Hashable] | torch.Tensor | None = None,
    baseline: str = "group",
    scale: str = "task",
    unbiased: bool = True,
    eps: float = 1e-6,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """One advantage per sample of a batch.

    Args:
        rewards: ``[N]``, finite.
        group_ids: ``[N]`` ids of any hashable kind; samples of one prompt share one.
        task_ids: ``[N]``, for ``scale="task"``.
        baseline: ``"group"``: minus the mean of the group. ``"leave_one_out"``: minus the mean of
            the other samples of the group, which is G / (G - 1) times as far away.
        scale: what std to divide by; ``"none"`` divides by nothing (mean-only).
        unbiased: divide squares by n - 1, as the published snippet does, else by n.
        eps: added to the std.
        process_group: gather rewards and ids from its ranks first, which may hold different
            numbers of samples; groups may span ranks. Every rank gets what one process would
            compute on the whole batch, bit for bit.

    Returns:
        ``[N]`` fp32 on the device of ``rewards``; computed in fp64 on the CPU (synchronises).
        Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    for name, value, allowed in (("baseline", baseline, BASELINES), ("scale", scale, SCALES)):
        if value not in allowed:
            raise ValueError(
                f"group_advantages: {name} must be one of {', '.join(allowed)}, got {value!r}"
            )
    if rewards.dim() != 1:
        raise ValueError(f"group_advantages: rewards must be [N], got {tuple(rewards.shape)}")
    if (task_ids is None) == (scale == "task"):
        raise ValueError(f"group_advantages: task_ids belongs to scale='task', got {scale!r}")
    values = rewards.detach().double().cpu()
    groups = _as_list("group_ids", group_ids, len(values))
    tasks = _as_list("task_ids", task_ids, len(values)) if task_ids is not None else groups
    if not values.isfinite().all():
        bad = (~values.isfinite()).nonzero()[0].item()
        raise ValueError(
            f"group_advantages: reward {bad} is {values[bad].item()}; drop or score that sample"
        )
    first = 0
    if process_group is not None:
        parts: list = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(parts, (values, groups, tasks), group=process_group)
        first = sum(len(part[0]) for part in parts[: dist.get_rank(process_group)])
        values = torch.cat([part[0] for part in parts])
        groups = [g for part in parts for g in part[1]]
        tasks = [t for part in parts for t in part[2]]

    group, n_groups = _dense_ids(groups)
    size = _sums(torch.ones_like(values), group, n_groups)
    centred = values - (_sums(values, group, n_groups) / size)[group]
    low, high = (
        torch.zeros(n_groups, dtype=values.dtype).scatter_reduce(
            0, group, values, reduce, include_self=False
        )
        for reduce in ("amin", "amax")
    )
    centred = torch.where((low == high)[group], 0.0, centred)
    if baseline == "leave_one_out":
        centred = centred * (size / (size - 1).clamp_min(1))[group]

    if scale != "none":
        pool, n_pools = {
            "group": (group, n_groups),
            "batch": (torch.zeros_like(group), 1),
            "task": _dense_ids(tasks),
        }[scale]
        centred = centred / (_std(values, pool, n_pools, unbiased)[pool] + eps)
    mine = centred[first : first + len(rewards)]
    return mine.to(device=rewards.device, dtype=torch.float32)


def spread_to_tokens(
    values: torch.Tensor, response_mask: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Give every response token its sequence's value, and 0 (False) to every other row.

    Args:
        values: ``[B]``: advantages, or a bool mask of sequences to keep.
        response_mask: ``[T]`` bool with ``cu_seqlens`` ``[B + 1]``, or ``(B, S)`` without.

    Returns:
        The shape of ``response_mask``, the dtype of ``values``. Does not synchronise.
    """
    B = values.shape[0]
    if response_mask.dim() == 2:
        if cu_seqlens is not None or response_mask.shape[0] != B:
            raise ValueError(
                f"spread_to_tokens: values is [B] = {(B,)}, so a padded response_mask must be "
                f"(B, S) without cu_seqlens, got {tuple(response_mask.shape)}"
            )
        return torch.where(response_mask, values[:, None], torch.zeros_like(values[:1]))
    if cu_seqlens is None or cu_seqlens.shape[0] != B + 1:
        got = None if cu_seqlens is None else tuple(cu_seqlens.shape)
        raise ValueError(
            f"spread_to_tokens: values is [B] = {(B,)}, so cu_seqlens must be [B + 1], got {got}"
        )
    row = torch.arange(response_mask.shape[0], device=response_mask.device)
    seq_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    values = torch.cat([values, values.new_zeros(1)])  # the rows past the last sequence
    return torch.where(response_mask, values[seq_ids], values[-1])


def _as_list(name: str, ids, n: int) -> list:
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if len(ids) != n:
        raise ValueError(f"group_advantages: {name} has {len(ids)} entries for {n} rewards")
    return ids


def _dense_ids(ids: list) -> tuple[torch.Tensor, int]:
    """Ids in order of first appearance, and how many there are."""
    dense: dict = {}
    index = [dense.setdefault(x, len(dense)) for x in ids]
    return torch.tensor(index, dtype=torch.int64), len(dense)


def _sums(values: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=values.dtype).index_add(0, ids, values)


def _std(values: torch.Tensor, ids: torch.Tensor, n: int, unbiased: bool) -> torch.Tensor:
    """``[n]``; 1 where a single sample leaves it undefined (its advantage is 0 in any case)."""
    size = _sums(torch.ones_like(values), ids, n)
    away = values - (_sums(values, ids, n) / size)[ids]
    variance = _sums(away**2, ids, n) / (size - int(unbiased)).clamp_min(1)
    return torch.where(size > 1, variance.sqrt(), 1.0)
