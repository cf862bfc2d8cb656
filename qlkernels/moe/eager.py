"""The layer in library calls: torch's grouped product on a GPU in bf16, else a loop over experts.

A chunk of tokens has a sort of its own, so h is saved chunk after chunk. The loop reads the number
of rows of every expert on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlkernels.moe_routing import build_expert_index

Chunks = list[tuple[int, int]]


def _has_grouped_mm(x: torch.Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product takes them: it wants rows that start on 16 bytes."""
    is_right = x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return is_right and all(size % 8 == 0 for size in sizes)


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x_e w_e of every expert, w ``[E, K, N]`` (any strides). Rows past the last end are 0."""
    if _has_grouped_mm(x, *w.shape[1:]):
        live = torch.arange(x.shape[0], device=x.device) < ends[-1]
        return torch.where(live[:, None], F.grouped_mm(x, w, offs=ends), 0.0)
    out = x.new_zeros(x.shape[0], w.shape[2])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            torch.mm(x[begin:end], w[expert], out=out[begin:end])
        begin = end
    return out


def _add_weight_gradient(
    left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor, out: torch.Tensor
) -> None:
    """out[e] += left_e^T right_e."""
    if _has_grouped_mm(left, left.shape[1], right.shape[1]):
        found = F.grouped_mm(left.t(), right, offs=ends)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        out += torch.where(empty[:, None, None], 0.0, found)
        return
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            out[expert] += left[begin:end].T @ right[begin:end]
        begin = end


def _activation(h: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in fp32."""
    gate, up = h.float().chunk(2, dim=1)
    return F.silu(gate) * up


def forward(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    residual: torch.Tensor | None,
    chunks: Chunks,
    save_h: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[T, H]`` and, where asked for, h ``[T * top_k, 2 I]``."""
    E, two_i, _ = w_gate_up.shape
    top_k = ids.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = x.new_empty(ids.numel() if save_h else 0, two_i)
    for first, last in chunks:
        index = build_expert_index(ids[first:last], E)
        ends, back = index.expert_offsets[1:], index.inverse_order.long()
        token = index.sort_order.long() // top_k
        h = _grouped(x[first:last][token], w_gate_up.transpose(1, 2), ends)
        if save_h:
            saved[first * top_k : last * top_k] = h
        y = _grouped(_activation(h).to(x.dtype), w_down.transpose(1, 2), ends)
        y = y[back].unflatten(0, (-1, top_k)).float()  # [tokens, top_k, H]
        live = (ids[first:last] >= 0) & (ids[first:last] < E)
        total = (y * torch.where(live, weights[first:last], 0.0)[..., None]).sum(1)
        if residual is not None:
            total += residual[first:last].float()
        out[first:last] = total
    return out, saved


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    h: torch.Tensor,
    chunks: Chunks,
    buffers: tuple[torch.Tensor | None, torch.Tensor | None],
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """dx, the gradient of the routing weights, dw_gate_up and dw_down."""
    E = w_gate_up.shape[0]
    needs_dx, *needs_dw = needs
    # several chunks are added up in fp32
    dw_gate_up, dw_down = (
        None if not need else buffer if buffer is not None
        else torch.zeros_like(w, dtype=w.dtype if len(chunks) == 1 else torch.float32)
        for w, buffer, need in zip((w_gate_up, w_down), buffers, needs_dw, strict=True)
    )  # fmt: skip
    top_k = ids.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
    dweights = torch.empty_like(weights)
    for first, last in chunks:
        index = build_expert_index(ids[first:last], E)
        ends, back = index.expert_offsets[1:], index.inverse_order.long()
        order = index.sort_order.long()
        token = order // top_k
        if h.numel():
            h_c = h[first * top_k : last * top_k]
        else:
            h_c = _grouped(x[first:last][token], w_gate_up.transpose(1, 2), ends)
        dy = dout[first:last][token]
        g = _grouped(dy, w_down, ends).float()  # [rows, I]
        gate, up = h_c.float().chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        dweights[first:last] = (g * (silu * up)).sum(1)[back].unflatten(0, (-1, top_k))
        weight = weights[first:last].reshape(-1)[order][:, None]
        live = torch.arange(len(order), device=x.device) < ends[-1]
        weight = torch.where(live[:, None], weight, 0.0)
        if dw_down is not None:
            _add_weight_gradient(dy, (weight * silu * up).to(x.dtype), ends, dw_down)
        if dx is None and dw_gate_up is None:
            continue
        da = weight * g
        dh = torch.cat([da * up * (sigmoid + silu * (1.0 - sigmoid)), da * silu], 1).to(x.dtype)
        if dw_gate_up is not None:
            _add_weight_gradient(dh, x[first:last][token], ends, dw_gate_up)
        if dx is not None:
            rows = _grouped(dh, w_gate_up, ends)
            dx[first:last] = rows[back].unflatten(0, (-1, top_k)).float().sum(1)
    made = (
        None if buffer is not None or dw is None else dw.to(x.dtype)
        for dw, buffer in zip((dw_gate_up, dw_down), buffers, strict=True)
    )
    return dx, dweights, *made
