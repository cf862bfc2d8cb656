"""The layer in our Triton kernels, over chunks of tokens that share one sort."""

from __future__ import annotations

import torch

from qlkernels.grouped_gemm import RoutedRows, launch

Chunks = list[tuple[int, int]]


def forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    residual: torch.Tensor | None,
    rows: RoutedRows,
    chunks: Chunks,
    save_h: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[T, H]`` and, where asked for, h ``[T * top_k, 2 I]`` in the order of the sort."""
    (T, H), two_i = x.shape, w_gate_up.shape[1]
    out = x.new_empty(T, H)
    h = x.new_empty(rows.total, two_i) if save_h else None
    most = max(last - first for first, last in chunks) * rows.top_k
    a, y = x.new_empty(most, two_i // 2), x.new_empty(most, H)
    for chunk in chunks:
        launch.gate_up(x, w_gate_up, rows, chunk, a, h, buffer=y)
        launch.product(a, w_down, rows, chunk, y, is_transposed=False)
        launch.combine(y, rows, chunk, out, weights=weights, residual=residual)
    return out, x.new_empty(0, two_i) if h is None else h


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    h: torch.Tensor,
    rows: RoutedRows,
    chunks: Chunks,
    buffers: tuple[torch.Tensor | None, torch.Tensor | None],
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """dx, the gradient of the routing weights, dw_gate_up and dw_down. Without a saved h it is
    computed again. Large temporaries are made as late and dropped as early as the order allows.
    """
    (T, H), two_i = x.shape, w_gate_up.shape[1]
    needs_dx, needs_dw_gate_up, needs_dw_down = needs
    if not h.numel():
        h = x.new_empty(rows.total, two_i)
        launch.gate_up(x, w_gate_up, rows, (0, T), None, h)
    dh = torch.empty_like(h) if needs_dx or needs_dw_gate_up else None
    a = x.new_empty(rows.total, two_i // 2) if needs_dw_down else None
    dweights = launch.swiglu_backward(dout, w_down, h, weights, rows, dh, a)
    del h
    dx = dw_gate_up = dw_down = None
    if needs_dw_down:
        dw_down = _weight_gradient(dout, a, rows, w_down, buffers[1], gather_left=True)
        del a
    if needs_dx:
        dx = x.new_empty(T, H)
        most = max(last - first for first, last in chunks) * rows.top_k
        expanded = x.new_empty(most, H)
        for chunk in chunks:
            launch.product(dh, w_gate_up, rows, chunk, expanded, is_transposed=True)
            launch.combine(expanded, rows, chunk, dx, weights=None, residual=None)
        del expanded
    if needs_dw_gate_up:
        dw_gate_up = _weight_gradient(dh, x, rows, w_gate_up, buffers[0], gather_left=False)
    return dx, dweights, dw_gate_up, dw_down


def _weight_gradient(left, right, rows, w, buffer, *, gather_left: bool) -> torch.Tensor | None:
    """A new gradient of w, or None where it was added to ``buffer``."""
    out = torch.empty_like(w) if buffer is None else buffer
    launch.weight_gradient(
        left, right, rows, out, gather_left=gather_left, accumulate=buffer is not None
    )
    return out if buffer is None else None
