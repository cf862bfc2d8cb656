"""Token scores from hidden states: the logits ``[T, V]`` are never stored.

    r = X W^T + b,  z = s r  or  c tanh(s r / c),  u = z / tau
    logprob, H, lse as in logprob_entropy; tiles merge by
    m = max m_i,  S = sum e^(m_i - m) S_i,  Q = sum e^(m_i - m) (Q_i + (m_i - m) S_i)       # fixed
    order dX = dR W,  dW = dR^T X,  db = sum_t dR_t,  dR as in logprob_entropy

FLOPs: 2 T H V forward; the backward computes the logits again, 6 T' H V, where T' counts the rows
    whose upstream
gradient is not exactly zero (4 T' H V where only one of dX and dW is asked for).

The Triton path runs a GEMM whose epilogue folds the tile that is still in registers into (m, S, Q),
12 bytes a row and tile. Its backward walks blocks of the vocabulary: the same GEMM writes dR of one
block in the inputs' dtype, two library GEMMs turn it into a slice of dW, written once, and a
contribution to dX, accumulated in fp32.
"""

from __future__ import annotations

import torch

from qlkernels import _checks, _ext, _rows
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._online import scale_and_cap, shifted, swizzled_tile
from qlkernels._scores import TokenScores
from qlkernels._target import (
    compute_capability,
    is_capturing,
    is_interpreting,
    multiprocessor_count,
    why_not_triton,
)
from qlkernels._triton import tl, triton

OP = "linear_logprob"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Temporaries at a time where chunk_tokens is not given: a [chunk_tokens, V] block of 2-byte values
# on the GPU, of 4-byte values on the CPU.
_GPU_WORKSPACE_BYTES = 512 << 20
_CPU_WORKSPACE_BYTES = 64 << 20

# --- reference ---------------------------------------------------------------


def linear_logprob_ref(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_mask: torch.Tensor | None = None,
) -> TokenScores:
    """Ground truth: eager, differentiable, any device, all logits at once. fp64 stays fp64, the
    rest is fp32.
    """
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    x, w = hidden_states.to(dtype), lm_head_weight.to(dtype)
    if row_mask is not None:
        x = torch.where(row_mask[:, None], x, 0.0)
        target_ids = torch.where(row_mask, target_ids, 0)
    z = x @ w.t()  # [T, V]
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = temperature[:, None].to(dtype) if isinstance(temperature, torch.Tensor) else temperature
    logp = (z / tau).log_softmax(dim=1)
    logprobs = logp.gather(1, target_ids[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(dim=1)
    lse = (z / tau).logsumexp(dim=1)
    if row_mask is None:
        return TokenScores(logprobs, entropy, lse)
    return TokenScores(*(torch.where(row_mask, v, 0.0) for v in (logprobs, entropy, lse)))


# --- kernels -----------------------------------------------------------------


@triton.jit
def _load_pair(
    x, w, stride_xt, stride_wv, row, column, k, T, V, H,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Tiles ``[BLOCK_T, BLOCK_H]`` of x and ``[BLOCK_V, BLOCK_H]`` of w; zero outside."""
    if USE_TMA:
        a = x.load([row, k])
        b = w.load([column, k])
    else:
        offs_t = row + tl.arange(0, BLOCK_T)
        offs_v = column + tl.arange(0, BLOCK_V)
        offs_h = k + tl.arange(0, BLOCK_H)
        in_h = (offs_h < H)[None, :]
        a_ptr = x + offs_t.to(tl.int64)[:, None] * stride_xt + offs_h[None, :]
        b_ptr = w + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
        a = tl.load(a_ptr, mask=(offs_t < T)[:, None] & in_h, other=0.0)
        b = tl.load(b_ptr, mask=(offs_v < V)[:, None] & in_h, other=0.0)
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return a, b


@triton.jit
def _linear_fold_kernel(
    x, w, bias_ptr, temperature_ptr, m_ptr, s_ptr, q_ptr,
    stride_xt, stride_wv, T, V, H, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr, USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Persistent GEMM; each tile of logits becomes (m, S, Q) of its rows, stored ``[tile, T]``."""
    n_t = tl.cdiv(T, BLOCK_T)
    n_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), n_t * n_v, NUM_PROGRAMS, flatten=USE_TMA):
        pid_t, pid_v = swizzled_tile(tile, n_t, n_v, GROUP_T)
        row, column = pid_t * BLOCK_T, pid_v * BLOCK_V
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, H, BLOCK_H):
            a, b = _load_pair(
                x, w, stride_xt, stride_wv, row, column, k, T, V, H,
                USE_TMA, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        offs_t = row + tl.arange(0, BLOCK_T)
        offs_v = column + tl.arange(0, BLOCK_V)
        mask_t = offs_t < T
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        z = scale_and_cap(
            acc, tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32), HAS_SOFTCAP
        )
        if not EVEN_V:
            z = tl.where((offs_v < V)[None, :], z, -float("inf"))
        tau = tl.cast(temperature, tl.float32)
        inv_tau = 1.0 / tau + tl.zeros([BLOCK_T], tl.float32)
        if HAS_TEMPERATURE:
            inv_tau = 1.0 / tl.load(temperature_ptr + offs_t, mask=mask_t, other=1.0)
        m = tl.maximum(tl.max(z, 1), -1.0e30)  # finite where the tile is all -inf
        d = shifted(z, m[:, None], inv_tau[:, None])
        e = tl.exp(d)
        part = pid_v.to(tl.int64) * T + offs_t
        tl.store(m_ptr + part, m, mask=mask_t)
        tl.store(s_ptr + part, tl.sum(e, 1), mask=mask_t)
        tl.store(q_ptr + part, tl.sum(d * e, 1), mask=mask_t)


@triton.jit
def _target_logit_kernel(
    x, w, bias_ptr, target_ptr, target_z_ptr, stride_xt, stride_wv, T, V, H, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z of each row's target: the diagonal of x times the gathered rows of w.

    A product of the same instructions and the same order along H as the fold's, so that both have
    the same bits and a certain token cannot get a positive log-probability. Costs T * BLOCK_T * H
    of T * V * H.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    y = tl.load(target_ptr + offs_t, mask=mask_t, other=-1)
    in_range = (y >= 0) & (y < V)
    acc = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for k in range(0, H, BLOCK_H):
        offs_h = k + tl.arange(0, BLOCK_H)
        in_h = (offs_h < H)[None, :]
        a_ptr = x + offs_t.to(tl.int64)[:, None] * stride_xt + offs_h[None, :]
        b_ptr = w + y[:, None] * stride_wv + offs_h[None, :]
        a = tl.load(a_ptr, mask=mask_t[:, None] & in_h, other=0.0)
        b = tl.load(b_ptr, mask=in_range[:, None] & in_h, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    rows = tl.arange(0, BLOCK_T)
    r = tl.sum(tl.where(rows[:, None] == rows[None, :], acc, 0.0), 1)
    if HAS_BIAS:
        r += tl.load(bias_ptr + y, mask=in_range, other=0.0).to(tl.float32)
    z = scale_and_cap(
        r, tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32), HAS_SOFTCAP
    )
    tl.store(target_z_ptr + offs_t, z, mask=mask_t)


@triton.jit
def _linear_merge_kernel(
    m_ptr, s_ptr, q_ptr, target_ptr, temperature_ptr, target_z_ptr,
    logprobs_ptr, entropy_ptr, lse_ptr, T, V, N, temperature,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge N parts of each row in a fixed order, BLOCK_N at a time."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    tau = tl.cast(temperature, tl.float32)
    inv_tau = 1.0 / tau + tl.zeros([BLOCK_T], tl.float32)
    if HAS_TEMPERATURE:
        inv_tau = 1.0 / tl.load(temperature_ptr + offs_t, mask=mask_t, other=1.0)
    m = tl.full([BLOCK_T], -1.0e30, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    q = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[:, None] & mask_t[None, :]
        part = offs_n.to(tl.int64)[:, None] * T + offs_t[None, :]
        m_i = tl.load(m_ptr + part, mask=mask, other=-1.0e30)
        s_i = tl.load(s_ptr + part, mask=mask, other=0.0)
        q_i = tl.load(q_ptr + part, mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(m_i, 0))
        move = (m - m_new) * inv_tau
        move_i = (m_i - m_new[None, :]) * inv_tau[None, :]
        scale, scale_i = tl.exp(move), tl.exp(move_i)
        q = (q + move * s) * scale + tl.sum((q_i + move_i * s_i) * scale_i, 0)
        s = s * scale + tl.sum(s_i * scale_i, 0)
        m = m_new
    log_s = tl.log(s)
    y = tl.load(target_ptr + offs_t, mask=mask_t, other=-1)
    in_range = (y >= 0) & (y < V) & mask_t
    z_y = tl.load(target_z_ptr + offs_t, mask=in_range, other=0.0)
    logprobs = (z_y - m) * inv_tau - log_s
    logprobs = tl.where(logprobs > 0.0, 0.0, logprobs)  # not minimum(): NaN must stay
    tl.store(logprobs_ptr + offs_t, tl.where(in_range, logprobs, float("nan")), mask=mask_t)
    tl.store(entropy_ptr + offs_t, log_s - q / s, mask=mask_t)
    tl.store(lse_ptr + offs_t, m * inv_tau + log_s, mask=mask_t)


@triton.jit
def _linear_dlogits_kernel(
    x, w, bias_ptr, target_ptr, temperature_ptr, target_z_ptr, logprobs_ptr, entropy_ptr, lse_ptr,
    dlogprobs_ptr, dentropy_ptr, dlse_ptr, dlogits_ptr,
    stride_xt, stride_wv, stride_dt, T, V, H, first_v, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DLOGPROBS: tl.constexpr, HAS_DENTROPY: tl.constexpr, HAS_DLSE: tl.constexpr,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dR of V columns of the vocabulary, from column ``first_v`` on: ``w`` and the bias are already
    that slice.
    """
    n_t = tl.cdiv(T, BLOCK_T)
    n_v = tl.cdiv(V, BLOCK_V)
    scale = tl.cast(logit_scale, tl.float32)
    cap = tl.cast(softcap, tl.float32)
    for tile in tl.range(tl.program_id(0), n_t * n_v, NUM_PROGRAMS, flatten=USE_TMA):
        pid_t, pid_v = swizzled_tile(tile, n_t, n_v, GROUP_T)
        row, column = pid_t * BLOCK_T, pid_v * BLOCK_V
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, H, BLOCK_H):
            a, b = _load_pair(
                x, w, stride_xt, stride_wv, row, column, k, T, V, H,
                USE_TMA, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        offs_t = row + tl.arange(0, BLOCK_T)
        offs_v = column + tl.arange(0, BLOCK_V)
        mask_t = offs_t < T
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        z = scale_and_cap(acc, scale, cap, HAS_SOFTCAP)
        tau = tl.cast(temperature, tl.float32)
        inv_tau = 1.0 / tau + tl.zeros([BLOCK_T], tl.float32)
        if HAS_TEMPERATURE:
            inv_tau = 1.0 / tl.load(temperature_ptr + offs_t, mask=mask_t, other=1.0)
        g_l = tl.zeros([BLOCK_T], tl.float32)
        g_h = tl.zeros([BLOCK_T], tl.float32)
        g_lse = tl.zeros([BLOCK_T], tl.float32)
        if HAS_DLOGPROBS:
            g_l = tl.load(dlogprobs_ptr + offs_t, mask=mask_t, other=0.0)
        if HAS_DENTROPY:
            g_h = tl.load(dentropy_ptr + offs_t, mask=mask_t, other=0.0)
        if HAS_DLSE:
            g_lse = tl.load(dlse_ptr + offs_t, mask=mask_t, other=0.0)
        logprob = tl.load(logprobs_ptr + offs_t, mask=mask_t, other=0.0)
        entropy = tl.load(entropy_ptr + offs_t, mask=mask_t, other=0.0)
        z_y = tl.load(target_z_ptr + offs_t, mask=mask_t, other=0.0)
        # log p_i = (z_i - z_y) / tau + logprob; a target of probability 0 cannot be the anchor
        reachable = z_y > -float("inf")
        lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
        anchor_z = tl.where(reachable, z_y, 0.0)
        anchor_l = tl.where(reachable, logprob, -lse)
        # 1 - p_y without cancellation where p_y is near 1
        near = -logprob * (1.0 + logprob * (0.5 + logprob * (1.0 / 6.0)))
        not_y = tl.where(logprob > -1.0e-2, near, 1.0 - tl.exp(logprob))
        at_y = tl.exp(logprob) * (g_lse - g_h * (tl.where(reachable, logprob, 0.0) + entropy))
        at_y += g_l * not_y
        # a row with zero upstream is selected to 0: its scores may be NaN
        dead = (g_l == 0.0) & (g_h == 0.0) & (g_lse == 0.0)

        logp = shifted(z, anchor_z[:, None], inv_tau[:, None]) + anchor_l[:, None]
        du = tl.exp(logp) * ((g_lse - g_l)[:, None] - g_h[:, None] * (logp + entropy[:, None]))
        local = tl.load(target_ptr + offs_t, mask=mask_t, other=-1) - first_v - column
        is_y = local[:, None] == tl.arange(0, BLOCK_V)[None, :]
        du = tl.where(is_y, at_y[:, None], du)
        dr = du * (inv_tau * scale)[:, None]
        if HAS_SOFTCAP:
            dr = dr * (1.0 - (z / cap) * (z / cap))
        dr = tl.where(dead[:, None], 0.0, dr)
        out = dlogits_ptr + offs_t.to(tl.int64)[:, None] * stride_dt + offs_v[None, :]
        mask = mask_t[:, None] & (offs_v < V)[None, :]
        tl.store(out, dr.to(dlogits_ptr.dtype.element_ty), mask=mask)


# (BLOCK_T, BLOCK_V, BLOCK_H, GROUP_T, num_warps, num_stages) by (path, bytes of an element)
_FOLD_CONFIG = {
    ("tma", 2): (256, 128, 64, 8, 8, 4),
    ("tma", 4): (128, 128, 32, 8, 8, 3),
    ("pointer", 2): (128, 128, 32, 8, 8, 4),
    ("pointer", 4): (64, 64, 32, 8, 4, 3),
    ("interpreter", 2): (16, 32, 16, 2, 1, 1),
    ("interpreter", 4): (16, 32, 16, 2, 1, 1),
}
_DLOGITS_CONFIG = _FOLD_CONFIG | {("tma", 2): (128, 128, 64, 8, 8, 4)}
_TARGET_CONFIG = {2: (64, 64, 4, 4), 4: (64, 32, 4, 3)}  # BLOCK_T, BLOCK_H, num_warps, num_stages
_MERGE_CONFIG = (32, 32)  # BLOCK_T, BLOCK_N


def _uses_tma(*tensors: torch.Tensor) -> bool:
    """The copy engine wants sm_90 and rows that start on 16 bytes."""
    if is_interpreting() or compute_capability(tensors[0].device.index or 0) < 90:
        return False
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # ignored for 16-bit operands


def _launch_options(table: dict, x: torch.Tensor, w: torch.Tensor, use_tma: bool):
    """Operands, tile sizes and compiler options of a GEMM kernel."""
    path = "interpreter" if is_interpreting() else "tma" if use_tma else "pointer"
    block_t, block_v, block_h, group_t, warps, stages = table[path, x.element_size()]
    operands = (x, w)
    if use_tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = ([block_t, block_h], [block_v, block_h])
        operands = tuple(
            TensorDescriptor(t, list(t.shape), [t.stride(0), 1], b)
            for t, b in zip(operands, blocks, strict=True)
        )
    options = dict(
        USE_TMA=use_tma,
        UPCAST=is_interpreting(),
        PRECISION=_precision(x),
        BLOCK_T=block_t,
        BLOCK_V=block_v,
        BLOCK_H=block_h,
        GROUP_T=group_t,
        NUM_PROGRAMS=multiprocessor_count(x.device.index or 0),
        num_warps=warps,
        num_stages=stages,
    )
    return operands, options


def aot_variants():
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    rows = dict(
        bias_ptr="*bf16", target_ptr="*i64", temperature_ptr="*fp32", m_ptr="*fp32",
        s_ptr="*fp32", q_ptr="*fp32", target_z_ptr="*fp32", logprobs_ptr="*fp32",
        entropy_ptr="*fp32", lse_ptr="*fp32", dlogprobs_ptr="*fp32", dentropy_ptr="*fp32",
        dlse_ptr="*fp32", dlogits_ptr="*bf16", stride_xt="i32", stride_wv="i32", stride_dt="i32",
        T="i32", V="i32", H="i32", N="i32", first_v="i32",
        temperature="fp32", logit_scale="fp32", softcap="fp32",
    )  # fmt: skip
    aligned = ("stride_xt", "stride_wv", "stride_dt", "V", "H", "x", "w", "dlogits_ptr")
    flags = dict(HAS_BIAS=False, HAS_TEMPERATURE=True, HAS_SOFTCAP=False)
    mma = dict(UPCAST=False, PRECISION="tf32")
    found = []
    for path, capabilities in (("pointer", [80]), ("tma", [90, 100])):
        fold = flags | dict(EVEN_V=True)
        grads = flags | dict(HAS_DLOGPROBS=True, HAS_DENTROPY=True, HAS_DLSE=False)
        for name, kernel, table, constexprs in (
            ("linear_fold", _linear_fold_kernel, _FOLD_CONFIG, fold),
            ("linear_dlogits", _linear_dlogits_kernel, _DLOGITS_CONFIG, grads),
        ):
            block_t, block_v, block_h, group_t, warps, stages = table[path, 2]
            constexprs = constexprs | mma | dict(
                USE_TMA=path == "tma", BLOCK_T=block_t, BLOCK_V=block_v, BLOCK_H=block_h,
                GROUP_T=group_t, NUM_PROGRAMS=132,
            )  # fmt: skip
            operand = "*bf16" if path == "pointer" else "tensordesc<bf16[{}, {}]>"
            signature = rows | dict(
                x=operand.format(block_t, block_h), w=operand.format(block_v, block_h)
            )
            options = dict(num_warps=warps, num_stages=stages, capabilities=capabilities)
            found.append((f"{name}-{path}", kernel, signature, constexprs, aligned, options))
    signature = rows | dict(x="*bf16", w="*bf16")
    block_t, block_h, warps, stages = _TARGET_CONFIG[2]
    target = mma | dict(HAS_BIAS=False, HAS_SOFTCAP=False, BLOCK_T=block_t, BLOCK_H=block_h)
    options = dict(num_warps=warps, num_stages=stages)
    found.append(("target_logit", _target_logit_kernel, signature, target, aligned, options))
    merge = dict(HAS_TEMPERATURE=True, BLOCK_T=_MERGE_CONFIG[0], BLOCK_N=_MERGE_CONFIG[1])
    found.append(("linear_merge", _linear_merge_kernel, rows, merge, ("T",), dict(num_warps=4)))
    return found


# --- forward and backward of each implementation -----------------------------


class _Options:
    """What both passes of one call share. ``temperature`` is a float or fp32 ``[T]``."""

    def __init__(self, temperature, logit_scale, softcap, chunk_tokens, compact, impl):
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.chunk_tokens = chunk_tokens
        self.compact = compact
        self.impl = impl

    @property
    def row_options(self):
        return self.temperature, self.logit_scale, self.softcap

    def of_rows(self, rows):
        """The same for a subset of the rows."""
        part = self.temperature
        part = part[rows] if isinstance(part, torch.Tensor) else part
        return _Options(
            part, self.logit_scale, self.softcap, self.chunk_tokens, self.compact, self.impl
        )


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in fp32: 16-bit operands are accumulated and returned in fp32, never rounded to 16
    bits.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` with an fp32 ``total``."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _row_chunks(T: int, V: int, chunk_tokens: int | None) -> list[slice]:
    rows = chunk_tokens or max(1, _CPU_WORKSPACE_BYTES // (4 * V))
    return [slice(start, min(T, start + rows)) for start in range(0, T, rows)]


def _forward(x, w, bias, target_ids, options):
    """logprobs, entropy, lse and the target's z, each fp32 ``[T]``; no masks here."""
    T, V = x.shape[0], w.shape[0]
    out = tuple(torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(4))
    if T == 0:
        return out
    if options.impl == "triton":
        _forward_triton(x, w, bias, target_ids, options, out)
        return out
    w = w if x.is_cuda else w.float()  # once, not once a chunk
    in_range = (target_ids >= 0) & (target_ids < V)
    y = torch.where(in_range, target_ids, 0)
    for rows in _row_chunks(T, V, options.chunk_tokens):
        r = _matmul(x[rows], w.t())
        if bias is not None:
            r += bias.float()
        tau, scale, cap = options.of_rows(rows).row_options
        if options.impl == "cpu":
            scores = _ext.logprob_entropy_fwd(r, y[rows], None, tau, cap, scale)
        else:
            scores = _rows.fold_rows(r, y[rows], tau, scale, cap)
        z_y = _rows.scale_and_cap(r.gather(1, y[rows, None]).squeeze(1), scale, cap)
        for whole, part in zip(out, (*scores, z_y), strict=True):
            whole[rows] = part
    out[0][:] = torch.where(in_range, out[0], torch.nan)
    return out


def _forward_triton(x, w, bias, target_ids, options, out):
    T, H = x.shape
    V = w.shape[0]
    tau, scale, cap = options.row_options
    use_tma = _uses_tma(x, w)
    flags = dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=cap is not None)
    per_row = dict(HAS_TEMPERATURE=isinstance(tau, torch.Tensor))
    block_t, block_h, warps, stages = _TARGET_CONFIG[x.element_size()]
    if is_interpreting():
        block_t, block_h = 16, 16
    _target_logit_kernel[(triton.cdiv(T, block_t),)](
        x, w, bias, target_ids, out[3], x.stride(0), w.stride(0), T, V, H, scale, cap or 0.0,
        **flags, UPCAST=is_interpreting(), PRECISION=_precision(x), BLOCK_T=block_t,
        BLOCK_H=block_h, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    chunk = options.chunk_tokens or max(1, _GPU_WORKSPACE_BYTES // (2 * V))
    block_v = _launch_options(_FOLD_CONFIG, x, w, False)[1]["BLOCK_V"]
    n_parts = -(-V // block_v)
    # three fp32 parts a row and tile, in the memory of [chunk, V] 2-byte values
    step = max(1, chunk * V // (6 * n_parts))
    for start in range(0, T, step):
        rows = slice(start, min(T, start + step))
        n = rows.stop - rows.start
        tau, _, _ = options.of_rows(rows).row_options
        taus = tau if per_row["HAS_TEMPERATURE"] else None
        tau = 1.0 if per_row["HAS_TEMPERATURE"] else tau
        parts = torch.empty(3, n_parts, n, dtype=torch.float32, device=x.device)
        operands, launch = _launch_options(_FOLD_CONFIG, x[rows], w, use_tma)
        _linear_fold_kernel[(launch["NUM_PROGRAMS"],)](
            *operands, bias, taus, *parts, x.stride(0), w.stride(0), n, V, H, tau, scale,
            cap or 0.0, **flags, **per_row, EVEN_V=V % block_v == 0, **launch,
        )  # fmt: skip
        block_t, block_n = _MERGE_CONFIG
        _linear_merge_kernel[(triton.cdiv(n, block_t),)](
            *parts, target_ids[rows], taus, out[3][rows], *(o[rows] for o in out[:3]),
            n, V, n_parts, tau, **per_row, BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip


def _backward(x, w, bias, target_ids, scores, grads, needs, options):
    """(dx, dw, db), each None where ``needs`` says so. ``scores`` ends with the target's z."""
    needs_dx, needs_dw, needs_db = needs
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs_dx else None
    db = torch.zeros(w.shape[0], dtype=torch.float32, device=x.device) if needs_db else None
    if x.shape[0] == 0:
        dw = torch.zeros_like(w) if needs_dw else None
    elif options.impl == "triton":
        dw = _backward_triton(x, w, bias, target_ids, scores, grads, dx, needs_dw, db, options)
    else:
        dw = _backward_chunks(x, w, bias, target_ids, scores, grads, dx, needs_dw, db, options)
    return (
        None if dx is None else dx.to(x.dtype),
        None if dw is None else dw.to(w.dtype),
        None if db is None else db.to(bias.dtype),
    )


def _backward_chunks(x, w, bias, target_ids, scores, grads, dx, needs_dw, db, options):
    """Rows in chunks: logits again, dR over them, dx of the chunk, dw accumulated in fp32."""
    V = w.shape[0]
    w = w if x.is_cuda else w.float()
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if needs_dw else None
    y = torch.where((target_ids >= 0) & (target_ids < V), target_ids, 0)
    for rows in _row_chunks(x.shape[0], V, options.chunk_tokens):
        r = _matmul(x[rows], w.t())
        if bias is not None:
            r += bias.float()
        tau, scale, cap = options.of_rows(rows).row_options
        logprobs, entropy, lse, _ = (s[rows] for s in scores)
        g = [None if v is None else v[rows] for v in grads]
        if options.impl == "cpu":
            dr = r
            _ext.logprob_entropy_bwd(r, y[rows], None, tau, cap, scale, entropy, lse, *g, dr)
        else:
            dr = _rows.row_gradient(r, y[rows], tau, scale, cap, logprobs, entropy, lse, *g)
            live = _rows.live_rows(None, *g)
            dr = torch.where(live[:, None], dr, 0.0)
        dr = dr.to(x.dtype) if x.is_cuda else dr
        if dx is not None:
            dx[rows] = _matmul(dr, w)
        if dw is not None:
            _add_matmul(dw, dr.t(), x[rows])
        if db is not None:
            db += dr.sum(dim=0, dtype=torch.float32)
    return dw


def _backward_triton(x, w, bias, target_ids, scores, grads, dx, needs_dw, db, options):
    """Blocks of the vocabulary: dR of one block, its slice of dw written once, dx accumulated in
    fp32.
    """
    T, H = x.shape
    V = w.shape[0]
    tau, scale, cap = options.row_options
    has_taus = isinstance(tau, torch.Tensor)
    logprobs, entropy, lse, target_z = scores
    use_tma = _uses_tma(x, w)
    tile = _launch_options(_DLOGITS_CONFIG, x, w, False)[1]["BLOCK_V"]
    chunk = options.chunk_tokens or max(1, _GPU_WORKSPACE_BYTES // (2 * V))
    # as many values as a [chunk, V] block holds, in whole tiles
    width = min(-(-V // tile) * tile, max(tile, chunk * V // T // tile * tile))
    dw = torch.empty_like(w) if needs_dw else None
    block = torch.empty(T, width, dtype=x.dtype, device=x.device)
    for first in range(0, V, width):
        columns = slice(first, min(V, first + width))
        n = columns.stop - first
        operands, launch = _launch_options(_DLOGITS_CONFIG, x, w[columns], use_tma)
        _linear_dlogits_kernel[(launch["NUM_PROGRAMS"],)](
            *operands, None if bias is None else bias[columns], target_ids,
            tau if has_taus else None, target_z, logprobs, entropy, lse, *grads, block,
            x.stride(0), w.stride(0), block.stride(0), T, n, H, first, 1.0 if has_taus else tau,
            scale, cap or 0.0, HAS_BIAS=bias is not None, HAS_TEMPERATURE=has_taus,
            HAS_SOFTCAP=cap is not None, HAS_DLOGPROBS=grads[0] is not None,
            HAS_DENTROPY=grads[1] is not None, HAS_DLSE=grads[2] is not None, **launch,
        )  # fmt: skip
        dr = block[:, :n]
        if dx is not None:
            _add_matmul(dx, dr, w[columns])
        if dw is not None:
            dw[columns] = _matmul(dr.t(), x) if not x.is_cuda else torch.mm(dr.t(), x)
        if db is not None:
            db[columns] = dr.sum(dim=0, dtype=torch.float32)
    return dw


# --- custom ops and autograd -------------------------------------------------


@torch.library.custom_op("qlkernels::linear_logprob", mutates_args=())
def _op(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tau = temperature if temperatures is None else temperatures
    options = _Options(tau, logit_scale, softcap, chunk_tokens, compact, impl)
    x, y = hidden_states, target_ids
    with op_range(OP), torch.autocast(x.device.type, enabled=False):
        if row_mask is None:
            return _forward(x, lm_head_weight, bias, y, options)
        if not compact or is_capturing():
            x = torch.where(row_mask[:, None], x, 0.0)
            found = _forward(x, lm_head_weight, bias, torch.where(row_mask, y, 0), options)
            return tuple(torch.where(row_mask, v, 0.0) for v in found)
        rows = row_mask.nonzero().squeeze(1)  # the one synchronisation
        found = _forward(x[rows], lm_head_weight, bias, y[rows], options.of_rows(rows))
        out = tuple(torch.zeros(x.shape[0], device=x.device) for _ in found)
        for whole, part in zip(out, found, strict=True):
            whole[rows] = part
        return out


@_op.register_fake
def _(hidden_states, *_args):
    T = hidden_states.shape[0]
    return tuple(hidden_states.new_empty(T, dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("qlkernels::linear_logprob_bwd", mutates_args=())
def _op_bwd(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    bias: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    scores: list[torch.Tensor],
    dlogprobs: torch.Tensor | None,
    dentropy: torch.Tensor | None,
    dlse: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int | None,
    compact: bool,
    impl: str,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tau = temperature if temperatures is None else temperatures
    options = _Options(tau, logit_scale, softcap, chunk_tokens, compact, impl)
    x, w, y = hidden_states, lm_head_weight, target_ids
    grads = (dlogprobs, dentropy, dlse)
    needs = (needs_dx, needs_dw, needs_db)
    with op_range(f"{OP}_bwd"), torch.autocast(x.device.type, enabled=False):
        live = _rows.live_rows(row_mask, *grads)
        rows = None
        if compact and not is_capturing():
            rows = live.nonzero().squeeze(1)  # the one synchronisation
        if rows is not None and rows.numel() < x.shape[0]:
            pick = [[None if v is None else v[rows] for v in vs] for vs in (scores, grads)]
            part, dw, db = _backward(x[rows], w, bias, y[rows], *pick, needs, options.of_rows(rows))
            dx = None
            if needs_dx:
                dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
                dx[rows] = part
        else:
            if rows is None:  # dead rows enter the GEMMs: selected to 0, since 0 * NaN is not 0
                x = torch.where(live[:, None], x, 0.0)
                grads = [None if g is None else torch.where(live, g, 0.0) for g in grads]
            dx, dw, db = _backward(x, w, bias, y, scores, grads, needs, options)
    nothing = hidden_states.new_empty(0)
    return tuple(nothing.clone() if g is None else g for g in (dx, dw, db))


@_op_bwd.register_fake
def _(hidden_states, lm_head_weight, target_ids, bias, *args):
    needs_dx, needs_dw, needs_db = args[-3:]
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


def _setup_context(ctx, inputs, output):
    x, w, y, bias, temperatures, row_mask, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, y, bias, temperatures, row_mask, *output)
    ctx.mark_non_differentiable(output[3])
    ctx.options = options


def _autograd_backward(ctx, *grads):
    grads = [None if g is None else g.contiguous() for g in grads[:3]]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if not any(needs) or all(g is None for g in grads):
        return (None,) * 12
    x, w, y, bias, temperatures, row_mask, *scores = ctx.saved_tensors
    dx, dw, db = torch.ops.qlkernels.linear_logprob_bwd(
        x, w, y, bias, temperatures, row_mask, scores, *grads, *ctx.options, *needs
    )
    dx, dw, db = (g if n else None for g, n in zip((dx, dw, db), needs, strict=True))
    return (dx, dw, None, db) + (None,) * 8


_op.register_autograd(_autograd_backward, setup_context=_setup_context)


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
        logit_scale: multiplies the raw logits (Cohere).
        softcap: ``c`` in ``c tanh(s r / c)`` (Gemma 2), or None.
        row_mask: bool, shape of ``target_ids``. Rows where it is False may hold anything, cost
            nothing and return 0.
        chunk_tokens: temporaries take the memory of about ``[chunk_tokens, V]`` values, 2 bytes
            each on the GPU (by default 512 MB in all), 4 on the CPU (64 MB).
        compact: drop masked rows, and in the backward rows whose upstream gradients are all exactly
            0, before the GEMMs. Reads one count from the device per pass where there is a mask or a
            backward. Off under CUDA graph capture.
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
            chunk_tokens=chunk_tokens, compact=compact, validate=validate, impl=impl,
        )  # fmt: skip
        return TokenScores(*(v.view(B, S) for v in scores))
    hidden_states, lm_head_weight, bias = _autocast(hidden_states, lm_head_weight, bias)
    sizes: dict[str, int] = {}
    _checks.check_shape(OP, "hidden_states", hidden_states, "T H", sizes)
    _checks.check_unsharded(OP, "lm_head_weight", lm_head_weight)
    _checks.check_shape(OP, "lm_head_weight", lm_head_weight, "V H", sizes)
    allowed = DTYPES + ((torch.float64,) if impl == "reference" else ())
    _checks.check_dtype(OP, "hidden_states", hidden_states, allowed)
    operands = {"lm_head_weight": lm_head_weight} | ({} if bias is None else {"bias": bias})
    for name, operand in operands.items():
        _checks.check_dtype(OP, name, operand, (hidden_states.dtype,))
        _checks.check_device(OP, name, operand, hidden_states, "hidden_states")
    if bias is not None:
        _checks.check_shape(OP, "bias", bias, "V", sizes)
    _checks.check_last_dim_contiguous(OP, "hidden_states", hidden_states)
    _checks.check_last_dim_contiguous(OP, "lm_head_weight", lm_head_weight)
    _checks.check_rows(OP, hidden_states, "hidden_states", target_ids, temperature, row_mask, sizes)
    _checks.check_scalars(OP, temperature, softcap, logit_scale)
    V, H = lm_head_weight.shape
    if V == 0 or H == 0:
        raise ValueError(f"{OP}: lm_head_weight is [V, H] = {(V, H)}: nothing to multiply")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if validate or hidden_states.device.type == "cpu":
        _checks.check_targets(OP, target_ids, row_mask, V)

    blockers = {
        "triton": why_not_triton(hidden_states),
        "cpu": _ext.why_not_cpu(hidden_states),
        "torch": None,
        "reference": None,
    }
    if impl == "auto" and hidden_states.device.type == "cpu":
        del blockers["triton"]  # on the CPU it would be the interpreter
    chosen = pick_impl(OP, impl, blockers)
    if chosen == "reference":
        return linear_logprob_ref(
            hidden_states, lm_head_weight, target_ids, bias=bias, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, row_mask=row_mask,
        )  # fmt: skip
    is_tensor = isinstance(temperature, torch.Tensor)
    scores = torch.ops.qlkernels.linear_logprob(
        hidden_states,
        lm_head_weight,
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
    )
    return TokenScores(*scores[:3])


def _autocast(x, w, bias):
    """Operands in the dtype of an active autocast region; as they are outside."""
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type):
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
