"""Answers from a transformers model in this process: a shared prompt is read and kept once.

Prompts are taken in sorted order, so that those with a common beginning are neighbours. Each run of
neighbours is a family: its common prefix goes through the model once, and the keys and values of
that prefix exist once, whatever the number of prompts and answers; every row attends to them and to
its own tokens in one softmax. What the last family has read stays, so that the next reads only what
differs. Several families are written at the same time. Weights are the model's own, at every call.

    keys and values, at most:  max(cache_tokens, longest prompt)          of prefixes
                               max(cache_tokens, max_new_tokens) + rows * MAX_OWN_TOKENS
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from qwenlong.errors import InputError
from qwenlong.rollout.shared_prefix import ATTENTION, KeyValues, SharedPrefixes
from qwenlong.types import Turn

# A prompt joins a family while no prompt of it has more own tokens than this: they are copied for
# every answer, where the prefix is not.
MAX_OWN_TOKENS = 256


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
        max_rows: answers that are written at the same time; fewer where ``max_rows *
            max_new_tokens`` exceeds ``cache_tokens``.
        cache_tokens: prefix tokens, and answer tokens, whose keys and values are held at the same
            time; one prefix and one answer may be longer.
        prefill_tokens: prompt tokens that go through the model at once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_token_ids: Sequence[int] | None = None,
        max_rows: int = 64,
        cache_tokens: int = 131_072,
        prefill_tokens: int = 8192,
    ):
        if min(max_rows, cache_tokens, prefill_tokens) < 1:
            raise InputError(
                f"rollouts: max_rows is {max_rows}, cache_tokens {cache_tokens} and prefill_tokens "
                f"{prefill_tokens}; all must be at least 1."
            )
        self._model = model
        self._eos = _end_tokens(model, eos_token_ids)
        self._max_rows = max_rows
        self._cache_tokens = cache_tokens
        self._prefill_tokens = prefill_tokens
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
        max_rows = max(1, min(self._max_rows, self._cache_tokens // max_new_tokens))
        families = _families(prompts, max(1, max_rows // group_size))
        with self._generating():
            for wave in _waves(families, max_rows // group_size, self._cache_tokens):
                prefixes = [self._read_prefix(prompts[f.prompts[0]][: f.shared]) for f in wave]
                own = [[prompts[i][f.shared :] for i in f.prompts] for f in wave]
                # More answers than rows: the group is written in parts, over the same prefix.
                for first in range(0, group_size, max_rows):
                    answers = range(first, min(first + max_rows, group_size))
                    rows = [
                        _Row(index, answer, _uniforms(seed, index, answer, max_new_tokens))
                        for family in wave
                        for index in family.prompts
                        for answer in answers
                    ]
                    with self._shared_attention():
                        self._write(prefixes, own, rows, len(answers), max_new_tokens, temperature)
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
        """Evaluation mode and no gradients; keys and values of older weights forgotten."""
        was_training = self._model.training
        self._known = ([], [])
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._known = ([], [])
            self._model.train(was_training)

    @contextmanager
    def _shared_attention(self) -> Iterator[None]:
        """The model reads its keys and values from ``SharedPrefixes``."""
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)

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
        prefixes: list[KeyValues],
        own: list[list[list[int]]],
        rows: list[_Row],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        """Fill ``rows``: ``group_size`` for each prompt of each family, with own tokens ``own``."""
        device = next(self._model.parameters()).device
        prompts = [tokens for family in own for tokens in family]
        width = max(map(len, prompts))
        pads = torch.tensor([width - len(tokens) for tokens in prompts], device=device)
        ids = torch.tensor([[tokens[0]] * (width - len(tokens)) + tokens for tokens in prompts])
        state = SharedPrefixes(prefixes, [len(family) for family in own], pads)
        slots = (torch.arange(width, device=device) - pads[:, None]).clamp_min(0)
        positions = slots + state.shared()[:, None]
        logits = self._forward(ids.to(device), positions, state)  # [prompts, V]

        logits = logits.repeat_interleave(group_size, dim=0)
        state.repeat(group_size)
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
            positions = (state.shared() + width + step - state.pads)[:, None]
            logits = self._forward(tokens[:, None], positions, state)
        all_tokens = torch.stack(chosen, dim=1).long().tolist()  # -1 after an answer's end
        all_scores = torch.stack(scores, dim=1).tolist()
        for row, ids, logprobs in zip(rows, all_tokens, all_scores, strict=True):
            row.ids = [token for token in ids if token >= 0]
            row.logprobs = logprobs[: len(row.ids)]

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, state: SharedPrefixes
    ) -> torch.Tensor:
        """fp32 logits ``[rows, V]`` of the last token of ``ids [rows, S]``."""
        out = self._model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
            shared_prefixes=state,
        )
        state.tokens += ids.shape[1]
        return out.logits[:, -1].float()


# --- batches -----------------------------------------------------------------


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(different[0]) if len(different) else length


class _Family(NamedTuple):
    shared: int  # tokens that all prompts begin with
    prompts: list[int]  # indices, in sorted order of the prompts


def _families(prompts: list[list[int]], max_prompts: int) -> Iterator[_Family]:
    """Runs of prompts, in sorted order, with a common prefix that is nearly all of each.

    The last token of a prompt is always its own: its logits begin the answer.
    """
    family: list[int] = []
    shared = longest = 0
    for index in sorted(range(len(prompts)), key=lambda i: (prompts[i], i)):
        prompt = prompts[index]
        if family:
            common = min(shared, _common_length(prompts[family[0]], prompt), len(prompt) - 1)
            if len(family) < max_prompts and max(longest, len(prompt)) - common <= MAX_OWN_TOKENS:
                family.append(index)
                shared, longest = common, max(longest, len(prompt))
                continue
            yield _Family(shared, family)
        family, shared, longest = [index], len(prompt) - 1, len(prompt)
    if family:
        yield _Family(shared, family)


def _waves(
    families: Iterable[_Family], max_prompts: int, cache_tokens: int
) -> Iterator[list[_Family]]:
    """Families that are written together: within both limits, or one alone."""
    wave: list[_Family] = []
    for family in families:
        together = [*wave, family]
        fits = sum(len(f.prompts) for f in together) <= max_prompts
        if wave and not (fits and sum(f.shared for f in together) <= cache_tokens):
            yield wave
            together = [family]
        wave = together
    if wave:
        yield wave


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


def _plain_layer(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if getattr(layer, "is_sliding", False) or not hasattr(layer, "keys"):
        raise InputError(
            "rollouts: this model has layers that do not attend to the whole context; generate "
            "with a vLLM server."
        )
    return layer.keys, layer.values
