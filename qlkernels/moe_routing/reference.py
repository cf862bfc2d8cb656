"""Ground truth: eager, any device, routing differentiable. Tests call it in fp64."""

from __future__ import annotations

import torch

from qlkernels.moe_routing.results import ExpertIndex, Routing


def moe_route_ref(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    replay_ids: torch.Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
) -> Routing:
    """See ``moe_route``. fp64 stays fp64, everything else is computed in fp32."""
    x = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    E = x.shape[1]
    # + 0.0 makes -0.0 and 0.0 equal in every sort; a stable sort gives ties to the lower id
    order = torch.sort(x.detach() + 0.0, dim=1, descending=True, stable=True).indices
    ids = order[:, :top_k]
    known = None
    if replay_ids is not None:
        replay_ids = replay_ids.long()
        known = ((replay_ids >= 0) & (replay_ids < E)).all(1, keepdim=True)
        ids = torch.where(known, replay_ids, ids)
    probs = x.softmax(dim=1)  # [T, E]
    if norm_topk_prob:
        # p_k / sum of p_j, which stays a number where every replayed expert has p = 0 in fp32
        weights = x.gather(1, ids).softmax(dim=1)
    else:
        weights = probs.gather(1, ids)  # [T, top_k]
    if weights_dtype is not None:
        rounded = weights.detach().to(weights_dtype).to(weights.dtype)
        # w + (rounded - w) is exactly rounded, with the gradient of w
        weights = weights + (rounded - weights.detach())
    if known is not None:
        is_valid = known | (replay_ids == -1).all(1, keepdim=True)
        weights = torch.where(is_valid, weights, torch.nan)
    counts = torch.zeros(E, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids.reshape(-1), dtype=torch.int32))
    return Routing(ids.int(), weights, counts, probs.sum(0))


def build_expert_index_ref(topk_ids: torch.Tensor, num_experts: int) -> ExpertIndex:
    """See ``build_expert_index``."""
    ids = topk_ids.reshape(-1).long()
    expert = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sort_order = torch.argsort(expert, stable=True)
    bounds = torch.arange(num_experts + 1, device=ids.device)
    offsets = torch.searchsorted(expert[sort_order], bounds)
    return ExpertIndex(sort_order.int(), torch.argsort(sort_order).int(), offsets.int())
