"""Triton where it is installed. Without it kernels stay plain functions that nothing calls.

Op files hold their kernels and must import everywhere, so they import ``triton`` and ``tl`` from
here. The CPU build of torch does not bring Triton.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

    def _jit(function=None, **_options):
        return function if function is not None else lambda f: f

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)


# triton.cdiv and triton.next_power_of_2 are made for kernels: called on the host they cost as much
# as an allocation each
def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n >= 1``."""
    return 1 << (n - 1).bit_length()
