"""Root-mean-square norm, and the norm and rotation of query and key heads, in place.

    rms_norm:   y = w * round(x / sqrt(mean(x^2) + eps))                   over a row [H]
    rotate:     lo, hi = halves of a head;  lo' = lo cos - hi sin,  hi' = hi cos + lo sin

``round`` is to the dtype of x, and each product of the rotation is rounded too: the roundings of
transformers, so that scores and a transformers trainer see the same hidden states. Sums are fp32.
Both read and write T * H * itemsize bytes once.
"""

from __future__ import annotations

import torch

from qlkernels import _checks
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._target import why_not_triton
from qlkernels._triton import tl, triton

# --- reference ---------------------------------------------------------------


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dim, any leading ones. Eager, any device; tests call it in fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def norm_and_rotate_ref(
    heads: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``heads [T, N, D]``, ``cos`` and ``sin [T, D / 2]``; returns a new tensor."""
    if weight is not None:
        heads = rms_norm_ref(heads, weight, eps)
    lo, hi = heads.chunk(2, dim=-1)  # [T, N, D / 2]
    # whole heads, not halves: products of strided halves take a CPU several times as long
    c, s = (torch.cat([x, x], dim=-1)[:, None] for x in (cos, sin))
    return heads * c + torch.cat([-hi, lo], dim=-1) * s


# --- kernels -----------------------------------------------------------------


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride_xt, H, eps, BLOCK_H: tl.constexpr):
    """One program per row."""
    t = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    x = tl.load(x_ptr + t * stride_xt + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    rounded = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * H + offs, (w * rounded).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_and_rotate_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    N,
    eps,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One program per block of rows (token, head) of 2 * HALF values, in place."""
    dtype = x_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (r < rows)[:, None]
    d = tl.arange(0, HALF)[None, :]
    at_lo = x_ptr + r[:, None] * (2 * HALF) + d
    lo = tl.load(at_lo, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, HALF]
    hi = tl.load(at_lo + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(lo * lo, 1) + tl.sum(hi * hi, 1)) / (2 * HALF) + eps)[:, None]
        w_lo = tl.load(weight_ptr + d).to(tl.float32)
        w_hi = tl.load(weight_ptr + HALF + d).to(tl.float32)
        lo = (w_lo * (lo * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        hi = (w_hi * (hi * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    angle = (r // N)[:, None] * HALF + d
    c = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    new_lo = (lo * c).to(dtype).to(tl.float32) - (hi * s).to(dtype).to(tl.float32)
    new_hi = (hi * c).to(dtype).to(tl.float32) + (lo * s).to(dtype).to(tl.float32)
    tl.store(at_lo, new_lo.to(dtype), mask=mask)
    tl.store(at_lo + HALF, new_hi.to(dtype), mask=mask)


_ROTATED_ROWS = 32  # rows of a program: 8 KB of bf16 heads of 128
REFERENCE_ROWS = 1024  # rows of which the eager path holds fp32 copies


def _norm_options(H: int) -> dict[str, int]:
    block = triton.next_power_of_2(H)
    return {"BLOCK_H": block, "num_warps": max(1, min(16, block // 512))}


def aot_variants():
    """The launches to compile ahead of time: (name, kernel, signature, constexprs, aligned,
    options).
    """
    x = "*bf16"
    for H in (2048, 5120):
        signature = {"x_ptr": x, "weight_ptr": x, "out_ptr": x, "stride_xt": "i64", "H": "i32"}
        constexprs = _norm_options(H)
        warps = constexprs.pop("num_warps")
        yield (
            f"scorer_rms_norm-H{H}", _rms_norm_kernel, {**signature, "eps": "fp32"}, constexprs,
            ("x_ptr", "weight_ptr", "out_ptr", "stride_xt", "H"), {"num_warps": warps},
        )  # fmt: skip
    signature = {"x_ptr": x, "weight_ptr": x, "cos_ptr": x, "sin_ptr": x, "rows": "i64", "N": "i32"}
    for has_norm in (True, False):
        constexprs = {"HALF": 64, "BLOCK_R": _ROTATED_ROWS, "HAS_NORM": has_norm}
        yield (
            f"scorer_rotate-{'norm' if has_norm else 'plain'}", _norm_and_rotate_kernel,
            {**signature, "eps": "fp32"}, constexprs,
            ("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr"), {"num_warps": 4},
        )  # fmt: skip


# --- public ------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, impl: str = "auto"
) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` of every row; no gradient.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32, last dim contiguous.
        weight: ``[H]``, same dtype.
        eps: added to the mean square.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[T, H]``, dtype of ``x``, contiguous.
    """
    sizes: dict[str, int] = {}
    _checks.check_shape("rms_norm", "x", x, "T H", sizes)
    _checks.check_shape("rms_norm", "weight", weight, "H", sizes)
    _checks.check_last_dim_contiguous("rms_norm", "x", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    T, H = x.shape
    if _pick("rms_norm", impl, x) == "reference" or T == 0:
        for part, piece in zip(out.split(REFERENCE_ROWS), x.split(REFERENCE_ROWS), strict=True):
            part.copy_(rms_norm_ref(piece, weight, eps))
        return out
    with op_range("rms_norm", x):
        _rms_norm_kernel[(T,)](x, weight, out, x.stride(0), H, eps, **_norm_options(H))
    return out


def norm_and_rotate_(
    heads: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    impl: str = "auto",
) -> None:
    """Normalise every head of a row and turn it by its position, in place; no gradient.

    Args:
        heads: ``[T, N, D]`` bf16, fp16 or fp32, contiguous, D even.
        weight: ``[D]`` of the norm of each head, or None for no norm.
        cos, sin: ``[T, D / 2]``, same dtype, contiguous.
        eps: of the norm.
        impl: ``"auto"``, ``"triton"`` (D a power of 2) or ``"reference"``.
    """
    sizes: dict[str, int] = {}
    _checks.check_shape("norm_and_rotate_", "heads", heads, "T N D", sizes)
    if not heads.is_contiguous():
        raise ValueError("norm_and_rotate_: heads must be contiguous")
    T, N, D = heads.shape
    if impl == "auto" and D & (D - 1):
        impl = "reference"
    if _pick("norm_and_rotate_", impl, heads) == "reference" or not T:
        for part, c, s in zip(*(y.split(REFERENCE_ROWS) for y in (heads, cos, sin)), strict=True):
            part.copy_(norm_and_rotate_ref(part, weight, c, s, eps))
        return
    rows = T * N
    with op_range("norm_and_rotate_", heads):
        _norm_and_rotate_kernel[(triton.cdiv(rows, _ROTATED_ROWS),)](
            heads, heads if weight is None else weight, cos, sin, rows, N, eps,
            HALF=D // 2, BLOCK_R=_ROTATED_ROWS, HAS_NORM=weight is not None, num_warps=4,
        )  # fmt: skip


def _pick(op: str, impl: str, x: torch.Tensor) -> str:
    blockers = {"triton": why_not_triton(x), "reference": None}
    return pick_impl(op, impl, blockers)
