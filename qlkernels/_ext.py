"""Loads ``qlkernels._C`` (built from ``csrc/``), or keeps the reason why it could not."""

import torch

try:
    from qlkernels import _C

    missing_reason: str | None = None
except ImportError as error:  # built without a compiler, or for another Python
    _C = None
    missing_reason = (
        f"the extension qlkernels._C is not built ({error}); reinstall with a C++ compiler on PATH"
    )


def why_not_cpu(*tensors: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on these tensors, or None."""
    if _C is None:
        return missing_reason
    if not all(t.device.type == "cpu" for t in tensors):
        return f"it needs CPU tensors, got {tensors[0].device}"
    return None


def why_not_cuda(*tensors: torch.Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot run on these tensors, or None."""
    if _C is None:
        return missing_reason
    if not _C.has_cuda:
        return "the extension was built without CUDA (no nvcc at build time, or QL_BUILD_CUDA=0)"
    if not all(t.is_cuda for t in tensors):
        return f"it needs tensors on a CUDA device, got {tensors[0].device}"
    return None
