"""Attention of many rows over prefixes that groups of them share, and over tokens of their own.

Registered with transformers as ``ATTENTION``; a model that runs under that name takes its keys and
values from the ``SharedPrefixes`` passed to it as ``shared_prefixes=``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qwenlong.errors import InputError

ATTENTION = "qwenlong_shared_prefix"
# Elements of the largest block of attention scores, 256 MB in fp32; one query row may exceed it.
SCORE_ELEMENTS = 1 << 26

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # a layer: [1 or rows, Hkv, tokens, D] each


class SharedPrefixes:
    """Keys and values of the rows of a wave: a prefix for each family, and own tokens of each row.

    The rows of a family are neighbours. Own tokens are left-padded to one width: the first
    ``pads[r]`` slots of row r are empty.
    """

    def __init__(self, prefixes: list[KeyValues], sizes: list[int], pads: torch.Tensor):
        self.prefixes = prefixes
        self.sizes = sizes  # rows of each family
        self.pads = pads  # [rows]
        self.tokens = 0  # own tokens written, by every layer
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def shared(self) -> torch.Tensor:
        """``[rows]``: prefix tokens of each row."""
        lengths = [prefix[0][0].shape[2] if prefix else 0 for prefix in self.prefixes]
        return torch.tensor(
            [n for n, size in zip(lengths, self.sizes, strict=True) for _ in range(size)],
            device=self.pads.device,
        )

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in ``[rows, Hkv, S, D]`` of the newest tokens; return all own ones."""
        end = self.tokens + keys.shape[2]
        if layer not in self._own or self._own[layer][0].shape[2] < end:
            self._grow(layer, keys, values, max(end, 2 * self.tokens))
        own = self._own[layer]
        own[0][:, :, self.tokens : end] = keys
        own[1][:, :, self.tokens : end] = values
        return own[0][:, :, :end], own[1][:, :, :end]

    def _grow(self, layer: int, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Room for ``room`` own tokens in a layer; long answers are rare, so that it doubles."""
        wider = [t.new_empty(*t.shape[:2], room, t.shape[3]) for t in (keys, values)]
        for new, old in zip(wider, self._own.get(layer, ()), strict=False):
            new[:, :, : self.tokens] = old[:, :, : self.tokens]
        self._own[layer] = tuple(wider)

    def repeat(self, times: int) -> None:
        """Every row ``times`` times, neighbours of each other."""
        self.sizes = [times * size for size in self.sizes]
        self.pads = self.pads.repeat_interleave(times)
        self._own = {
            layer: tuple(part[:, :, : self.tokens].repeat_interleave(times, dim=0) for part in own)
            for layer, own in self._own.items()
        }

    def select(self, rows: torch.Tensor) -> None:
        """Keep ``rows``, indices in ascending order."""
        ends = np.cumsum(self.sizes)
        kept_before = np.searchsorted(rows.cpu().numpy(), ends)  # rows kept of all up to each
        self.sizes = np.diff(kept_before, prepend=0).tolist()
        self.pads = self.pads[rows]
        self._own = {layer: tuple(part[rows] for part in own) for layer, own in self._own.items()}


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    shared_prefixes: SharedPrefixes | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``[rows, S, Hq, D]`` from ``query [rows, Hq, S, D]``, family by family."""
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
        raise InputError(
            "rollouts: this model's attention has a window, a cap or sinks, which the embedded "
            "rollouts do not compute; generate with a vLLM server."
        )
    own_keys, own_values = shared_prefixes.append(module.layer_idx, key, value)
    parts, first = [], 0
    for prefix, size in zip(shared_prefixes.prefixes, shared_prefixes.sizes, strict=True):
        rows = slice(first, first + size)
        first += size
        if size:
            parts.append(
                _attend(
                    query[rows],
                    own_keys[rows],
                    own_values[rows],
                    prefix[module.layer_idx] if prefix else None,
                    shared_prefixes.pads[rows],
                    scaling,
                )
            )
    return torch.cat(parts), None


def _attend(
    query: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    pads: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """``[rows, S, Hq, D]`` of one family: a softmax over the prefix and the own tokens together.

    Args:
        query: ``[rows, Hq, S, D]``.
        own_keys, own_values: ``[rows, Hkv, own, D]``; the last S are those of the queries.
        prefix: keys and values ``[1, Hkv, shared, D]`` of all rows, or None.
        pads: ``[rows]``, empty own slots.
    """
    rows, heads, length, width = query.shape
    kv_heads, own = own_keys.shape[1], own_keys.shape[2]
    repeats = heads // kv_heads
    shared = prefix[0].shape[2] if prefix is not None else 0
    out = query.new_empty(rows, length, heads, own_values.shape[3])
    step = max(1, SCORE_ELEMENTS // (rows * heads * (shared + own)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = query[:, :, start:stop].reshape(rows, kv_heads, repeats * (stop - start), width)
        scores = (part @ own_keys.transpose(2, 3)).float()  # [rows, Hkv, repeats * part, own]
        allowed = _own_mask(pads, own - length + start, stop - start, own)
        scores = scores.view(rows, kv_heads, repeats, -1, own)
        scores = scores.masked_fill(~allowed[:, None, None], float("-inf")).flatten(2, 3)
        if shared:
            by_head = part.transpose(0, 1).reshape(kv_heads, -1, width)
            found = (by_head @ prefix[0][0].transpose(1, 2)).float()
            found = found.view(kv_heads, rows, -1, shared).transpose(0, 1)
            scores = torch.cat([scores, found], dim=-1)
        weights = (scores * scaling).softmax(dim=-1).to(own_values.dtype)
        mixed = weights[..., :own] @ own_values
        if shared:
            by_head = weights[..., own:].transpose(0, 1).reshape(kv_heads, -1, shared)
            found = by_head @ prefix[1][0]  # [Hkv, rows * repeats * part, D]
            mixed = mixed + found.view(kv_heads, rows, -1, found.shape[-1]).transpose(0, 1)
        mixed = mixed.view(rows, kv_heads, repeats, stop - start, -1)
        out[:, start:stop] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


def _own_mask(pads: torch.Tensor, first: int, count: int, own: int) -> torch.Tensor:
    """``[rows, count, own]``: what query slot ``first + i`` sees of the own slots.

    A padded slot sees itself, so that its softmax is over something; nobody else sees it.
    """
    slots = torch.arange(own, device=pads.device)
    queries = slots[first : first + count, None]  # [count, 1]
    causal = (slots <= queries) & (slots >= pads[:, None, None])
    return causal | (slots == queries)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
