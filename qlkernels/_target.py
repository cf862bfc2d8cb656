"""The only module that asks about hardware, versions or environment variables."""

import functools
import importlib.util
import os

import torch

# found at import, where Triton looks too
_IS_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_interpreting() -> bool:
    """True where Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1`` at import)."""
    return _IS_INTERPRETING


# found at import: torch.compile cannot look for it while it traces
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    return _HAS_TRITON


@functools.cache
def compute_capability(device_index: int = 0) -> int:
    """90 for sm_90; 0 without a CUDA device."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def multiprocessor_count(device_index: int = 0) -> int:
    """Streaming multiprocessors; 1 in the interpreter, so that persistent loops are exercised."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def why_not_triton(*tensors: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors, or None."""
    if not has_triton():
        return "triton is not installed (pip install 'qlkernels[gpu]')"
    if is_interpreting():
        return None
    if not all(t.is_cuda for t in tensors):
        return f"it needs tensors on a CUDA device, got {tensors[0].device}"
    if torch.version.hip is not None:
        return "it is not tested on ROCm"
    capability = compute_capability(tensors[0].device.index or 0)
    if capability < 80:
        return f"it needs compute capability 8.0 or later, this device has {capability / 10:.1f}"
    return None


def is_capturing() -> bool:
    """True inside a CUDA graph capture, where nothing may synchronise."""
    # asking whether a device is there would ask the driver, at every call
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
