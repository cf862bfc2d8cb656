"""Attention of a transformers model: packed groups, packed sequences and plain causal batches.

A model names its attention in its config; under that name transformers looks up a function that
makes the mask, once a forward, and a function that attends, once a layer. We register both. What
the mask function returns reaches every layer as ``attention_mask``, so it carries the layout: an
argument of the layer, it is also there when gradient checkpointing runs the layer again, long after
the block in which the forward ran.

The name we register tells what it replaced, and everything that is not ours goes there: a model
under our name behaves as before outside of a block.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qlkernels.attention import attention, choose_backend, prefix_attention
from qlkernels.prefix_group import PackedGroups

# Families whose attention is softmax(scale q k) v over all earlier tokens, and nothing else
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_GROUPS, _ALL = "qlkernels-groups", "qlkernels"  # first word of a registered name


@dataclass(frozen=True, eq=False)
class _Groups:
    """Stands for the mask: rows are those of ``layout``."""

    layout: PackedGroups
    backend: str
    deterministic: bool


@dataclass(frozen=True, eq=False)
class _Sequences:
    """Stands for the mask: causal, sequences of these lengths behind each other."""

    cu_seqlens: torch.Tensor  # [B + 1] int32
    lengths: tuple[int, ...]


_current: contextvars.ContextVar[_Groups | None] = contextvars.ContextVar(
    "qlkernels_groups", default=None
)

# --- what transformers calls -------------------------------------------------


def _make_mask(previous: str, takes_all: bool, **arguments):
    """Registered as the mask function; the arguments are those of transformers'."""
    groups = _current.get()
    if groups is not None:
        return groups
    if takes_all and _is_causal(arguments):
        return _sequences(**arguments)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    # an attention without a mask function of its own gets none, as transformers would do
    if previous not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[previous](**arguments)


def _is_causal(arguments: dict) -> bool:
    """Whether rows and keys are the same tokens, with no padding and no mask of the caller's."""
    return (
        arguments.get("attention_mask") is None
        and arguments["q_length"] == arguments["kv_length"]
        and not arguments.get("use_vmap", False)
        and (arguments.get("allow_is_causal_skip", True) or arguments["batch_size"] == 1)
    )


def _sequences(
    *, batch_size, q_length, mask_function, allow_is_causal_skip=True, device=None, **_rest
):
    """The lengths of packed sequences, read once a forward, or those of a plain batch."""
    if allow_is_causal_skip:
        lengths = (q_length,) * batch_size
    else:
        # positions that start again: a row that does not see the row before it begins a sequence
        rows = torch.arange(1, q_length, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        starts = (~mask_function(zero, zero, rows, rows - 1)).nonzero().flatten().tolist()
        edges = [0, *(row + 1 for row in starts), q_length]
        lengths = tuple(b - a for a, b in zip(edges, edges[1:], strict=False))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return _Sequences(offsets, lengths)


def _attend(
    previous: str,
    backend: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
):
    """Registered as the attention: q ``[B, Hq, S, D]``, k and v ``[B, Hkv, S, D]`` to
    ``[B, S, Hq, D]``.
    """
    if not isinstance(attention_mask, _Groups | _Sequences):
        function = _previous_attention(previous, module)
        return function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    wanted = {name: options.get(name) for name in ("softcap", "s_aux", "position_bias")}
    wanted["sliding_window"] = options.get("sliding_window")
    wanted["dropout"] = dropout or None
    for name, value_ in wanted.items():
        if value_ is not None:
            raise ValueError(f"qlkernels.hf: attention with {name} = {value_!r} is not supported")
    batch, _, rows, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [T, H, D]
    if isinstance(attention_mask, _Groups):
        out = prefix_attention(
            q, k, v, attention_mask.layout, softmax_scale=scaling, backend=attention_mask.backend,
            deterministic=attention_mask.deterministic,
        )  # fmt: skip
    else:
        lengths = attention_mask.lengths
        out = attention(
            q, k, v, cu_seqlens=attention_mask.cu_seqlens.to(q.device), max_seqlen=max(lengths),
            lengths=lengths, softmax_scale=scaling, backend=backend,
        )  # fmt: skip
    return out.unflatten(0, (batch, rows)), None


def _previous_attention(previous: str, module: nn.Module) -> Callable:
    """The function that ``previous`` names. Each modeling file keeps its own eager one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if previous != "eager":
        return ALL_ATTENTION_FUNCTIONS[previous]
    for cls in type(module).__mro__:  # FSDP2 puts a class of its own in front
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"qlkernels.hf: no eager attention found for {type(module).__name__}")


# --- the model -----------------------------------------------------------------


def _supported_model(model: nn.Module):
    """The transformers model in ``model``, which may be wrapped; refused where its attention is
    another.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"qlkernels.hf: model must be a module, got {type(model).__name__}")
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"qlkernels.hf: {type(model).__name__} holds no transformers model")
    config, family = found.config, found.config.model_type
    reason = None
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reason = "its attention scores have a soft-cap"
    elif getattr(config, "alibi", False):
        reason = "its attention has ALiBi biases"
    elif set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        others = sorted(set(config.layer_types) - {"full_attention"})
        reason = f"it has layers of {', '.join(others)}"
    elif family not in FAMILIES:
        reason = "nobody has checked that its attention is plain"
    if reason is not None:
        raise ValueError(
            f"qlkernels.hf: {family} ({type(found).__name__}) is not supported: {reason}; "
            f"supported are {', '.join(FAMILIES)} with full attention in every layer"
        )
    return found


def _switch(model, kind: str, backend: str) -> None:
    """Register our functions under a name that tells what they replace; the model takes it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    previous = _replaced(model) or model.config._attn_implementation or "sdpa"
    name = f"{kind}:{backend}:{previous}"
    AttentionInterface.register(name, partial(_attend, previous, backend))
    AttentionMaskInterface.register(name, partial(_make_mask, previous, kind == _ALL))
    model.config._attn_implementation = name


def _replaced(model) -> str | None:
    """What our name in the config stands before, or None where the name is not ours."""
    kind, _, rest = (model.config._attn_implementation or "").partition(":")
    return rest.partition(":")[2] if kind in (_GROUPS, _ALL) else None


def enable(model: nn.Module, *, backend: str = "auto") -> None:
    """Run the model's causal attention on :func:`qlkernels.attention`, until :func:`disable`.

    Plain batches without padding and packed ones (one row, positions that start again) are ours,
    forward and backward; the lengths of packed ones are read from the device once a forward.
    Padded batches and decoding with a cache go to the attention that the model had.

    Args:
        model: a transformers model of one of ``FAMILIES``, or a module that wraps one.
        backend: as in :func:`qlkernels.attention.choose_backend`.
    """
    found = _supported_model(model)
    if backend != "auto":
        weight = next(found.parameters())
        choose_backend(weight.device, weight.dtype, _head_dim(found.config), backend=backend)
    _switch(found, _ALL, backend)


def disable(model: nn.Module) -> None:
    """Give the model back the attention that it had before :func:`enable` or
    :func:`packed_groups`; nothing to do where it has not been changed.
    """
    found = _supported_model(model)
    previous = _replaced(found)
    if previous is not None:
        found.config._attn_implementation = previous


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@contextlib.contextmanager
def packed_groups(
    model: nn.Module, layout: PackedGroups, *, backend: str = "auto", deterministic: bool = True
) -> Iterator[None]:
    """Inside the block, ``model(layout.input_ids[None])`` runs the packed groups.

    Every row gets the hidden state, and so the logits, that it has in its full sequence (prompt and
    answer); gradients are the sums over those sequences, prompts counted once a group. Positions
    are those of the layout; there is no mask to pass and no cache. The backward may run after the
    block, with gradient checkpointing too: the model keeps our name for its attention until
    :func:`disable`, and behaves as before outside of blocks.

    A router's load-balancing loss counts every token of the packed rows once, prompts too.

    Args:
        model: a transformers model of one of ``FAMILIES``, or a module that wraps one.
        layout: from :func:`qlkernels.pack_groups`, on the device of the model.
        backend: as in :func:`qlkernels.attention.choose_backend`.
        deterministic: as in :func:`qlkernels.prefix_attention`.
    """
    found = _supported_model(model)
    if not isinstance(layout, PackedGroups):
        raise TypeError(
            f"packed_groups: layout must come from pack_groups, got {type(layout).__name__}"
        )
    if not len(layout.input_ids):
        raise ValueError(
            "packed_groups: the layout has no rows: prompts have one token and answers none"
        )
    if _replaced(found) is None:
        _switch(found, _GROUPS, "auto")
    groups = _Groups(layout, backend, deterministic)
    tokens: list[contextvars.Token] = []

    def before(_module, args, kwargs):
        kwargs = _checked_arguments(layout, args, kwargs)
        tokens.append(_current.set(groups))
        return (), kwargs

    def after(*_arguments):
        if tokens:  # empty where the arguments were refused
            _current.reset(tokens.pop())

    decoder = found.base_model
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked_arguments(layout: PackedGroups, args: tuple, kwargs: dict) -> dict:
    """The decoder's arguments, completed by the layout; refused where they contradict it."""
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("attention_mask", "past_key_values", "use_cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"packed_groups: {name} has no place in packed groups; leave it out")
    T = len(layout.input_ids)
    for name in ("input_ids", "inputs_embeds"):
        x = kwargs.get(name)
        if x is not None and tuple(x.shape[:2]) != (1, T):
            raise ValueError(
                f"packed_groups: {name} is {tuple(x.shape)}, but the layout has {T} rows; pass "
                "layout.input_ids[None]"
            )
    positions = layout.position_ids[None]
    given = kwargs.get("position_ids")
    if given is not None and given.data_ptr() != positions.data_ptr():
        if given.shape != positions.shape or not torch.equal(given.to(positions.device), positions):
            raise ValueError("packed_groups: position_ids must be layout.position_ids[None]")
    return {**kwargs, "position_ids": positions, "use_cache": False}
