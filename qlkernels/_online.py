"""Triton pieces that several kernels share: logits to z, the online softmax state, tile order.

State of a row, over the columns seen: m = max z (before the temperature), S = sum e^d, Q = sum d
e^d with d = (z - m) / tau. Shifted sums: nothing cancels in H = log S - Q / S, whatever constant
the logits carry.
"""

from qlkernels._triton import tl, triton

# Under the interpreter a bf16 operand of tl.dot is multiplied as raw bits: kernels take UPCAST and
# convert first.


@triton.jit
def scale_and_cap(r, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits (fp32) -> z = s r, or c tanh(s r / c)."""
    z = r * logit_scale
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1: libdevice does not run in the interpreter
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def shifted(z, m, inv_tau):
    """(z - m) / tau; a logit of -inf becomes a large finite negative, so that d e^d is 0 and NaN
    stays NaN.
    """
    d = (z - m) * inv_tau
    return tl.where(d == -float("inf"), -1.0e4, d)


@triton.jit
def fold_tile(m, s, q, z, inv_tau):
    """Add one tile ``[BLOCK]`` of z to the state. s and q keep one partial sum a lane: sum them
    once, at the end.
    """
    m_new = tl.maximum(m, tl.max(z, 0))
    d = shifted(z, m_new, inv_tau)
    e = tl.exp(d)
    move = (m - m_new) * inv_tau
    scale = tl.exp(move)
    q = (q + move * s) * scale + d * e
    s = s * scale + e
    return m_new, s, q


@triton.jit
def swizzled_tile(tile, n_m, n_n, GROUP_M: tl.constexpr):
    """Order of GEMM tiles: GROUP_M row tiles walk the columns together, so that both operands stay
    in L2.
    """
    per_group = GROUP_M * n_n
    group = tile // per_group
    first = group * GROUP_M
    size = tl.minimum(n_m - first, GROUP_M)
    local = tile % per_group
    return first + local % size, local // size
