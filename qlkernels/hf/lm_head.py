"""The head and the loss of a transformers model in one pass: logits ``[B, S, V]`` are never stored.

``enable`` replaces ``forward`` of one model object. With labels, in training mode, it runs the
decoder, then ``linear_logprob`` on the rows that have a label, and gives the loss that the model's
own forward gives, without logits. With ``token_scores=True`` it gives the scores themselves, in any
mode. Every other call (generation, evaluation, labels with logits asked for) is the model's own.

The weight is read inside of ``forward``, on every call: sharding engines have it whole there, and
what wraps or replaces the head later is seen.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlkernels.linear_logprob import linear_logprob
from qlkernels.targets import IGNORED, targets_from_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose forward is decoder, head, scale or soft-cap of the logits, cross entropy, and the
# load-balancing loss of the router where there is one; and the name of the scale in their config
FAMILIES: dict[str, str | None] = {
    "cohere": "logit_scale",
    "gemma2": None,
    "llama": None,
    "mistral": None,
    "mixtral": None,
    "olmoe": None,
    "qwen2": None,
    "qwen2_moe": None,
    "qwen3": None,
    "qwen3_moe": None,
}
_PATCH = "_qlkernels_lm_head"  # on a model: its _Patch


@dataclass
class _Patch:
    previous: Callable | None  # the instance's own forward before ours; None: the class's
    function: Callable | None = None  # what we put in its place
    is_on: bool = True


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in ``model``, which peft, DDP or others may have wrapped."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"qlkernels.hf: model must be a module, got {type(model).__name__}")
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"qlkernels.hf: {type(model).__name__} holds no transformers model")
    return found


def why_not(model: PreTrainedModel) -> str | None:
    """Why the head of a transformers model cannot be ours, or None."""
    family = model.config.model_type
    if family not in FAMILIES:
        return f"{family} is not among {', '.join(sorted(FAMILIES))}"
    if not type(model).__name__.endswith("ForCausalLM"):
        return f"{type(model).__name__} is no causal language model"
    return None


def enable(model: nn.Module) -> nn.Module:
    """Compute the loss of ``model`` without its logits, until :func:`disable`.

    ``model(input_ids, labels=labels)`` in training mode gives the same loss and ``logits=None``.
    ``model(input_ids, labels=labels, token_scores=True, temperature=0.7)`` gives
    :class:`ScoredOutput` in training and evaluation. Loss functions set by the user, and calls with
    ``logits_to_keep``, go to the model's own forward.

    Args:
        model: a causal language model of transformers of one of ``FAMILIES``, or a module that
            wraps one. Nothing but its ``forward`` changes.

    Returns:
        ``model``.
    """
    found = transformers_model(model)
    reason = why_not(found)
    if reason is not None:
        raise ValueError(f"qlkernels.hf: lm_head cannot be applied: {reason}")
    patch = found.__dict__.get(_PATCH)
    if patch is not None:
        patch.is_on = True
        return model
    patch = found.__dict__[_PATCH] = _Patch(found.__dict__.get("forward"))
    own = type(found).forward
    names = [name for name in inspect.signature(own).parameters][1:]

    # keeps the signature, which generate and Trainer check their arguments against
    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return _forward(self, kwargs)

    patch.function = forward
    found.forward = MethodType(forward, found)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Give ``model`` back the forward that it had before :func:`enable`."""
    found = transformers_model(model)
    patch = found.__dict__.get(_PATCH)
    if patch is None:
        return model
    if getattr(found.__dict__.get("forward"), "__func__", None) is not patch.function:
        patch.is_on = False  # somebody wrapped ours since: it stays in the chain and passes on
        return model
    if patch.previous is None:
        del found.forward
    else:
        found.forward = patch.previous
    del found.__dict__[_PATCH]
    return model


# --- forward -----------------------------------------------------------------


def _forward(self: PreTrainedModel, kwargs: dict):
    patch: _Patch = self.__dict__[_PATCH]
    wants_scores = kwargs.pop("token_scores", False) if patch.is_on else False
    if wants_scores:
        return _scored(self, kwargs, kwargs.pop("temperature", 1.0))
    if patch.is_on and _is_plain_loss(self, kwargs):
        return _loss(self, kwargs)
    if patch.previous is not None:
        return patch.previous(**kwargs)
    return type(self).forward(self, **kwargs)


def _is_plain_loss(self: PreTrainedModel, kwargs: dict) -> bool:
    """Whether this call trains on the model's own cross entropy and needs nothing of the logits."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    keep = kwargs.get("logits_to_keep", 0)
    return (
        self.training
        and kwargs.get("labels") is not None
        and isinstance(keep, int)
        and keep == 0
        and kwargs.get("ignore_index", IGNORED) == IGNORED
        and kwargs.get("return_dict") is not False
        and not kwargs.get("fused_lm_head", False)  # TRL's own switch
        and self.loss_function is ForCausalLMLoss
    )


def _scored(self: PreTrainedModel, kwargs: dict, temperature):
    if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
        raise ValueError("qlkernels.hf: token_scores=True needs labels (or shift_labels)")
    loss, aux_loss, scores, _ = _scores(self, kwargs, temperature)
    return _output_class()(
        loss=loss,
        logprobs=scores.logprobs,
        entropy=scores.entropy,
        lse=scores.lse,
        aux_loss=aux_loss,
    )


def _loss(self: PreTrainedModel, kwargs: dict):
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    loss, aux_loss, _, decoded = _scores(self, kwargs, 1.0)
    common = dict(
        loss=loss,
        past_key_values=decoded.past_key_values,
        hidden_states=decoded.hidden_states,
        attentions=decoded.attentions,
    )
    if not hasattr(self, "router_aux_loss_coef"):
        return CausalLMOutputWithPast(**common)
    return MoeCausalLMOutputWithPast(
        **common, aux_loss=aux_loss, router_logits=decoded.router_logits
    )


def _scores(self: PreTrainedModel, kwargs: dict, temperature):
    """Loss, router loss or None, ``TokenScores`` of ``[B, S]``, and what the decoder returned."""
    kwargs = dict(kwargs)
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    for name in ("logits_to_keep", "ignore_index", "return_dict"):
        kwargs.pop(name, None)
    balances = False
    if hasattr(self, "router_aux_loss_coef"):
        balances = kwargs.get("output_router_logits")
        balances = self.config.output_router_logits if balances is None else balances
        kwargs["output_router_logits"] = balances
    decoded = self.base_model(**kwargs)

    weight, bias = _head_weights(self)
    hidden_states = decoded.last_hidden_state.to(weight.device)  # [B, S, H]; device_map may differ
    if shifted is None:
        targets, mask = targets_from_labels(labels.to(weight.device))
    else:
        shifted = shifted.to(weight.device)
        mask = shifted != IGNORED
        targets = torch.where(mask, shifted, 0)
    scale = FAMILIES[self.config.model_type]
    scores = linear_logprob(
        hidden_states,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=1.0 if scale is None else float(getattr(self.config, scale)),
        softcap=getattr(self.config, "final_logit_softcapping", None),
        row_mask=mask,
    )
    count = mask.sum() if num_items is None else num_items
    if isinstance(count, torch.Tensor):
        count = count.to(weight.device)
    loss = -scores.logprobs.sum() / count
    aux_loss = None
    if balances:
        balance = sys.modules[_own_class(self).__module__].load_balancing_loss_func
        aux_loss = balance(
            decoded.router_logits,
            self.num_experts,
            self.num_experts_per_tok,
            kwargs.get("attention_mask"),
        )
        loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
    return loss, aux_loss, scores, decoded


def _own_class(model: PreTrainedModel) -> type:
    """The class of the modeling file; FSDP2 puts one of its own in front."""
    return next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))


def _head_weights(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:  # peft trains a copy of the head
        active = [name for name in head.active_adapters if name in copies]
        head = head.original_module if head.disable_adapters or not active else copies[active[0]]
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"qlkernels.hf: the head is a {type(head).__module__}.{type(head).__name__}, which is "
            "not one matrix; leave the head out of the adapter's target_modules (modules_to_save "
            "works), or apply(model, lm_head=False)"
        )
    return head.weight, head.bias


@functools.cache
def _output_class() -> type:
    """:class:`ScoredOutput`; a function, because importing qlkernels loads no transformers."""
    from transformers.utils import ModelOutput

    @dataclass
    class ScoredOutput(ModelOutput):
        """Scores of every row ``[B, S]``, fp32, nats; row t scores the label at t + 1, and rows
        without one hold 0. ``loss`` is the mean negative log-probability over the labels (plus the
        weighted ``aux_loss`` of the router where it is asked for).
        """

        loss: torch.Tensor | None = None
        logprobs: torch.Tensor | None = None
        entropy: torch.Tensor | None = None
        lse: torch.Tensor | None = None
        aux_loss: torch.Tensor | None = None

    return ScoredOutput
