"""Our ops inside transformers models, through transformers' own registries.

qlkernels.hf.apply(model)      # experts, attention, head and loss
qlkernels.hf.undo(model)       # as it was
qlkernels.hf.supported()       # which families, and what of them
"""

from __future__ import annotations

from torch import nn

from qlkernels.hf import attention as _attention
from qlkernels.hf import experts as _experts
from qlkernels.hf import lm_head as _lm_head
from qlkernels.hf.attention import packed_groups

PARTS = ("moe", "attention", "lm_head")
_MOE_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def supported() -> dict[str, tuple[str, ...]]:
    """What :func:`apply` does for each family: ``model_type`` to some of ``PARTS``.

    Each pair is compared with the untouched model in the tests. Experts of other families with the
    same layout run too (``qlkernels.hf.experts``).
    """
    families = {
        "moe": _MOE_FAMILIES,
        "attention": _attention.FAMILIES,
        "lm_head": tuple(_lm_head.FAMILIES),
    }
    names = sorted({name for found in families.values() for name in found})
    return {name: tuple(part for part in PARTS if name in families[part]) for name in names}


def apply(
    model: nn.Module, moe: bool = True, attention: bool = True, lm_head: bool = True
) -> nn.Module:
    """Run the expert layers, the attention and the head with its loss on our ops.

    Weights, their names, ``generate``, ``save_pretrained``, gradient checkpointing and peft are as
    before, and :func:`undo` takes everything back. Apply before or after peft and other wrappers,
    and before ``torch.compile``.

    Args:
        model: a transformers model, or a module that wraps one.
        moe: expert layers on :func:`qlkernels.moe_mlp`; nothing to do where there are none.
        attention: causal attention on :func:`qlkernels.attention`.
        lm_head: in training, the loss from hidden states without logits; see
            :func:`qlkernels.hf.lm_head.enable`.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: a part cannot be applied, with the reason and the argument that leaves it out;
            then nothing has changed.
    """
    found = _lm_head.transformers_model(model)
    experts = list(_experts.experts_modules(found)) if moe else []
    for name, module in experts:
        reason = _experts.why_not(module)
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's calls on
            reason = "its forward has been replaced (by Liger? Leave swiglu out of it)"
        if reason is not None:
            raise ValueError(f"apply: {name}: {reason}; pass moe=False")
    if attention:
        try:
            _attention._supported_model(found)
        except ValueError as error:
            raise ValueError(f"apply: {error}; pass attention=False") from None
    if lm_head:
        reason = _lm_head.why_not(found)
        if reason is not None:
            raise ValueError(f"apply: no head and loss of ours: {reason}; pass lm_head=False")

    if experts:
        _experts.enable(found)
    if attention:
        _attention.enable(found)
    if lm_head:
        _lm_head.enable(found)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Take back what :func:`apply` changed; nothing to do where nothing was.

    Returns:
        ``model``, computing what it computed before.
    """
    found = _lm_head.transformers_model(model)
    _experts.disable(found)
    if _attention._replaced(found) is not None:
        _attention.disable(found)
    _lm_head.disable(found)
    return model
