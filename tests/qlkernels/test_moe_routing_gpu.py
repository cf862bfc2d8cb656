import math

import pytest
import torch

from qlkernels import build_expert_index, moe_route
from qlkernels.moe_routing.reference import moe_route_ref
from tests.qlkernels.routing_cases import (
    DTYPES,
    KIND_NAMES,
    KINDS,
    check,
    check_index,
    distinct_ids,
    make,
    name_of,
)

pytestmark = pytest.mark.gpu

GPU_IMPLS = ["cuda", "triton", "torch"]
KERNELS = GPU_IMPLS[:2]
GPU_SHAPES = [
    (0, 8, 2), (1, 1, 1), (17, 33, 5), (65, 60, 4), (40, 40, 32), (4099, 128, 8), (1031, 512, 10),
]  # fmt: skip


def skewed_ids(T, E, top_k, seed=0):
    """Distinct experts of each token, expert r first with probability proportional to 1 / r."""
    g = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(T, E, generator=g, device="cuda").log()
    ranks = torch.arange(1, E + 1, device="cuda")
    return (scores * ranks).argsort(1, descending=True)[:, :top_k].contiguous()


@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("dtype, norm_topk_prob", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("T, E, top_k", GPU_SHAPES)
def test_gpu_matches_reference(impl, T, E, top_k, dtype, norm_topk_prob):
    logits, upstream = make(T, E, top_k, dtype, device="cuda")
    check(impl, logits, top_k, upstream, norm_topk_prob=norm_topk_prob)


@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=name_of)
def test_gpu_replay(impl, ids_dtype):
    logits, upstream = make(533, 128, 8, torch.bfloat16, device="cuda")
    replay = distinct_ids(533, 128, 8).to(ids_dtype).cuda()
    replay[1::3] = -1
    for norm_topk_prob in (True, False):
        options = dict(replay_ids=replay, norm_topk_prob=norm_topk_prob)
        routing, _ = check(impl, logits, 8, upstream, **options)
        known = replay[:, 0] >= 0
        assert torch.equal(routing.topk_ids[known], replay[known].int())
    wrong = replay.clone()
    wrong[5, 2], wrong[6, 0] = 128, -2
    found = moe_route(logits, 8, replay_ids=wrong, impl=impl)
    live = moe_route(logits, 8, impl=impl)
    assert found.topk_weights.isnan().any(1).nonzero().flatten().tolist() == [5, 6]
    assert torch.equal(found.topk_ids[5:7], live.topk_ids[5:7])
    with pytest.raises(ValueError, match=r"replay_ids\[5\]"):
        moe_route(logits, 8, replay_ids=wrong, validate=True, impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gpu_ties_nan_and_infinity(impl, dtype):
    logits, _ = make(64, 100, 6, dtype, device="cuda")
    with torch.no_grad():
        logits[0] = 0.0
        logits[1, ::2] = -0.0
        logits[2] = math.nan
        logits[3, 70] = math.nan
        logits[4] = -math.inf
        logits[5, 3:] = -math.inf
        logits[6, 50] = math.inf
        logits[7:] = logits[7:].round()  # many ties
    got, want = moe_route(logits, 6, impl=impl), moe_route_ref(logits, 6)
    assert torch.equal(got.topk_ids, want.topk_ids)
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
    assert torch.equal(got.topk_weights.isnan(), want.topk_weights.isnan())
    torch.testing.assert_close(got.topk_weights, want.topk_weights, equal_nan=True)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=name_of)
def test_gpu_rounded_weights(impl, weights_dtype):
    logits, _ = make(2000, 64, 6, torch.bfloat16, device="cuda")
    exact = moe_route(logits, 6, impl=impl).topk_weights
    rounded = moe_route(logits, 6, weights_dtype=weights_dtype, impl=impl).topk_weights
    assert torch.equal(rounded, exact.to(weights_dtype).float())


@pytest.mark.parametrize("impl", KERNELS)
def test_gpu_backward_reads_no_row_without_upstream(impl):
    logits, upstream = make(70, 128, 8, torch.bfloat16, device="cuda")
    upstream[0][1::2] = 0.0
    routing = moe_route(logits, 8, impl=impl)
    logits.data[1::2] = math.nan
    total = (routing.topk_weights * upstream[0]).sum() + 0.0 * routing.prob_sums.sum()
    total.backward()
    assert (logits.grad[1::2] == 0).all() and (logits.grad[::2] != 0).any(1).all()


@pytest.mark.large
@pytest.mark.parametrize("impl", KERNELS)
def test_gpu_rows_beyond_2_31_elements(impl):
    stride, E = 2**30 + 24, 128
    memory = torch.empty(2 * stride + E, dtype=torch.bfloat16, device="cuda")
    logits, _ = make(3, E, 8, torch.bfloat16, device="cuda")
    rows = memory.as_strided((3, E), (stride, 1))
    rows.copy_(logits.detach())
    for x, y in zip(moe_route(rows, 8, impl=impl), moe_route(logits, 8, impl=impl), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize(
    "T, E, top_k",
    [
        *GPU_SHAPES, (512, 128, 8), (513, 128, 8), (4099, 512, 10), (131_072, 128, 8),
        (270_000, 128, 8),
    ],
)  # fmt: skip
def test_gpu_index_is_a_stable_argsort(impl, T, E, top_k, dtype):
    check_index(impl, skewed_ids(T, E, top_k).to(dtype), E)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("T", [300, 20_000])
def test_gpu_index_of_one_expert_and_of_none(impl, T):
    check_index(impl, torch.full((T, 8), 5, device="cuda"), 128)
    check_index(impl, torch.full((T, 8), 128, device="cuda"), 128)
    ids = skewed_ids(T, 130, 8) - 1  # -1 and 128 are no experts
    check_index(impl, ids, 128)
    ids[::7, 0], ids[1::7, 0] = 2**40, -(2**40)
    check_index(impl, ids, 128)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("T", [0, 1, 512, 5000])
def test_gpu_graph_equals_eager_and_repeats_are_bitwise(impl, T):
    logits, upstream = make(T, 128, 8, torch.bfloat16, device="cuda")

    def run():
        routing = moe_route(logits, 8, impl=impl)
        index = build_expert_index(routing.topk_ids, 128, impl=impl)
        outputs = (routing.topk_weights, routing.prob_sums)
        (dlogits,) = torch.autograd.grad(outputs, logits, upstream)
        return (*(x.detach() for x in routing), *index, dlogits)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first, second = run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        logits.copy_(logits.flip(0))
    graph.replay()
    flipped = run()
    for name, a, b, c, d in zip(range(8), first, second, captured, flipped, strict=True):
        assert torch.equal(a, b), f"repeat, output {name}"
        assert torch.equal(c, d), f"graph, output {name}"


@pytest.mark.parametrize("impl", KERNELS)
def test_gpu_chunks_of_tokens_change_no_bit(impl):
    logits, upstream = make(40_000, 128, 8, torch.bfloat16, device="cuda")

    def run(rows):
        x = logits.detach()[rows].requires_grad_()
        routing = moe_route(x, 8, impl=impl)
        return *routing[:2], torch.autograd.grad(routing.topk_weights, x, upstream[0][rows])[0]

    whole = run(slice(0, 40_000))
    for rows in (slice(0, 1), slice(777, 1300), slice(20_000, 40_000)):
        for x, y in zip(whole, run(rows), strict=True):
            assert torch.equal(x[rows], y)


def test_gpu_limits_of_the_cuda_kernels():
    logits = torch.randn(3, 600, device="cuda")
    with pytest.raises(RuntimeError, match="at most 512 experts, got 600"):
        moe_route(logits, 4, impl="cuda")
    with pytest.raises(RuntimeError, match="top_k of at most 32, got 33"):
        moe_route(logits[:, :64].contiguous(), 33, impl="cuda")
    check("auto", logits.requires_grad_(), 33, [torch.randn(3, 33).cuda(), torch.randn(600).cuda()])


def test_gpu_opcheck_and_compile():
    logits, upstream = make(33, 16, 4, torch.bfloat16, device="cuda")
    options = (4, True, torch.bfloat16, "cuda")
    torch.library.opcheck(torch.ops.qlkernels.moe_route, (logits, None, *options))
    ids = distinct_ids(33, 16, 4).cuda()
    torch.library.opcheck(torch.ops.qlkernels.build_expert_index, (ids, 16, "cuda"))

    def layer(x):
        routing = moe_route(x, 4)
        return routing.topk_weights, build_expert_index(routing.topk_ids, 16).sort_order

    got, want = torch.compile(layer, fullgraph=True)(logits), layer(logits)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    dgot, dwant = (torch.autograd.grad(x[0], logits, upstream[0])[0] for x in (got, want))
    assert torch.equal(dgot, dwant)
