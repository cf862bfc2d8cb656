"""Triton where it is installed. Without it kernels stay plain functions that nothing calls.

Op files hold their kernels and must import everywhere, so they import ``triton`` and ``tl`` from
here. The CPU build of torch does not bring Triton.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:

    def _jit(function=None, **_options):
        return function if function is not None else lambda f: f

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)
