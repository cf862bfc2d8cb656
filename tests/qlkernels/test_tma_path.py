"""The path of Hopper's copy engine, through tensor descriptors, in the interpreter.

On a card the operands decide which path runs; here it is forced, with tiles of the interpreter's
size, on shapes where every tile is ragged and where the two paths' tiles differ.
"""

import pytest
import torch

from qlkernels import linear_logprob, linear_policy_loss
from qlkernels.linear_logprob import passes
from qlkernels.linear_logprob.kernels import (
    DLOGITS_CONFIG,
    DLOGITS_EXTRA_CONFIG,
    FOLD_CONFIG,
)
from qlkernels.linear_policy_loss import passes as policy_passes
from qlkernels.linear_policy_loss.kernels import EXP_CONFIG
from qlkernels.testing import outputs_and_grads

TILE = (16, 16, 16, 2, 1, 2)  # the interpreter's pointer tiles are 16 x 32 x 16
KEY = ("tma-sm90", 4)


@pytest.fixture
def through_descriptors(monkeypatch):
    for table in (
        FOLD_CONFIG,
        DLOGITS_CONFIG,
        DLOGITS_EXTRA_CONFIG,
        EXP_CONFIG,
    ):
        monkeypatch.setitem(table, KEY, TILE)
    launched, options = [], passes.launch_options

    def watch(table, x, w, use_tma):
        launched.append(use_tma)
        return options(table, x, w, use_tma)

    for module in (passes, policy_passes):
        monkeypatch.setattr(module, "uses_tma", lambda *_: True)
        monkeypatch.setattr(module, "launch_options", watch)
    yield launched
    assert launched and all(launched), "a kernel or a tile size came from the other path"


def make(T, H, V):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=g).requires_grad_()
    w = torch.randn(V, H, generator=g).requires_grad_()
    y = torch.randint(V, (T,), generator=g)
    return x, w, y, [torch.randn(T, generator=g) for _ in range(3)]


@pytest.mark.parametrize("T, H, V", [(1, 8, 3), (17, 24, 37), (33, 16, 80)])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_linear_logprob(through_descriptors, T, H, V, chunk_tokens):
    x, w, y, upstream = make(T, H, V)
    inputs = dict(hidden_states=x, lm_head_weight=w, target_ids=y)
    found = outputs_and_grads(
        lambda **i: linear_logprob(**i, impl="triton", chunk_tokens=chunk_tokens), inputs, upstream
    )
    want = outputs_and_grads(lambda **i: linear_logprob(**i, impl="torch"), inputs, upstream)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("T, H, V", [(17, 24, 37), (33, 16, 80)])
def test_linear_policy_loss(through_descriptors, T, H, V):
    x, w, y, (advantages, *_) = make(T, H, V)
    mask = torch.arange(T) % 5 != 0
    grads = []
    for impl in ("triton", "torch"):
        result = linear_policy_loss(
            x, w, y, None, advantages, mask, cu_seqlens=torch.tensor([0, T]), impl=impl
        )
        grads.append([result.loss, *torch.autograd.grad(result.loss, (x, w)), *result.scores])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
