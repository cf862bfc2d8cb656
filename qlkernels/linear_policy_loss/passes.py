"""One call: which rows are scored, which of them get a gradient, and how."""

from __future__ import annotations

import torch

from qlkernels import _ext, _rows
from qlkernels.linear_logprob.kernels import launch_options, uses_tma
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
from qlkernels.linear_policy_loss.kernels import EXP_CONFIG, exp_kernel

_CHUNK_TOKENS = 8192  # rows whose E is stored at a time on the GPU: 2.5 GB of bf16 at V = 151936
_COPIED_ROWS = 1 << 16  # scored rows that are gathered at a time
_S_LIMIT = 2.0**100


class Call:
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


def scores_and_gradients(call: Call, needs) -> tuple:
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


def _score(call: Call, index: torch.Tensor):
    """logprobs, entropy, lse and the target's z of some rows, which are gathered in parts."""
    parts = [
        forward(call.x[rows], call.w, call.bias, call.target_ids[rows], call.options.of_rows(rows))
        for rows in index.split(_COPIED_ROWS)
    ]
    return [torch.cat(field) for field in zip(*parts, strict=True)]


def _two_pass_backward(call: Call, index, found, upstream, grads) -> None:
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


def _chunk_torch(call: Call, w, index, grads, scores, *, only: bool) -> None:
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


def _chunk_triton(call: Call, w, index, grads, scores, *, only: bool) -> None:
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
    operands, launch = launch_options(EXP_CONFIG, x, w, uses_tma(x, w))
    exp = torch.empty(n, V, dtype=x.dtype, device=x.device)
    n_parts = -(-V // launch["BLOCK_V"])
    parts = torch.empty(2, n_parts, n, dtype=torch.float32, device=x.device)
    exp_kernel[(launch["NUM_PROGRAMS"],)](
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
