"""Attention with an explicit mask: the specification. T x T memory, any device, differentiable."""

from __future__ import annotations

import torch

from qlkernels.prefix_group import PackedGroups


def _masked_attention(q, k, v, visible, softmax_scale):
    """``visible`` is ``[T, T]`` bool, query by key. Scores and softmax are at least fp32, weights
    and result are in the dtype of ``q``.
    """
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))  # [T, Hq, D]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights.to(q.dtype), v)


def _segments(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """``[T]``: the segment of every row. Empty segments have no rows."""
    rows = torch.arange(T, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Ground truth of :func:`qlkernels.attention`. Tests call it in fp64."""
    T = q.shape[0]
    segment = _segments(cu_seqlens, T)
    rows = torch.arange(T, device=q.device)
    visible = (segment[:, None] == segment) & (rows[:, None] >= rows)
    return _masked_attention(q, k, v, visible, softmax_scale)


def prefix_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PackedGroups,
    *,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Ground truth of :func:`qlkernels.prefix_attention`. Tests call it in fp64."""
    T = q.shape[0]
    segment = _segments(layout.cu_seqlens, T)
    rows = torch.arange(T, device=q.device)
    own = (segment[:, None] == segment) & (rows[:, None] >= rows)
    in_prefix = layout.prefix_of.long()[segment][:, None] == segment
    return _masked_attention(q, k, v, own | (in_prefix & layout.is_answer[:, None]), softmax_scale)
