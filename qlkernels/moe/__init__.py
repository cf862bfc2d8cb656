"""The experts of a mixture-of-experts layer: forward and backward of routed SwiGLU MLPs.

    h_t,j = W_gate_up[e] x_t,  a = silu(gate) * up,  y = W_down[e] a,  e = topk_ids[t, j]
    out_t = sum_j topk_weights[t, j] y_t,j  (+ residual_t)

Rows are sorted by expert once. The forward is two grouped products and a gather-sum in a fixed
order; it saves x and h for the backward, or x alone. The backward forms g = W_down^T dout once, and
dh, the gradient of the routing weights and weight * a in its epilogue; y is never needed again.

FLOPs: 6 T top_k H I forward, 12 backward, 4 more where h is computed again. With the Triton
kernels, bits of out and of every gradient but those of the weights depend neither on
``chunk_tokens`` nor on the other tokens.
"""

from __future__ import annotations

import torch

from qlkernels import _checks
from qlkernels._direct import call_direct, direct_function, is_watched, without_autocast
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._target import why_not_triton
from qlkernels.grouped_gemm import RoutedRows
from qlkernels.moe import eager, passes
from qlkernels.moe.reference import moe_mlp_ref
from qlkernels.moe_routing import build_expert_index

OP = "moe_mlp"
# temporaries of one chunk where chunk_tokens is not given
_FORWARD_BYTES = 3 << 29  # a and y
_BACKWARD_BYTES = 5 << 27  # dx before it is summed
_EAGER_TOKENS = 8192

# --- chunks --------------------------------------------------------------------


def chunks_of(T: int, at_most: int) -> list[tuple[int, int]]:
    """``[0, T)`` in the fewest equal parts of at most ``at_most`` tokens."""
    count = -(-T // at_most)
    size = -(-T // max(count, 1))
    return [(first, min(T, first + size)) for first in range(0, T, size)] if T else []


def _chunks(x, ids, chunk_tokens, impl, columns, budget):
    """Chunks of a pass that holds ``columns`` values of every routed row."""
    if chunk_tokens is None:
        row = ids.shape[1] * columns * x.element_size()
        chunk_tokens = _EAGER_TOKENS if impl == "torch" else max(1024, budget // max(row, 1))
    return chunks_of(x.shape[0], chunk_tokens)


# --- custom ops and autograd ----------------------------------------------------


def _run(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    residual: torch.Tensor | None,
    dw_gate_up: torch.Tensor | None,
    dw_down: torch.Tensor | None,
    chunk_tokens: int | None,
    save_h: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, h, and the expert index; h and the index are empty where they are not saved. The two
    gradients are not read: the backward adds to them.
    """
    x, ids = hidden_states, topk_ids
    E, two_i, H = w_gate_up.shape
    with op_range(OP, x), without_autocast(x.device):
        columns = two_i // 2 + H
        chunks = _chunks(x, ids, chunk_tokens, impl, columns, _FORWARD_BYTES)
        if impl == "torch":
            arguments = (x, ids, topk_weights, w_gate_up, w_down, residual, chunks, save_h)
            index = (ids.new_empty(0, dtype=torch.int32) for _ in range(3))
            return *eager.forward(*arguments), *index
        index = build_expert_index(ids, E)
        if not chunks:
            return torch.empty_like(x), x.new_empty(0, two_i), *index
        rows = RoutedRows(ids, *index)
        arguments = (x, topk_weights, w_gate_up, w_down, residual, rows, chunks, save_h)
        return *passes.forward(*arguments), *index


_op = torch.library.custom_op("qlkernels::moe_mlp", _run, mutates_args=())


@_op.register_fake
def _(x, ids, _weights, w_gate_up, _w_down, _residual, _dw1, _dw2, _chunk_tokens, save_h, impl):
    E, two_i, _ = w_gate_up.shape
    M = ids.shape[0] * ids.shape[1]
    sizes = (0, 0, 0) if impl == "torch" else (M, M, E + 1)
    index = (torch.empty(size, dtype=torch.int32, device=x.device) for size in sizes)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, x.new_empty(M if save_h else 0, two_i), *index


def _run_backward(
    dout, x, ids, weights, w_gate_up, w_down, saved, buffers, chunk_tokens, impl, needs
):
    """dx, dweights, dw_gate_up, dw_down; None where ``needs`` says so, or where ``buffers`` holds
    what to add to.
    """
    with op_range(f"{OP}_bwd", x), without_autocast(x.device):
        h, *index = saved
        if x.shape[0] == 0:
            made = [
                torch.zeros_like(w) if need and buffer is None else None
                for w, buffer, need in zip((w_gate_up, w_down), buffers, needs[1:], strict=True)
            ]
            return torch.empty_like(x), torch.empty_like(weights), *made
        operands = (dout, x, ids, weights, w_gate_up, w_down, h)
        if impl == "torch":
            # the chunks of the forward: each has a sort of its own
            chunks = _chunks(x, ids, chunk_tokens, impl, 0, 0)
            return eager.backward(*operands, chunks, buffers, needs)
        chunks = _chunks(x, ids, chunk_tokens, impl, x.shape[1], _BACKWARD_BYTES)
        return passes.backward(*operands, RoutedRows(ids, *index), chunks, buffers, needs)


@torch.library.custom_op("qlkernels::moe_mlp_bwd", mutates_args=())
def _op_bwd(
    dout: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    saved: list[torch.Tensor],
    chunk_tokens: int | None,
    impl: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = _run_backward(
        dout, hidden_states, topk_ids, topk_weights, w_gate_up, w_down, saved, (None, None),
        chunk_tokens, impl, needs,
    )  # fmt: skip
    return tuple(dout.new_empty(0) if g is None else g for g in found)


@_op_bwd.register_fake
def _(dout, x, _ids, weights, w_gate_up, w_down, _saved, _chunk_tokens, _impl, needs):
    like = (x, weights, w_gate_up, w_down)
    wanted = (needs[0], True, *needs[1:])
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else dout.new_empty(0)
        for t, need in zip(like, wanted, strict=True)
    )


@torch.library.custom_op("qlkernels::moe_mlp_bwd_into", mutates_args={"dw_gate_up", "dw_down"})
def _op_bwd_into(
    dout: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    saved: list[torch.Tensor],
    dw_gate_up: torch.Tensor,
    dw_down: torch.Tensor,
    chunk_tokens: int | None,
    impl: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _run_backward(
        dout, hidden_states, topk_ids, topk_weights, w_gate_up, w_down, saved,
        (dw_gate_up, dw_down), chunk_tokens, impl, needs,
    )  # fmt: skip
    return tuple(dout.new_empty(0) if g is None else g for g in found[:2])


@_op_bwd_into.register_fake
def _(dout, x, _ids, weights, *args):
    needs = args[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else dout.new_empty(0)
    return dx, torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)


def _setup_context(ctx, inputs, output):
    x, ids, weights, w_gate_up, w_down, _residual, dw1, dw2, chunk_tokens, _save_h, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, ids, weights, w_gate_up, w_down, *output[1:])
    ctx.buffers = dw1, dw2  # not saved as tensors: every backward changes them
    ctx.options = chunk_tokens, impl


def _autograd_backward(ctx, dout, *_others):
    if dout is None:
        return (None,) * 11
    dresidual = dout if ctx.needs_input_grad[5] else None
    needs_dx, _, needs_dweights, *needs_dw = ctx.needs_input_grad[:5]
    dx = dweights = dw1 = dw2 = None
    if needs_dx or needs_dweights or any(needs_dw):
        x, ids, weights, w_gate_up, w_down, *saved = ctx.saved_tensors
        operands = (dout.contiguous(), x, ids, weights, w_gate_up, w_down, saved)
        needs = [needs_dx, *needs_dw]
        # with gradients on, the op is there to refuse a second backward
        watched = is_watched(*operands[:6], *ctx.buffers)
        if not (torch.is_grad_enabled() or watched):
            dx, dweights, dw1, dw2 = _run_backward(*operands, ctx.buffers, *ctx.options, needs)
            if ctx.buffers[0] is not None:
                torch.autograd.graph.increment_version(ctx.buffers)
        elif ctx.buffers[0] is None:
            dx, dweights, dw1, dw2 = torch.ops.qlkernels.moe_mlp_bwd(*operands, *ctx.options, needs)
        else:
            dx, dweights = torch.ops.qlkernels.moe_mlp_bwd_into(
                *operands, *ctx.buffers, *ctx.options, needs
            )
    return (
        dx if needs_dx else None,
        None,
        dweights if needs_dweights else None,
        dw1 if needs_dw[0] else None,
        dw2 if needs_dw[1] else None,
        dresidual,
    ) + (None,) * 5


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
_MoeMlp = direct_function(OP, _run, _setup_context, _autograd_backward)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(f"{OP}: double backward is not supported; use moe_mlp_ref for it")


_op_bwd.register_autograd(_refuse_double_backward)

# --- public ----------------------------------------------------------------------


def moe_mlp(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
    grad_buffers: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Weighted sum over each token's experts of ``W_down (silu(W_gate x) * (W_up x))``.

    Args:
        hidden_states: ``[T, H]`` bf16, fp16 or fp32, last dim contiguous. Under autocast it and the
            weights are cast to its dtype.
        topk_ids: ``[T, top_k]`` int32 or int64. A slot whose id is outside ``[0, E)`` adds nothing,
            costs nothing and gets no gradient: expert parallelism marks other ranks' experts so.
        topk_weights: ``[T, top_k]`` floating point; used in fp32. May be NaN where the id is
            outside ``[0, E)``.
        w_gate_up: ``[E, 2 * I, H]``, gate rows before up rows, as transformers stores them; dtype
            of ``hidden_states``, contiguous.
        w_down: ``[E, H, I]``, likewise.
        residual: ``[T, H]``, added in fp32 before the result is rounded, or None.
        chunk_tokens: tokens whose temporaries exist at a time: ``top_k * (H + I)`` values each in
            the forward, ``top_k * H`` in the backward. By default as many as take 1.5 and 0.6 GB
            (8192 tokens for ``"torch"``).
        recompute: save only the inputs for the backward, which computes the gate and up
            projections again; otherwise they are kept, ``top_k * 2 * I`` values a token.
        grad_buffers: ``(dw_gate_up, dw_down)``, shaped as the weights, in their dtype or fp32, to
            which the backward adds the weights' gradients instead of returning them: what gradient
            accumulation wants. The kernels add in fp32 and round once. Both weights must then
            require a gradient, unless gradients are off: a frozen one has none to add.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``; an explicit choice never
            falls back. ``"torch"`` is torch's grouped product for bf16 on a GPU and a loop over
            experts elsewhere, which synchronises.

    Returns:
        ``[T, H]``, dtype of ``hidden_states``. Differentiable with respect to all floating-point
        tensors; each gradient is computed only where it is required. An expert without a token
        gets a gradient of 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device, sharding or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        _checks.check_unsharded(OP, name, weight)
    x, w_gate_up, w_down, residual = _autocast(hidden_states, w_gate_up, w_down, residual)
    _check(x, topk_ids, topk_weights, w_gate_up, w_down, residual, impl)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be at least 1, got {chunk_tokens}")
    buffers = _checked_buffers(grad_buffers, w_gate_up, w_down)
    blockers = {"triton": why_not_triton(x), "torch": None, "reference": None}
    chosen = pick_impl(OP, impl, blockers)
    if chosen == "reference":
        if grad_buffers is not None:
            raise ValueError(f"{OP}: impl='reference' has no grad_buffers")
        return moe_mlp_ref(x, topk_ids, topk_weights, w_gate_up, w_down, residual=residual)
    weights = _checks.as_wanted(topk_weights, torch.float32)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weights.requires_grad or w_gate_up.requires_grad or w_down.requires_grad
    )
    arguments = (
        x,
        _checks.as_wanted(topk_ids, torch.int32),
        weights,
        w_gate_up,
        w_down,
        residual,
        *buffers,
        chunk_tokens,
        needs_grad and not recompute,
        chosen,
    )
    if is_watched(*arguments):
        return torch.ops.qlkernels.moe_mlp(*arguments)[0]
    return call_direct(_MoeMlp, arguments)[0]


def _autocast(x, w_gate_up, w_down, residual):
    """Operands in the dtype of an active autocast region; as they are outside."""
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type):
        return x, w_gate_up, w_down, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    operands = (x, w_gate_up, w_down, residual)
    return tuple(t if t is None else t.to(dtype) for t in operands)


def _check(x, topk_ids, topk_weights, w_gate_up, w_down, residual, impl) -> None:
    sizes: dict[str, int] = {}
    allowed = _checks.FLOATS if impl == "reference" else _checks.FLOATS[:3]
    _checks.check_shape(OP, "hidden_states", x, "T H", sizes)
    _checks.check_dtype(OP, "hidden_states", x, allowed)
    _checks.check_last_dim_contiguous(OP, "hidden_states", x)
    _checks.check_shape(OP, "topk_ids", topk_ids, "T top_k", sizes)
    _checks.check_dtype(OP, "topk_ids", topk_ids, (torch.int32, torch.int64))
    _checks.check_shape(OP, "topk_weights", topk_weights, "T top_k", sizes)
    _checks.check_dtype(OP, "topk_weights", topk_weights, _checks.FLOATS)
    _checks.check_shape(OP, "w_down", w_down, "E H I", sizes)
    E, H, I = w_down.shape  # noqa: E741
    if not isinstance(w_gate_up, torch.Tensor) or tuple(w_gate_up.shape) != (E, 2 * I, H):
        raise ValueError(
            f"{OP}: w_gate_up must be [E, 2 * I, H] = {(E, 2 * I, H)} beside w_down [E, H, I] = "
            f"{(E, H, I)}, got {tuple(w_gate_up.shape)}"
        )
    if 0 in (E, H, I) or sizes["top_k"] == 0:
        raise ValueError(f"{OP}: E, H, I, top_k = {(E, H, I, sizes['top_k'])}: nothing to multiply")
    if topk_ids.numel() >= 2**31:
        raise ValueError(
            f"{OP}: topk_ids has {topk_ids.numel()} entries, but rows are counted in int32; split "
            "the tokens into calls"
        )
    operands = dict(w_gate_up=w_gate_up, w_down=w_down)
    for name, weight in operands.items():
        if not weight.is_contiguous():
            raise ValueError(
                f"{OP}: {name} must be contiguous, got strides {weight.stride()}; call "
                f"{name}.contiguous()"
            )
    if residual is not None:
        _checks.check_shape(OP, "residual", residual, "T H", sizes)
        _checks.check_last_dim_contiguous(OP, "residual", residual)
        operands["residual"] = residual
    for name, operand in operands.items():
        _checks.check_dtype(OP, name, operand, (x.dtype,))
    operands |= dict(topk_ids=topk_ids, topk_weights=topk_weights)
    for name, operand in operands.items():
        _checks.check_device(OP, name, operand, x, "hidden_states")


def _checked_buffers(grad_buffers, w_gate_up, w_down):
    if grad_buffers is None:
        return None, None
    names = ("dw_gate_up", "dw_down")
    if len(grad_buffers) != 2:
        raise ValueError(f"{OP}: grad_buffers must be (dw_gate_up, dw_down)")
    for name, buffer, w in zip(names, grad_buffers, (w_gate_up, w_down), strict=True):
        if not isinstance(buffer, torch.Tensor):
            raise TypeError(f"{OP}: grad_buffers' {name} must be a tensor")
        if buffer.shape != w.shape or not buffer.is_contiguous():
            raise ValueError(
                f"{OP}: {name} must be contiguous {tuple(w.shape)}, got {tuple(buffer.shape)} with "
                f"strides {buffer.stride()}"
            )
        _checks.check_dtype(OP, name, buffer, (w.dtype, torch.float32))
        _checks.check_device(OP, name, buffer, w, "the weight")
        if torch.is_grad_enabled() and not w.requires_grad:
            raise ValueError(
                f"{OP}: grad_buffers is given, but {name[1:]} does not require a gradient, so the "
                f"backward would add nothing to {name}; call {name[1:]}.requires_grad_(), or pass "
                "no grad_buffers"
            )
    return grad_buffers
