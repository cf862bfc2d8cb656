"""Weights one tensor at a time: between models that no process holds whole and safetensors files.

A parameter is stored under its own name, or, where the module stacks experts and the file does not,
as one tensor a matrix of an expert:

    experts.gate_up_proj [E, 2 I, H]   experts.{e}.gate_proj.weight, ...up_proj.weight  [I, H]
    experts.down_proj    [E, H, I]     experts.{e}.down_proj.weight                     [H, I]

Either way the flat elements of the parameter are those of its parts, one after the other, so that
any rows of it are read without the rest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch

from qwenlong.errors import InputError
from qwenlong.merge_files import (
    FLOATS,
    SINGLE,
    Checkpoint,
    Entry,
    natural_key,
    write_header,
    write_index,
)

FILE_BYTES = 5 * 10**9  # of one file of a model, or one parameter
READ_ELEMENTS = 1 << 24  # held at once, beside the tensor that is filled
# Model types whose checkpoints keep experts apart, in every version of transformers.
SPLIT_EXPERTS = {"qwen2_moe", "qwen3_moe"}
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class Weight(NamedTuple):
    """A parameter, and the stored tensors that it is, in the order of its elements."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part_shape(self) -> tuple[int, ...]:
        if len(self.parts) == 1:
            return self.shape
        experts, rows, columns = self.shape
        return (rows * experts // len(self.parts), columns)


def split_experts(name: str, shape: tuple[int, ...]) -> Weight | None:
    """``name`` as one matrix an expert; None where it is no stack of experts."""
    where, _, leaf = name.rpartition(".")
    if leaf not in _STACKED or where.rpartition(".")[2] != "experts" or len(shape) != 3:
        return None
    parts = [f"{where}.{e}.{part}.weight" for e in range(shape[0]) for part in _STACKED[leaf]]
    return Weight(tuple(shape), tuple(parts))


# --- reading -----------------------------------------------------------------


def find_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Weight:
    """How ``checkpoint`` stores a parameter.

    Raises:
        InputError: it does not, in no layout that is known here, or not as bf16, fp16 or fp32.
    """
    found = Weight(tuple(shape), (name,))
    if name not in checkpoint.entries:
        found = split_experts(name, shape) or found
    for part in found.parts:
        entry = checkpoint.entries.get(part)
        if entry is None:
            raise InputError(
                f"{checkpoint.folder} lacks {part}, or stores it in a layout that sharded loading "
                "does not know; load the model with engine.kind torch and save it, or download it "
                "again."
            )
        if entry.shape != found.part_shape() or entry.dtype not in FLOATS:
            raise InputError(
                f"{checkpoint.folder}: {part} is {entry.describe()}, and the model needs "
                f"{list(found.part_shape())} in {', '.join(FLOATS)}."
            )
    return found


@torch.no_grad()
def read_elements(checkpoint: Checkpoint, weight: Weight, start: int, out: torch.Tensor) -> None:
    """Fill ``out`` with the flat elements of ``weight`` from ``start`` on; any dtype and device."""
    flat = out.view(-1)
    size = weight.numel // len(weight.parts)
    done = 0
    while done < flat.numel():
        part, first = divmod(start + done, size)
        n = min(size - first, flat.numel() - done, READ_ELEMENTS)
        flat[done : done + n].copy_(checkpoint.read(weight.parts[part], first, first + n))
        done += n


# --- writing -----------------------------------------------------------------


class WeightStream:
    """The weights of a model, one whole tensor at a time.

    Args:
        weights: by name, in the order in which they come.
        fetch: gives one of them on this rank's device. On several ranks it is collective, so that
            every rank must take every tensor.
        is_main: whether this rank writes.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        fetch: Callable[[str], torch.Tensor],
        *,
        is_main: bool = True,
    ):
        self.weights, self._fetch, self.is_main = weights, fetch, is_main

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.weights:
            yield name, self._fetch(name)

    def save(
        self,
        folder: Path,
        dtype: torch.dtype,
        *,
        file: str | None = None,
        max_bytes: int = FILE_BYTES,
    ) -> None:
        """Write safetensors with an index, or the one ``file``; where ``is_main`` is not set, only
        take part. A full disk ends it no sooner than the stream, so that no other rank is left
        waiting.
        """
        failure: Exception | None = None
        with contextlib.ExitStack() as stack:
            writer = _Writer(folder, self.weights, dtype, file, max_bytes)
            stack.callback(writer.close)
            for name, tensor in self:
                if self.is_main and failure is None:
                    try:
                        writer.add(name, tensor)
                    except Exception as error:
                        failure = error
            if failure is not None:
                raise failure
            if self.is_main:
                writer.finish()


class _Writer:
    """Files that are written in the order of their tensors, each header before its data."""

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, Weight],
        dtype: torch.dtype,
        file: str | None,
        max_bytes: int,
    ):
        self._folder, self._weights, self._dtype = folder, weights, dtype
        groups: list[list[str]] = [[]]
        filled = 0
        for name, weight in weights.items():
            nbytes = weight.numel * dtype.itemsize
            if file is None and groups[-1] and filled + nbytes > max_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += nbytes
        total = len(groups)
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        if total == 1:
            names = [file or SINGLE]
        self._entries = {
            part: Entry(
                folder,
                _NAMES[dtype],
                weight.part_shape(),
                0,
                math.prod(weight.part_shape()) * dtype.itemsize,
            )
            for weight in weights.values()
            for part in weight.parts
        }
        self._plan = {
            file_name: [part for name in group for part in weights[name].parts]
            for file_name, group in zip(names, groups, strict=True)
        }
        self._first = {g[0]: n for n, g in zip(names, groups, strict=True) if g}
        self._file: IO[bytes] | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._first:
            self._open(self._first[name])
        data = tensor.detach().to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy()))

    def _open(self, file_name: str) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / file_name, "wb")
        write_header(self._file, self._entries, self._plan[file_name])

    def finish(self) -> None:
        if not self._weights:
            self._open(next(iter(self._plan)))
        self.close()
        write_index(self._folder, self._entries, self._plan)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def in_file_order(names: list[str]) -> list[str]:
    """Layer by layer, 10 after 9."""
    return sorted(names, key=natural_key)
