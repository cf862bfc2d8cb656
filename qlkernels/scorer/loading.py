"""Weights on their way in: from a model in memory, or from the shards of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlkernels.scorer.checkpoint import Checkpoint
from qlkernels.scorer.decoder import Decoder
from qlkernels.scorer.memory import NotEnoughMemory, available_bytes, gigabytes, host_bytes
from qlkernels.scorer.weights import (
    LayerLayout,
    ResidentWeights,
    StreamedWeights,
    host_buffer,
    layouts_of,
)


def stream_model(
    decoder: Decoder,
    modules: Any,
    outer: dict[str, torch.nn.Module],
    dtype: torch.dtype,
    device: torch.device,
) -> StreamedWeights:
    """Move a model to host buffers, a layer at a time, and let its parameters live there."""
    layouts = layouts_of(decoder, dtype)
    flats = [_move_to_host(m, a, device) for m, a in zip(modules, layouts, strict=True)]

    def fill(layer: int, out: dict[str, torch.Tensor]) -> None:
        for name, view in layouts[layer].views(flats[layer]).items():
            out[name].copy_(view)

    moved: dict[int, torch.Tensor] = {}  # a tied head is one parameter
    ends = {}
    for name, module in outer.items():
        key = id(module.weight)
        if key not in moved:
            layout = LayerLayout({"weight": tuple(module.weight.shape)}, dtype)
            moved[key] = layout.views(_move_to_host(module, layout, device))["weight"]
        ends[name] = moved[key]
    return StreamedWeights(layouts, ends, device, fill, flats)


def _move_to_host(
    module: torch.nn.Module, layout: LayerLayout, device: torch.device
) -> torch.Tensor:
    flat = host_buffer(layout.bytes, device)
    views = layout.views(flat)
    for name, parameter in module.named_parameters():
        views[name].copy_(parameter.detach())
        parameter.data = views[name]
    return flat


def _read_ends(
    checkpoint: Checkpoint,
    decoder: Decoder,
    dtype: torch.dtype,
    device: torch.device,
    on_host: bool,
) -> dict[str, torch.Tensor]:
    names = {
        "embedding": ("model.embed_tokens.weight", (decoder.V, decoder.H)),
        "norm": ("model.norm.weight", (decoder.H,)),
        "head": ("lm_head.weight", (decoder.V, decoder.H)),
    }
    ends = {}
    for end, (name, shape) in names.items():
        if end == "head" and decoder.is_tied:
            ends[end] = ends["embedding"]
            continue
        layout = LayerLayout({name: shape}, dtype)
        ends[end] = layout.views(_buffer(layout, device, on_host))[name]
        checkpoint.read_into(name, ends[end])
    return ends


def _no_fill(_layer: int, _out: dict[str, torch.Tensor]) -> None:
    """Layers in page-locked memory need no one to write them."""


def load_folder(
    decoder: Decoder,
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    stream_weights: bool,
    on_layer_loaded: Callable[[int, int], None] | None,
) -> ResidentWeights | StreamedWeights:
    """Every weight from its shard straight to its place: the device, or page-locked host memory.

    On the CPU streamed layers stay on disk and are read when they are needed.
    """
    checkpoint = Checkpoint(folder)
    _check_room(decoder, dtype, device, stream_weights)
    ends = _read_ends(checkpoint, decoder, dtype, device, stream_weights)
    layouts = layouts_of(decoder, dtype)
    if stream_weights and device.type != "cuda":
        return StreamedWeights(layouts, ends, device, checkpoint.read_layer_into, None)
    flats = []
    for i, layout in enumerate(layouts):
        flats.append(_buffer(layout, device, stream_weights))
        checkpoint.read_layer_into(i, layout.views(flats[-1]))
        if on_layer_loaded is not None:
            on_layer_loaded(i + 1, decoder.layers)
    if stream_weights:
        return StreamedWeights(layouts, ends, device, _no_fill, flats)
    return ResidentWeights([a.views(b) for a, b in zip(layouts, flats, strict=True)], ends)


def _buffer(layout: LayerLayout, device: torch.device, on_host: bool) -> torch.Tensor:
    if on_host:
        return host_buffer(layout.bytes, device)
    return torch.empty(layout.bytes, dtype=torch.uint8, device=device)


def _check_room(
    decoder: Decoder, dtype: torch.dtype, device: torch.device, stream_weights: bool
) -> None:
    """Before anything is read."""
    model = decoder.num_weights() * dtype.itemsize
    on_disk = stream_weights and device.type != "cuda"
    free = host_bytes() if stream_weights else available_bytes(device)
    if free is None or on_disk or model <= free:
        return
    if stream_weights:
        raise NotEnoughMemory(
            f"Scorer: the weights take {gigabytes(model)} of host memory and {gigabytes(free)} are "
            "free; free some, or run on the CPU, where layers stay on disk (device='cpu')"
        )
    raise NotEnoughMemory(
        f"Scorer: the weights take {gigabytes(model)} and {gigabytes(free)} are free on {device}; "
        "use stream_weights=True"
    )
