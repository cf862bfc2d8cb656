"""Reading sequences with a model: layer by layer where the scorer knows the family, else window by
window through transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from transformers import AutoConfig, DynamicCache

from qlkernels._scores import TokenScores
from qlkernels.linear_logprob import linear_logprob
from qlkernels.prefix_group import PackedGroups
from qlkernels.scorer import Decoder, NotEnoughMemory, Scorer
from qlkernels.scorer.memory import available_bytes
from qwenlong.errors import InputError
from qwenlong.models import DTYPES, CausalLM, load_causal_lm, pick_device

# Tokens of one forward pass of transformers; attention's mask is [chunk, window].
PREFILL_TOKENS = {"cpu": 1024, "cuda": 4096}
# Windows or groups that share a pass of the scorer, in tokens. More reads the weights less often.
PASS_TOKENS = {"cpu": 8192, "cuda": 131_072}

Item = TypeVar("Item")
OnRead = Callable[[float, int, int], None]  # (tokens read more, layers done, layers in all)


class Part(NamedTuple):
    """A sequence to read, and the first of its rows whose score is wanted."""

    ids: torch.Tensor  # [L] int64
    first_row: int


class Reader(Protocol):
    """A model that scores sequences."""

    V: int
    context_tokens: int | None
    device: torch.device
    dtype: torch.dtype

    def describe(self) -> dict[str, Any]:
        """How the model is run, for scores.json."""

    def read(self, parts: list[Part], temperature: float, on_read: OnRead) -> Iterator[TokenScores]:
        """Scores of rows ``[first_row, L - 1)`` of every part, on the host."""


class TransformersReader:
    """One sequence at a time through the model's own forward, with its cache of keys and values."""

    def __init__(
        self,
        lm: CausalLM,
        *,
        chunk_tokens: int | None = None,
        impl: str = "auto",
        prefill_tokens: int | None = None,
    ):
        self.lm, self.chunk_tokens, self.impl = lm, chunk_tokens, impl
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS[lm.device.type]
        self.V, self.context_tokens = lm.lm_head_weight.shape[0], lm.context_tokens
        self.device, self.dtype = lm.device, lm.lm_head_weight.dtype

    def describe(self) -> dict[str, Any]:
        attention = self.lm.model.config.get_text_config()._attn_implementation
        return {"reader": "transformers", "attention": attention, "weights": "resident"}

    @torch.inference_mode()
    def read(self, parts: list[Part], temperature: float, on_read: OnRead) -> Iterator[TokenScores]:
        for ids, first_row in parts:
            ids = ids.to(self.device)
            found = []
            for row, hidden_states in self._hidden_states(ids[:-1]):
                skip = max(0, first_row - row)  # rows of the overlap: read, not scored
                on_read(len(hidden_states), 1, 1)
                if skip >= len(hidden_states):
                    continue
                rows = slice(row + skip, row + len(hidden_states))
                scores = linear_logprob(
                    hidden_states[skip:],
                    self.lm.lm_head_weight,
                    ids[rows.start + 1 : rows.stop + 1],
                    bias=self.lm.lm_head_bias,
                    temperature=temperature,
                    logit_scale=self.lm.logit_scale,
                    softcap=self.lm.softcap,
                    chunk_tokens=self.chunk_tokens,
                    impl=self.impl,
                )
                found.append([field.cpu() for field in scores])
            yield TokenScores(*(torch.cat(fields) for fields in zip(*found, strict=True)))

    def _hidden_states(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield hidden states ``[rows, H]`` of ``ids [L]`` in parts, each with its first row."""
        step = self.prefill_tokens
        if not self.lm.can_prefill_in_chunks or len(ids) <= step:
            yield 0, self.lm.base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            return
        cache = DynamicCache(config=self.lm.model.config)
        for start in range(0, len(ids), step):
            part = ids[None, start : start + step]
            output = self.lm.base(input_ids=part, past_key_values=cache, use_cache=True)
            yield start, output.last_hidden_state[0]


class ScorerReader:
    """Packed sequences through ``qlkernels.scorer``."""

    def __init__(self, scorer: Scorer, *, pass_tokens: int | None = None):
        self.scorer = scorer
        self.V, self.context_tokens = scorer.decoder.V, scorer.decoder.max_positions
        self.device, self.dtype = scorer.device, scorer.dtype
        self.pass_tokens = pass_tokens or self._tokens_that_fit()

    def describe(self) -> dict[str, Any]:
        return {
            "reader": "qlkernels.scorer",
            "attention": self.scorer.attention,
            "weights": "streamed" if self.scorer.is_streaming else "resident",
        }

    def _tokens_that_fit(self) -> int:
        """Half as many as there is room for, so that a pass of several items is never refused."""
        tokens = PASS_TOKENS[self.device.type]
        room = available_bytes(self.device)
        while room is not None and tokens > 1024:
            if 2 * self.scorer.estimate(tokens, is_one_sequence=False).activations <= room:
                break
            tokens //= 2
        return tokens

    def read(self, parts: list[Part], temperature: float, on_read: OnRead) -> Iterator[TokenScores]:
        for group in packed(parts, lambda part: len(part.ids), self.pass_tokens):
            lengths = torch.tensor([len(part.ids) for part in group])
            cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            wanted = [torch.arange(len(ids) - 1) >= first for ids, first in group]
            mask = torch.cat([torch.cat([w, w.new_zeros(1)]) for w in wanted])
            scores = self.scorer.score(
                torch.cat([part.ids for part in group]),
                cu_seqlens=cu_seqlens,
                positions=mask,
                temperature=temperature,
                # the last token of a sequence is only predicted
                on_layer=self._per_layer(int(lengths.sum()) - len(group), on_read),
            )
            scores = TokenScores(*(field.cpu() for field in scores))
            for start, (ids, first_row) in zip(cu_seqlens.tolist(), group, strict=False):
                rows = slice(start + first_row, start + len(ids) - 1)
                yield TokenScores(*(field[rows] for field in scores))

    def read_groups(self, layout: PackedGroups, temperature: float, on_read: OnRead) -> TokenScores:
        """Scores ``[T]`` of the answer rows of a layout, on the host."""
        per_layer = self._per_layer(len(layout.input_ids), on_read)
        scores = self.scorer.score(
            layout, positions="answers", temperature=temperature, on_layer=per_layer
        )
        return TokenScores(*(field.cpu() for field in scores))

    @staticmethod
    def _per_layer(tokens: int, on_read: OnRead) -> Callable[[int, int], None]:
        return lambda done, layers: on_read(tokens / layers, done, layers)


def packed(items: Iterable[Item], size: Callable[[Item], int], room: int) -> Iterator[list[Item]]:
    """Consecutive items whose sizes sum to at most ``room``; a larger one comes alone."""
    batch, filled = [], 0
    for item in items:
        if batch and filled + size(item) > room:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size(item)
    if batch:
        yield batch


def load_reader(
    folder: str | Path,
    *,
    dtype: str,
    device: str,
    impl: str,
    attention: str,
    stream_weights: bool,
    chunk_tokens: int | None,
    needs_scorer: str | None,
    on_layer_loaded: Callable[[int, int], None] | None = None,
) -> Reader:
    """Load a model for scoring.

    Args:
        folder: of a transformers causal language model.
        dtype, device, impl: as in ``load_causal_lm``.
        attention, stream_weights, chunk_tokens: as in ``Scorer``.
        needs_scorer: an option that only the scorer knows, or None.
        on_layer_loaded: called with (layers loaded, layers in all).

    Raises:
        InputError: the folder cannot be used, or an option does not fit the model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; choose auto, {', '.join(DTYPES)}.")
    target = pick_device(device)
    why = _why_not_scorer(folder)
    if why is not None:
        if needs_scorer is not None:
            raise InputError(f"{needs_scorer} cannot be used with {folder}: {why}.")
        lm = load_causal_lm(folder, dtype=dtype, device=device, impl=impl)
        return TransformersReader(lm, chunk_tokens=chunk_tokens, impl=impl)
    wanted = DTYPES.get(dtype) or (torch.float32 if target.type == "cpu" else None)
    try:
        with _quiet():
            scorer = Scorer.from_folder(
                folder,
                stream_weights=stream_weights,
                dtype=wanted,
                device=target,
                attention=attention,
                chunk_tokens=chunk_tokens,
                impl=impl,
                on_layer_loaded=on_layer_loaded,
            )
    except NotEnoughMemory as error:
        raise InputError(in_options(error)) from error
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"the model in {folder} cannot be loaded: {_reason(error)}.") from error
    return ScorerReader(scorer)


def _why_not_scorer(folder: str | Path) -> str | None:
    """Why the scorer does not compute this model, or None. What is no model at all is left to
    ``load_causal_lm``, which says so.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception:  # of many kinds; load_causal_lm names them
        return "it is no model that can be read"
    architectures = config.architectures or ["ForCausalLM"]
    if not all(name.endswith("ForCausalLM") for name in architectures):
        return f"it holds {', '.join(architectures)}"
    try:
        Decoder.of_config(config)
    except ValueError as error:
        return _reason(error)
    return None


def in_options(error: Exception) -> str:
    """A message of the scorer in the words of the command line."""
    text = _reason(error)
    text = text.replace("stream_weights=True", "--stream-weights")
    text = text.replace("device='cpu'", "--device cpu").replace("chunk_tokens=", "--chunk-tokens ")
    return text + "."


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__).rstrip(".")
    return text.removeprefix("Scorer: ")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A meta model is made only for its rotary embedding; transformers says much about it."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
