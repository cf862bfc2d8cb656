"""Log-probability, entropy and log-sum-exp of every token, from logits.

    z = s r,  or  z = c tanh(s r / c)       # r: raw logits, s: logit scale, c: soft-cap
    u = z / tau,  m = max z,  d = (z - m) / tau
    S = sum e^d,  Q = sum d e^d             # shifted: a constant added to the logits cancels
    logprob = d_y - log S                   # nats, as the next two
    H = log S - Q / S
    lse = m / tau + log S
    du_i = p_i (g_lse - g_l - g_H (log p_i + H)) + g_l 1[i = y]
    log p_i = (z_i - z_y) / tau + logprob

Bytes: the forward reads the logits once, T * V * itemsize; the backward reads them once and writes
once. Rows whose upstream gradients are all exactly zero are written without being read.
"""

from __future__ import annotations

from functools import partial

import torch

from qlkernels import _checks, _ext
from qlkernels._direct import direct_function, is_watched
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._scores import TokenScores
from qlkernels._target import compute_capability, why_not_triton
from qlkernels.logprob_entropy.kernels import aot_variants
from qlkernels.logprob_entropy.passes import backward, forward
from qlkernels.logprob_entropy.reference import logprob_entropy_ref

OP = "logprob_entropy"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# --- custom ops and autograd -------------------------------------------------


def _run(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tau = temperature if temperatures is None else temperatures
    with op_range(OP, logits):
        return forward(logits, target_ids, row_mask, tau, softcap, logit_scale, impl)


_op = torch.library.custom_op("qlkernels::logprob_entropy", _run, mutates_args=())


@_op.register_fake
def _(logits, target_ids, *_args):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))


_SCHEMA = (
    "Tensor target_ids, Tensor? row_mask, Tensor? temperatures, float temperature, float? softcap, "
    "float logit_scale, Tensor logprobs, Tensor entropy, Tensor lse, Tensor? dlogprobs, "
    "Tensor? dentropy, Tensor? dlse, str impl) -> "
)


def _backward_into(out, logits, target_ids, row_mask, temperatures, temperature, *rest):
    softcap, logit_scale, logprobs, entropy, lse, *grads, impl = rest
    tau = temperature if temperatures is None else temperatures
    with op_range(f"{OP}_bwd", logits):
        backward(
            logits, target_ids, row_mask, tau, softcap, logit_scale, (logprobs, entropy, lse),
            grads, impl, out,
        )  # fmt: skip


def _run_backward(logits, *args):
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(dlogits, logits, *args)
    return dlogits


_op_bwd = torch.library.custom_op(
    "qlkernels::logprob_entropy_bwd", _run_backward, mutates_args=(),
    schema=f"(Tensor logits, {_SCHEMA}Tensor",
)  # fmt: skip


@_op_bwd.register_fake
def _(logits, *_args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    "qlkernels::logprob_entropy_bwd_", mutates_args={"logits"},
    schema=f"(Tensor(a!) logits, {_SCHEMA}()",
)  # fmt: skip
def _op_bwd_inplace(logits, *args):
    _backward_into(logits, logits, *args)


def _setup_context(ctx, inputs, output):
    logits, target_ids, row_mask, temperatures, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target_ids, row_mask, temperatures, *output)
    ctx.options = options


def _autograd_backward(ctx, *grads):
    if all(g is None for g in grads):
        return (None,) * 9
    logits, target_ids, row_mask, temperatures, *scores = ctx.saved_tensors
    temperature, softcap, logit_scale, inplace, impl = ctx.options
    grads = [None if g is None else g.contiguous() for g in grads]
    arguments = (
        target_ids, row_mask, temperatures, temperature, softcap, logit_scale, *scores, *grads, impl
    )  # fmt: skip
    # with gradients on, the op is there to refuse a second backward
    direct = not (torch.is_grad_enabled() or is_watched(logits, *grads))
    if inplace:
        dlogits = logits.detach()
        if direct:
            _backward_into(dlogits, dlogits, *arguments)
            torch.autograd.graph.increment_version(dlogits)
        else:
            torch.ops.qlkernels.logprob_entropy_bwd_(dlogits, *arguments)
    elif direct:
        dlogits = _run_backward(logits, *arguments)
    else:
        dlogits = torch.ops.qlkernels.logprob_entropy_bwd(logits, *arguments)
    return (dlogits,) + (None,) * 8


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
_LogprobEntropy = direct_function(OP, _run, _setup_context, _autograd_backward)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(f"{OP}: double backward is not supported; use impl='reference' for it")


_op_bwd.register_autograd(_refuse_double_backward)


def check_arguments(
    op, logits, target_ids, temperature, row_mask, softcap, logit_scale, *, inplace, validate, impl
) -> dict[str, int]:
    """Raise on what does not fit, else the sizes. ``inplace`` names the argument that asks for the
    gradient in the memory of the logits, or is None.
    """
    sizes: dict[str, int] = {}
    _checks.check_shape(op, "logits", logits, "T V", sizes)
    _checks.check_dtype(
        op, "logits", logits, DTYPES + ((torch.float64,) if impl == "reference" else ())
    )
    _checks.check_last_dim_contiguous(op, "logits", logits)
    _checks.check_rows(op, logits, "logits", target_ids, temperature, row_mask, sizes)
    _checks.check_scalars(op, temperature, softcap, logit_scale)
    T, V = logits.shape
    if V == 0:
        raise ValueError(f"{op}: logits is [T, V] = {(T, V)}: an empty vocabulary")
    if inplace is not None and T > 1 and logits.stride(0) < V:
        raise ValueError(
            f"{op}: {inplace} needs rows of their own, but logits has strides {logits.stride()}"
        )
    if validate or logits.device.type == "cpu":
        _checks.check_targets(op, target_ids, row_mask, V)
    return sizes


def blockers_of(logits: torch.Tensor) -> dict:
    """For ``pick_impl``: why each implementation cannot run on ``logits``; the fastest is first."""
    cuda, triton_ = partial(_ext.why_not_cuda, logits), partial(why_not_triton, logits)
    others = {"cpu": partial(_ext.why_not_cpu, logits), "torch": None, "reference": None}
    # only sm_90 has the kernels that copy in bulk
    if logits.is_cuda and compute_capability(logits.device.index or 0) == 90:
        return {"cuda": cuda, "triton": triton_, **others}
    return {"triton": triton_, "cuda": cuda, **others}


# --- public ------------------------------------------------------------------


def logprob_entropy(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    row_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    validate: bool = False,
    impl: str = "auto",
) -> TokenScores:
    """Log-probability of the target, entropy and log-sum-exp of every row of logits, in nats.

    Args:
        logits: ``[T, V]`` bf16, fp16 or fp32, any row stride, last dim contiguous; or ``[B, S,
            V]``. Entries of -inf have probability 0. A row with NaN gives NaN in that row.
        target_ids: ``[T]`` (or ``[B, S]``) int64, already shifted: row t scores ``target_ids[t]``.
            Outside ``[0, V)``: raises on the CPU and with ``validate=True``, gives a NaN
            log-probability on the GPU.
        temperature: the logits are divided by it, after scale and soft-cap. Float, or fp32 of the
            shape of ``target_ids``; positive.
        row_mask: bool, shape of ``target_ids``. Rows where it is False are never read and hold 0.
        softcap: ``c`` in ``c tanh(s r / c)``, as Gemma 2 does; None for none.
        logit_scale: ``s``, positive, as Cohere does.
        inplace_backward: write the gradient over ``logits``, which nothing may read afterwards.
        validate: check the targets on the GPU too (synchronises).
        impl: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an
            explicit choice never falls back.

    Returns:
        ``TokenScores``, fp32, shape of ``target_ids``: log-probabilities ``<= 0``, entropy in ``[0,
        log V]``, lse. All three are differentiable with respect to ``logits``; rows whose upstream
        gradients are all exactly 0 cost a write.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    if isinstance(logits, torch.Tensor) and logits.dim() == 3:
        return _batched(
            logits, target_ids, temperature, row_mask,
            softcap=softcap, logit_scale=logit_scale, inplace_backward=inplace_backward,
            validate=validate, impl=impl,
        )  # fmt: skip
    check_arguments(
        OP, logits, target_ids, temperature, row_mask, softcap, logit_scale,
        inplace="inplace_backward" if inplace_backward else None, validate=validate, impl=impl,
    )  # fmt: skip
    chosen = pick_impl(OP, impl, blockers_of(logits))
    is_tensor = isinstance(temperature, torch.Tensor)
    if chosen == "reference":
        options = dict(temperature=temperature, row_mask=row_mask, softcap=softcap)
        return logprob_entropy_ref(logits, target_ids, logit_scale=logit_scale, **options)
    arguments = (
        logits,
        target_ids.contiguous(),
        None if row_mask is None else row_mask.contiguous(),
        temperature.float().contiguous() if is_tensor else None,
        1.0 if is_tensor else float(temperature),
        softcap,
        float(logit_scale),
        inplace_backward,
        chosen,
    )
    watched = is_watched(*arguments)
    call = torch.ops.qlkernels.logprob_entropy if watched else _LogprobEntropy.apply
    return TokenScores(*call(*arguments))


def token_entropy(
    logits: torch.Tensor, *, temperature: float | torch.Tensor = 1.0, impl: str = "auto"
) -> torch.Tensor:
    """Entropy of ``softmax(logits / temperature)`` for every token, in nats.

    Args:
        logits: ``[T, V]`` (or ``[B, S, V]``) bf16, fp16 or fp32, last dim contiguous.
        temperature: float, or fp32 of the leading shape of ``logits``; positive.
        impl: as in ``logprob_entropy``.

    Returns:
        ``[T]`` (or ``[B, S]``) fp32, in ``[0, log V]``. Differentiable with respect to ``logits``.
    """
    first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return logprob_entropy(logits, first, temperature=temperature, impl=impl).entropy


def _batched(logits, target_ids, temperature, row_mask, **options) -> TokenScores:
    """``[B, S, V]``: one call where the rows have one stride, else one call a sequence."""
    B, S, V = logits.shape
    if tuple(target_ids.shape) != (B, S):
        raise ValueError(
            f"{OP}: target_ids is {tuple(target_ids.shape)}, but logits is [B, S, V] = {(B, S, V)}"
        )
    parts = [target_ids, row_mask, temperature]
    if B * S == 0 or logits.stride(0) == S * logits.stride(1):
        flat = [x.reshape(-1) if isinstance(x, torch.Tensor) else x for x in parts]
        calls = [(logits.reshape(B * S, V), *flat)]
    else:
        calls = [
            (logits[b], *(x[b] if isinstance(x, torch.Tensor) else x for x in parts))
            for b in range(B)
        ]
    scores = [
        logprob_entropy(x, y, temperature=tau, row_mask=mask, **options)
        for x, y, mask, tau in calls
    ]
    return TokenScores(*(torch.cat(field).view(B, S) for field in zip(*scores, strict=True)))
