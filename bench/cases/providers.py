"""Calls without arguments from functions with them, for the forward and for the backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial

import torch

from bench.gate import WrongResult
from bench.registry import Outputs, Unavailable


def our_op(module: str, name: str | None = None) -> Callable:
    """The public function of ``qlkernels.<module>``; ``Unavailable`` where the module does not
    exist.
    """
    try:
        return getattr(importlib.import_module(f"qlkernels.{module}"), name or module)
    except ModuleNotFoundError as error:
        if error.name != f"qlkernels.{module}":
            raise
        raise Unavailable(f"qlkernels.{module} does not exist") from None


def timed(
    calls: Mapping[str, Callable[[], Outputs]],
    leaves: Mapping[str, torch.Tensor],
    upstream: Mapping[str, torch.Tensor],
) -> dict[str, Callable[[], Outputs]]:
    """What the runner times: the calls without a gradient, or with the backward of ``upstream``
    where there is one.

    The calls read the tensors of ``leaves``. A backward goes into the outputs that ``upstream``
    names and adds the gradients as ``d<leaf>``.
    """

    def forward(call: Callable[[], Outputs]) -> Outputs:
        with torch.no_grad():
            return call()

    def forward_backward(call: Callable[[], Outputs]) -> Outputs:
        outputs = call()
        used = [name for name in upstream if name in outputs]
        grads = torch.autograd.grad(
            [outputs[name] for name in used],
            list(leaves.values()),
            [upstream[name].to(outputs[name].dtype) for name in used],
        )
        found = {name: x.detach() for name, x in outputs.items()}
        return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}

    run = forward_backward if upstream else forward
    return {name: partial(run, call) for name, call in calls.items()}


def graphed(calls: Mapping[str, Callable[[], Outputs]]) -> dict[str, Callable[[], Outputs]]:
    """The calls as replays of CUDA graphs: what the device does, without the host's launches.

    The first call of each runs eagerly, for the check; the second captures, and must give the same.
    """

    def replayed(name: str, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        eager: list[Outputs] = []
        captured: list[tuple[torch.cuda.CUDAGraph, Outputs]] = []

        def run() -> Outputs:
            if not eager:
                eager.append(call())
                return eager[0]
            if not captured:
                graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    call()
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph):
                    outputs = call()
                captured.append((graph, outputs))
                graph.replay()
                for key, value in outputs.items():
                    if not torch.allclose(value, eager[0][key], equal_nan=True):
                        raise WrongResult(f"{name}: {key} of the graph differs from the eager call")
            graph, outputs = captured[0]
            graph.replay()
            return outputs

        return run

    return {name: replayed(name, call) for name, call in calls.items()}
