"""NVTX ranges, so that a profile names our ops. Free on the CPU."""

import torch


class op_range:
    """Mark the block as ``qlkernels::name`` in Nsight Systems, Nsight Compute and torch's profiler.

    Kernels of the block launch on the device of ``like``, whatever the current one is. A class, not
    a generator: entered once an op, it is part of the time before the first kernel.
    """

    __slots__ = ("_name", "_like", "_guard")

    def __init__(self, name: str, like: torch.Tensor):
        self._name, self._like, self._guard = name, like, None

    def __enter__(self) -> None:
        if not self._like.is_cuda:
            return
        if self._like.get_device() != torch.cuda.current_device():
            self._guard = torch.cuda.device(self._like.device)
            self._guard.__enter__()
        torch.cuda.nvtx.range_push(f"qlkernels::{self._name}")

    def __exit__(self, *error) -> None:
        if not self._like.is_cuda:
            return
        torch.cuda.nvtx.range_pop()
        if self._guard is not None:
            self._guard.__exit__(*error)
