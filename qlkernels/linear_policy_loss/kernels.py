"""The Triton kernel of one chunk of rows: the head's GEMM, whose epilogue stores exponentials."""

from __future__ import annotations

from qlkernels._online import swizzled_tile
from qlkernels._triton import tl, triton
from qlkernels.linear_logprob.kernels import FOLD_CONFIG, ROWS, load_pair

EXP_CONFIG = FOLD_CONFIG | {("tma-sm90", 2): (256, 128, 64, 16, 8, 3)}


@triton.jit(do_not_specialize=ROWS)
def exp_kernel(
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
        block_t, block_v, block_h, group_t, warps, stages = EXP_CONFIG[path, 2]
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
        found.append((f"linear_exp-{path}", exp_kernel, signature, constexprs, aligned, options))
    return found
