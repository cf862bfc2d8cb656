"""Inputs and checks that the routing tests of the CPU and of the GPU share."""

import torch

from qlkernels import build_expert_index, moe_route
from qlkernels.moe_routing import ExpertIndex, Routing
from qlkernels.moe_routing.reference import build_expert_index_ref, moe_route_ref
from qlkernels.testing import assert_as_accurate, outputs_and_grads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# not every pair: each is compiled, or interpreted, for every shape
KINDS = [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)]
KIND_NAMES = ["fp32-raw", "fp16-norm", "bf16-norm"]
# (T, E, top_k): nothing, one, all experts, primes, either side of a tile
SHAPES = [
    (0, 8, 2), (1, 1, 1), (1, 8, 8), (3, 7, 3), (17, 33, 5), (9, 128, 8), (65, 60, 4),
    (33, 128, 8), (9, 257, 6), (9, 512, 10),
]  # fmt: skip


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(T, E, top_k, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed + 7 * T + E)
    logits = (2 * torch.randn(T, E, generator=g)).to(dtype).to(device).requires_grad_()
    upstream = [torch.randn(T, top_k, generator=g), torch.randn(E, generator=g)]
    return logits, [g.to(device) for g in upstream]


def distinct_ids(T, E, top_k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=g).argsort(1)[:, :top_k].int()


def floats(function, **options):
    """The differentiable outputs of a routing function, as a function of the logits."""

    def call(router_logits):
        routing = function(router_logits, **options)
        return routing.topk_weights, routing.prob_sums

    return call


def check(impl, logits, top_k, upstream, **options):
    """Ids and counts are the reference's; weights, sums and gradient as accurate as it."""
    with torch.no_grad():
        actual = moe_route(logits, top_k, impl=impl, **options)
        expected = moe_route_ref(logits, top_k, **options)
    assert isinstance(actual, Routing)
    assert torch.equal(actual.topk_ids, expected.topk_ids)
    assert torch.equal(actual.tokens_per_expert, expected.tokens_per_expert)
    for x in (actual.topk_ids, actual.tokens_per_expert):
        assert x.dtype == torch.int32
    for x in (actual.topk_weights, actual.prob_sums):
        assert x.dtype == torch.float32
    options["top_k"] = top_k
    doubles = dict(router_logits=logits.detach().double().requires_grad_())
    inputs = dict(router_logits=logits)
    found = outputs_and_grads(floats(moe_route, impl=impl, **options), inputs, upstream)
    truth = outputs_and_grads(floats(moe_route_ref, **options), doubles, upstream)
    baseline = outputs_and_grads(floats(moe_route_ref, **options), inputs, upstream)
    # the interpreter truncates to bf16 where the compiler rounds
    truncates = impl == "triton" and logits.dtype == torch.bfloat16 and not logits.is_cuda
    for name in truth:
        floor = 2**-7 if truncates and name == "drouter_logits" else 1e-5
        assert_as_accurate(name, found[name], truth[name], baseline[name], floor=floor)
    return actual, found["drouter_logits"]


def check_index(impl, ids, num_experts):
    actual = build_expert_index(ids, num_experts, impl=impl)
    expected = build_expert_index_ref(ids, num_experts)
    assert isinstance(actual, ExpertIndex)
    for name, x, y in zip(ExpertIndex._fields, actual, expected, strict=True):
        assert x.dtype == torch.int32 and torch.equal(x, y), name
    return actual
