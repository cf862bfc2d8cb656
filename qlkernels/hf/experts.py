"""``moe_mlp`` as an experts implementation of transformers, named ``"qlkernels"``.

    qlkernels.hf.experts.enable(model)                       # a model that is there
    qlkernels.hf.experts.register()                          # or by name:
    AutoModelForCausalLM.from_pretrained(path, experts_implementation="qlkernels")

It serves every family whose experts hold ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``
and compute ``down(silu(gate) * up)``: Qwen3-MoE, Qwen2-MoE, Mixtral, DeepSeek-V2 and V3, OLMoE,
GLM-4-MoE and others. Weights are read where they are. Routing stays the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qlkernels.moe import moe_mlp

NAME = "qlkernels"
_OPTIONS = "_qlkernels_moe_options"  # on an experts module: arguments of moe_mlp
_PREVIOUS = "_qlkernels_experts_before"  # on a model: its configs and what they said

# layout flags that transformers' decorator leaves on a module, and what our kernels read
_LAYOUT = {
    "has_gate": (True, "has no gate"),
    "is_concatenated": (True, "interleaves the rows of gate and up"),
    "is_transposed": (False, "stores its weights transposed"),
    "has_bias": (False, "has biases"),
    "has_post_expert_norm": (False, "has a norm behind every expert"),
}


def why_not(experts: nn.Module) -> str | None:
    """Why an experts module of transformers cannot run on ``moe_mlp``, or None."""
    from transformers.integrations import moe

    for flag, (wanted, why) in _LAYOUT.items():
        if bool(getattr(experts, flag, wanted)) != wanted:
            return f"{type(experts).__name__} {why}"
    if type(experts)._apply_gate is not moe._default_apply_gate:
        return f"{type(experts).__name__} gates in a way of its own"
    if type(experts.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"{type(experts).__name__} activates with {type(experts.act_fn).__name__}, not SiLU"
    return None


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls with an experts module as ``self``; ``[T, H]`` in and out.

    Parametrised weights (LoRA on the experts) arrive as the sum, and their gradient goes on through
    it. Under expert parallelism ids from ``E`` on mark experts of other ranks: they add nothing.
    """
    reason = why_not(self)
    if reason is not None:
        raise ValueError(
            f"experts_implementation={NAME!r}: {reason}; use 'grouped_mm' for this model"
        )
    return moe_mlp(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        **getattr(self, _OPTIONS, {}),
    )


def register() -> None:
    """Make ``experts_implementation="qlkernels"`` known to transformers. Changes no model."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that look their forward up in transformers' experts interface, by name."""
    for name, module in model.named_modules():
        if hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed"):
            yield name, module


def enable(
    model: nn.Module, *, chunk_tokens: int | None = None, recompute: bool = False
) -> nn.Module:
    """Run every expert layer of ``model`` on ``moe_mlp``.

    Args:
        model: a transformers model, or a module that holds one. Models that share its config object
            change with it.
        chunk_tokens, recompute: as in ``moe_mlp``.

    Returns:
        ``model``.

    Raises:
        ValueError: it has no expert layers, or some cannot run on ``moe_mlp``, with the reason;
            then nothing has changed.
    """
    found = list(experts_modules(model))
    if not found:
        raise ValueError(
            f"enable: {type(model).__name__} has no experts that transformers dispatches "
            "(a mixture-of-experts model of transformers >= 5.5 has)"
        )
    for name, module in found:
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"enable: {name} cannot run on moe_mlp: {reason}")
    register()
    before = getattr(model, _PREVIOUS, {})  # enabled twice: the first one knows
    for _, module in found:
        config = module.config
        before.setdefault(id(config), (config, config._experts_implementation))
        config._experts_implementation_internal = NAME
        setattr(module, _OPTIONS, dict(chunk_tokens=chunk_tokens, recompute=recompute))
    setattr(model, _PREVIOUS, before)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Give ``model`` back the experts implementation it had before ``enable``."""
    for config, previous in getattr(model, _PREVIOUS, {}).values():
        config._experts_implementation_internal = previous
    for _, module in experts_modules(model):
        if hasattr(module, _OPTIONS):
            delattr(module, _OPTIONS)
    if hasattr(model, _PREVIOUS):
        delattr(model, _PREVIOUS)
    return model
