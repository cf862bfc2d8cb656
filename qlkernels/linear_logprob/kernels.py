"""Triton kernels of the head: a GEMM whose epilogue folds or differentiates the tile of logits.

The tile is still in registers: it is never stored. Operands come by the copy engine (sm_90 and
later, ``USE_TMA``) or through pointers.
"""

from __future__ import annotations

import torch

from qlkernels._online import scale_and_cap, shifted, swizzled_tile
from qlkernels._target import compute_capability, is_interpreting, multiprocessor_count
from qlkernels._triton import TensorDescriptor, tl, triton

# A kernel is compiled once for every divisibility of the arguments that are specialised: those that
# the vectors of a load depend on. The number of rows is not, nor are the [T] vectors, which are
# read in the order of the accumulator, an element at a time, and may start anywhere in a batch.
ROWS = [
    "T", "target_ptr", "temperature_ptr", "target_z_ptr", "offset_ptr", "m_ptr", "s_ptr", "q_ptr",
    "logprobs_ptr", "entropy_ptr", "lse_ptr", "dlogprobs_ptr", "dentropy_ptr", "dlse_ptr",
]  # fmt: skip


@triton.jit
def load_pair(
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


@triton.jit(do_not_specialize=ROWS)
def fold_kernel(
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
        z = scale_and_cap(
            acc, tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32), HAS_SOFTCAP
        )
        if not EVEN_V:
            z = tl.where((offs_v < V)[None, :], z, -1.0e30)
        tau = tl.cast(temperature, tl.float32)
        inv_tau = 1.0 / tau + tl.zeros([BLOCK_T], tl.float32)
        if HAS_TEMPERATURE:
            inv_tau = 1.0 / tl.load(temperature_ptr + offs_t, mask=mask_t, other=1.0)
        m = tl.maximum(tl.max(z, 1), -1.0e30)  # finite where the tile is all -inf
        if HAS_BIAS:  # only then can a logit be -inf
            d = shifted(z, m[:, None], inv_tau[:, None])
        else:
            d = (z - m[:, None]) * inv_tau[:, None]
        e = tl.exp(d)
        part = pid_v.to(tl.int64) * T + offs_t
        tl.store(m_ptr + part, m, mask=mask_t)
        tl.store(s_ptr + part, tl.sum(e, 1), mask=mask_t)
        tl.store(q_ptr + part, tl.sum(d * e, 1), mask=mask_t)


@triton.jit(do_not_specialize=ROWS)
def target_logit_kernel(
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


@triton.jit(do_not_specialize=ROWS)
def merge_kernel(
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


@triton.jit(do_not_specialize=ROWS)
def dlogits_kernel(
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
        reachable = (z_y > -float("inf")) & (logprob > -float("inf"))
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

        if HAS_BIAS:  # only then can a logit be -inf
            logp = shifted(z, anchor_z[:, None], inv_tau[:, None]) + anchor_l[:, None]
        else:
            logp = (z - anchor_z[:, None]) * inv_tau[:, None] + anchor_l[:, None]
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
FOLD_CONFIG = {
    ("tma-sm90", 2): (128, 256, 64, 8, 8, 3),
    ("tma-sm100", 2): (128, 128, 64, 8, 8, 4),
    ("pointer", 2): (128, 128, 32, 8, 8, 4),
    ("pointer", 4): (64, 64, 32, 8, 4, 3),
    ("interpreter", 2): (16, 32, 16, 2, 1, 1),
    ("interpreter", 4): (16, 32, 16, 2, 1, 1),
}
DLOGITS_CONFIG = FOLD_CONFIG | {("tma-sm90", 2): (128, 256, 64, 16, 8, 3)}
# with a bias, a soft-cap or a ragged V the larger tile spills
DLOGITS_EXTRA_CONFIG = FOLD_CONFIG | {("tma-sm90", 2): (128, 128, 64, 8, 8, 4)}
TARGET_CONFIG = {2: (64, 64, 4, 4), 4: (64, 32, 4, 3)}  # BLOCK_T, BLOCK_H, num_warps, num_stages
MERGE_CONFIG = (32, 32)  # BLOCK_T, BLOCK_N


def dlogits_config(V: int, has_bias: bool, has_softcap: bool) -> dict:
    """The table for what the epilogue has to do. V is that of the whole vocabulary."""
    is_plain = V % 16 == 0 and not has_bias and not has_softcap
    return DLOGITS_CONFIG if is_plain else DLOGITS_EXTRA_CONFIG


def uses_tma(*tensors: torch.Tensor) -> bool:
    """The copy engine wants rows that start on 16 bytes.

    The tiles of its path are for 16-bit operands and for the shared memory of sm_90 and sm_100.
    """
    capability = compute_capability(tensors[0].device.index or 0)
    if is_interpreting() or not 90 <= capability < 120:
        return False
    return all(
        x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        for x in tensors
    )


def precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # ignored for 16-bit operands


def tile_sizes(table: dict, x: torch.Tensor, use_tma: bool) -> tuple[int, ...]:
    """The entry of ``table`` for an operand."""
    path = "interpreter" if is_interpreting() else "pointer"
    if use_tma:
        capability = compute_capability(x.device.index or 0)
        path = "tma-sm90" if capability < 100 else "tma-sm100"
    return table[path, x.element_size()]


def launch_options(table: dict, x: torch.Tensor, w: torch.Tensor, use_tma: bool):
    """Operands, tile sizes and compiler options of a GEMM kernel."""
    block_t, block_v, block_h, group_t, warps, stages = tile_sizes(table, x, use_tma)
    operands = (x, w)
    if use_tma:
        operands = (
            TensorDescriptor(x, x.shape, (x.stride(0), 1), [block_t, block_h]),
            TensorDescriptor(w, w.shape, (w.stride(0), 1), [block_v, block_h]),
        )
    options = dict(
        USE_TMA=use_tma,
        UPCAST=is_interpreting(),
        PRECISION=precision(x),
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
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options).

    Beside the common case (bf16, no bias, no soft-cap, V a multiple of the tile) the ones that cost
    registers: a ragged V, a bias, a soft-cap, fp32. All three at once is left out: on sm_90 the
    fold of a ragged V with bias and soft-cap spills some 200 bytes.
    """
    found = []
    for path, size, capabilities in (
        ("pointer", 2, [80, 90]), ("pointer", 4, [80, 90]), ("tma-sm90", 2, [90]),
        ("tma-sm100", 2, [100]),
    ):  # fmt: skip
        for extra in ("", "ragged", "bias", "softcap"):
            if extra and (path, size) == ("pointer", 4):
                continue
            found += _gemm_variants(path, size, capabilities, extra)
    rows, aligned = _signature("bf16"), _ALIGNED
    block_t, block_h, warps, stages = TARGET_CONFIG[2]
    target = dict(
        HAS_BIAS=False, HAS_SOFTCAP=False, UPCAST=False, PRECISION="tf32", BLOCK_T=block_t,
        BLOCK_H=block_h,
    )  # fmt: skip
    signature = rows | dict(x="*bf16", w="*bf16")
    options = dict(num_warps=warps, num_stages=stages)
    found.append(("target_logit", target_logit_kernel, signature, target, aligned, options))
    merge = dict(HAS_TEMPERATURE=True, BLOCK_T=MERGE_CONFIG[0], BLOCK_N=MERGE_CONFIG[1])
    found.append(("linear_merge", merge_kernel, rows, merge, (), dict(num_warps=4)))
    return found


_ALIGNED = ("stride_xt", "stride_wv", "stride_dt", "V", "H", "x", "w", "dlogits_ptr")


def _signature(dtype: str) -> dict[str, str]:
    floats = (
        "temperature_ptr", "m_ptr", "s_ptr", "q_ptr", "target_z_ptr", "logprobs_ptr",
        "entropy_ptr", "lse_ptr", "dlogprobs_ptr", "dentropy_ptr", "dlse_ptr",
    )  # fmt: skip
    integers = ("stride_xt", "stride_wv", "stride_dt", "T", "V", "H", "N", "first_v")
    return (
        dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(("temperature", "logit_scale", "softcap"), "fp32")
        | dict(bias_ptr=f"*{dtype}", dlogits_ptr=f"*{dtype}", target_ptr="*i64")
    )


def _gemm_variants(path: str, size: int, capabilities: list[int], extra: str) -> list[tuple]:
    flags = dict(
        HAS_BIAS=extra == "bias", HAS_TEMPERATURE=True, HAS_SOFTCAP=extra == "softcap",
        UPCAST=False, PRECISION="tf32" if size == 2 else "ieee",
    )  # fmt: skip
    aligned = tuple(n for n in _ALIGNED if not (extra == "ragged" and n == "V"))
    dtype = "bf16" if size == 2 else "fp32"
    found = []
    for name, kernel, table, own in (
        ("linear_fold", fold_kernel, FOLD_CONFIG, dict(EVEN_V=extra != "ragged")),
        ("linear_dlogits", dlogits_kernel, DLOGITS_EXTRA_CONFIG if extra else DLOGITS_CONFIG,
         dict(HAS_DLOGPROBS=True, HAS_DENTROPY=True, HAS_DLSE=False)),
    ):  # fmt: skip
        block_t, block_v, block_h, group_t, warps, stages = table[path, size]
        constexprs = flags | own | dict(
            USE_TMA=path != "pointer", BLOCK_T=block_t, BLOCK_V=block_v, BLOCK_H=block_h,
            GROUP_T=group_t, NUM_PROGRAMS=132,
        )  # fmt: skip
        operand = f"*{dtype}" if path == "pointer" else f"tensordesc<{dtype}[{{}}, {{}}]>"
        signature = _signature(dtype) | dict(
            x=operand.format(block_t, block_h), w=operand.format(block_v, block_h)
        )
        options = dict(num_warps=warps, num_stages=stages, capabilities=capabilities)
        label = "-".join(filter(None, (name, path, dtype, extra)))
        found.append((label, kernel, signature, constexprs, aligned, options))
    return found
