"""Ops run without their dispatch where nobody watches, and through it where somebody does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qlkernels import (
    build_expert_index,
    linear_logprob,
    logprob_entropy,
    logprob_entropy_with_grad,
    moe_mlp,
    moe_route,
    policy_loss,
)
from qlkernels._direct import is_watched, without_autocast
from qlkernels._triton import cdiv, next_power_of_2

T, V, H = 5, 11, 4
NAMES = ["logprob_entropy", "linear_logprob", "policy_loss", "moe_route", "moe_mlp"]


class Seen(TorchDispatchMode):
    """Names of our ops, as a dispatch mode sees them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "qlkernels":
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **kwargs or {})


def case(name):
    """(function of one tensor to a scalar, that tensor, a leaf)."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(V, (T,), generator=g)
    mask = torch.tensor([True, True, False, True, True])
    w = torch.randn(V, H, generator=g).requires_grad_()
    if name == "logprob_entropy":
        x = torch.randn(T, V, generator=g)
        run = lambda x: sum(v.square().sum() for v in logprob_entropy(x, y, row_mask=mask))  # noqa: E731
    elif name == "linear_logprob":
        x = torch.randn(T, H, generator=g)
        run = lambda x: sum(v.square().sum() for v in linear_logprob(x, w, y, row_mask=mask))  # noqa: E731
    elif name == "moe_route":
        x = torch.randn(T, V, generator=g)
        run = lambda x: moe_route(x, 3).topk_weights.square().sum()  # noqa: E731
    elif name == "moe_mlp":
        x, ids = torch.randn(T, H, generator=g), torch.randint(3, (T, 2), generator=g)
        experts = torch.randn(3, 12, H, generator=g), torch.randn(3, H, 6, generator=g)
        run = lambda x: moe_mlp(x, ids, torch.ones(T, 2), *experts).square().sum()  # noqa: E731
    else:
        x, old = torch.randn(2, T, generator=g)
        A, cu_seqlens = torch.tensor([1.0, -1.0]), torch.tensor([0, 2, T])
        run = lambda x: policy_loss(x, old, A, mask, cu_seqlens=cu_seqlens).loss  # noqa: E731
    return run, x.requires_grad_()


@pytest.mark.parametrize("name", NAMES)
def test_watched_or_not_the_bits_are_the_same(name):
    run, x = case(name)
    plain = run(x)
    (dplain,) = torch.autograd.grad(plain, x)
    with Seen() as seen:
        watched = run(x)
        (dwatched,) = torch.autograd.grad(watched, x)
    assert torch.equal(plain, watched) and torch.equal(dplain, dwatched)
    assert seen.names == [name, f"{name}_bwd"]


@pytest.mark.parametrize("name", NAMES)
def test_an_op_watched_in_one_direction_alone(name):
    """A backward may run where the forward did not, as under a profiler of a part of the step."""
    run, x = case(name)
    (want,) = torch.autograd.grad(run(x), x)
    loss = run(x)
    with Seen() as seen:
        (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, want) and seen.names == [f"{name}_bwd"]
    with Seen() as seen:
        loss = run(x)
    (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, want) and seen.names == [name]


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_refused(name):
    run, x = case(name)
    (dx,) = torch.autograd.grad(run(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported"):
        dx.sum().backward()


def test_nobody_watches_plain_tensors():
    x = torch.zeros(2)
    assert not is_watched(x, torch.nn.Parameter(x), None, 1.0, "cpu")
    assert not is_watched()


def test_who_watches():
    x, seen = torch.zeros(2), []

    def note(x):
        seen.append(is_watched(x))
        return x.clone()

    class Subclass(torch.Tensor):
        pass

    note(x.as_subclass(Subclass))
    with FakeTensorMode():
        note(torch.zeros(2))
    with Seen():
        note(x)
    make_fx(note)(x)
    torch.func.vmap(note)(x)
    torch.func.grad(lambda x: note(x).sum())(x)
    assert seen == [True] * 6
    watched = torch.compile(lambda x: x + float(is_watched(x)), backend="eager", fullgraph=True)
    assert watched(x).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["logprob_entropy", "moe_route"])
def test_a_jacobian_from_batched_gradients(name):
    """Those batches are no business of torch.func, which sees plain tensors."""
    run = dict(
        logprob_entropy=lambda x: logprob_entropy(x, torch.arange(T)).logprobs,
        moe_route=lambda x: moe_route(x, 3).topk_weights.flatten(),
    )[name]
    x = torch.randn(T, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = run(x)
    rows = torch.eye(y.numel())
    (got,) = torch.autograd.grad(y, x, rows, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]
    assert torch.equal(got, torch.stack(want))


def test_weights_of_a_subclass_make_the_backward_of_the_experts_one_op():
    class Weight(torch.Tensor):
        pass

    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(T, H, generator=g, requires_grad=True), torch.zeros(T, 1, dtype=torch.long)
    up, down = torch.randn(1, 12, H, generator=g), torch.randn(1, H, 6, generator=g)
    outs = [moe_mlp(x, ids, torch.ones(T, 1), w, down) for w in (up, up.as_subclass(Weight))]
    names = []
    for out in outs:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.sum().backward()
        names.append({event.name for event in profile.events()})
    assert ["qlkernels::moe_mlp_bwd" in found for found in names] == [False, True]


def test_selective_checkpointing_can_keep_the_scores():
    run, x = case("logprob_entropy")
    kept = []

    def policy(_context, function, *_args, **_options):
        is_ours = function == torch.ops.qlkernels.logprob_entropy.default
        kept.append(is_ours)
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    loss = checkpoint(
        run, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss, x)
    (want,) = torch.autograd.grad(run(x), x)
    assert any(kept) and torch.equal(got, want)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_logits_that_were_overwritten_cannot_be_read_by_another_backward(impl):
    leaf, y = torch.randn(T, V, requires_grad=True), torch.zeros(T, dtype=torch.int64)
    logits = leaf * 2.0
    squares = (logits * logits).sum()  # its backward reads the logits
    scores = logprob_entropy(logits, y, inplace_backward=True, impl=impl)
    torch.autograd.grad(scores.logprobs.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_the_gradient_in_place_counts_as_a_change():
    logits, y = torch.randn(T, V), torch.zeros(T, dtype=torch.int64)
    before = logits._version
    logprob_entropy_with_grad(logits, y, torch.ones(T), inplace=True, impl="cpu")
    assert logits._version > before


def test_a_gradient_that_was_added_to_counts_as_changed():
    x, w, y = torch.randn(T, H, requires_grad=True), torch.randn(V, H), torch.arange(T)
    main_grad = torch.zeros(V, H)
    before = main_grad._version
    linear_logprob(x, w, y, main_grad=main_grad).logprobs.sum().backward()
    assert main_grad._version > before and main_grad.any()


def test_the_index_is_one_op_to_those_who_watch():
    ids = torch.tensor([[2, 0], [0, 3], [2, 0]])
    plain = build_expert_index(ids, 5)
    with Seen() as seen:
        watched = build_expert_index(ids, 5)
    assert seen.names == ["build_expert_index"]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_profilers_show_the_name_of_the_op():
    run, x = case("policy_loss")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(x).backward()
    names = {event.name for event in profile.events()}
    assert {"qlkernels::policy_loss", "qlkernels::policy_lossBackward"} <= names


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_op_runs_alone_and_gives_the_same_bits(name):
    run, x = case(name)
    want = run(x)
    for leaf in (x.detach(), torch.nn.Parameter(x.detach(), False)):
        got = run(leaf)
        assert torch.equal(got, want) and (name == "linear_logprob" or not got.requires_grad)
    with torch.no_grad():
        got = run(x)
    assert torch.equal(got, want) and not got.requires_grad
    with torch.inference_mode():
        assert torch.equal(run(x.detach()), want)


@pytest.mark.parametrize("name", NAMES)
def test_profilers_show_the_name_of_the_op_without_gradients(name):
    run, x = case(name)
    with torch.no_grad(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:  # fmt: skip
        run(x)
    assert f"qlkernels::{name}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", NAMES)
def test_tangents_of_forward_mode_are_refused_not_dropped(name):
    run, x = case(name)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(Exception, match="jvp|forward mode"):
            run(dual)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_off_inside_and_as_before_outside(outside):
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        with without_autocast(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == (torch.bfloat16 if outside else torch.float32)


@pytest.mark.parametrize("n, want", [(1, 1), (2, 2), (3, 4), (8, 8), (129, 256), (2**30, 2**30)])
def test_sizes_as_triton_computes_them(n, want):
    assert next_power_of_2(n) == want
    assert [cdiv(n, k) for k in (1, 2, n, n + 1)] == [n, n // 2 + n % 2, 1, 1]
