"""Running an op's Python without the dispatch of its custom op, where nobody would notice.

torch.library costs a call tens of microseconds, and more with its autograd: as long as the kernels
of a few thousand rows take. The dispatch serves those who trace an op or watch it; for all others
an autograd.Function around the same Python gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_watched(*inputs: object) -> bool:
    """Whether the call must be seen as one op: by torch.compile or FX, by a dispatch mode (fake
    tensors, selective checkpointing, FLOP counters), by torch.func, by a tensor subclass or by
    ``torch.autograd.grad(..., is_grads_batched=True)``, whose batches are not seen by torch.func.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    for x in inputs:
        if type(x) in _PLAIN:
            if is_batched(x):
                return True
        elif isinstance(x, torch.Tensor):
            return True
    return False


def direct_function(
    name: str, run: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The ``autograd.Function`` of a custom op, from what the op was registered with.

    Args:
        name: of the op, as profilers show it.
        run: the op's Python, from its inputs to its outputs.
        setup_context, backward: as ``register_autograd`` takes them.
    """

    def forward(ctx, *inputs):
        output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    methods["run"] = staticmethod(run)
    base = torch.autograd.Function
    return type(base)(f"qlkernels::{name}", (base,), methods)


def call_direct(function: type[torch.autograd.Function], inputs: tuple):
    """Outputs of a ``direct_function``; its Python alone where there is nothing to record, neither
    for a backward nor for a profiler, nor a tangent to refuse.
    """
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return function.apply(*inputs)
    if torch.autograd._profiler_enabled() or forward_ad._current_level >= 0:
        return function.apply(*inputs)
    return function.run(*inputs)


_NO_CHANGE = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No autocast inside; costs nothing where there is none outside."""
    if not torch.is_autocast_enabled(device.type):
        return _NO_CHANGE
    return torch.autocast(device.type, enabled=False)
