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

import torch

from qlkernels import _checks, _ext, _rows
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._online import fold_tile, scale_and_cap, shifted
from qlkernels._scores import TokenScores
from qlkernels._target import compute_capability, why_not_triton
from qlkernels._triton import tl, triton

OP = "logprob_entropy"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# --- reference ---------------------------------------------------------------


def logprob_entropy_ref(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    row_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenScores:
    """Ground truth: eager, differentiable, any device. fp64 stays fp64, everything else is computed
    in fp32.
    """
    r = logits if logits.dtype == torch.float64 else logits.float()
    if row_mask is not None:
        r = torch.where(row_mask[:, None], r, 0.0)
        target_ids = torch.where(row_mask, target_ids, 0)
        if isinstance(temperature, torch.Tensor):
            temperature = torch.where(row_mask, temperature, 1.0)
    z = r * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = temperature[:, None].to(z.dtype) if isinstance(temperature, torch.Tensor) else temperature
    u = z / tau  # [T, V]
    logp = u.log_softmax(dim=1)
    p = logp.exp()
    logprobs = logp.gather(1, target_ids[:, None]).squeeze(1)
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(dim=1)
    lse = u.logsumexp(dim=1)
    if row_mask is None:
        return TokenScores(logprobs, entropy, lse)
    return TokenScores(*(torch.where(row_mask, x, 0.0) for x in (logprobs, entropy, lse)))


# --- kernels -----------------------------------------------------------------


# A kernel is compiled once for every divisibility of the arguments that are specialised. The [T]
# vectors, of which a program reads one element, may start anywhere in a batch.
_ROWS = [
    "target_ptr", "row_mask_ptr", "temperature_ptr", "logprobs_ptr", "entropy_ptr", "lse_ptr",
    "dlogprobs_ptr", "dentropy_ptr", "dlse_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_ROWS)
def _logprob_entropy_fwd_kernel(
    logits_ptr,
    target_ptr,
    row_mask_ptr,
    temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    stride_t,
    V,
    temperature,
    logit_scale,
    softcap,
    HAS_ROW_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row, one read of the row; each lane keeps its partial sums until the end."""
    t = tl.program_id(0).to(tl.int64)  # T * V exceeds int32 for long contexts
    live = t >= 0
    if HAS_ROW_MASK:
        live = tl.load(row_mask_ptr + t) != 0
    tau = tl.cast(temperature, tl.float32)
    if HAS_TEMPERATURE:
        tau = tl.load(temperature_ptr + t)
    inv_tau = 1.0 / tau
    scale = tl.cast(logit_scale, tl.float32)
    cap = tl.cast(softcap, tl.float32)
    row_ptr = logits_ptr + t * stride_t

    m = -1.0e30  # finite, so that the first move is 0 * finite and not NaN
    s = tl.zeros([BLOCK_V], tl.float32)
    q = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, tl.where(live, V, 0), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        r = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z = tl.where(mask_v, scale_and_cap(r, scale, cap, HAS_SOFTCAP), -float("inf"))
        m, s, q = fold_tile(m, s, q, z, inv_tau)
    S = tl.sum(s, 0)
    log_s = tl.log(S)

    y = tl.load(target_ptr + t)
    in_range = (y >= 0) & (y < V)
    r_y = tl.load(row_ptr + y, mask=in_range & live, other=0.0).to(tl.float32)
    z_y = scale_and_cap(r_y, scale, cap, HAS_SOFTCAP)
    logprob = tl.where(in_range, (z_y - m) * inv_tau - log_s, float("nan"))
    tl.store(logprobs_ptr + t, tl.where(live, logprob, 0.0))
    tl.store(entropy_ptr + t, tl.where(live, log_s - tl.sum(q, 0) / S, 0.0))
    tl.store(lse_ptr + t, tl.where(live, m * inv_tau + log_s, 0.0))


@triton.jit(do_not_specialize=_ROWS)
def _logprob_entropy_bwd_kernel(
    logits_ptr,
    target_ptr,
    row_mask_ptr,
    temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    dlogprobs_ptr,
    dentropy_ptr,
    dlse_ptr,
    dlogits_ptr,
    stride_t,
    stride_dt,
    V,
    temperature,
    logit_scale,
    softcap,
    HAS_ROW_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DLOGPROBS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row: read once, write once. ``dlogits`` may be the memory of ``logits``."""
    t = tl.program_id(0).to(tl.int64)
    g_l = tl.cast(0.0, tl.float32)
    g_h = tl.cast(0.0, tl.float32)
    g_lse = tl.cast(0.0, tl.float32)
    if HAS_DLOGPROBS:
        g_l = tl.load(dlogprobs_ptr + t)
    if HAS_DENTROPY:
        g_h = tl.load(dentropy_ptr + t)
    if HAS_DLSE:
        g_lse = tl.load(dlse_ptr + t)
    # counted, not or-ed: the interpreter turns a disjunction of scalars into a float
    live = (g_l != 0.0).to(tl.int32) + (g_h != 0.0).to(tl.int32) + (g_lse != 0.0).to(tl.int32) > 0
    if HAS_ROW_MASK:
        live = live & (tl.load(row_mask_ptr + t) != 0)
    tau = tl.cast(temperature, tl.float32)
    if HAS_TEMPERATURE:
        tau = tl.load(temperature_ptr + t)
    inv_tau = 1.0 / tau
    scale = tl.cast(logit_scale, tl.float32)
    cap = tl.cast(softcap, tl.float32)
    row_ptr = logits_ptr + t * stride_t
    drow_ptr = dlogits_ptr + t * stride_dt

    y = tl.load(target_ptr + t)
    in_range = (y >= 0) & (y < V)
    logprob = tl.load(logprobs_ptr + t)
    entropy = tl.load(entropy_ptr + t)
    r_y = tl.load(row_ptr + y, mask=in_range & live, other=-float("inf")).to(tl.float32)
    tl.debug_barrier()  # in place: every warp has read the target before one overwrites it
    z_y = scale_and_cap(r_y, scale, cap, HAS_SOFTCAP)
    # log p_i = (z_i - z_y) / tau + logprob; a target of probability 0 cannot be the anchor
    reachable = (z_y > -float("inf")) & (logprob > -float("inf")) & in_range
    anchor_z = tl.where(reachable, z_y, 0.0)
    anchor_l = tl.where(reachable, logprob, -tl.load(lse_ptr + t))
    a = g_lse - g_l
    # 1 - p_y without cancellation where p_y is near 1
    near = -logprob * (1.0 + logprob * (0.5 + logprob * (1.0 / 6.0)))
    not_y = tl.where(logprob > -1.0e-2, near, 1.0 - tl.exp(logprob))
    at_y = tl.exp(logprob) * (g_lse - g_h * (tl.where(reachable, logprob, 0.0) + entropy))
    at_y += g_l * not_y

    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        r = tl.load(row_ptr + offs_v, mask=mask_v & live, other=0.0).to(tl.float32)
        z = scale_and_cap(r, scale, cap, HAS_SOFTCAP)
        logp = shifted(z, anchor_z, inv_tau) + anchor_l
        p = tl.exp(logp)
        du = p * (a - g_h * (logp + entropy))
        du = tl.where(offs_v == y, at_y, du)
        dr = du * inv_tau * scale
        if HAS_SOFTCAP:
            dr = dr * (1.0 - (z / cap) * (z / cap))
        dr = tl.where(live, dr, 0.0)
        tl.store(drow_ptr + offs_v, dr.to(dlogits_ptr.dtype.element_ty), mask=mask_v)


# (BLOCK_V, num_warps)
_FWD_CONFIG = (4096, 4)
_BWD_CONFIG = (4096, 16)


def _block_v(V: int, config: tuple[int, int]) -> tuple[int, int]:
    block, warps = config
    if V >= block:
        return block, warps
    small = max(16, triton.next_power_of_2(V))
    return small, max(1, min(warps, small // 256))


def aot_variants():
    """Every kernel as it is launched for bf16 logits: (name, kernel, signature, constexprs,
    aligned, options).
    """
    found = []
    flags = dict(HAS_ROW_MASK=True, HAS_TEMPERATURE=True, HAS_SOFTCAP=False)
    rows = dict(
        logits_ptr="*bf16", target_ptr="*i64", row_mask_ptr="*i1", temperature_ptr="*fp32",
        logprobs_ptr="*fp32", entropy_ptr="*fp32", lse_ptr="*fp32", stride_t="i64", V="i32",
        temperature="fp32", logit_scale="fp32", softcap="fp32",
    )  # fmt: skip
    aligned = ("logits_ptr", "stride_t", "V")
    for softcap in (False, True):
        constexprs = flags | dict(HAS_SOFTCAP=softcap, BLOCK_V=_FWD_CONFIG[0])
        name = f"logprob_entropy_fwd-softcap{int(softcap)}"
        options = dict(num_warps=_FWD_CONFIG[1])
        found.append((name, _logprob_entropy_fwd_kernel, rows, constexprs, aligned, options))
    grads = rows | dict(
        dlogprobs_ptr="*fp32", dentropy_ptr="*fp32", dlse_ptr="*fp32", dlogits_ptr="*bf16",
        stride_dt="i64",
    )  # fmt: skip
    constexprs = flags | dict(
        HAS_DLOGPROBS=True, HAS_DENTROPY=True, HAS_DLSE=True, BLOCK_V=_BWD_CONFIG[0]
    )
    aligned += ("dlogits_ptr", "stride_dt")
    options = dict(num_warps=_BWD_CONFIG[1])
    found.append(
        ("logprob_entropy_bwd", _logprob_entropy_bwd_kernel, grads, constexprs, aligned, options)
    )
    return found


# --- forward and backward of each implementation -----------------------------

# Rows of fp32 temporaries that the torch implementation holds at a time.
_TORCH_CHUNK_BYTES = 64 << 20


def _chunks(T: int, V: int) -> list[slice]:
    rows = max(1, _TORCH_CHUNK_BYTES // (4 * V))
    return [slice(start, min(T, start + rows)) for start in range(0, T, rows)]


def _part(x, rows):
    return x[rows] if isinstance(x, torch.Tensor) else x


def _forward(logits, target_ids, row_mask, temperature, softcap, logit_scale, impl):
    T, V = logits.shape
    if impl in ("cuda", "cpu"):
        return _ext.logprob_entropy_fwd(
            logits, target_ids, row_mask, temperature, softcap, logit_scale
        )
    out = tuple(torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    if T == 0:
        return out
    if impl == "triton":
        block, warps = _block_v(V, _FWD_CONFIG)
        is_tensor = isinstance(temperature, torch.Tensor)
        _logprob_entropy_fwd_kernel[(T,)](
            logits,
            target_ids,
            row_mask,
            temperature if is_tensor else None,
            *out,
            logits.stride(0),
            V,
            1.0 if is_tensor else temperature,
            logit_scale,
            softcap or 0.0,
            HAS_ROW_MASK=row_mask is not None,
            HAS_TEMPERATURE=is_tensor,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=block,
            num_warps=warps,
        )
        return out
    for rows in _chunks(T, V):
        r, y = logits[rows].float(), target_ids[rows]
        if row_mask is not None:
            r = torch.where(row_mask[rows, None], r, 0.0)
            y = torch.where(row_mask[rows], y, 0)
        in_range = (y >= 0) & (y < V)
        scores = _rows.fold_rows(
            r, torch.where(in_range, y, 0), _part(temperature, rows), logit_scale, softcap
        )
        for whole, part in zip(out, scores, strict=True):
            whole[rows] = part if row_mask is None else torch.where(row_mask[rows], part, 0.0)
        out[0][rows] = torch.where(in_range, out[0][rows], torch.nan)
    return out


def _backward(
    logits, target_ids, row_mask, temperature, softcap, logit_scale, scores, grads, impl, out
):
    """Write dlogits into ``out``, which may be ``logits`` itself."""
    T, V = logits.shape
    if T == 0:
        return
    logprobs, entropy, lse = scores
    if impl in ("cuda", "cpu"):
        _ext.logprob_entropy_bwd(
            logits, target_ids, row_mask, temperature, softcap, logit_scale,
            entropy, lse, *grads, out,
        )  # fmt: skip
        return
    if impl == "triton":
        block, warps = _block_v(V, _BWD_CONFIG)
        is_tensor = isinstance(temperature, torch.Tensor)
        _logprob_entropy_bwd_kernel[(T,)](
            logits,
            target_ids,
            row_mask,
            temperature if is_tensor else None,
            logprobs,
            entropy,
            lse,
            *grads,
            out,
            logits.stride(0),
            out.stride(0),
            V,
            1.0 if is_tensor else temperature,
            logit_scale,
            softcap or 0.0,
            HAS_ROW_MASK=row_mask is not None,
            HAS_TEMPERATURE=is_tensor,
            HAS_SOFTCAP=softcap is not None,
            HAS_DLOGPROBS=grads[0] is not None,
            HAS_DENTROPY=grads[1] is not None,
            HAS_DLSE=grads[2] is not None,
            BLOCK_V=block,
            num_warps=warps,
        )
        return
    for rows in _chunks(T, V):
        g = [_part(x, rows) for x in grads]
        live = _rows.live_rows(_part(row_mask, rows), *g)
        y = target_ids[rows]
        y = torch.where(live & (y >= 0) & (y < V), y, 0)
        dr = _rows.row_gradient(
            torch.where(live[:, None], logits[rows].float(), 0.0),
            y,
            _part(temperature, rows),
            logit_scale,
            softcap,
            *(x[rows] for x in scores),
            *g,
        )
        out[rows] = torch.where(live[:, None], dr, 0.0).to(out.dtype)


# --- custom ops and autograd -------------------------------------------------


@torch.library.custom_op("qlkernels::logprob_entropy", mutates_args=())
def _op(
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
        return _forward(logits, target_ids, row_mask, tau, softcap, logit_scale, impl)


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
        _backward(
            logits, target_ids, row_mask, tau, softcap, logit_scale, (logprobs, entropy, lse),
            grads, impl, out,
        )  # fmt: skip


@torch.library.custom_op(
    "qlkernels::logprob_entropy_bwd", mutates_args=(), schema=f"(Tensor logits, {_SCHEMA}Tensor"
)
def _op_bwd(logits, *args):
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(dlogits, logits, *args)
    return dlogits


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
    if inplace:
        dlogits = logits.detach()
        torch.ops.qlkernels.logprob_entropy_bwd_(dlogits, *arguments)
    else:
        dlogits = torch.ops.qlkernels.logprob_entropy_bwd(logits, *arguments)
    return (dlogits,) + (None,) * 8


_op.register_autograd(_autograd_backward, setup_context=_setup_context)


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


def blockers_of(logits: torch.Tensor) -> dict[str, str | None]:
    """Why each implementation cannot run on ``logits``, or None; the fastest is first."""
    cuda, triton_ = _ext.why_not_cuda(logits), why_not_triton(logits)
    found = {"cuda": cuda, "triton": triton_}
    if not (logits.is_cuda and compute_capability(logits.device.index or 0) == 90):
        found = {"triton": triton_, "cuda": cuda}  # only sm_90 has the kernels that copy in bulk
    return found | {"cpu": _ext.why_not_cpu(logits), "torch": None, "reference": None}


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
    return TokenScores(
        *torch.ops.qlkernels.logprob_entropy(
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
    )


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
