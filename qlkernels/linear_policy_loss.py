"""Policy loss from hidden states: loss, scores and both gradients in one pass over the logits.

A GRPO step needs logprob, entropy, the loss and dL/dX, dL/dW. Where the derivative g_t = dL/dl_t of
a row is known as soon as the row's own score is (every token-level loss; every loss without old
log-probs), the logits of a chunk of rows give all of it while they are there: 6 T H V FLOPs, not 8.

    h_t: an offset known before the GEMM, the target's z, less tau l_old where l_old is given
    E_i = e^((z_i - h) / tau),  S = sum E_i,  Q = sum E_i (z_i - h) / tau
    logprob = (z_y - h) / tau - log S,  H = log S - Q / S,  lse = h / tau + log S
    E_y <- S expm1(logprob),  v = -g s / (tau S)          # du_i = -g (p_i - 1[i = y])
    dX = v * (E W),  dW = E^T (v * X)                     # plain GEMMs over the stored chunk of E

Rows are spent where they matter: prompt rows are not multiplied at all, rows whose derivative must
be zero (masked by AEPO, zero advantage, zero weight) are scored and nothing more, 2 T H V, and rows
that the clip takes out of a chunk skip the gradient GEMMs. A row whose S leaves [2^-100, 2^100],
where the offset was wrong by 69 nats, is computed again in two passes.

Two passes, (2 + 6f) T H V with a fraction f of live rows: a sequence-level ratio with old
log-probs, whose derivative needs the whole sequence; fp16, whose gradients vanish before the loss
scale of the backward reaches them; and on the GPU an entropy bonus and a soft-cap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlkernels import _checks, _ext, _rows
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._online import swizzled_tile
from qlkernels._scores import TokenScores
from qlkernels._target import is_capturing, why_not_triton
from qlkernels._triton import tl, triton
from qlkernels.linear_logprob import autocast_operands, linear_logprob, linear_logprob_ref
from qlkernels.linear_logprob.kernels import (
    FOLD_CONFIG,
    ROWS,
    launch_options,
    load_pair,
    uses_tma,
)
from qlkernels.linear_logprob.passes import (
    CPU_WORKSPACE_BYTES,
    GPU_WORKSPACE_BYTES,
    Options,
    WeightGradient,
    backward,
    forward,
    matmul,
    target_logits,
)
from qlkernels.policy_loss import (
    RULE_OF,
    PolicyLossMetrics,
    PolicyOptions,
    aggregation_weights,
    policy_loss,
)
from qlkernels.policy_loss.arguments import check_cu_seqlens, policy_loss_arguments

OP = "linear_policy_loss"
_CHUNK_TOKENS = 8192  # rows whose E is stored at a time on the GPU: 2.5 GB of bf16 at V = 151936
_COPIED_ROWS = 1 << 16  # scored rows that are gathered at a time
_S_LIMIT = 2.0**100


class LinearPolicyLoss(NamedTuple):
    loss: torch.Tensor  # 0-d, differentiable w.r.t. hidden states, weight and bias
    metrics: PolicyLossMetrics
    scores: TokenScores  # without gradient; rows outside the response hold 0


# --- reference ---------------------------------------------------------------


def linear_policy_loss_ref(
    hidden_states, lm_head_weight, target_ids, old_logprobs, advantages, response_mask, *,
    cu_seqlens=None, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, entropy_coef=0.0,
    **policy_options,
) -> LinearPolicyLoss:  # fmt: skip
    """Ground truth: all logits at once, then the reference policy loss; autograd does the rest."""
    scores = linear_logprob_ref(
        hidden_states, lm_head_weight, target_ids, bias=bias, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, row_mask=response_mask,
    )  # fmt: skip
    result = policy_loss(
        scores.logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens,
        entropy=scores.entropy, entropy_coef=entropy_coef, impl="reference", **policy_options,
    )  # fmt: skip
    return LinearPolicyLoss(*result, scores)


# --- kernels -----------------------------------------------------------------


@triton.jit(do_not_specialize=ROWS)
def _exp_kernel(
    x, w, bias_ptr, temperature_ptr, offset_ptr, exp_ptr, s_ptr, q_ptr,
    stride_xt, stride_wv, stride_et, T, V, H, temperature, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, EVEN_V: tl.constexpr,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Persistent GEMM that stores E = exp((z - h) / tau) and parts of S and Q, ``[tile, T]``."""
    n_t = tl.cdiv(T, BLOCK_T)
    n_v = tl.cdiv(V, BLOCK_V)
    scale = tl.cast(logit_scale, tl.float32)
    for tile in tl.range(tl.program_id(0), n_t * n_v, NUM_PROGRAMS, flatten=USE_TMA):
        pid_t, pid_v = swizzled_tile(tile, n_t, n_v, GROUP_T)
        row, column = pid_t * BLOCK_T, pid_v * BLOCK_V
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, H, BLOCK_H):
            a, b = load_pair(
                x, w, stride_xt, stride_wv, row, column, k, T, V, H,
                USE_TMA, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        offs_t = row + tl.arange(0, BLOCK_T)
        offs_v = column + tl.arange(0, BLOCK_V)
        mask_t = offs_t < T
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        tau = tl.cast(temperature, tl.float32)
        inv_tau = 1.0 / tau + tl.zeros([BLOCK_T], tl.float32)
        if HAS_TEMPERATURE:
            inv_tau = 1.0 / tl.load(temperature_ptr + offs_t, mask=mask_t, other=1.0)
        h = tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0)
        z = acc * scale
        d = (z - h[:, None]) * inv_tau[:, None]
        if HAS_BIAS:  # a logit of -inf has E = 0 and adds 0 to Q; NaN stays NaN
            d = tl.where(z == -float("inf"), -1.0e4, d)
        if not EVEN_V:
            d = tl.where((offs_v < V)[None, :], d, -1.0e4)
        e = tl.exp(d)
        part = pid_v.to(tl.int64) * T + offs_t
        tl.store(s_ptr + part, tl.sum(e, 1), mask=mask_t)
        tl.store(q_ptr + part, tl.sum(d * e, 1), mask=mask_t)
        out = exp_ptr + offs_t.to(tl.int64)[:, None] * stride_et + offs_v[None, :]
        mask = mask_t[:, None] & (offs_v < V)[None, :]
        tl.store(out, e.to(exp_ptr.dtype.element_ty), mask=mask)


def aot_variants():
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    rows = dict(
        bias_ptr="*bf16", temperature_ptr="*fp32", offset_ptr="*fp32", exp_ptr="*bf16",
        s_ptr="*fp32", q_ptr="*fp32", stride_xt="i32", stride_wv="i32", stride_et="i32",
        T="i32", V="i32", H="i32", temperature="fp32", logit_scale="fp32",
    )  # fmt: skip
    aligned = ("stride_xt", "stride_wv", "stride_et", "V", "H", "x", "w", "exp_ptr")
    found = []
    for path, capabilities in (("pointer", [80]), ("tma-sm90", [90]), ("tma-sm100", [100])):
        block_t, block_v, block_h, group_t, warps, stages = _EXP_CONFIG[path, 2]
        constexprs = dict(
            HAS_BIAS=False, HAS_TEMPERATURE=True, EVEN_V=True, USE_TMA=path != "pointer",
            UPCAST=False, PRECISION="tf32", BLOCK_T=block_t, BLOCK_V=block_v, BLOCK_H=block_h,
            GROUP_T=group_t, NUM_PROGRAMS=132,
        )  # fmt: skip
        operand = "*bf16" if path == "pointer" else "tensordesc<bf16[{}, {}]>"
        signature = rows | dict(
            x=operand.format(block_t, block_h), w=operand.format(block_v, block_h)
        )
        options = dict(num_warps=warps, num_stages=stages, capabilities=capabilities)
        found.append((f"linear_exp-{path}", _exp_kernel, signature, constexprs, aligned, options))
    return found


_EXP_CONFIG = FOLD_CONFIG | {("tma-sm90", 2): (256, 128, 64, 16, 8, 3)}

# --- one call ----------------------------------------------------------------


class _Call:
    """Inputs of one call, and the derivative of the policy loss of any subset of its rows."""

    def __init__(self, x, w, target_ids, bias, options: Options, rows: dict, cu_seqlens, policy):
        self.x, self.w, self.target_ids, self.bias = x, w, target_ids, bias
        self.options, self.rows, self.cu_seqlens, self.policy = options, rows, cu_seqlens, policy
        self.known = None  # derivatives of all rows, where no score is needed for them

    @property
    def known_before(self) -> bool:
        """Without old log-probs the ratio is 1, and without a KL term nothing else moves."""
        return self.rows["old_logprobs"] is None and self.policy.kl_coef == 0.0

    @property
    def one_pass(self) -> bool:
        needs_sequence = self.policy.loss_type == "gspo" and not self.known_before
        if self.options.impl != "triton" or needs_sequence:
            return not needs_sequence
        return self.policy.entropy_coef == 0.0 and self.options.softcap is None

    def derivative(self, logprobs, entropy, index=None):
        """dL/dlogprobs and dL/dentropy (or None) of the rows ``index``, or of all of them."""
        if self.known is not None:
            return tuple(g if g is None or index is None else g[index] for g in self.known)
        pick = {k: v if v is None or index is None else v[index] for k, v in self.rows.items()}
        n, device = logprobs.shape[0], logprobs.device
        cu_seqlens = self.cu_seqlens if index is None else torch.arange(2, device=device) * n
        has_bonus = self.policy.entropy_coef != 0.0
        impl = "triton" if self.options.impl == "triton" else "torch"
        weights, packed = pick.pop("weights"), self.policy.packed()
        _, _, g, coef = torch.ops.qlkernels.policy_loss(
            logprobs, *pick.values(), entropy, weights, cu_seqlens, None, *packed, impl
        )
        dlogprobs, dentropy = torch.ops.qlkernels.policy_loss_bwd(
            torch.ones_like(coef[0]), coef, g, pick["response_mask"], pick["keep_mask"],
            weights, cu_seqlens, *packed, has_bonus, impl,
        )  # fmt: skip
        return dlogprobs, dentropy if has_bonus else None

    def may_be_live(self) -> torch.Tensor:
        """``[T]`` bool: False where the derivative is 0 whatever the scores turn out to be."""
        rows, mask = self.rows, self.rows["response_mask"]
        if self.known_before:
            nothing = torch.zeros_like(rows["weights"])
            self.known = g, g_entropy = self.derivative(nothing, nothing)
            return mask & ((g != 0) if g_entropy is None else (g != 0) | (g_entropy != 0))
        live = mask & (rows["weights"] != 0)
        if self.policy.kl_coef == 0.0 and self.policy.entropy_coef == 0.0:
            live = live & (rows["advantages"] != 0)
            if rows["keep_mask"] is not None:
                live = live & rows["keep_mask"]
        return live


def _run(call: _Call, needs) -> tuple:
    """(dx, dw, db, logprobs, entropy, lse): gradients or None, and the scores of every row."""
    x, w = call.x, call.w
    T, device = x.shape[0], x.device
    # a row of dx is written once; dw and db are sums over chunks
    dx = torch.zeros_like(x) if needs[0] else None
    dw = WeightGradient(w) if needs[1] else None
    db = torch.zeros(w.shape[0], dtype=torch.float32, device=device) if needs[2] else None
    grads = (dx, dw, db)
    scores = [torch.zeros(T, dtype=torch.float32, device=device) for _ in range(3)]
    mask = call.rows["response_mask"]
    live = call.may_be_live() if any(needs) else torch.zeros_like(mask)
    # responses first, live ones before the rest: one synchronisation for both counts
    order = torch.argsort((~mask).int() + (~live).int(), stable=True)
    n_live, n_response = torch.stack([live.sum(), mask.sum()]).tolist()

    scored = order[n_live:n_response]
    if call.one_pass and n_live:
        run = _chunk_triton if call.options.impl == "triton" else _chunk_torch
        workspace = GPU_WORKSPACE_BYTES if x.is_cuda else CPU_WORKSPACE_BYTES
        default = max(1, workspace // (4 * w.shape[0]))
        default = _CHUNK_TOKENS if call.options.impl == "triton" else default
        step = call.options.chunk_tokens or default
        operand = w if x.is_cuda or call.options.impl == "triton" else w.float()
        for start in range(0, n_live, step):
            index = order[start : min(n_live, start + step)]
            run(call, operand, index, grads, scores, only=n_live <= step)
    else:
        scored = order[:n_response]
    if scored.numel():
        found = _score(call, scored)
        for whole, part in zip(scores, found, strict=False):
            whole[scored] = part
        if not call.one_pass and n_live:
            g = call.derivative(scores[0], scores[1])
            _two_pass_backward(call, scored, found, g, grads)
    return (dx, None if dw is None else dw.result(), db, *scores)


def _score(call: _Call, index: torch.Tensor):
    """logprobs, entropy, lse and the target's z of some rows, which are gathered in parts."""
    parts = [
        forward(call.x[rows], call.w, call.bias, call.target_ids[rows], call.options.of_rows(rows))
        for rows in index.split(_COPIED_ROWS)
    ]
    return [torch.cat(field) for field in zip(*parts, strict=True)]


def _two_pass_backward(call: _Call, index, found, upstream, grads) -> None:
    """Add the gradients of rows ``index``, whose scores are ``found``; ``upstream`` is ``[T]``."""
    upstream = [None if g is None else g[index] for g in (*upstream, None)]
    live = _rows.live_rows(None, *upstream).nonzero().squeeze(1)
    if not live.numel():
        return
    rows = index[live]
    parts = backward(
        call.x[rows], call.w, call.bias, call.target_ids[rows],
        [s[live] for s in found], [None if g is None else g[live] for g in upstream],
        [g is not None for g in grads], call.options.of_rows(rows),
    )  # fmt: skip
    dx, dw, db = grads
    if dx is not None:
        dx[rows] = parts[0]
    if dw is not None:
        dw.add(parts[1])
    if db is not None:
        db += parts[2]


def _chunk_torch(call: _Call, w, index, grads, scores, *, only: bool) -> None:
    """One chunk on any device: its logits are there once, and give scores and gradients. ``only``:
    there is no other.
    """
    dx, dw, db = grads
    options = call.options.of_rows(index)
    tau, scale, cap = options.row_options
    x, y = call.x[index], call.target_ids[index]
    in_range = (y >= 0) & (y < w.shape[0])
    y = torch.where(in_range, y, 0)
    r = matmul(x, w.t())
    if call.bias is not None:
        r += call.bias.float()
    on_cpu = options.impl == "cpu"
    fold = _ext.logprob_entropy_fwd if on_cpu else None
    found = fold(r, y, None, tau, cap, scale) if on_cpu else _rows.fold_rows(r, y, tau, scale, cap)
    found = (torch.where(in_range, found[0], torch.nan), *found[1:])
    for whole, part in zip(scores, found, strict=True):
        whole[index] = part
    g, g_entropy = call.derivative(found[0], found[1], index)
    if on_cpu:
        dr = r
        _ext.logprob_entropy_bwd(r, y, None, tau, cap, scale, *found[1:], g, g_entropy, None, dr)
    else:
        dr = _rows.row_gradient(r, y, tau, scale, cap, *found, g, g_entropy, None)
    live = _rows.live_rows(None, g, g_entropy)
    dr = torch.where(live[:, None], dr, 0.0)
    if x.is_cuda:
        dr = dr.to(x.dtype)
    if dx is not None:
        dx[index] = matmul(dr, w).to(dx.dtype)
    if dw is not None:
        dw.add_product(dr.t(), torch.where(live[:, None], x, 0.0), only=only)
    if db is not None:
        db += dr.sum(dim=0, dtype=torch.float32)


def _chunk_triton(call: _Call, w, index, grads, scores, *, only: bool) -> None:
    """One chunk on the GPU: E is stored, everything else is a GEMM over it or ``[T]``-sized.
    ``only``: there is no other.
    """
    dx, dw, db = grads
    options = call.options.of_rows(index)
    tau, scale, _ = options.row_options
    x, y = call.x[index], call.target_ids[index]
    (n, H), V = x.shape, w.shape[0]
    taus = tau if isinstance(tau, torch.Tensor) else None
    z_y = torch.empty(n, dtype=torch.float32, device=x.device)
    target_logits(x, w, call.bias, y, z_y, scale, None)
    h = z_y
    if call.rows["old_logprobs"] is not None:
        h = z_y - tau * call.rows["old_logprobs"][index]
    operands, launch = launch_options(_EXP_CONFIG, x, w, uses_tma(x, w))
    exp = torch.empty(n, V, dtype=x.dtype, device=x.device)
    n_parts = -(-V // launch["BLOCK_V"])
    parts = torch.empty(2, n_parts, n, dtype=torch.float32, device=x.device)
    _exp_kernel[(launch["NUM_PROGRAMS"],)](
        *operands, call.bias, taus, h, exp, *parts, x.stride(0), w.stride(0), exp.stride(0),
        n, V, H, 1.0 if taus is not None else tau, scale, HAS_BIAS=call.bias is not None,
        HAS_TEMPERATURE=taus is not None, EVEN_V=V % launch["BLOCK_V"] == 0, **launch,
    )  # fmt: skip
    S, Q = parts.sum(dim=1)
    log_s = S.log()
    in_range = (y >= 0) & (y < V)
    logprobs = ((z_y - h) / tau - log_s).clamp(max=0.0)
    found = (torch.where(in_range, logprobs, torch.nan), log_s - Q / S, h / tau + log_s)
    good = (S >= 1.0 / _S_LIMIT) & (S <= _S_LIMIT)
    g, _ = call.derivative(*found[:2], index)
    # live rows to the GEMMs, rows with a wrong offset to two passes; NaN from the model stays live
    live = (g != 0) & (good | S.isnan())
    again = ~(good | S.isnan())
    order = torch.argsort((~live).int() + again.int(), stable=True)
    n_live, n_again = torch.stack([live.sum(), again.sum()]).tolist()
    for whole, part in zip(scores, found, strict=True):
        whole[index] = part
    if n_live:
        rows = order[:n_live]
        if n_live < n:
            for start in range(0, n_live, 256):  # rows ascend: nothing unread is overwritten
                block = rows[start : start + 256]
                exp[start : start + block.shape[0]] = exp[block]
            exp, x, y, S = exp[:n_live], x[rows], y[rows], S[rows]
            g, logprobs = g[rows], logprobs[rows]
            tau = tau[rows] if taus is not None else tau
        exp.scatter_(1, y.clamp(0, V - 1)[:, None], (S * logprobs.expm1())[:, None].to(exp.dtype))
        v = -g * scale / (tau * S)
        if dx is not None:
            dx[index[rows]] = matmul(exp, w).mul_(v[:, None]).to(dx.dtype)
        if dw is not None:
            scaled = (v[:, None] * x).to(x.dtype)
            dw.add_product(exp.t(), scaled, only=only and n_again == 0)
        if db is not None:
            db += matmul(exp.t(), v[:, None].to(exp.dtype)).squeeze(1)
    if n_again:
        rows = index[order[n - n_again :]]
        found = _score(call, rows)
        for whole, part in zip(scores, found, strict=False):
            whole[rows] = part
        g, _ = call.derivative(*found[:2], rows)
        upstream = torch.zeros_like(scores[0])
        upstream[rows] = g
        _two_pass_backward(call, rows, found, (upstream, None), grads)


# --- custom ops and autograd -------------------------------------------------

_ROWS = (
    "old_logprobs", "advantages", "response_mask", "keep_mask", "ref_logprobs",
    "rollout_is_weights",
)  # fmt: skip


@torch.library.custom_op("qlkernels::linear_policy_loss", mutates_args=())
def _op(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    bias: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    keep_mask: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    rollout_is_weights: torch.Tensor | None,
    weights: torch.Tensor,
    cu_seqlens: torch.Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int | None,
    numbers: list[float],
    flags: list[bool],
    words: str,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the loss, empty where not needed, and scores."""
    check_cu_seqlens(cu_seqlens, hidden_states.shape[0])
    tau = temperature if temperatures is None else temperatures
    rows = dict(
        zip(
            _ROWS,
            (old_logprobs, advantages, response_mask, keep_mask, ref_logprobs, rollout_is_weights),
            strict=True,
        )
    )
    options = Options(tau, logit_scale, softcap, chunk_tokens, True, impl)
    rows["weights"] = weights
    policy = PolicyOptions.unpacked(numbers, flags, words)
    call = _Call(hidden_states, lm_head_weight, target_ids, bias, options, rows, cu_seqlens, policy)
    with (
        op_range(OP, hidden_states),
        torch.autocast(hidden_states.device.type, enabled=False),
    ):
        dx, dw, db, *scores = _run(call, (needs_dx, needs_dw, needs_db))
    like = (hidden_states, lm_head_weight, bias)
    grads = (
        hidden_states.new_empty(0) if g is None else g.to(x.dtype)
        for g, x in zip((dx, dw, db), like, strict=True)
    )
    return (*grads, *scores)


@_op.register_fake
def _(hidden_states, lm_head_weight, target_ids, bias, *args):
    def like(x, needed):
        nothing = hidden_states.new_empty(0)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else nothing

    needs = args[-4:-1]
    grads = [like(x, n) for x, n in zip((hidden_states, lm_head_weight, bias), needs, strict=True)]
    T = hidden_states.shape[0]
    return (*grads, *(hidden_states.new_empty(T, dtype=torch.float32) for _ in range(3)))


@torch.library.custom_op("qlkernels::attach_gradients", mutates_args=())
def _attach(
    value: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    grads: list[torch.Tensor],
) -> torch.Tensor:
    """``value``, whose gradients with respect to the three operands are ``grads``."""
    return value.clone()


@_attach.register_fake
def _(value, *_args):
    return torch.empty_like(value)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[4])


def _attached_backward(ctx, dloss):
    if torch.is_grad_enabled() and dloss.requires_grad:
        raise RuntimeError(f"{OP}: double backward is not supported; use impl='reference' for it")
    # a multiplication on the device: whether the upstream scalar is 1 is never asked
    needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    grads = zip(ctx.saved_tensors, needs, strict=True)
    return (None, *((g * dloss.to(g.dtype)) if n else None for g, n in grads), [None] * 3)


_attach.register_autograd(_attached_backward, setup_context=_setup_context)

# --- public ------------------------------------------------------------------


def linear_policy_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep_mask: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    loss_type: str = "grpo",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    aggregation: str | torch.Tensor | None = None,
    denominator: str = "all",
    chunk_tokens: int | None = None,
    validate: bool = False,
    impl: str = "auto",
    **counts,
) -> LinearPolicyLoss:
    """Policy loss of packed tokens from hidden states, with scores and both gradients in one pass.

    Equal to ``policy_loss(linear_logprob(...).logprobs, ...)``. The gradients are computed in the
    forward (not under ``torch.no_grad``) and multiplied by the upstream scalar in the backward.

    Args:
        hidden_states: ``[T, H]`` bf16, fp16 or fp32, last dim contiguous.
        lm_head_weight: ``[V, H]``, same dtype. A frozen one (LoRA) skips its gradient.
        target_ids: ``[T]`` int64, already shifted; read in response rows only.
        old_logprobs: ``[T]`` or None, which means the current policy: ratio 1. Also the offset of
            the exponentials: the closer it is, the better, and 69 nats off is still exact.
        advantages: ``[B]`` or ``[T]``.
        response_mask: ``[T]`` bool. Rows outside it are not multiplied and may hold anything.
        cu_seqlens: ``[B + 1]`` int32 or int64.
        bias, temperature, logit_scale, softcap: as in ``linear_logprob``.
        keep_mask, ref_logprobs, rollout_is_weights, loss_type, eps_low, eps_high, dual_clip,
            ratio_cap, kl_coef, kl_estimator, kl_importance, entropy_coef, aggregation, denominator,
            counts (``group_ids``, ``num_tokens``, ``num_sequences``, ``num_groups``,
            ``max_completion_tokens``): as in ``policy_loss``.
        chunk_tokens: rows whose exponentials (2 bytes a logit) or, on the CPU, logits (4 bytes) are
            stored at a time. Default 8192 on the GPU, 64 MB on the CPU.
        validate: check the targets on the GPU too (synchronises).
        impl: ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an explicit
            choice never falls back.

    Returns:
        ``LinearPolicyLoss``: the loss, its metrics and the ``TokenScores`` of the response rows,
        fp32. Reads a few counts from the device: which rows are live, once a call and once a chunk.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    sizes: dict[str, int] = {}
    _checks.check_unsharded(OP, "lm_head_weight", lm_head_weight)
    x, w, bias = autocast_operands(hidden_states, lm_head_weight, bias)
    y = target_ids
    if is_capturing():
        raise RuntimeError(f"{OP}: it counts live rows, which a CUDA graph capture does not allow")
    _checks.check_head(OP, x, w, y, bias, temperature, response_mask, sizes, impl)
    _checks.check_scalars(OP, temperature, softcap, logit_scale)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if validate or x.device.type == "cpu":
        _checks.check_targets(OP, y, response_mask, w.shape[0])
    blockers = {
        "triton": why_not_triton(x),
        "cpu": _ext.why_not_cpu(x),
        "torch": None,
        "reference": None,
    }
    chosen = pick_impl(OP, impl, blockers)
    policy = dict(
        loss_type=loss_type, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip,
        ratio_cap=ratio_cap, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_importance=kl_importance, entropy_coef=entropy_coef,
    )  # fmt: skip
    rows = dict(
        keep_mask=keep_mask, ref_logprobs=ref_logprobs, rollout_is_weights=rollout_is_weights
    )
    shared = policy | rows | dict(aggregation=aggregation, denominator=denominator, **counts)
    head = dict(bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if chosen == "reference":
        return linear_policy_loss_ref(
            x, w, y, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, **head,
            **shared,
        )  # fmt: skip

    # every remaining argument is checked here, by the op that defines it, before the GEMMs
    nothing = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    policy_loss_arguments(
        nothing, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, entropy=nothing,
        **shared,
    )  # fmt: skip

    if isinstance(aggregation, torch.Tensor):
        weights = aggregation
    else:
        weights = aggregation_weights(
            response_mask, cu_seqlens, aggregation or RULE_OF[loss_type], keep_mask=keep_mask,
            denominator=denominator, **counts,
        )  # fmt: skip
    T, B = x.shape[0], cu_seqlens.shape[0] - 1
    tokens = torch.arange(T, device=x.device)
    seq_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    mask = response_mask & (seq_ids < B)  # rows past the last sequence are padding
    if advantages.shape == (B,):
        spread = torch.cat([advantages, advantages.new_zeros(1)])
        advantages = spread[seq_ids]

    def packed(v):  # rows outside the mask may hold NaN: select before anything reads them
        return None if v is None else torch.where(mask, v.detach().float(), 0.0)

    grads_on = torch.is_grad_enabled()
    operands = (x, w, bias)
    needs = [grads_on and v is not None and v.requires_grad for v in operands]
    if x.dtype == torch.float16 and any(needs):
        # its gradients need the loss scale, which only the backward knows
        scores = linear_logprob(
            x, w, y, row_mask=mask, chunk_tokens=chunk_tokens, impl=chosen, **head
        )
        result = policy_loss(
            scores.logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens,
            entropy=scores.entropy, impl="triton" if chosen == "triton" else "torch", **shared,
        )  # fmt: skip
        return LinearPolicyLoss(*result, TokenScores(*(v.detach() for v in scores)))
    is_tensor = isinstance(temperature, torch.Tensor)
    *grads, logprobs, entropy, lse = torch.ops.qlkernels.linear_policy_loss(
        x.detach(),
        w.detach(),
        torch.where(mask, y, 0),
        None if bias is None else bias.detach().contiguous(),
        temperature.float().contiguous() if is_tensor else None,
        packed(old_logprobs),
        packed(advantages),
        mask,
        None if keep_mask is None else keep_mask.contiguous(),
        packed(ref_logprobs),
        packed(rollout_is_weights),
        packed(weights),
        cu_seqlens.contiguous(),
        1.0 if is_tensor else float(temperature),
        float(logit_scale),
        softcap,
        chunk_tokens,
        *PolicyOptions.of(**policy, rule="weights", kept_only=denominator == "kept").packed(),
        *needs,
        chosen,
    )
    result = policy_loss(
        logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, entropy=entropy,
        impl="triton" if chosen == "triton" else "torch", **shared,
    )  # fmt: skip
    loss = result.loss
    if any(needs):
        loss = torch.ops.qlkernels.attach_gradients(loss.detach(), x, w, bias, grads)
    return LinearPolicyLoss(loss, result.metrics, TokenScores(logprobs, entropy, lse))
