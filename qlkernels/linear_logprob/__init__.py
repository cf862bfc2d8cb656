"""Token scores from hidden states: the logits ``[T, V]`` are never stored.

    r = X W^T + b,  z = s r  or  c tanh(s r / c),  u = z / tau
    logprob, H, lse: as in logprob_entropy, over tiles that merge in a fixed order by
    m = max m_i
    S = sum e^(m_i - m) S_i
    Q = sum e^(m_i - m) (Q_i + (m_i - m) S_i)
    dX = dR W,  dW = dR^T X,  db = sum_t dR_t,  dR as in logprob_entropy

FLOPs: 2 T H V forward. The backward computes the logits again, 6 T' H V, where T' counts the rows
whose upstream gradient is not exactly zero; 4 T' H V where only one of dX and dW is asked for.

The Triton path runs a GEMM whose epilogue folds the tile that is still in registers into (m, S, Q),
12 bytes a row and tile. Its backward walks blocks of the vocabulary: the same GEMM writes dR of one
block in the inputs' dtype, two library GEMMs turn it into a slice of dW, written once, and a
contribution to dX, accumulated in fp32.
"""

from __future__ import annotations

from functools import partial

import torch

from qlkernels import _checks, _ext, _rows
from qlkernels._direct import call_direct, direct_function, is_watched, without_autocast
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._scores import TokenScores
from qlkernels._target import is_capturing, why_not_triton
from qlkernels.linear_logprob.kernels import aot_variants
from qlkernels.linear_logprob.passes import Options, backward, forward
from qlkernels.linear_logprob.reference import linear_logprob_ref

OP = "linear_logprob"
_COPIED_ROWS = 1 << 16  # live rows that are gathered at a time

# --- custom ops and autograd -------------------------------------------------


def _run(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    bias: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int | None,
    compact: bool,
    impl: str,
    main_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last result is the target's z. ``main_grad`` is for the backward."""
    tau = temperature if temperatures is None else temperatures
    options = Options(tau, logit_scale, softcap, chunk_tokens, compact, impl)
    x, y = hidden_states, target_ids
    with op_range(OP, x), without_autocast(x.device):
        if row_mask is None:
            return forward(x, lm_head_weight, bias, y, options)
        if not compact or is_capturing():
            x = torch.where(row_mask[:, None], x, 0.0)
            found = forward(x, lm_head_weight, bias, torch.where(row_mask, y, 0), options)
            return tuple(torch.where(row_mask, v, 0.0) for v in found)
        out = tuple(torch.zeros_like(y, dtype=torch.float32) for _ in range(4))
        # nonzero is the one synchronisation; a part of the rows is copied at a time
        for rows in row_mask.nonzero().squeeze(1).split(_COPIED_ROWS):
            found = forward(x[rows], lm_head_weight, bias, y[rows], options.of_rows(rows))
            for whole, part in zip(out, found, strict=True):
                whole[rows] = part
        return out


_op = torch.library.custom_op("qlkernels::linear_logprob", _run, mutates_args=())


@_op.register_fake
def _(hidden_states, *_args):
    T = hidden_states.shape[0]
    return tuple(hidden_states.new_empty(T, dtype=torch.float32) for _ in range(4))


def _run_backward(
    hidden_states, lm_head_weight, target_ids, bias, temperatures, row_mask, scores, dlogprobs,
    dentropy, dlse, temperature, logit_scale, softcap, chunk_tokens, compact, impl, needs_dx,
    needs_dw, needs_db, main_grad=None,
):  # fmt: skip
    """The live rows through ``backward``; gradients that are not needed are empty."""
    tau = temperature if temperatures is None else temperatures
    options = Options(tau, logit_scale, softcap, chunk_tokens, compact, impl)
    x, w, y = hidden_states, lm_head_weight, target_ids
    grads = (dlogprobs, dentropy, dlse)
    needs = (needs_dx, needs_dw, needs_db)
    with op_range(f"{OP}_bwd", x), without_autocast(x.device):
        live = _rows.live_rows(row_mask, *grads)
        rows = None
        if compact and not is_capturing():
            rows = live.nonzero().squeeze(1)  # the one synchronisation
        if rows is not None and rows.numel() < x.shape[0]:
            pick = [[None if v is None else v[rows] for v in vs] for vs in (scores, grads)]
            part, dw, db = backward(
                x[rows], w, bias, y[rows], *pick, needs, options.of_rows(rows), main_grad
            )
            dx = None
            if needs_dx:
                dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
                dx[rows] = part
        else:
            if rows is None:  # dead rows enter the GEMMs: selected to 0, since 0 * NaN is not 0
                x = torch.where(live[:, None], x, 0.0)
                grads = [None if g is None else torch.where(live, g, 0.0) for g in grads]
            dx, dw, db = backward(x, w, bias, y, scores, grads, needs, options, main_grad)
    return tuple(hidden_states.new_empty(0) if g is None else g for g in (dx, dw, db))


_BACKWARD_SCHEMA = (
    "Tensor hidden_states, Tensor lm_head_weight, Tensor target_ids, Tensor? bias, "
    "Tensor? temperatures, Tensor? row_mask, Tensor[] scores, Tensor? dlogprobs, Tensor? dentropy, "
    "Tensor? dlse, float temperature, float logit_scale, float? softcap, SymInt? chunk_tokens, "
    "bool compact, str impl, bool needs_dx, bool needs_dw, bool needs_db"
)


@torch.library.custom_op(
    "qlkernels::linear_logprob_bwd", mutates_args=(),
    schema=f"({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _op_bwd(*args):
    return _run_backward(*args)


@torch.library.custom_op(
    "qlkernels::linear_logprob_bwd_", mutates_args={"main_grad"},
    schema=f"({_BACKWARD_SCHEMA}, Tensor(a!) main_grad) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _op_bwd_into(*args):
    return _run_backward(*args)


def _fake_backward(hidden_states, lm_head_weight, target_ids, bias, *args):
    needs_dx, needs_dw, needs_db = args[12:15]
    nothing = hidden_states.new_empty(0)
    return (
        torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        if needs_dx
        else nothing.clone(),
        torch.empty(lm_head_weight.shape, dtype=lm_head_weight.dtype, device=hidden_states.device)
        if needs_dw
        else nothing.clone(),
        bias.new_empty(bias.shape) if needs_db else nothing.clone(),
    )


_op_bwd.register_fake(_fake_backward)
_op_bwd_into.register_fake(_fake_backward)


def _setup_context(ctx, inputs, output):
    x, w, y, bias, temperatures, row_mask, *options, main_grad = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, y, bias, temperatures, row_mask, *output)
    ctx.main_grad = main_grad  # not saved: it changes between forward and backward, by design
    ctx.mark_non_differentiable(output[3])
    ctx.options = options


def _autograd_backward(ctx, *grads):
    grads = [None if g is None else g.contiguous() for g in grads[:3]]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if ctx.main_grad is not None:
        needs[1] = False
    if not (any(needs) or ctx.main_grad is not None) or all(g is None for g in grads):
        return (None,) * 13
    x, w, y, bias, temperatures, row_mask, *scores = ctx.saved_tensors
    arguments = (x, w, y, bias, temperatures, row_mask, scores, *grads, *ctx.options, *needs)
    if ctx.main_grad is not None and torch.is_grad_enabled():
        _refuse_double_backward(ctx)
    # with gradients on, the op is there to refuse a second backward
    if not (torch.is_grad_enabled() or is_watched(x, w, ctx.main_grad, *grads)):
        dx, dw, db = _run_backward(*arguments, ctx.main_grad)
        if ctx.main_grad is not None:
            torch.autograd.graph.increment_version(ctx.main_grad)
    elif ctx.main_grad is None:
        dx, dw, db = torch.ops.qlkernels.linear_logprob_bwd(*arguments)
    else:
        dx, dw, db = torch.ops.qlkernels.linear_logprob_bwd_(*arguments, ctx.main_grad)
    dx, dw, db = (g if n else None for g, n in zip((dx, dw, db), needs, strict=True))
    return (dx, dw, None, db) + (None,) * 9


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
_LinearLogprob = direct_function(OP, _run, _setup_context, _autograd_backward)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(f"{OP}: double backward is not supported; use linear_logprob_ref for it")


_op_bwd.register_autograd(_refuse_double_backward)

# --- public ------------------------------------------------------------------


def linear_logprob(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_mask: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    compact: bool = True,
    main_grad: torch.Tensor | None = None,
    validate: bool = False,
    impl: str = "auto",
) -> TokenScores:
    """Log-probability, entropy and log-sum-exp of every token, from hidden states, in nats.

    Equal to ``logprob_entropy(hidden_states @ lm_head_weight.T + bias, target_ids)`` with logits
    that are accumulated in fp32 and never rounded, but the logits are not stored.

    Args:
        hidden_states: ``[T, H]`` (or ``[B, S, H]``) bf16, fp16 or fp32, last dim contiguous. Under
            autocast both operands are cast to its dtype.
        lm_head_weight: ``[V, H]``, same dtype, last dim contiguous. May be the embedding (tied
            weights).
        target_ids: ``[T]`` (or ``[B, S]``) int64, already shifted. Outside ``[0, V)``: raises on
            the CPU and with ``validate=True``, gives a NaN log-probability on the GPU.
        bias: ``[V]``, same dtype, or None.
        temperature: float, or fp32 of the shape of ``target_ids``; positive.
        logit_scale: multiplies the raw logits (Cohere); positive.
        softcap: ``c`` in ``c tanh(s r / c)`` (Gemma 2), or None.
        row_mask: bool, shape of ``target_ids``. Rows where it is False may hold anything, cost
            nothing and return 0.
        chunk_tokens: temporaries take the memory of about ``[chunk_tokens, V]`` values, 2 bytes
            each on the GPU (by default 512 MB in all, in a backward of more than 65,536 rows 8 KB
            a row; twice that in an fp32 backward), 4 on the CPU (64 MB).
        compact: drop masked rows, and in the backward rows whose upstream gradients are all exactly
            0, before the GEMMs. Reads one count from the device per pass where there is a mask or a
            backward. Off under CUDA graph capture.
        main_grad: fp32 ``[V, H]``, contiguous, to which the backward adds the gradient of
            ``lm_head_weight``, which then gets none of its own. For gradients that are accumulated
            in fp32 over micro-batches.
        validate: check the targets on the GPU too (synchronises).
        impl: ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an explicit
            choice never falls back.

    Returns:
        ``TokenScores``, fp32, shape of ``target_ids``. Differentiable with respect to
        ``hidden_states``, ``lm_head_weight`` and ``bias``, each computed only where it is required.

    Raises:
        ValueError, TypeError: a shape, dtype, device, sharding or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    if isinstance(hidden_states, torch.Tensor) and hidden_states.dim() == 3:
        B, S, H = hidden_states.shape
        if tuple(target_ids.shape) != (B, S):
            raise ValueError(
                f"{OP}: target_ids is {tuple(target_ids.shape)}, but hidden_states is [B, S, H] = "
                f"{(B, S, H)}"
            )
        scores = linear_logprob(
            hidden_states.reshape(B * S, H), lm_head_weight, target_ids.reshape(-1), bias=bias,
            temperature=temperature.reshape(-1)
            if isinstance(temperature, torch.Tensor) else temperature,
            logit_scale=logit_scale, softcap=softcap,
            row_mask=None if row_mask is None else row_mask.reshape(-1),
            chunk_tokens=chunk_tokens, compact=compact, main_grad=main_grad, validate=validate,
            impl=impl,
        )  # fmt: skip
        return TokenScores(*(v.view(B, S) for v in scores))
    _checks.check_unsharded(OP, "lm_head_weight", lm_head_weight)
    x, w, bias = autocast_operands(hidden_states, lm_head_weight, bias)
    sizes: dict[str, int] = {}
    _checks.check_head(OP, x, w, target_ids, bias, temperature, row_mask, sizes, impl)
    _checks.check_scalars(OP, temperature, softcap, logit_scale)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if validate or x.device.type == "cpu":
        _checks.check_targets(OP, target_ids, row_mask, w.shape[0])

    if main_grad is not None:
        _check_main_grad(main_grad, x, w, impl)
    blockers = {
        "triton": partial(why_not_triton, x),
        "cpu": partial(_ext.why_not_cpu, x),
        "torch": None,
        "reference": None,
    }
    chosen = pick_impl(OP, impl, blockers)
    if chosen == "reference":
        return linear_logprob_ref(
            x, w, target_ids, bias=bias, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, row_mask=row_mask,
        )  # fmt: skip
    is_tensor = isinstance(temperature, torch.Tensor)
    arguments = (
        x,
        w,
        target_ids.contiguous(),
        None if bias is None else bias.contiguous(),
        temperature.float().contiguous() if is_tensor else None,
        None if row_mask is None else row_mask.contiguous(),
        1.0 if is_tensor else float(temperature),
        float(logit_scale),
        softcap,
        chunk_tokens,
        compact,
        chosen,
        main_grad,
    )
    if is_watched(*arguments):
        return TokenScores(*torch.ops.qlkernels.linear_logprob(*arguments)[:3])
    return TokenScores(*call_direct(_LinearLogprob, arguments)[:3])


def _check_main_grad(main_grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, impl: str) -> None:
    what = f"{OP}: main_grad must be contiguous fp32 {tuple(w.shape)} on {w.device}"
    found = (tuple(main_grad.shape), main_grad.dtype, main_grad.device, main_grad.is_contiguous())
    if found != (tuple(w.shape), torch.float32, w.device, True):
        raise ValueError(f"{what}, got {main_grad.dtype} {found[0]} on {main_grad.device}")
    if impl == "reference":
        raise ValueError(
            f"{OP}: impl='reference' leaves gradients to autograd and takes no main_grad"
        )
    if torch.is_grad_enabled() and not (x.requires_grad or w.requires_grad):
        raise ValueError(
            f"{OP}: main_grad is given, but neither hidden_states nor lm_head_weight requires a "
            "gradient, so there is no backward that could add to it"
        )


def autocast_operands(x, w, bias):
    """Operands in the dtype of an active autocast region; as they are outside."""
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type):
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
