"""NVTX ranges, so that a profile names our ops. Free where there is no CUDA device."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def op_range(name: str, like: torch.Tensor | None = None) -> Iterator[None]:
    """Mark the block as ``qlkernels::name`` in Nsight Systems, Nsight Compute and torch's profiler.

    With ``like``, kernels of the block launch on that tensor's device, whatever the current one is.
    """
    if not torch.cuda.is_available():
        yield
        return
    on_gpu = like is not None and like.is_cuda
    with torch.cuda.device(like.device) if on_gpu else contextlib.nullcontext():
        torch.cuda.nvtx.range_push(f"qlkernels::{name}")
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
