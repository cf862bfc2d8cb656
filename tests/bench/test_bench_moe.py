"""Inputs of the expert layer's benchmark, and the sweep of its tiles in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

from bench import tune_moe
from bench.cases.moe import LayerTruth, layer_inputs
from bench.gate import WrongResult
from qlkernels.grouped_gemm.configs import Tiles

SHAPE = (400, 32, 8, 8, 2)  # T, H, I, E, top_k


@pytest.mark.parametrize("routing", ["balanced", "zipf1", "one"])
def test_routing_is_as_asked_and_no_choice_is_close(routing):
    inputs = layer_inputs(*SHAPE, routing, torch.bfloat16, "cpu")
    assert (inputs["hidden"][:, 0] == 1).all()
    best = F.linear(inputs["hidden"], inputs["router"]).float().topk(3, dim=1)
    assert (best.values[:, 1] - best.values[:, 2]).min() >= 0.02
    counts = torch.bincount(best.indices[:, :2].flatten(), minlength=8).sort(descending=True).values
    if routing == "one":
        assert counts.tolist() == [400, 400, 0, 0, 0, 0, 0, 0]
    elif routing == "zipf1":
        assert counts[0] > 2 * counts[3] > 4 * counts[7]
    else:
        assert counts[0] < 3 * counts[7]
    with pytest.raises(ValueError, match="routing is balanced, zipf1, one, got 'zipf'"):
        layer_inputs(*SHAPE, "zipf", torch.float32, "cpu")


def test_truth_by_autograd_accepts_right_and_refuses_wrong():
    inputs = layer_inputs(9, 16, 8, 4, 2, "balanced", torch.float32, "cpu")
    dout = torch.randn(9, 16)
    for x in inputs.values():
        x.requires_grad_()
    hidden, router, gate_up, down = inputs.values()
    p, ids = F.linear(hidden, router).softmax(1).topk(2, dim=1)
    out = torch.zeros(9, 16)
    for j in range(2):
        gate, up = torch.einsum("th,tih->ti", hidden, gate_up[ids[:, j]]).chunk(2, dim=1)
        y = torch.einsum("ti,thi->th", F.silu(gate) * up, down[ids[:, j]])
        out = out + (p / p.sum(1, keepdim=True))[:, j, None] * y
    grads = torch.autograd.grad(out, list(inputs.values()), dout)
    found = {f"d{k}": g for k, g in zip(inputs, grads, strict=True)} | {"out": out.detach()}
    truth = LayerTruth(inputs, 2, dout)
    assert truth.check(found, True, True) < 1e-5
    for name in found:
        wrong = found | {name: found[name] + 1e-2 * found[name].abs().max()}
        with pytest.raises(WrongResult, match=f"{name} is off"):
            truth.check(wrong, True, True)


@pytest.mark.parametrize("kernel", tune_moe.KERNELS)
def test_every_kernel_can_be_swept(kernel):
    layer = tune_moe.Layer(6, 16, 16, 3, 2, torch.float32, "cpu")
    table = layer.calls()[kernel][0]
    key = tune_moe.key_of(layer)
    present = table[key]
    other, wrong = Tiles(32, 32, 16, 1, 1, 1), Tiles(16, 24, 16, 1, 1, 1)
    rows = dict(tune_moe.sweep(layer, kernel, [other, wrong], repeats=1))
    assert table[key] == present
    assert isinstance(rows[wrong], str)  # 24 is no power of 2
    for tiles in (present, other):
        assert all(ms > 0 for ms in rows[tiles].values())


def test_other_bits_are_refused():
    layer = tune_moe.Layer(6, 48, 16, 3, 2, torch.float32, "cpu")
    tiles = Tiles(16, 32, 32, 1, 1, 1)  # adds up blocks of 32, not of 16
    rows = dict(tune_moe.sweep(layer, "gate_up", [tiles], repeats=1))
    assert rows[tiles] == "other bits than the present configuration"
