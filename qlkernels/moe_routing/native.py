"""Calls the C++ and CUDA kernels of ``csrc/``; the device of the tensors decides which."""

from __future__ import annotations

import torch

from qlkernels import _ext

_MOST_PARTS = 1024  # rows of partial sums
_TOKENS_A_BLOCK = 8  # at least: one a warp


def why_not_cpu(x: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on this tensor, or None."""
    return _ext.why_not_cpu(x) or _why_stale()


def why_not_cuda(x: torch.Tensor, num_experts: int, top_k: int) -> str | None:
    """Why the CUDA C++ kernels cannot run on this tensor with these sizes, or None."""
    why = _ext.why_not_cuda(x) or _why_stale()
    if why is None and num_experts > _ext._C.most_experts:
        return f"it takes at most {_ext._C.most_experts} experts, got {num_experts}"
    if why is None and top_k > _ext._C.most_top_k:
        return f"it takes top_k of at most {_ext._C.most_top_k}, got {top_k}"
    return why


def _why_stale() -> str | None:
    if hasattr(_ext._C, "moe_route_fwd_cpu"):
        return None
    return "qlkernels._C is older than this op; reinstall, or run setup.py build_ext --inplace"


def _logits_arguments(logits: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple:
    T, E = logits.shape
    code = _ext.DTYPE_CODES[logits.dtype]
    return logits.data_ptr(), code, T, E, logits.stride(0), top_k, norm_topk_prob


def _pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_int64(x: torch.Tensor | None) -> bool:
    return x is not None and x.dtype == torch.int64


def route(
    router_logits: torch.Tensor,
    replay_ids: torch.Tensor | None,
    norm_topk_prob: bool,
    weights_dtype: torch.dtype | None,
    topk_weights: torch.Tensor,
    prob_sums: torch.Tensor,
    topk_ids: torch.Tensor,
    tokens_per_expert: torch.Tensor,
) -> None:
    """Fill the last four."""
    T, E = router_logits.shape
    device = router_logits.device
    parts, part_probs, part_counts = 0, None, None
    if router_logits.is_cuda:
        parts = min(_MOST_PARTS, -(-T // _TOKENS_A_BLOCK))
        part_probs = torch.empty(parts, E, dtype=torch.float32, device=device)
        part_counts = torch.empty(parts, E, dtype=torch.int32, device=device)
    _ext.call(
        "moe_route_fwd",
        device,
        *_logits_arguments(router_logits, topk_ids.shape[1], norm_topk_prob),
        _pointer(replay_ids),
        _is_int64(replay_ids),
        _ext.DTYPE_CODES[weights_dtype or torch.float32],
        *map(_pointer, (topk_weights, prob_sums, topk_ids, tokens_per_expert)),
        parts,
        _pointer(part_probs),
        _pointer(part_counts),
    )


def route_backward(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    norm_topk_prob: bool,
    dtopk_weights: torch.Tensor | None,
    dprob_sums: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the gradient with respect to ``router_logits`` into ``out``, which is contiguous."""
    _ext.call(
        "moe_route_bwd",
        router_logits.device,
        *_logits_arguments(router_logits, topk_ids.shape[1], norm_topk_prob),
        *map(_pointer, (topk_ids, dtopk_weights, dprob_sums, out)),
    )


def build_index(
    topk_ids: torch.Tensor,
    num_experts: int,
    sort_order: torch.Tensor,
    inverse_order: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> None:
    """Fill the last three."""
    rows, counts = topk_ids.numel(), None
    if topk_ids.is_cuda and (parts := _ext._C.index_parts(rows)) > 1:
        shape = (parts + 1, num_experts + 1)
        counts = torch.empty(shape, dtype=torch.int32, device=topk_ids.device)
    _ext.call(
        "build_expert_index",
        topk_ids.device,
        topk_ids.data_ptr(),
        _is_int64(topk_ids),
        rows,
        num_experts,
        *map(_pointer, (sort_order, inverse_order, expert_offsets, counts)),
    )
