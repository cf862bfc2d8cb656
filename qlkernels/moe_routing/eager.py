"""The ops out of library calls, for devices without kernels of ours; rows in chunks."""

from __future__ import annotations

import torch

# fp32 logits that are held at a time
_CHUNK_BYTES = 64 << 20


def _chunks(T: int, E: int) -> list[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * E))
    return [slice(start, min(T, start + rows)) for start in range(0, T, rows)]


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
    top_k = topk_ids.shape[1]
    tokens_per_expert.zero_()
    prob_sums.zero_()
    for rows in _chunks(T, E):
        x = router_logits[rows].float()
        # + 0.0: no -0.0 that a sort could place behind 0.0
        ids = (x + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        bad = None
        if replay_ids is not None:
            replay = replay_ids[rows].long()
            known = ((replay >= 0) & (replay < E)).all(1, keepdim=True)
            bad = ~known & (replay != -1).any(1, keepdim=True)
            ids = torch.where(known, replay, ids)
        probs = x.softmax(dim=1)  # [T, E]
        weights = x.gather(1, ids).softmax(dim=1) if norm_topk_prob else probs.gather(1, ids)
        if weights_dtype is not None:
            weights = weights.to(weights_dtype).float()
        topk_ids[rows] = ids.int()
        topk_weights[rows] = weights if bad is None else weights.masked_fill(bad, torch.nan)
        flat = ids.reshape(-1)
        tokens_per_expert.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        prob_sums += probs.sum(dim=0)


def route_backward(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    norm_topk_prob: bool,
    dtopk_weights: torch.Tensor | None,
    dprob_sums: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the gradient with respect to ``router_logits`` into ``out``."""
    T, E = router_logits.shape
    for rows in _chunks(T, E):
        live = torch.zeros(out[rows].shape[0], 1, dtype=torch.bool, device=out.device)
        if dtopk_weights is not None:
            live = live | (dtopk_weights[rows] != 0).any(1, keepdim=True)
        if dprob_sums is not None:
            live = live | (dprob_sums != 0).any()
        x = torch.where(live, router_logits[rows].float(), 0.0)
        p = x.softmax(dim=1)
        dx = torch.zeros_like(x)
        ids = topk_ids[rows].long()
        if dtopk_weights is not None:
            g = dtopk_weights[rows]
            if norm_topk_prob:
                w = x.gather(1, ids).softmax(dim=1)
                dx.scatter_add_(1, ids, w * (g - (g * w).sum(1, keepdim=True)))
            else:
                at = torch.zeros_like(x).scatter_add_(1, ids, g)
                dx += p * (at - (g * p.gather(1, ids)).sum(1, keepdim=True))
        if dprob_sums is not None:
            dx += p * (dprob_sums - (p * dprob_sums).sum(1, keepdim=True))
        out[rows] = torch.where(live, dx, 0.0).to(out.dtype)


def build_index(
    topk_ids: torch.Tensor,
    num_experts: int,
    sort_order: torch.Tensor,
    inverse_order: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> None:
    """Fill the last three."""
    ids = topk_ids.reshape(-1).long()
    expert = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = expert.sort(stable=True).indices
    sort_order.copy_(order)
    places = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    inverse_order.scatter_(0, order, places)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
    expert_offsets[:1] = 0
    expert_offsets[1:] = counts[:num_experts].cumsum(0)
