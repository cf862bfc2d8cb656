"""Checkpoints as folders of safetensors: read any part of a tensor, write shards as a stream.

The safetensors library reads whole rows and writes whole shards. A merge reads flat parts of a
tensor and writes a shard while it is made, in memory that does not grow with either, so the format
(eight bytes of header length, a JSON header, the data) is read and written here.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from qwenlong.errors import InputError
from qwenlong.storage import atomic_write

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What belongs to a model beside its weights.
_COPIED = re.compile(
    r".*\.(json|jinja|model|txt|tiktoken|py)|(LICENSE|LICENCE|NOTICE)(\..*)?", re.IGNORECASE
)
_NOT_COPIED = re.compile(r".*\.index\.json|merge\.json|trainer_state\.json|adapter_config\.json")


class Entry(NamedTuple):
    """Where a tensor lies; ``dtype`` as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


class Checkpoint(NamedTuple):
    folder: Path
    entries: dict[str, Entry]
    tied: bool  # its config says that input and output embeddings are one

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat elements ``[start, stop)`` of a tensor in its dtype; bytes, if that is no float."""
        entry = self.entries[name]
        dtype = FLOATS.get(entry.dtype, torch.uint8)
        found = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + start * dtype.itemsize)
            view = memoryview(found.numpy())
            while len(view):
                count = file.readinto(view)  # at most 2 GB a call
                if not count:
                    raise InputError(f"{entry.file} became shorter while it was read.")
                view = view[count:]
        return found.view(dtype)

    def elements(self, name: str) -> int:
        """What ``read`` counts in."""
        entry = self.entries[name]
        return entry.numel if entry.dtype in FLOATS else entry.nbytes

    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; an InputError where it is none, or is cut short."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise InputError(f"{file} is not a safetensors file, or is cut short: copy it again.")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise InputError(f"{file} is not a safetensors file: its header is not JSON.")
    header.pop("__metadata__", None)
    entries = {}
    try:
        for name, value in header.items():
            start, end = value["data_offsets"]
            shape = tuple(map(int, value["shape"]))
            entries[name] = Entry(file, value["dtype"], shape, 8 + length + start, end - start)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: its header is damaged; copy it again.") from error
    for name, entry in entries.items():
        dtype = FLOATS.get(entry.dtype)
        if dtype is not None and entry.nbytes != entry.numel * dtype.itemsize:
            raise InputError(f"{file}: {name} is {entry.describe()} in {entry.nbytes} bytes.")
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise InputError(
            f"{file} is cut short: {size} bytes, and its header needs {end}; copy it again."
        )
    return entries


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The tensors of ``model.safetensors`` or of the shards that its index names.

    Raises:
        InputError: no such folder, no safetensors, shards or tensors that the index names missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a saved model.")
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} is not an index of safetensors.") from error
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise InputError(f"{folder} lacks {_some(absent)}, which its index names.")
        found = {shard: read_header(folder / shard) for shard in shards}
        if absent := [name for name, shard in where.items() if name not in found[shard]]:
            raise InputError(
                f"{folder}: the index names tensors that its shards lack: {_some(absent)}."
            )
        entries = {name: found[shard][name] for name, shard in where.items()}
    elif (folder / SINGLE).is_file():
        entries = read_header(folder / SINGLE)
    else:
        hint = "convert it with save_pretrained(..., safe_serialization=True)"
        if (folder / "adapter_model.safetensors").is_file():
            hint = "it holds an adapter; merge that into its base first (peft: merge_and_unload)"
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}: {hint}.")
    if not entries:
        raise InputError(f"{folder} holds no tensors.")
    return _store_tied_once(Checkpoint(folder, entries, _is_tied(folder)))


def _is_tied(folder: Path) -> bool:
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no config.json; give the folder of a saved model."
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is not a JSON object.") from error
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _store_tied_once(checkpoint: Checkpoint) -> Checkpoint:
    """Leave the output embedding out where the config ties it and its values are the input's."""
    entries = dict(checkpoint.entries)
    heads = [name for name in entries if name.split(".")[-2:] == ["lm_head", "weight"]]
    inputs = [name for name in entries if name.split(".")[-2:] == ["embed_tokens", "weight"]]
    if not (checkpoint.tied and len(heads) == 1 and len(inputs) == 1):
        return checkpoint
    [head], [embedding] = heads, inputs
    same = entries[head][1:3] == entries[embedding][1:3]
    if not (same and equal_values(checkpoint, head, checkpoint, embedding)):
        raise InputError(
            f"{checkpoint.folder}: its config says that {head} is tied to {embedding}, but their "
            "values differ; correct tie_word_embeddings or the weights."
        )
    del entries[head]
    return checkpoint._replace(entries=entries)


def equal_values(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str) -> bool:
    """Whether two tensors of the same shape and dtype hold the same bits."""
    step, total = 1 << 19, a.elements(name_a)
    return all(
        torch.equal(*(x.view(torch.uint8) for x in (
            a.read(name_a, start, min(total, start + step)),
            b.read(name_b, start, min(total, start + step)),
        )))
        for start in range(0, total, step)
    )  # fmt: skip


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_same_layout(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise an InputError that names the tensors that are missing, extra or of another form."""
    problems = []
    if absent := [name for name in base.entries if name not in expert.entries]:
        problems.append(f"it lacks {_some(absent)}")
    if extra := [name for name in expert.entries if name not in base.entries]:
        problems.append(f"the base lacks {_some(extra)}")
    differs = [
        f"{name} is {expert.entries[name].describe()}, in the base {entry.describe()}"
        for name, entry in base.entries.items()
        if name in expert.entries and entry[1:3] != expert.entries[name][1:3]
    ]
    if differs:
        problems.append(_some(differs, 3))
    if problems:
        raise InputError(
            f"{expert.folder} does not fit the base {base.folder}: {'; '.join(problems)}."
        )


def check_mergeable(base: Checkpoint) -> None:
    """Raise an InputError for float types that cannot be merged element by element in fp32."""
    for name, entry in base.entries.items():
        if entry.dtype not in FLOATS and entry.dtype[0] in "FC":
            raise InputError(
                f"{name} of {base.folder} is {entry.dtype}; SCE merges F32, F16 and BF16: "
                "convert the models first (quantised values are no weights without their scales)."
            )


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints of one layout hold the same bits; stops at the first difference."""
    return all(equal_values(a, name, b, name) for name in a.entries)


# --- writing -----------------------------------------------------------------


def natural_key(name: str) -> list:
    """Sorts ``layers.10`` after ``layers.9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def plan_shards(entries: Mapping[str, Entry], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in natural order, each file at most ``max_bytes`` or one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(entries, key=natural_key):
        if groups[-1] and size + entries[name].nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entries[name].nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


def write_header(file: IO[bytes], entries: Mapping[str, Entry], names: Iterable[str]) -> list[str]:
    """Write the header of a shard; return the order in which its data must follow.

    Wide types come first, so that every tensor starts at a multiple of its element size.
    """
    order = sorted(names, key=lambda name: -_element_bytes(entries[name]))
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return order


def _element_bytes(entry: Entry) -> int:
    return entry.nbytes // entry.numel if entry.numel else 0


def write_index(folder: Path, entries: Mapping[str, Entry], plan: Mapping[str, list[str]]) -> None:
    """The index of several shards; a single file needs none."""
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": {name: shard for shard, names in plan.items() for name in names},
        }
        with atomic_write(folder / INDEX) as file:
            json.dump(index, file, ensure_ascii=False, indent=2)


def side_files(folder: Path) -> list[str]:
    """Config, tokenizer, templates and licence of a model: paths relative to its folder."""
    names = [
        file.name
        for file in folder.iterdir()
        if file.is_file() and _COPIED.fullmatch(file.name) and not _NOT_COPIED.fullmatch(file.name)
    ]
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        names += [f"{templates.name}/{file.name}" for file in templates.glob("*.jinja")]
    return sorted(names)


def differing_side_files(a: Path, b: Path) -> list[str]:
    """Side files that only one of two folders has, or that differ in content."""
    names = sorted(set(side_files(a)) | set(side_files(b)))
    return [
        name
        for name in names
        if not ((a / name).is_file() and (b / name).is_file())
        or not filecmp.cmp(a / name, b / name, shallow=False)
    ]


def fingerprint(checkpoint: Checkpoint) -> list:
    """Changes when a weight file of the model is replaced."""
    stats = [(os.fspath(file.resolve()), file.stat()) for file in checkpoint.files()]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
