"""The custom ops: allocate, run one implementation, and the gradient of the routing."""

from __future__ import annotations

import torch

from qlkernels._direct import call_direct, direct_function, is_watched
from qlkernels._nvtx import op_range
from qlkernels.moe_routing import eager, native
from qlkernels.moe_routing import triton as kernels
from qlkernels.moe_routing.results import INDEX_OP, OP

_MODULES = {"cuda": native, "triton": kernels, "cpu": native, "torch": eager}


def _empty(like: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=dtype)


def _routing(router_logits: torch.Tensor, top_k: int):
    """Weights, probability sums, ids, counts. Floats first: torch.library.opcheck adds the outputs
    up in place, and cannot add a float to an integer.
    """
    T, E = router_logits.shape
    return (
        _empty(router_logits, torch.float32, T, top_k),
        _empty(router_logits, torch.float32, E),
        _empty(router_logits, torch.int32, T, top_k),
        _empty(router_logits, torch.int32, E),
    )


def _index(topk_ids: torch.Tensor, num_experts: int):
    rows = topk_ids.numel()
    sizes = (rows, rows, num_experts + 1)
    return tuple(_empty(topk_ids, torch.int32, size) for size in sizes)


def _run(
    router_logits: torch.Tensor,
    replay_ids: torch.Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    weights_dtype: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = _routing(router_logits, top_k)
    with op_range(OP, router_logits):
        _MODULES[impl].route(router_logits, replay_ids, norm_topk_prob, weights_dtype, *found)
    return found


_route = torch.library.custom_op("qlkernels::moe_route", _run, mutates_args=())


@_route.register_fake
def _(router_logits, replay_ids, top_k, norm_topk_prob, weights_dtype, impl):
    return _routing(router_logits, top_k)


def _run_backward(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    norm_topk_prob: bool,
    dtopk_weights: torch.Tensor | None,
    dprob_sums: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    out = _empty(router_logits, router_logits.dtype, *router_logits.shape)
    with op_range(f"{OP}_bwd", router_logits):
        _MODULES[impl].route_backward(
            router_logits, topk_ids, norm_topk_prob, dtopk_weights, dprob_sums, out
        )
    return out


_route_bwd = torch.library.custom_op("qlkernels::moe_route_bwd", _run_backward, mutates_args=())


@_route_bwd.register_fake
def _(router_logits, *_args):
    return _empty(router_logits, router_logits.dtype, *router_logits.shape)


def _setup_context(ctx, inputs, output):
    router_logits, _replay_ids, _top_k, norm_topk_prob, _weights_dtype, impl = inputs
    _weights, _prob_sums, topk_ids, tokens_per_expert = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(topk_ids, tokens_per_expert)
    ctx.save_for_backward(router_logits, topk_ids)
    ctx.options = norm_topk_prob, impl


def _backward(ctx, dtopk_weights, dprob_sums, *_integers):
    if dtopk_weights is None and dprob_sums is None:
        return (None,) * 6
    router_logits, topk_ids = ctx.saved_tensors
    norm_topk_prob, impl = ctx.options
    grads = [None if g is None else g.float().contiguous() for g in (dtopk_weights, dprob_sums)]
    # with gradients on, the op is there to refuse a second backward
    watched = torch.is_grad_enabled() or is_watched(router_logits, topk_ids, *grads)
    run = torch.ops.qlkernels.moe_route_bwd if watched else _run_backward
    dlogits = run(router_logits, topk_ids, norm_topk_prob, *grads, impl)
    return (dlogits,) + (None,) * 5


_route.register_autograd(_backward, setup_context=_setup_context)
_MoeRoute = direct_function(OP, _run, _setup_context, _backward)


def route(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``qlkernels::moe_route``, without its dispatch where nobody watches."""
    if is_watched(*inputs):
        return torch.ops.qlkernels.moe_route(*inputs)
    return call_direct(_MoeRoute, inputs)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(f"{OP}: double backward is not supported; use impl='reference' for it")


_route_bwd.register_autograd(_refuse_double_backward)


def _run_index(
    topk_ids: torch.Tensor, num_experts: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = _index(topk_ids, num_experts)
    with op_range(INDEX_OP, topk_ids):
        _MODULES[impl].build_index(topk_ids, num_experts, *found)
    return found


_build_index = torch.library.custom_op("qlkernels::build_expert_index", _run_index, mutates_args=())


@_build_index.register_fake
def _(topk_ids, num_experts, impl):
    return _index(topk_ids, num_experts)


def build_index(
    topk_ids: torch.Tensor, num_experts: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``qlkernels::build_expert_index``, without its dispatch where nobody watches."""
    watched = is_watched(topk_ids)
    run = torch.ops.qlkernels.build_expert_index if watched else _run_index
    return run(topk_ids, num_experts, impl)
