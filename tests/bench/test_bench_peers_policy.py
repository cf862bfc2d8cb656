"""Liger's whole policy loss as a peer, and its per-token scores that need no CUTLASS DSL."""

import math

import pytest
import torch

import bench.cases  # noqa: F401  (loads the peers)
from bench import peers, peers_policy
from bench.gate import WrongResult
from bench.registry import Point, Unavailable, build
from bench.run import gate

EPS = {"eps_low": 0.2, "eps_high": 0.28}
SMALL = {"T": 32, "H": 32, "V": 301, "B": 8, "data": "peaked"}


@pytest.fixture
def liger():
    pytest.importorskip("liger_kernel", reason="the peer is not installed")
    return peers_policy._liger_grpo()


def test_a_uniform_policy_by_hand(liger):
    """With a head of zeros each token has probability 1 / 4. On the policy the loss is the mean of
    -A, and its gradient of the logits A / n (1 / V - [y]).
    """
    hidden = torch.tensor([[1.0], [2.0], [3.0], [5.0]], requires_grad=True)
    weight = torch.zeros(4, 1, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 3])
    A = torch.tensor([2.0, -1.0])
    loss = liger(hidden, weight, ids, None, A, torch.ones(4, dtype=torch.bool), 0, **EPS)["loss"]
    assert loss.item() == pytest.approx(-(2 + 2 - 1 - 1) / 4)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert dhidden.tolist() == [[0.0]] * 4
    base = (2 * 1 + 2 * 2 - 3 - 5) / 4 / 4  # sum of A h, over n and V
    by_hand = torch.tensor([base - 2 / 4, base - (4 - 3) / 4, base, base + 5 / 4])
    torch.testing.assert_close(dweight[:, 0], by_hand)


def test_the_clip_by_hand(liger):
    """Three of the four ratios are outside the clip, one of them on the side that it leaves."""
    hidden, weight = torch.ones(4, 1), torch.zeros(4, 1, requires_grad=True)
    ratio = torch.tensor([1.5, 1.1, 1.5, 0.5])
    old = -math.log(4.0) - ratio.log()
    A = torch.tensor([2.0, -2.0])
    ids, mask = torch.tensor([0, 1, 2, 3]), torch.ones(4, dtype=torch.bool)
    loss = liger(hidden, weight, ids, old, A, mask, 0, **EPS)["loss"]
    by_hand = (-1.28 * 2 - 1.1 * 2 + 1.5 * 2 + 0.8 * 2) / 4
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    (dweight,) = torch.autograd.grad(loss, weight)
    slopes = torch.tensor([0.0, -1.1 * 2, 1.5 * 2, 0.0]) / 4  # of the log-probs
    torch.testing.assert_close(dweight[:, 0], slopes - slopes.sum() / 4)


@pytest.mark.parametrize("on_policy", [True, False])
def test_prompts_are_left_out(liger, on_policy):
    torch.manual_seed(0)
    B, L, prompt, V = 3, 7, 4, 19
    hidden, weight = torch.randn(B * L, 8), torch.randn(V, 8, requires_grad=True)
    ids, A = torch.randint(V, (B * L,)), torch.tensor([1.5, -0.5, 0.0])
    mask = torch.arange(B * L) % L >= prompt
    mask[-1] = False  # an answer that is shorter
    whole = hidden.clone().requires_grad_()
    logprobs = (whole @ weight.T).log_softmax(1).gather(1, ids[:, None])[:, 0]
    old = None if on_policy else logprobs.detach() + 0.3 * torch.randn(B * L)
    expected = peers.clipped_loss(logprobs, old, A.repeat_interleave(L), mask, **EPS)
    truth = torch.autograd.grad(expected, (whole, weight))
    broken = torch.where(mask.roll(-1)[:, None] | mask[:, None], hidden, torch.nan)
    broken[-1] = hidden[-1]  # rows of the batch are computed, prompts are not even read
    for i in range(B):
        broken[i * L : i * L + prompt] = torch.nan
    broken.requires_grad_()
    loss = liger(broken, weight, ids, old, A, mask, prompt, **EPS)["loss"]
    torch.testing.assert_close(loss, expected)
    for found, true in zip(torch.autograd.grad(loss, (broken, weight)), truth, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-6)


def test_sequences_of_several_lengths_are_refused(liger):
    with pytest.raises(Unavailable, match="B=2 sequences of one length"):
        liger(
            torch.ones(5, 2), torch.ones(3, 2), torch.zeros(5, dtype=torch.long), None,
            torch.ones(2), torch.ones(5, dtype=torch.bool), 0, **EPS,
        )  # fmt: skip


def test_it_stands_beside_ours_as_less_and_the_gate_sees_a_wrong_one(liger, monkeypatch):
    problem = build(Point("linear_policy_loss", "fwd_bwd", "fp32", SMALL), "cpu")
    (name,) = [name for name in problem.impls if name.startswith("liger-grpo")]
    assert problem.peer_scope[name] == "less"  # neither scores nor an entropy
    outputs = problem.impls[name]()
    assert set(outputs) == {"loss", "dhidden", "dweight"}
    assert gate(problem, name, problem.impls[name]) < 1e-4
    (tf32,) = [name for name in problem.absent if name.startswith("liger-grpo-tf32")]
    assert problem.absent[tf32] == "it needs a CUDA device"
    with pytest.raises(WrongResult, match="dweight is another function"):
        problem.check(outputs | {"dweight": 2 * outputs["dweight"]}, False, False)


def test_without_liger_it_is_absent_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "package_version", lambda name: "")
    found, _, absent = peers.find(peers_policy.OP, "cpu", backward=True)
    assert found == {}
    assert absent["liger-grpo"] == "not installed (pip install liger-kernel)"


def test_tf32_ends_with_its_block():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), peers_policy.tf32():
        assert torch.get_float32_matmul_precision() == "high"
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == before


def test_the_fallback_scores_by_hand(monkeypatch):
    """On Hopper it is asked for by its class; elsewhere ``liger`` is it already."""
    pytest.importorskip("liger_kernel", reason="the peer is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(Unavailable, match="the same function on this GPU"):
        peers._liger_fallback()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    mask = torch.tensor([True, False, True])
    found = peers._liger_fallback()(
        torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3]), mask
    )
    expected = math.log(4.0) * mask
    torch.testing.assert_close(found["logprobs"], -expected)
    torch.testing.assert_close(found["entropy"], expected)
