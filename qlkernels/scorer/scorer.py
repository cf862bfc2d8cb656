"""The public class: a model, a way to hold its weights, and passes over packed rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlkernels._dispatch import pick_impl
from qlkernels._scores import TokenScores
from qlkernels.attention import attention, choose_backend, prefix_attention, why_not
from qlkernels.linear_logprob import linear_logprob
from qlkernels.prefix_group import PackedGroups
from qlkernels.router_replay import RoutingRecord, RoutingRecorder
from qlkernels.scorer.decoder import Decoder, find_parts, named_layer
from qlkernels.scorer.elementwise import rms_norm
from qlkernels.scorer.layer import Attend, Pass, run_layer
from qlkernels.scorer.loading import load_folder, stream_model
from qlkernels.scorer.memory import (
    CHUNK_TOKENS,
    MemoryEstimate,
    NotEnoughMemory,
    available_bytes,
    estimate_memory,
    gigabytes,
    what_would_fit,
)
from qlkernels.scorer.rows import Rows, rows_of
from qlkernels.scorer.weights import ResidentWeights, StreamedWeights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Scorer:
    """Scores tokens under a transformers decoder, layer by layer over packed rows.

    Families: Llama, Qwen2, Qwen3 and Qwen3-MoE with full attention. The weights are used where they
    are; with ``stream_weights`` they move to host memory and come to the device one layer at a
    time. Every pass runs without gradient.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stream_weights: bool = False,
        device: torch.device | str | None = None,
        attention: str | Sequence[str] = "auto",
        impl: str = "auto",
        chunk_tokens: int | None = None,
        memory_bytes: int | None = None,
    ):
        """
        Args:
            model: a ``...ForCausalLM`` of transformers, in one dtype, fp32, bf16 or fp16.
            stream_weights: keep the layers in host memory (page-locked where ``device`` is a GPU;
                the model's own parameters move there, so that there is one copy) and two of them
                on the device.
            device: where passes run. By default the model's, or with ``stream_weights`` the GPU
                where there is one.
            attention: ``"auto"`` for the fastest backend that can run, a name of
                ``qlkernels.attention``, or an order of names of which the first that can run is
                taken. The attribute ``attention`` says which it is.
            impl: of ``linear_logprob``.
            chunk_tokens: rows that projections, MLP and experts work on at a time; by default
                32,768 on a GPU and 1,024 on the CPU.
            memory_bytes: the most that a pass may take beside the weights; by default what the
                device has free when it starts. A pass whose estimate is larger does not start.

        Raises:
            ValueError: a family, option or structure that is not supported, by name.
        """
        self.decoder = Decoder.of_config(model.config)
        base, head = find_parts(model)
        if head.bias is not None:
            raise ValueError("Scorer: a head with a bias is not supported")
        dtype, where = _common_dtype_and_device(model)
        if device is None:
            on_gpu = stream_weights and torch.cuda.is_available()
            device = "cuda" if on_gpu else where
        self.device = torch.device(device)
        if len(base.layers) != self.decoder.layers:
            raise ValueError(
                f"Scorer: the config has {self.decoder.layers} layers, the model {len(base.layers)}"
            )
        # by reference, but not held where the model moves away
        layers = (named_layer(self.decoder, i, m) for i, m in enumerate(base.layers))
        outer = {"embedding": base.embed_tokens, "norm": base.norm, "head": head}
        if stream_weights:
            for _ in layers:  # refuse before anything moves
                pass
            self._weights = stream_model(self.decoder, base.layers, outer, dtype, self.device)
        elif where.type != self.device.type:
            raise ValueError(
                f"Scorer: the model is on {where} and device is {self.device}; move it there, or "
                "use stream_weights=True"
            )
        else:
            ends = {name: module.weight.detach() for name, module in outer.items()}
            self._weights = ResidentWeights(list(layers), ends)
        self._finish(base.rotary_emb, attention, impl, chunk_tokens, memory_bytes)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        stream_weights: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: str | Sequence[str] = "auto",
        impl: str = "auto",
        chunk_tokens: int | None = None,
        memory_bytes: int | None = None,
        on_layer_loaded: Callable[[int, int], None] | None = None,
    ) -> Scorer:
        """A scorer whose weights go from the safetensors shards straight to their place.

        Args:
            folder: of a transformers model; nothing is downloaded, no code from it is run.
            stream_weights: layers lie in page-locked host memory, or on the CPU stay on disk.
            dtype: of the weights and of every pass; that of the checkpoint if None.
            device: the GPU where there is one, if None.
            attention, impl, chunk_tokens, memory_bytes: as in the constructor.
            on_layer_loaded: called with (layers loaded, layers in all).

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a tensor is missing or has another shape; a family that is not supported.
            NotEnoughMemory: the weights do not fit where they should go.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self = cls.__new__(cls)
        self.decoder = decoder = Decoder.of_config(config)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or config.dtype or torch.bfloat16
        _check_dtype(dtype)
        self._weights = load_folder(
            decoder, folder, dtype, self.device, stream_weights, on_layer_loaded
        )
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        # buffers of a model on the meta device are empty: the rotary embedding is made again
        rotary = type(find_parts(shell)[0].rotary_emb)(config)
        self._finish(rotary, attention, impl, chunk_tokens, memory_bytes)
        return self

    def _finish(
        self,
        rotary: torch.nn.Module,
        attention: str | Sequence[str],
        impl: str,
        chunk_tokens: int | None,
        memory_bytes: int | None,
    ) -> None:
        _check_dtype(self._weights.dtype)
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"Scorer: chunk_tokens must be at least 1, got {chunk_tokens}")
        self.attention = ""
        self.use_attention(attention)
        # a copy, because the model's own stays where the model is
        self._rotary, self._impl = copy.deepcopy(rotary).to(self.device), impl
        nothing = torch.empty(0, self.decoder.H, dtype=self.dtype, device=self.device)
        targets = torch.empty(0, dtype=torch.int64, device=self.device)
        head = torch.empty(1, self.decoder.H, dtype=self.dtype, device=self.device)
        linear_logprob(nothing, head, targets, impl=impl)  # refuses an impl that cannot run
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS[self.device.type]
        self.memory_bytes = memory_bytes
        # called with the name of each part of a pass as it begins, for measurements
        self.on_part: Callable[[str], None] = lambda _part: None

    def use_attention(self, order: str | Sequence[str]) -> str:
        """Choose the backend of the next passes, as ``attention`` of the constructor; its name."""
        device, dtype, D = self.device, self.dtype, self.decoder.head_dim
        if isinstance(order, str):
            self.attention = choose_backend(device, dtype, D, backend=order)
        else:
            blockers = {name: why_not(name, device, dtype, D) for name in order}
            self.attention = pick_impl("Scorer attention", "auto", blockers)
        return self.attention

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def is_streaming(self) -> bool:
        return isinstance(self._weights, StreamedWeights)

    def estimate(self, tokens: int, *, is_one_sequence: bool = True) -> MemoryEstimate:
        """Memory of a pass over ``tokens`` rows with this scorer; see ``estimate_memory``."""
        return estimate_memory(self.decoder, tokens, **self._settings(is_one_sequence))

    def _settings(self, is_one_sequence: bool) -> dict[str, Any]:
        return dict(
            dtype=self.dtype,
            chunk_tokens=self.chunk_tokens,
            stream_weights=self.is_streaming,
            is_one_sequence=is_one_sequence,
            device_type=self.device.type,
        )

    def _check_memory(self, rows: Rows) -> None:
        available = self.memory_bytes
        if available is None:
            available = available_bytes(self.device)
        if available is None:
            return
        settings = self._settings(len(rows.seqlens) == 1)
        needed = estimate_memory(self.decoder, len(rows), **settings).activations
        if needed > available:
            raise NotEnoughMemory(
                f"Scorer: a pass over {len(rows)} tokens needs {gigabytes(needed)} beside the "
                f"weights and {gigabytes(available)} are free on {self.device}; "
                f"{what_would_fit(self.decoder, len(rows), available, **settings)}"
            )

    # --- passes --------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        inputs: torch.Tensor | PackedGroups,
        *,
        cu_seqlens: torch.Tensor | None = None,
        positions: str | torch.Tensor = "all",
        temperature: float | torch.Tensor = 1.0,
        recorder: RoutingRecorder | None = None,
        replay: RoutingRecord | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> TokenScores:
        """Log-probability, entropy and log-sum-exp of the token after each row, in nats.

        Args:
            inputs: ``input_ids [T]``, or the layout of ``pack_groups``, whose prompts are read
                once for all of their answers.
            cu_seqlens: ``[B + 1]`` borders of the packed sequences; one sequence if None.
            positions: ``"all"`` rows that have a target, the ``"answers"`` of a layout, or a mask
                bool ``[T]``. Other rows cost no work in the head and return 0.
            temperature: positive; a float, or fp32 ``[T]``.
            recorder: from ``routing_recorder``; gets the experts that every row chose.
            replay: the experts to use, of these rows in this order (for a layout, of its rows);
                rows without a route choose their own.
            on_layer: called with (layers done, layers in all); waits for the layer before.

        Returns:
            ``TokenScores``, fp32 ``[T]`` on the device of the scorer. Row t scores the token that
            follows it; the last row of a plain sequence has none and returns 0.

        Raises:
            ValueError: ids outside the vocabulary, a sequence longer than the model's positions,
                borders or masks that do not fit.
        """
        rows = rows_of(inputs, cu_seqlens, positions, self.decoder, self.device)
        T = len(rows)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(self.device)
        if T == 0:
            return TokenScores(*(torch.zeros(0, device=self.device) for _ in range(3)))
        x = self._last_hidden_states(rows, on_layer, recorder, replay)
        x = rms_norm(x, self._weights.end("norm"), self.decoder.eps)
        return linear_logprob(
            x,
            self._weights.end("head"),
            rows.target_ids,
            temperature=temperature,
            row_mask=rows.is_scored,
            impl=self._impl,
        )

    @torch.no_grad()
    def hidden_states(
        self,
        inputs: torch.Tensor | PackedGroups,
        *,
        cu_seqlens: torch.Tensor | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Last hidden states after the final norm, ``chunk_tokens`` rows at a time.

        Args:
            inputs, cu_seqlens, on_layer: as in ``score``.

        Yields:
            ``(rows, [rows, H])`` in order, for a head of one's own.
        """
        rows = rows_of(inputs, cu_seqlens, "all", self.decoder, self.device)
        if len(rows) == 0:
            return
        x = self._last_hidden_states(rows, on_layer)
        norm = self._weights.end("norm")
        for part in self._chunks(len(rows)):
            yield part, rms_norm(x[part], norm, self.decoder.eps)

    def routing_recorder(self) -> RoutingRecorder:
        """An empty recorder of this model's experts, for ``score``."""
        if not self.decoder.moe_layers:
            raise ValueError("Scorer: the model has no experts whose choice could be recorded")
        return RoutingRecorder(self.decoder.E, sorted(self.decoder.moe_layers))

    def _check_replay(self, replay: RoutingRecord, T: int) -> None:
        decoder = self.decoder
        wanted = (tuple(sorted(decoder.moe_layers)), decoder.E, decoder.top_k, T)
        found = (replay.layers, replay.num_experts, replay.top_k, replay.num_tokens)
        if wanted != found:
            raise ValueError(
                f"Scorer: the pass has (layers, experts, top_k, rows) = {wanted}, the record to "
                f"replay {found}"
            )

    def _last_hidden_states(
        self,
        rows: Rows,
        on_layer: Callable[[int, int], None] | None,
        recorder: RoutingRecorder | None = None,
        replay: RoutingRecord | None = None,
    ) -> torch.Tensor:
        """The residual stream ``[T, H]`` behind the last layer."""
        if replay is not None:
            self._check_replay(replay, len(rows))
            replay = replay.to(self.device)
        self._check_memory(rows)
        self.on_part("embedding")
        x = self._weights.embed(rows.input_ids)
        cos, sin = self._rotation(rows.position_ids)
        attend = _attention(rows, self.attention)
        step = Pass(
            self.decoder, cos, sin, attend, self.chunk_tokens, self.on_part, recorder, replay
        )
        report = _Progress(on_layer, self.decoder.layers, self.device)
        self.on_part("weights")
        for i, weights in enumerate(self._weights.layers()):
            x = run_layer(x, i, weights, step)
            report.after(i)
            self.on_part("weights")
        self.on_part("head")
        return x

    def _rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        T, half = position_ids.shape[0], self.decoder.head_dim // 2
        like = torch.empty(0, dtype=self._weights.dtype, device=self.device)
        cos, sin = (like.new_empty(T, half) for _ in range(2))
        for part in self._chunks(T):
            whole = self._rotary(like, position_ids[None, part])
            # both halves of a head turn by the same angles
            cos[part], sin[part] = (angles[0, :, :half] for angles in whole)
        return cos, sin

    def _chunks(self, T: int) -> list[slice]:
        return [slice(a, min(T, a + self.chunk_tokens)) for a in range(0, T, self.chunk_tokens)]


class _Progress:
    """Reports a layer when it is done; on a GPU the next one is queued by then, so none waits."""

    def __init__(
        self, on_layer: Callable[[int, int], None] | None, layers: int, device: torch.device
    ):
        self._on_layer, self._layers, self._device = on_layer, layers, device
        self._queued: list[torch.cuda.Event] = []

    def after(self, layer: int) -> None:
        if self._on_layer is None:
            return
        if self._device.type != "cuda":
            self._on_layer(layer + 1, self._layers)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._queued.append(event)
        last = layer + 1 == self._layers
        for done in range(layer + 1 - len(self._queued), layer + 1 if last else layer):
            self._queued.pop(0).synchronize()
            self._on_layer(done + 1, self._layers)


def _attention(rows: Rows, backend: str) -> Attend:
    """Causal attention of every sequence; an answer of a group sees its prompt too."""
    if rows.layout is not None:
        return partial(prefix_attention, layout=rows.layout, backend=backend)
    return partial(
        attention,
        cu_seqlens=rows.cu_seqlens,
        max_seqlen=max(rows.seqlens),
        lengths=rows.seqlens,
        backend=backend,
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"Scorer: weights must be fp32, bf16 or fp16, got {dtype}")


def _common_dtype_and_device(model: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    first = None
    for name, p in model.named_parameters():
        found = (p.dtype, p.device)
        if p.device.type == "meta":
            raise ValueError(f"Scorer: {name} is on the meta device; use Scorer.from_folder")
        if first is not None and found != first[1]:
            raise ValueError(
                f"Scorer: {name} is {p.dtype} on {p.device}, but {first[0]} is {first[1][0]} on "
                f"{first[1][1]}; one dtype and one device are needed"
            )
        first = first or (name, found)
    return first[1]
