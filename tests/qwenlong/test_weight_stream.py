"""Weights one tensor at a time, against the safetensors library."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenlong.errors import InputError
from qwenlong.merge_files import open_checkpoint
from qwenlong.weight_stream import (
    Weight,
    WeightStream,
    find_weight,
    in_file_order,
    read_elements,
    split_experts,
)

STACK = "model.layers.0.mlp.experts.gate_up_proj"
ROOT = "model.layers.0.mlp.experts"


def folder_of(tmp_path, tensors):
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return open_checkpoint(tmp_path)


def stacked():
    """[E = 2, 2 I = 4, H = 3] and its parts: gate and up of expert 0, then of expert 1."""
    whole = torch.arange(24.0).view(2, 4, 3)
    parts = {
        f"{ROOT}.0.gate_proj.weight": torch.tensor([[0.0, 1, 2], [3, 4, 5]]),
        f"{ROOT}.0.up_proj.weight": torch.tensor([[6.0, 7, 8], [9, 10, 11]]),
        f"{ROOT}.1.gate_proj.weight": torch.tensor([[12.0, 13, 14], [15, 16, 17]]),
        f"{ROOT}.1.up_proj.weight": torch.tensor([[18.0, 19, 20], [21, 22, 23]]),
    }
    return whole, parts


def test_names_of_experts():
    assert split_experts(STACK, (2, 4, 3)) == Weight((2, 4, 3), tuple(stacked()[1]))
    down = split_experts(f"{ROOT}.down_proj", (2, 3, 2))
    assert down.parts == (f"{ROOT}.0.down_proj.weight", f"{ROOT}.1.down_proj.weight")
    assert down.part_shape() == (3, 2)
    for name in ("model.layers.0.mlp.down_proj", f"{ROOT}.gate_up_proj_bias", "experts"):
        assert split_experts(name, (2, 4, 3)) is None


@pytest.mark.parametrize("start, count", [(0, 24), (12, 12), (5, 8), (23, 1), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_elements_of_split_experts(tmp_path, start, count, dtype):
    whole, parts = stacked()
    checkpoint = folder_of(tmp_path, {name: part.to(dtype) for name, part in parts.items()})
    weight = find_weight(checkpoint, STACK, (2, 4, 3))
    out = torch.full((count,), -1.0)
    read_elements(checkpoint, weight, start, out)
    assert torch.equal(out, whole.flatten()[start : start + count])


def test_a_stack_under_its_own_name_is_taken_as_it_is(tmp_path):
    whole, _ = stacked()
    weight = find_weight(folder_of(tmp_path, {STACK: whole}), STACK, (2, 4, 3))
    assert weight == Weight((2, 4, 3), (STACK,))


@pytest.mark.parametrize(
    "name, shape, tensor, words",
    [
        ("w", (2, 3), torch.zeros(3, 2), "w is .3, 2. F32, and the model needs .2, 3."),
        ("w", (2, 3), torch.zeros(2, 3, dtype=torch.int8), "F32, F16, BF16"),
        ("v", (2, 3), torch.zeros(2, 3), "lacks v, or stores it in a layout"),
        (STACK, (2, 4, 3), torch.zeros(2, 3), f"lacks {ROOT}.0.gate_proj.weight"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, name, shape, tensor, words):
    with pytest.raises(InputError, match=words):
        find_weight(folder_of(tmp_path, {"w": tensor}), name, shape)


def random_stream(is_main=True, fetched=None):
    tensors = {
        "model.embed_tokens.weight": torch.randn(5, 3),
        "model.layers.2.w": torch.randn(4, 3),
        "model.layers.10.w": torch.randn(7),
        STACK: stacked()[0],
    }
    weights = {
        name: split_experts(name, tuple(tensors[name].shape))
        or Weight(tuple(tensors[name].shape), (name,))
        for name in in_file_order(list(tensors))
    }

    def fetch(name):
        if fetched is not None:
            fetched.append(name)
        return tensors[name]

    expected = {k: v for k, v in tensors.items() if k != STACK} | stacked()[1]
    return WeightStream(weights, fetch, is_main=is_main), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_bytes, files", [(10**9, 1), (170, 2), (1, 4)])
def test_files_hold_what_came(tmp_path, dtype, max_bytes, files):
    stream, expected = random_stream()
    if dtype == torch.bfloat16:
        max_bytes //= 2
    stream.save(tmp_path, dtype, max_bytes=max_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in expected.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files > 1:
        assert json.loads(index.read_text())["weight_map"].keys() == expected.keys()
        (tmp_path / "config.json").write_text("{}")
        assert open_checkpoint(tmp_path).entries.keys() == expected.keys()


def test_order_of_layers():
    names = ["model.layers.10.w", "model.embed_tokens.weight", "model.layers.2.w"]
    assert in_file_order(names) == [names[1], names[2], names[0]]


def test_other_ranks_take_part_and_write_nothing(tmp_path):
    fetched = []
    stream, _ = random_stream(is_main=False, fetched=fetched)
    stream.save(tmp_path, torch.float32)
    assert fetched == list(stream.weights) and not list(tmp_path.iterdir())


def test_a_full_disk_is_told_after_the_last_tensor(tmp_path, monkeypatch):
    """Another rank waits in the gathering of every tensor."""
    fetched = []
    stream, _ = random_stream(fetched=fetched)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwenlong.weight_stream.write_header", full)
    with pytest.raises(OSError, match="No space left"):
        stream.save(tmp_path, torch.float32)
    assert fetched == list(stream.weights)


def test_no_weights_are_an_empty_file(tmp_path):
    WeightStream({}, {}.__getitem__).save(tmp_path, torch.float32)
    assert load_file(tmp_path / "model.safetensors") == {}
