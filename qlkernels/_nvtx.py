"""NVTX ranges, so that a profile names our ops. Free where there is no CUDA device."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def op_range(name: str) -> Iterator[None]:
    """Mark the block as ``qlkernels::name`` in Nsight Systems, Nsight Compute and the torch
    profiler.
    """
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(f"qlkernels::{name}")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
