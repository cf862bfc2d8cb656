"""Triton kernels: one program a row, which it reads once."""

from __future__ import annotations

from qlkernels._online import fold_tile, scale_and_cap, shifted
from qlkernels._triton import tl, triton

# A kernel is compiled once for every divisibility of the arguments that are specialised. The [T]
# vectors, of which a program reads one element, may start anywhere in a batch.
_ROWS = [
    "target_ptr", "row_mask_ptr", "temperature_ptr", "logprobs_ptr", "entropy_ptr", "lse_ptr",
    "dlogprobs_ptr", "dentropy_ptr", "dlse_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_ROWS)
def logprob_entropy_fwd_kernel(
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
def logprob_entropy_bwd_kernel(
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
FWD_CONFIG = (4096, 4)
BWD_CONFIG = (4096, 16)


def block_v(V: int, config: tuple[int, int]) -> tuple[int, int]:
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
        constexprs = flags | dict(HAS_SOFTCAP=softcap, BLOCK_V=FWD_CONFIG[0])
        name = f"logprob_entropy_fwd-softcap{int(softcap)}"
        options = dict(num_warps=FWD_CONFIG[1])
        found.append((name, logprob_entropy_fwd_kernel, rows, constexprs, aligned, options))
    grads = rows | dict(
        dlogprobs_ptr="*fp32", dentropy_ptr="*fp32", dlse_ptr="*fp32", dlogits_ptr="*bf16",
        stride_dt="i64",
    )  # fmt: skip
    constexprs = flags | dict(
        HAS_DLOGPROBS=True, HAS_DENTROPY=True, HAS_DLSE=True, BLOCK_V=BWD_CONFIG[0]
    )
    aligned += ("dlogits_ptr", "stride_dt")
    options = dict(num_warps=BWD_CONFIG[1])
    found.append(
        ("logprob_entropy_bwd", logprob_entropy_bwd_kernel, grads, constexprs, aligned, options)
    )
    return found
