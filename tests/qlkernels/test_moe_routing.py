import math
from functools import partial

import numpy as np
import pytest
import torch

from qlkernels import build_expert_index, load_balancing_loss, moe_route
from qlkernels.moe_routing import triton as kernels
from qlkernels.moe_routing.reference import moe_route_ref
from qlkernels.testing import assert_as_accurate
from tests.qlkernels.routing_cases import (
    DTYPES,
    KIND_NAMES,
    KINDS,
    SHAPES,
    check,
    check_index,
    distinct_ids,
    make,
    name_of,
)

CPU_IMPLS = ["torch", "triton", "cpu"]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype, norm_topk_prob", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("T, E, top_k", SHAPES)
def test_matches_reference(impl, T, E, top_k, dtype, norm_topk_prob):
    logits, upstream = make(T, E, top_k, dtype)
    check(impl, logits, top_k, upstream, norm_topk_prob=norm_topk_prob)


@pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
def test_known_routing(impl):
    """Probabilities 1/2, 1/4, 1/8, 1/8."""
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 2.0]]) * math.log(2)
    logits.requires_grad_()
    routing = moe_route(logits, 2, impl=impl)
    assert routing.topk_ids.tolist() == [[0, 2], [3, 1]]
    assert routing.tokens_per_expert.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[2 / 3, 1 / 3]] * 2))
    torch.testing.assert_close(routing.prob_sums, torch.tensor([5 / 8, 3 / 8, 3 / 8, 5 / 8]))
    # d w_0 / d x_0 = w_0 (1 - w_0) = 2/9, and nothing outside the two
    (dlogits,) = torch.autograd.grad(routing.topk_weights[0, 0], logits)
    expected = torch.tensor([[2 / 9, 0.0, -2 / 9, 0.0], [0.0] * 4])
    torch.testing.assert_close(dlogits, expected)
    raw = moe_route(logits, 2, norm_topk_prob=False, impl=impl)
    torch.testing.assert_close(raw.topk_weights, torch.tensor([[1 / 2, 1 / 4]] * 2))
    # d P_0 / d x = p_i ([i = 0] - p_0) in each row
    (dlogits,) = torch.autograd.grad(raw.prob_sums[0], logits)
    expected = torch.tensor([[16, -4, -8, -4], [7, -2, -1, -4]]) / 64
    torch.testing.assert_close(dlogits, expected)


@pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ties_go_to_the_lower_id(impl, dtype):
    logits = torch.zeros(4, 37, dtype=dtype)
    logits[1, 5::3] = 1.0
    logits[2, 0::2] = -0.0
    logits[3] = -math.inf
    logits[3, 20] = 0.0
    ids = moe_route(logits, 4, impl=impl).topk_ids
    assert ids.tolist() == [[0, 1, 2, 3], [5, 8, 11, 14], [0, 1, 2, 3], [20, 0, 1, 2]]


@pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
@pytest.mark.parametrize("E, top_k", [(8, 2), (130, 8)])
def test_nan_and_infinity_stay_in_their_rows_and_ids_in_range(impl, E, top_k):
    logits, upstream = make(5, E, top_k)
    clean = moe_route(logits, top_k, impl=impl)
    with torch.no_grad():
        logits[1] = math.nan
        logits[2, 4] = -math.nan
        logits[3] = -math.inf
    routing = moe_route(logits, top_k, impl=impl)
    assert routing.topk_ids[1].tolist() == list(range(top_k))
    assert routing.topk_ids[2, 0] == 4 and len(set(routing.topk_ids[2].tolist())) == top_k
    assert routing.topk_ids[3].tolist() == list(range(top_k))
    assert routing.topk_weights[1:4].isnan().all()
    for t in (0, 4):
        assert torch.equal(routing.topk_ids[t], clean.topk_ids[t])
        assert torch.equal(routing.topk_weights[t], clean.topk_weights[t])
    assert routing.tokens_per_expert.sum() == 5 * top_k


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("T, E, top_k", [(1, 1, 1), (41, 16, 4), (9, 128, 8)])
def test_replayed_ids(impl, T, E, top_k, ids_dtype, norm_topk_prob):
    logits, upstream = make(T, E, top_k)
    replay = distinct_ids(T, E, top_k).to(ids_dtype)
    replay[1::3] = -1
    options = dict(norm_topk_prob=norm_topk_prob)
    routing, dlogits = check(impl, logits, top_k, upstream, replay_ids=replay, **options)
    live = moe_route(logits, top_k, impl=impl, **options)
    is_live = (replay == -1).all(1)
    assert torch.equal(routing.topk_ids[is_live], live.topk_ids[is_live])
    assert torch.equal(routing.topk_ids[~is_live], replay[~is_live].int())
    assert E == 1 or (dlogits.gather(1, routing.topk_ids.long()) != 0).any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_replaying_the_live_ids_changes_no_bit(impl):
    logits, upstream = make(29, 64, 6)
    live, dlive = check(impl, logits, 6, upstream)
    replayed, dreplayed = check(impl, logits, 6, upstream, replay_ids=live.topk_ids)
    for x, y in zip((*live, dlive), (*replayed, dreplayed), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
def test_replayed_experts_without_probability_still_share_the_weight(impl):
    """p underflows to 0 in fp32 for all of them; their ratios do not."""
    logits = torch.zeros(1, 6)
    logits[0, 0], logits[0, 4] = 500.0, math.log(3)
    routing = moe_route(logits, 2, replay_ids=torch.tensor([[4, 2]]), impl=impl)
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_replayed_id_may_come_twice(impl):
    logits, upstream = make(3, 9, 3)
    replay = torch.tensor([[4, 4, 1], [0, 0, 0], [8, 2, 8]])
    for norm_topk_prob in (True, False):
        check(impl, logits, 3, upstream, replay_ids=replay, norm_topk_prob=norm_topk_prob)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_an_id_of_no_expert_gives_nan_in_its_row_where_it_is_not_checked(impl):
    logits, _ = make(4, 9, 2)
    replay = torch.tensor([[0, 1], [3, 9], [-1, 4], [-1, -1]])
    found = torch.ops.qlkernels.moe_route(logits, replay, 2, True, None, impl)
    live = moe_route(logits, 2, impl=impl)
    assert found[0].isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert torch.equal(found[2][1:], live.topk_ids[1:])


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=name_of)
def test_rounded_weights(impl, weights_dtype):
    logits, upstream = make(50, 32, 4)
    exact = moe_route(logits, 4, impl=impl)
    rounded = moe_route(logits, 4, weights_dtype=weights_dtype, impl=impl)
    assert torch.equal(rounded.topk_weights, exact.topk_weights.to(weights_dtype).float())
    grads = [
        torch.autograd.grad((r.topk_weights * upstream[0]).sum(), logits)[0]
        for r in (exact, rounded)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("only", [0, 1], ids=["dweights", "dprob_sums"])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["norm", "raw"])
def test_one_upstream_gradient_alone(impl, only, norm_topk_prob):
    logits, upstream = make(13, 40, 3)
    options = dict(top_k=3, norm_topk_prob=norm_topk_prob)

    def grad(function, x):
        routing = function(x, **options)
        output = (routing.topk_weights, routing.prob_sums)[only]
        return torch.autograd.grad((output * upstream[only].to(output.dtype)).sum(), x)[0]

    truth = grad(moe_route_ref, logits.detach().double().requires_grad_())
    baseline = grad(moe_route_ref, logits)
    assert_as_accurate("dlogits", grad(partial(moe_route, impl=impl), logits), truth, baseline)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_row_without_upstream_is_not_read_in_the_backward(impl):
    logits, upstream = make(4, 33, 2)
    upstream[0][[1, 3]] = 0.0
    routing = moe_route(logits, 2, impl=impl)
    total = (routing.topk_weights * upstream[0]).sum() + 0.0 * routing.prob_sums.sum()
    with torch.no_grad():
        logits.data[[1, 3]] = math.nan
    total.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_every_token_on_one_expert(impl):
    logits = torch.full((70, 12), -3.0)
    logits[:, 7] = 5.0
    routing = moe_route(logits, 1, impl=impl)
    assert routing.tokens_per_expert.tolist() == [0] * 7 + [70] + [0] * 4
    assert (routing.topk_weights == 1).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_chunks_of_tokens_change_no_bit(impl):
    logits, _ = make(131, 64, 4, torch.bfloat16)
    whole = moe_route(logits, 4, impl=impl)
    parts = [moe_route(x, 4, impl=impl) for x in logits.split(50)]
    assert torch.equal(whole.topk_ids, torch.cat([p.topk_ids for p in parts]))
    assert torch.equal(whole.topk_weights, torch.cat([p.topk_weights for p in parts]))
    assert torch.equal(whole.tokens_per_expert, sum(p.tokens_per_expert for p in parts))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rows_may_be_far_apart(impl):
    memory = torch.full((9, 41), math.nan)
    logits, upstream = make(9, 33, 3)
    memory[:, 5:38] = logits.detach()
    routing = moe_route(memory[:, 5:38], 3, impl=impl)
    dense = moe_route(logits, 3, impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(routing, dense, strict=True))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rows_beyond_2_31_elements(impl):
    """The third row starts past 2^31 elements. The pages between the rows are never touched."""
    stride, E = 2**30 + 24, 20
    memory = torch.from_numpy(np.empty(2 * stride + E, dtype=np.int16)).view(torch.bfloat16)
    logits, upstream = make(3, E, 2, torch.bfloat16)
    rows = memory.as_strided((3, E), (stride, 1))
    rows.copy_(logits.detach())
    for x, y in zip(moe_route(rows, 2, impl=impl), moe_route(logits, 2, impl=impl), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_same_input_same_bits(impl):
    logits, upstream = make(70, 128, 8, torch.bfloat16)
    (first, dfirst), (second, dsecond) = (check(impl, logits, 8, upstream) for _ in range(2))
    for x, y in zip((*first, dfirst), (*second, dsecond), strict=True):
        assert torch.equal(x, y)


def test_the_number_of_threads_changes_no_bit():
    logits, upstream = make(700, 60, 4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(check("cpu", logits, 4, upstream))
    finally:
        torch.set_num_threads(before)
    (first, dfirst), (second, dsecond) = found
    for x, y in zip((*first, dfirst), (*second, dsecond), strict=True):
        assert torch.equal(x, y)


def test_no_token_has_a_differentiable_zero():
    logits = torch.zeros(0, 4, requires_grad=True)
    routing = moe_route(logits, 2)
    assert (routing.prob_sums == 0).all() and (routing.tokens_per_expert == 0).all()
    load_balancing_loss(routing).backward()
    assert logits.grad.shape == (0, 4)


# --- the index ---------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
def test_known_index(impl):
    ids = torch.tensor([[2, 0], [0, 3], [2, 0]])
    index = build_expert_index(ids, 5, impl=impl)
    assert index.sort_order.tolist() == [1, 2, 5, 0, 4, 3]
    assert index.inverse_order.tolist() == [3, 0, 1, 5, 4, 2]
    assert index.expert_offsets.tolist() == [0, 3, 3, 5, 6, 6]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("T, E, top_k", [*SHAPES, (90, 64, 6), (200, 5, 3)])
def test_index_is_a_stable_argsort(impl, T, E, top_k, dtype):
    g = torch.Generator().manual_seed(T)
    ids = torch.randint(E, (T, top_k), generator=g).to(dtype)
    index = check_index(impl, ids, E)
    order = torch.argsort(ids.flatten(), stable=True)
    assert torch.equal(index.sort_order.long(), order)
    assert torch.equal(index.inverse_order[order], torch.arange(T * top_k, dtype=torch.int32))
    assert index.expert_offsets[-1] == T * top_k


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_index_of_skewed_routing(impl):
    check_index(impl, torch.full((180, 3), 4), 9)
    g = torch.Generator().manual_seed(1)
    weights = 1.0 / torch.arange(1, 65)
    check_index(impl, torch.multinomial(weights.expand(140, 64), 4, generator=g), 64)


def test_triton_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_PARTS", 2)
    logits, upstream = make(150, 100, 3)
    check("triton", logits, 3, upstream)
    check_index("triton", distinct_ids(450, 20, 3), 20)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_ids_of_no_expert_sort_to_the_end(impl):
    ids = torch.tensor([[4, 1], [-1, 4], [0, 2**31 - 1], [-(2**31), 3]], dtype=torch.int32)
    index = check_index(impl, ids, 4)
    assert index.sort_order.tolist() == [4, 1, 7, 0, 2, 3, 5, 6]
    assert index.expert_offsets.tolist() == [0, 1, 2, 2, 3]
    check_index(impl, torch.full((3, 2), 7), 4)


# --- the load-balancing loss -------------------------------------------------


def test_balanced_routing_has_the_least_loss():
    logits = torch.eye(8).repeat(4, 1) * 0.5  # every expert first of four tokens
    for normalization, balanced in (("transformers", 1.0), ("switch", 1.0)):
        loss = load_balancing_loss(moe_route(logits, 1), normalization=normalization)
        torch.testing.assert_close(loss, torch.tensor(balanced))
    crowded = torch.full((32, 8), -20.0)
    crowded[:, 3] = 20.0
    torch.testing.assert_close(load_balancing_loss(moe_route(crowded, 1)), torch.tensor(8.0))


def test_load_balancing_equals_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    layers = [make(19, 16, 4, seed=s)[0] for s in range(3)]
    expected = modeling.load_balancing_loss_func(tuple(layers), 16, 4)
    want = torch.autograd.grad(expected, layers)
    loss = load_balancing_loss([moe_route(x, 4) for x in layers])
    torch.testing.assert_close(loss, expected)
    for x, y in zip(torch.autograd.grad(loss, layers), want, strict=True):
        torch.testing.assert_close(x, y)
    switch = load_balancing_loss([moe_route(x, 4) for x in layers], normalization="switch")
    torch.testing.assert_close(4 * switch, loss)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_weights_equal_transformers(impl, dtype):
    """As its router computes them, rounded to the activations' dtype."""
    config = pytest.importorskip("transformers").Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    router = Qwen3MoeTopKRouter(
        config(hidden_size=24, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True)
    ).to(dtype)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(50, 24, dtype=dtype, requires_grad=True)
    logits, weights, ids = router(hidden)
    routing = moe_route(logits, 4, weights_dtype=dtype, impl=impl)
    # bf16 logits tie, and torch.topk gives ties to any id
    assert torch.equal(*(logits.gather(1, x.long()) for x in (routing.topk_ids, ids)))
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(routing.topk_weights, weights.float(), atol=0, rtol=rtol)
    upstream = torch.randn(50, 4)
    if dtype == torch.float32:
        assert torch.equal(routing.topk_ids, ids.int())
        upstream = torch.randn(50, 4)
        got, want = (
            torch.autograd.grad((w * upstream).sum(), router.weight, retain_graph=True)[0]
            for w in (routing.topk_weights, weights)
        )
        torch.testing.assert_close(got, want)


# --- errors, compilation -----------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, error, sentence",
    [
        ((torch.zeros(4), 1), {}, ValueError, r"moe_route: router_logits must be \[T, E\]"),
        (([1.0], 1), {}, TypeError, "router_logits must be a tensor"),
        ((torch.zeros(2, 4, dtype=torch.int64), 1), {}, TypeError, "got int64"),
        ((torch.zeros(2, 4, dtype=torch.float64), 1), {}, TypeError, "got float64"),
        ((torch.zeros(4, 3).t(), 1), {}, ValueError, "last dim of router_logits must be contig"),
        ((torch.zeros(2, 4), 5), {}, ValueError, r"top_k must be in \[1, E\] = \[1, 4\], got 5"),
        ((torch.zeros(2, 4), 0), {}, ValueError, "got 0"),
        ((torch.zeros(2, 4), 1), dict(weights_dtype=torch.int8), TypeError, "weights_dtype"),
        ((torch.zeros(2, 4), 2), dict(replay_ids=torch.zeros(2, 3).int()), ValueError, "top_k = 2"),
        ((torch.zeros(2, 4), 1), dict(replay_ids=torch.zeros(2, 1)), TypeError, "int32, int64"),
        ((torch.zeros(2, 4), 1), dict(replay_ids=torch.tensor([[0], [4]])), ValueError,
         r"replay_ids\[1\] = \[4\], but a row holds expert ids in \[0, 4\)"),
        ((torch.zeros(2, 4), 2), dict(replay_ids=torch.tensor([[-1, 0], [0, 1]])), ValueError,
         r"replay_ids\[0\] = \[-1, 0\]"),
        ((torch.zeros(2, 4), 1), dict(impl="magic"), ValueError, "unknown impl 'magic'"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        moe_route(*arguments, **options)


def test_wrong_arguments_of_the_index_and_the_loss():
    with pytest.raises(ValueError, match=r"build_expert_index: topk_ids must be \[T, top_k\]"):
        build_expert_index(torch.zeros(4).long(), 4)
    with pytest.raises(TypeError, match="int32, int64"):
        build_expert_index(torch.zeros(4, 2), 4)
    with pytest.raises(ValueError, match="num_experts must be positive"):
        build_expert_index(torch.zeros(4, 2).long(), 0)
    with pytest.raises(ValueError, match="positions are int32"):
        build_expert_index(torch.zeros(1, 1).long().expand(2**28, 8), 4)
    with pytest.raises(ValueError, match="no layer"):
        load_balancing_loss([])
    with pytest.raises(ValueError, match="normalization must be"):
        load_balancing_loss(moe_route(torch.zeros(2, 4), 1), normalization="mean")


def test_double_backward_is_refused():
    logits, _ = make(3, 8, 2)
    weights = moe_route(logits, 2, impl="torch").topk_weights
    (dlogits,) = torch.autograd.grad(weights[:, 0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dlogits.sum().backward()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_opcheck(impl):
    logits, _ = make(5, 12, 3)
    options = (3, True, torch.bfloat16, impl)
    torch.library.opcheck(torch.ops.qlkernels.moe_route, (logits, None, *options))
    replay = distinct_ids(5, 12, 3)
    torch.library.opcheck(torch.ops.qlkernels.moe_route, (logits, replay, *options))
    torch.library.opcheck(torch.ops.qlkernels.build_expert_index, (replay, 12, impl))
    grads = (torch.randn(5, 3), torch.randn(12))
    torch.library.opcheck(
        torch.ops.qlkernels.moe_route_bwd, (logits.detach(), replay, True, *grads, impl)
    )


def test_under_torch_compile():
    def layer(x, replay):
        routing = moe_route(x, 2, replay_ids=replay)
        index = build_expert_index(routing.topk_ids, 6)
        return routing.topk_weights, load_balancing_loss(routing), index.sort_order

    logits, upstream = make(9, 6, 2)
    replay = distinct_ids(9, 6, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(logits, replay), layer(logits, replay), strict=True):
        assert torch.equal(x, y)
    got, want = (
        torch.autograd.grad((f(logits, replay)[0] * upstream[0]).sum(), logits)[0]
        for f in (compiled, layer)
    )
    assert torch.equal(got, want)
