"""The specification: a loop over experts, in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def moe_mlp_ref(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ground truth: eager, differentiable, any device; computes in fp64, returns the dtype of
    ``hidden_states``. Ids outside ``[0, E)`` add nothing.
    """
    x = hidden_states.double()
    out = torch.zeros_like(x) if residual is None else residual.double()
    for expert in range(w_gate_up.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].double().T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w_down[expert].double().T  # [rows, H]
        out = out.index_add(0, token, y * topk_weights[token, slot, None].double())
    return out.to(hidden_states.dtype)
