"""Merging attention over two disjoint sets of keys by their log-sum-exp.

    lse = log(e^lse_a + e^lse_b),  out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

computed in fp32 and rounded once. Reads both parts and writes one: 3 N Hq D itemsize bytes.
"""

from __future__ import annotations

import torch

from qlkernels._target import why_not_triton
from qlkernels._triton import tl, triton

_BLOCK_N, _WARPS = 32, 4


@triton.jit(
    do_not_specialize=[
        "N", "n_blocks", "stride_lse_h", "stride_part_lse_h", "lse_ptr", "part_lse_ptr",
    ]
)  # fmt: skip
def _merge_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    part_lse_ptr,
    stride_out_n,
    stride_out_h,
    stride_part_n,
    stride_part_h,
    stride_lse_h,
    stride_part_lse_h,
    N,
    D,
    n_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per block of rows and head; ``out`` and ``lse`` are read and written in place."""
    pid = tl.program_id(0)
    h = (pid // n_blocks).to(tl.int64)  # Hq * T passes int32 for long contexts
    offs_n = (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    a = tl.load(lse_ptr + h * stride_lse_h + offs_n, mask=mask_n, other=0.0)
    b = tl.load(part_lse_ptr + h * stride_part_lse_h + offs_n, mask=mask_n, other=0.0)
    m = tl.maximum(a, b)
    lse = m + tl.log(tl.exp(a - m) + tl.exp(b - m))

    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    out_offs = out_ptr + h * stride_out_h + rows * stride_out_n + offs_d[None, :]
    part_offs = part_ptr + h * stride_part_h + rows * stride_part_n + offs_d[None, :]
    out = tl.load(out_offs, mask=mask, other=0.0).to(tl.float32)
    part = tl.load(part_offs, mask=mask, other=0.0).to(tl.float32)
    out = tl.exp(a - lse)[:, None] * out + tl.exp(b - lse)[:, None] * part
    tl.store(out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + h * stride_lse_h + offs_n, lse, mask=mask_n)


def aot_variants():
    """The kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    signature = dict(
        out_ptr="*bf16", part_ptr="*bf16", lse_ptr="*fp32", part_lse_ptr="*fp32",
        stride_out_n="i64", stride_out_h="i64", stride_part_n="i64", stride_part_h="i64",
        stride_lse_h="i64", stride_part_lse_h="i64", N="i32", D="i32", n_blocks="i32",
    )  # fmt: skip
    aligned = (
        "out_ptr", "part_ptr", "stride_out_n", "stride_out_h", "stride_part_n",
        "stride_part_h", "D",
    )  # fmt: skip
    return [
        (
            f"attention_merge-D{D}",
            _merge_kernel,
            signature,
            dict(BLOCK_N=_BLOCK_N, BLOCK_D=D),
            aligned,
            dict(num_warps=_WARPS),
        )
        for D in (64, 128, 256)
    ]


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Merge ``part`` into ``out``, and ``part_lse`` into ``lse``, in place.

    Args:
        out, part: ``[N, Hq, D]``, same dtype, last dim contiguous.
        lse, part_lse: ``[Hq, N]`` fp32 (fp64 for fp64 attention), finite; the last dim of ``lse``
            is contiguous.
    """
    N, Hq, D = out.shape
    if why_not_triton(out) is not None or lse.dtype != torch.float32:
        both = torch.logaddexp(lse, part_lse)
        w_out, w_part = ((x - both).exp().T[:, :, None] for x in (lse, part_lse))  # [N, Hq, 1]
        out.copy_(w_out * out + w_part * part)
        lse.copy_(both)
        return
    part_lse = part_lse.contiguous()
    n_blocks = triton.cdiv(N, _BLOCK_N)
    _merge_kernel[(n_blocks * Hq,)](
        out,
        part,
        lse,
        part_lse,
        *out.stride()[:2],
        *part.stride()[:2],
        lse.stride(0),
        part_lse.stride(0),
        N,
        D,
        n_blocks,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=_WARPS,
    )
