"""Answers from a transformers model in this process: a shared prompt is read and kept once.

Prompts are taken in sorted order, so that those with a common beginning are neighbours. Each run of
neighbours is a batch: its common prefix goes through the model once, and the keys and values of
that prefix exist once, whatever the number of prompts and answers; every row attends to them and to
its own tokens in one softmax. What the last batch has read stays, so that the next reads only what
differs. Weights are the model's own, at every call.

    keys and values: (longest prompt + rows * (own tokens of a prompt + max_new_tokens)) entries
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from qwenlong.errors import InputError
from qwenlong.types import Turn

ATTENTION = "qwenlong_shared_prefix"
# A prompt joins a batch while no prompt of it has more own tokens than this: they are copied for
# every answer, where the prefix is not.
MAX_OWN_TOKENS = 256
# Elements of the largest block of attention scores, 256 MB in fp32; one query row may exceed it.
SCORE_ELEMENTS = 1 << 26

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # a layer: [1 or rows, Hkv, tokens, D] each


class EmbeddedRollouts:
    """Implements ``qwenlong.rollout.Rollouts`` for one process.

    Every answer draws from random numbers of its own, made from ``(seed, index of the prompt, index
    of the answer)``, so that they do not depend on which prompts are generated together; the
    log-probs then agree up to rounding.

    Args:
        model: a causal language model of transformers with plain attention in every layer; it may
            be the model that is trained. Evaluation mode holds while it generates.
        eos_token_ids: tokens that end an answer; None takes them from the model's generation
            config.
        max_rows: answers that are written at the same time.
        prefill_tokens: prompt tokens that go through the model at once.
        autocast_dtype: run the model under autocast to this dtype, as the trainer does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_token_ids: Sequence[int] | None = None,
        max_rows: int = 64,
        prefill_tokens: int = 8192,
        autocast_dtype: torch.dtype | None = None,
    ):
        if max_rows < 1 or prefill_tokens < 1:
            raise InputError(
                f"rollouts: max_rows is {max_rows} and prefill_tokens {prefill_tokens}; both must "
                "be at least 1."
            )
        self._model = model
        self._eos = _end_tokens(model, eos_token_ids)
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._autocast_dtype = autocast_dtype
        self._known: tuple[list[int], KeyValues] = ([], [])  # tokens read, and what they left

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Turn]]:
        """See ``Rollouts.generate``. Raises ``InputError`` where a prompt does not fit."""
        prompts = [[int(token) for token in prompt] for prompt in prompts]
        self._check(prompts, group_size, max_new_tokens, temperature)
        turns: list[list[Turn | None]] = [[None] * group_size for _ in prompts]
        with self._generating():
            for shared, batch in _batches(prompts, max(1, self._max_rows // group_size)):
                prefix = self._read_prefix(prompts[batch[0]][:shared])
                # More answers than rows: the group is written in parts, over the same prefix.
                for first in range(0, group_size, self._max_rows):
                    answers = range(first, min(first + self._max_rows, group_size))
                    rows = [
                        _Row(index, answer, _uniforms(seed, index, answer, max_new_tokens))
                        for index in batch
                        for answer in answers
                    ]
                    own = [prompts[index][shared:] for index in batch]
                    self._write(prefix, own, rows, len(answers), max_new_tokens, temperature)
                    for row in rows:
                        turns[row.prompt][row.answer] = row.turn(
                            prompts[row.prompt], temperature, self._eos
                        )
        return turns

    def sync_weights(self, model: torch.nn.Module, policy_step: int) -> None:
        """Copy the weights of ``model``, unless it is the model that generates."""
        if model is not self._model:
            self._model.load_state_dict(model.state_dict())

    def close(self) -> None:
        self._known = ([], [])

    # --- checks and settings --------------------------------------------------

    def _check(
        self, prompts: list[list[int]], group_size: int, max_new_tokens: int, temperature: float
    ) -> None:
        if group_size < 1 or max_new_tokens < 1:
            raise InputError(
                f"rollouts: group_size is {group_size} and max_new_tokens {max_new_tokens}; both "
                "must be at least 1."
            )
        if not 0.0 <= temperature < float("inf"):
            raise InputError(f"rollouts: temperature is {temperature}; it must be 0 or more.")
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"rollouts: prompt {index} has no tokens.")
            if context is not None and len(prompt) + max_new_tokens > context:
                raise InputError(
                    f"rollouts: prompt {index} has {len(prompt)} tokens and may get "
                    f"{max_new_tokens} more, but the model's context is {context}; shorten one of "
                    "them."
                )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Evaluation mode, no gradients, autocast; keys and values of older weights forgotten."""
        was_training = self._model.training
        device = next(self._model.parameters()).device.type
        self._known = ([], [])
        self._model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    device, self._autocast_dtype, enabled=self._autocast_dtype is not None
                ),
            ):
                yield
        finally:
            self._known = ([], [])
            self._model.train(was_training)

    # --- reading --------------------------------------------------------------

    def _read_prefix(self, tokens: list[int]) -> KeyValues:
        """Keys and values of ``tokens``, in the model's own attention; reuses what is known."""
        known_tokens, known = self._known
        n = _common_length(known_tokens, tokens)
        if n < len(tokens):
            cache = DynamicCache(config=self._model.config)
            for layer, (keys, values) in enumerate(known if n else ()):
                cache.update(keys[:, :, :n], values[:, :, :n], layer)
            known = []  # its memory goes to what follows
            self._known = ([], [])
            device = next(self._model.parameters()).device
            for start in range(n, len(tokens), self._prefill_tokens):
                ids = tokens[start : start + self._prefill_tokens]
                self._model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.arange(start, start + len(ids), device=device)[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            known = [_plain_layer(layer) for layer in cache.layers]
        else:
            known = [(keys[:, :, :n], values[:, :, :n]) for keys, values in known]
        self._known = (tokens, known)
        return known

    # --- writing --------------------------------------------------------------

    def _write(
        self,
        prefix: KeyValues,
        own: list[list[int]],
        rows: list[_Row],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        """Fill ``rows``: ``group_size`` of them for each prompt, whose own tokens are ``own``."""
        device = next(self._model.parameters()).device
        shared = prefix[0][0].shape[2] if prefix else 0
        width = max(map(len, own))
        pads = torch.tensor([width - len(tokens) for tokens in own], device=device)
        ids = torch.tensor([[tokens[0]] * (width - len(tokens)) + tokens for tokens in own])
        state = _SharedPrefix(prefix, pads, width)
        positions = (torch.arange(width, device=device) - pads[:, None]).clamp_min(0) + shared
        logits = self._forward(ids.to(device), positions, state)  # [prompts, V]

        logits = logits.repeat_interleave(group_size, dim=0)
        state.repeat(group_size, max_new_tokens - 1)
        uniforms = torch.from_numpy(np.stack([row.uniforms for row in rows])).to(device)
        ends = torch.tensor(sorted(self._eos), dtype=torch.long, device=device)
        alive = torch.arange(len(rows), device=device)  # rows of the batch that are written
        chosen, scores = [], []
        for step in range(max_new_tokens):
            tokens, logprobs = _choose(logits, uniforms[alive, step], temperature)
            everything = logits.new_full((2, len(rows)), -1.0, dtype=torch.float64)
            everything[0, alive], everything[1, alive] = tokens.double(), logprobs.double()
            chosen.append(everything[0])
            scores.append(everything[1])
            if step + 1 == max_new_tokens:
                break
            goes_on = ~torch.isin(tokens, ends)
            if not goes_on.all():  # the one synchronisation of a step
                kept = goes_on.nonzero()[:, 0]
                if len(kept) == 0:
                    break
                alive, tokens = alive[kept], tokens[kept]
                state.select(kept)
            positions = (shared + width + step - state.pads)[:, None]
            logits = self._forward(tokens[:, None], positions, state)
        all_tokens = torch.stack(chosen, dim=1).long().tolist()  # -1 after an answer's end
        all_scores = torch.stack(scores, dim=1).tolist()
        for row, ids, logprobs in zip(rows, all_tokens, all_scores, strict=True):
            row.ids = [token for token in ids if token >= 0]
            row.logprobs = logprobs[: len(row.ids)]

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, state: _SharedPrefix
    ) -> torch.Tensor:
        """fp32 logits ``[rows, V]`` of the last token of ``ids [rows, S]``."""
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(ATTENTION)
        try:
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                shared_prefix=state,
            )
        finally:
            self._model.set_attn_implementation(before)
        state.tokens += ids.shape[1]
        return out.logits[:, -1].float()


# --- batches -----------------------------------------------------------------


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(different[0]) if len(different) else length


def _batches(prompts: list[list[int]], max_prompts: int) -> Iterator[tuple[int, list[int]]]:
    """``(shared, indices)``: prompts with a common prefix of ``shared`` tokens, in sorted order.

    The last token of a prompt is always its own: its logits begin the answer.
    """
    batch: list[int] = []
    shared = longest = 0
    for index in sorted(range(len(prompts)), key=lambda i: (prompts[i], i)):
        prompt = prompts[index]
        if batch:
            common = min(shared, _common_length(prompts[batch[0]], prompt), len(prompt) - 1)
            if len(batch) < max_prompts and max(longest, len(prompt)) - common <= MAX_OWN_TOKENS:
                batch.append(index)
                shared, longest = common, max(longest, len(prompt))
                continue
            yield shared, batch
        batch, shared, longest = [index], len(prompt) - 1, len(prompt)
    if batch:
        yield shared, batch


def _uniforms(seed: int, prompt: int, answer: int, count: int) -> np.ndarray:
    """``count`` fp64 numbers in [0, 1) that belong to one answer."""
    source = np.random.SeedSequence((abs(seed), int(seed < 0), prompt, answer))
    return np.random.Generator(np.random.PCG64(source)).random(count)


@dataclass
class _Row:
    """One answer that is being written."""

    prompt: int
    answer: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def turn(self, prompt_ids: list[int], temperature: float, eos: frozenset[int]) -> Turn:
        return Turn(
            prompt_ids=prompt_ids,
            response_ids=self.ids,
            logprobs=self.logprobs if temperature > 0 else None,
            finish_reason="stop" if self.ids[-1] in eos else "length",
        )


def _choose(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[rows]`` and their log-probs ``[rows]`` fp32, from fp32 logits ``[rows, V]``.

    The token is where the cumulative probability, in fp64, first exceeds the uniform number.
    """
    if not torch.isfinite(logits.logsumexp(-1)).all():
        raise FloatingPointError(
            "rollouts: the model's logits are not finite; the weights have diverged, go back to an "
            "earlier checkpoint"
        )
    logprobs = (logits / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Below the total, so that a token of probability 0 at the end is never chosen.
        target = torch.minimum(
            uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
        )
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _end_tokens(model: torch.nn.Module, given: Sequence[int] | None) -> frozenset[int]:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = [given] if isinstance(given, int) else list(given or ())
    if not given:
        raise InputError("rollouts: the model names no end token; pass eos_token_ids.")
    return frozenset(int(token) for token in given)


# --- attention ---------------------------------------------------------------


def _plain_layer(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if getattr(layer, "is_sliding", False) or not hasattr(layer, "keys"):
        raise InputError(
            "rollouts: this model has layers that do not attend to the whole context; generate "
            "with a vLLM server."
        )
    return layer.keys, layer.values


class _SharedPrefix:
    """Keys and values of the rows of a batch: a prefix that is theirs in common, and their own.

    Own tokens are left-padded to one width: ``pads[r]`` first slots of row r are empty.
    """

    def __init__(self, prefix: KeyValues, pads: torch.Tensor, room: int):
        self.prefix = prefix
        self.pads = pads  # [rows]
        self.room = room  # own tokens that fit
        self.tokens = 0  # own tokens written, by every layer
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in ``[rows, Hkv, S, D]`` of the newest tokens; return all own ones."""
        if layer not in self._own:
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self._own[layer] = (keys.new_empty(shape), values.new_empty(shape))
        end = self.tokens + keys.shape[2]
        own = self._own[layer]
        own[0][:, :, self.tokens : end] = keys
        own[1][:, :, self.tokens : end] = values
        return own[0][:, :, :end], own[1][:, :, :end]

    def repeat(self, times: int, more_room: int) -> None:
        """Every row ``times`` times, neighbours of each other, with room for more tokens."""
        self.room += more_room
        self.pads = self.pads.repeat_interleave(times)
        for layer, own in self._own.items():
            wider = []
            for old in own:
                rows, heads, _, width = old.shape
                new = old.new_empty(rows * times, heads, self.room, width)
                new[:, :, : self.tokens] = old.repeat_interleave(times, dim=0)
                wider.append(new)
            self._own[layer] = tuple(wider)

    def select(self, rows: torch.Tensor) -> None:
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
    shared_prefix: _SharedPrefix | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``[rows, S, Hq, D]`` from ``query [rows, Hq, S, D]`` over the prefix and the own tokens."""
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
        raise InputError(
            "rollouts: this model's attention has a window, a cap or sinks, which the embedded "
            "rollouts do not compute; generate with a vLLM server."
        )
    own_keys, own_values = shared_prefix.append(module.layer_idx, key, value)
    rows, heads, length, width = query.shape
    kv_heads, own = own_keys.shape[1], own_keys.shape[2]
    repeats = heads // kv_heads
    prefix = shared_prefix.prefix[module.layer_idx] if shared_prefix.prefix else None
    shared = prefix[0].shape[2] if prefix else 0
    out = query.new_empty(rows, length, heads, own_values.shape[3])
    step = max(1, SCORE_ELEMENTS // (rows * heads * (shared + own)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = query[:, :, start:stop].reshape(rows, kv_heads, repeats * (stop - start), width)
        scores = [part @ own_keys.transpose(2, 3)]  # [rows, Hkv, repeats * part, own]
        if shared:
            by_head = part.transpose(0, 1).reshape(kv_heads, -1, width)
            found = by_head @ prefix[0][0].transpose(1, 2)  # [Hkv, rows * repeats * part, shared]
            scores.append(found.view(kv_heads, rows, -1, shared).transpose(0, 1))
        first = own - length + start  # the slot of query `start`
        allowed = _own_mask(shared_prefix.pads, first, stop - start, own)
        own_scores = (scores[0].float() * scaling).view(rows, kv_heads, repeats, -1, own)
        own_scores = own_scores.masked_fill(~allowed[:, None, None], float("-inf"))
        joined = torch.cat(
            [own_scores.flatten(2, 3), *(other.float() * scaling for other in scores[1:])], dim=-1
        )
        weights = joined.softmax(dim=-1).to(own_values.dtype)
        mixed = weights[..., :own] @ own_values
        if shared:
            by_head = weights[..., own:].transpose(0, 1).reshape(kv_heads, -1, shared)
            found = by_head @ prefix[1][0]  # [Hkv, rows * repeats * part, D]
            mixed = mixed + found.view(kv_heads, rows, -1, found.shape[-1]).transpose(0, 1)
        mixed = mixed.view(rows, kv_heads, repeats, stop - start, -1)
        out[:, start:stop] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out, None


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
