"""``moe_route`` in the routers of transformers models: one kernel for softmax, top_k and weights.

    qlkernels.hf.routers.enable(model)
    qlkernels.hf.routers.disable(model)

It serves the routers that choose the top_k of a softmax over plain linear logits: Qwen2-MoE,
Qwen3-MoE, Qwen3-Next, OLMoE, Mixtral and others. Logits, weights and their dtypes are the model's
own; of experts with equal logits the lower ids are chosen, where torch.topk promises nothing.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

from qlkernels.moe_routing import moe_route
from qlkernels.router_replay import NORMALISES

_PREVIOUS = "_qlkernels_router_before"  # on a router: a forward of its own that it had, or None
# the logits of Granite's routers are cast before the choice
_SERVED = {k: v for k, v in NORMALISES.items() if not k.startswith("Granite")}
_FP32_WEIGHTS = ("MiniMaxTopKRouter", "MixtralTopKRouter")  # the others round to the logits' dtype


def router_forward(
    self: nn.Module, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits ``[T, E]``, weights and int64 ids ``[T, top_k]``, as the router's own returns them."""
    kind = type(self).__name__
    norm_topk_prob = _SERVED[kind]
    if norm_topk_prob is None:
        norm_topk_prob = self.norm_topk_prob
    logits = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
    routing = moe_route(logits, self.top_k, norm_topk_prob=norm_topk_prob)
    dtype = torch.float32 if kind in _FP32_WEIGHTS else logits.dtype
    return logits, routing.topk_weights.to(dtype), routing.topk_ids.long()


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    found = dict(model.named_modules())
    return {name: m for name, m in found.items() if type(m).__name__.endswith("Router")}


def why_not(model: nn.Module) -> str | None:
    """Why the routers of ``model`` cannot run on ``moe_route``, or None."""
    routers = _routers(model)
    if not routers:
        return f"{type(model).__name__} has no router"
    for name, router in routers.items():
        if type(router).__name__ not in _SERVED:
            return (
                f"{name} is a {type(router).__name__}, which does not choose the top_k of a "
                f"softmax over its logits as {', '.join(_SERVED)} do"
            )
    return None


def enable(model: nn.Module) -> nn.Module:
    """Run every router of ``model`` on ``moe_route``.

    Args:
        model: a transformers model, or a module that holds one.

    Returns:
        ``model``, changed in place; its weights and their names are as before.

    Raises:
        ValueError: it has no router, or one of another kind; then nothing has changed.
    """
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"enable: {reason}")
    for router in _routers(model).values():
        if not hasattr(router, _PREVIOUS):
            setattr(router, _PREVIOUS, vars(router).get("forward"))
            router.forward = MethodType(router_forward, router)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Give the routers of ``model`` back the forward they had before ``enable``."""
    for router in _routers(model).values():
        if hasattr(router, _PREVIOUS):
            del router.forward
            if getattr(router, _PREVIOUS) is not None:
                router.forward = getattr(router, _PREVIOUS)
            delattr(router, _PREVIOUS)
    return model
