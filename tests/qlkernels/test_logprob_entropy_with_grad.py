import math
from functools import partial

import pytest
import torch

from qlkernels import logprob_entropy, logprob_entropy_with_grad
from qlkernels.logprob_entropy_with_grad import logprob_entropy_with_grad_ref
from qlkernels.testing import AWKWARD_TV, assert_as_accurate

CPU_IMPLS = ["torch", "triton", "cpu"]
NAMES = ("logprobs", "entropy", "lse", "dlogits")


def make(T, V, dtype=torch.float32, device="cpu", pad=0, seed=0, scale=4.0, shift=0.0):
    """Rows ``V + pad`` apart, so that they start on 16 bytes whatever V is."""
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(T, V + pad, generator=g) + shift).to(dtype).to(device)[:, :V]
    target_ids = torch.randint(V, (T,), generator=g).to(device)
    upstream = [torch.randn(T, generator=g).to(device) for _ in range(3)]
    return logits, target_ids, upstream


def padding(V, dtype):
    return -V % (16 // dtype.itemsize)


def copy_of(logits):
    """With the same row stride; clone() would pack the rows, which then start anywhere."""
    T, V = logits.shape
    return logits.new_empty(T, logits.stride(0))[:, :V].copy_(logits)


def run(impl, logits, target_ids, upstream, **options):
    scores, dlogits = logprob_entropy_with_grad(logits, target_ids, *upstream, impl=impl, **options)
    return (*scores, dlogits)


def check(impl, logits, target_ids, upstream, **options):
    memory = copy_of(logits) if options.get("inplace") else logits
    actual = run(impl, memory, target_ids, upstream, **options)
    options.pop("inplace", None)
    doubled = [None if g is None else g.double() for g in upstream]
    ref = partial(logprob_entropy_with_grad_ref, **options)
    truth, dtruth = ref(logits.double(), target_ids, *doubled)
    baseline, dbaseline = ref(logits, target_ids, *upstream)
    on_interpreter = impl == "triton" and logits.device.type == "cpu"
    for name, value, want, base in zip(
        NAMES, actual, (*truth, dtruth), (*baseline, dbaseline), strict=True
    ):
        truncates = on_interpreter and logits.dtype == torch.bfloat16 and name == "dlogits"
        assert_as_accurate(name, value, want, base, floor=2**-7 if truncates else 1e-5)
    return actual


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, V", AWKWARD_TV)
def test_matches_reference(impl, T, V, dtype):
    check(impl, *make(T, V, dtype))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_equals_forward_and_backward_of_the_scores(impl):
    logits, target_ids, upstream = make(5, 67)
    leaf = logits.clone().requires_grad_()
    scores = logprob_entropy(leaf, target_ids, impl=impl)
    sum((x * g).sum() for x, g in zip(scores, upstream, strict=True)).backward()
    actual = run(impl, logits, target_ids, upstream)
    for value, want in zip(actual, (*scores, leaf.grad), strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_in_place_gives_the_same_bits_in_the_memory_of_the_logits(impl):
    logits, target_ids, upstream = make(4, 40)
    want = run(impl, logits, target_ids, upstream, softcap=9.0)
    memory = logits.clone()
    actual = run(impl, memory, target_ids, upstream, softcap=9.0, inplace=True)
    assert actual[3].data_ptr() == memory.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(actual, want, strict=True))


@pytest.mark.parametrize("impl", [*CPU_IMPLS, "reference"])
def test_missing_upstream_is_zero_and_gives_no_gradient(impl):
    logits, target_ids, upstream = make(3, 20)
    assert (run(impl, logits, target_ids, [None, None, None])[3] == 0).all()
    zeros = torch.zeros(3)
    given = run(impl, logits, target_ids, [upstream[0], zeros, zeros])
    absent = run(impl, logits, target_ids, [upstream[0], None, None])
    torch.testing.assert_close(given[3], absent[3])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_masked_and_dead_rows(impl):
    logits, target_ids, upstream = make(5, 33)
    mask = torch.tensor([True, False, True, True, True])
    logits[1] = torch.nan
    upstream = [g * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]) for g in upstream]
    scores, dlogits = logprob_entropy_with_grad(
        logits, target_ids, *upstream, row_mask=mask, impl=impl
    )
    assert (dlogits[[1, 2]] == 0).all() and (dlogits[[0, 3, 4]] != 0).any(1).all()
    assert all((x[1] == 0) and (x[[0, 2, 3, 4]] != 0).all() for x in scores)


def capped_rows_of_minus_infinity(V, dtype, device):
    """A soft-cap c turns -inf into -c, which has mass: beside the target, as the target, at the
    ends of the row, and in all of it.
    """
    logits, target_ids, upstream = make(6, V, dtype, device, padding(V, dtype), scale=2.0)
    logits[1, 1::3] = -torch.inf
    logits[2, target_ids[2]] = -torch.inf
    logits[3, 0] = logits[3, V - 1] = -torch.inf
    logits[4] = -torch.inf
    target_ids[5], logits[5, V - 1] = V - 1, -torch.inf
    return logits, target_ids, upstream


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_minus_infinity_under_a_softcap(impl):
    arguments = capped_rows_of_minus_infinity(37, torch.float32, "cpu")
    scores = check(impl, *arguments, softcap=3.0)
    assert scores[0][4].item() == pytest.approx(-math.log(37))


def test_arguments_are_checked():
    logits, target_ids, upstream = make(3, 7)
    bad = [
        (dict(dlogprobs=upstream[0][:2]), "dlogprobs"),
        (dict(target_ids=target_ids[:2]), "target_ids"),
        (dict(logits=torch.zeros(3, 0)), "empty vocabulary"),
        (dict(logits=torch.zeros(1, 7).expand(3, 7), inplace=True), "rows of their own"),
        (dict(target_ids=torch.tensor([0, 7, 1])), "7"),
        (dict(temperature=0.0), "temperature"),
    ]
    for change, words in bad:
        arguments = dict(logits=logits, target_ids=target_ids, dlogprobs=upstream[0]) | change
        with pytest.raises(ValueError, match=words):
            logprob_entropy_with_grad(**arguments)


def test_custom_op_passes_opcheck():
    logits, target_ids, upstream = make(3, 16)
    arguments = (torch.empty(3, 16), logits, target_ids, None, None, 1.0, None, 1.0, *upstream)
    torch.library.opcheck(
        torch.ops.qlkernels.logprob_entropy_with_grad.default,
        (*arguments, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- on a GPU ----------------------------------------------------------------

# V around a vector, a chunk (8192 values of 16 bits), the longest row of one block, of a cluster of
# 2 and of larger ones; rows around the number of multiprocessors
RING = [
    (1, 8), (2, 5), (2, 13), (3, 8192), (5, 8200), (133, 8191), (300, 16_411), (7, 90_112),
    (40, 90_117), (150, 151_936), (9, 262_147), (3, 1_000_003),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T, V", RING)
def test_gpu_rows_in_the_ring(T, V, dtype):
    """In place: a new gradient has packed rows, which start on 16 bytes only for some V."""
    logits, target_ids, upstream = make(T, V, dtype, "cuda", padding(V, dtype))
    assert logits.stride(0) * dtype.itemsize % 16 == 0
    actual = check("cuda", logits, target_ids, upstream, inplace=True)
    again = run("cuda", copy_of(logits), target_ids, upstream, inplace=True)
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))
    elsewhere = check("cuda", logits, target_ids, upstream)
    if padding(V, dtype) == 0:
        assert all(torch.equal(x, y) for x, y in zip(actual, elsewhere, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("T, V", [(3, 8192), (140, 16_411), (150, 151_936)])
def test_gpu_forward_and_backward_in_the_ring(T, V):
    logits, target_ids, upstream = make(T, V, torch.bfloat16, "cuda", padding(V, torch.bfloat16))
    want, dtruth = logprob_entropy_with_grad_ref(
        logits.double(), target_ids, *(g.double() for g in upstream)
    )
    base, dbase = logprob_entropy_with_grad_ref(logits, target_ids, *upstream)
    leaf = copy_of(logits).requires_grad_()
    for inplace in (False, True):
        scores = logprob_entropy(leaf, target_ids, impl="cuda", inplace_backward=inplace)
        total = sum((x * g).sum() for x, g in zip(scores, upstream, strict=True))
        (dlogits,) = torch.autograd.grad(total, leaf)
        values = zip(NAMES, (*scores, dlogits), (*want, dtruth), (*base, dbase), strict=True)
        for name, *triple in values:
            assert_as_accurate(name, *triple)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [37, 8203, 151_936])
def test_gpu_minus_infinity_under_a_softcap(V):
    logits, target_ids, upstream = capped_rows_of_minus_infinity(V, torch.bfloat16, "cuda")
    want = check("cuda", logits, target_ids, upstream, softcap=3.0, inplace=True)
    leaf = copy_of(logits).requires_grad_()
    scores = logprob_entropy(leaf, target_ids, softcap=3.0, inplace_backward=True, impl="cuda")
    total = sum((x * g).sum() for x, g in zip(scores, upstream, strict=True))
    (dlogits,) = torch.autograd.grad(total, leaf)
    for value, other in zip((*scores, dlogits), want, strict=True):
        torch.testing.assert_close(value, other, rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
def test_gpu_options_masks_and_certain_targets():
    T, V = 140, 16_384
    logits, target_ids, upstream = make(T, V, torch.bfloat16, "cuda", scale=2.0)
    mask = torch.rand(T, device="cuda") < 0.7
    tau = torch.rand(T, device="cuda") + 0.5
    logits[~mask] = torch.nan
    upstream = [torch.where(torch.arange(T, device="cuda") % 3 != 0, g, 0.0) for g in upstream]
    for inplace in (False, True):
        options = dict(row_mask=mask, temperature=tau, softcap=20.0, logit_scale=0.5)
        check("cuda", logits, target_ids, upstream, inplace=inplace, **options)
        memory = logits.clone()
        got = run("cuda", memory, target_ids, upstream, inplace=inplace, **options)
        want = run("cuda", logits, target_ids, upstream, **options)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    rows = torch.arange(T, device="cuda")
    certain = torch.randn(T, V, device="cuda").bfloat16()
    certain[rows, target_ids] = 24.0  # 1 - p is about 1e-6: nothing cancels
    ones = torch.ones(T, device="cuda")
    check("cuda", certain, target_ids, [ones, None, None])
    actual = run("cuda", certain, target_ids, [ones, None, None])[3][rows, target_ids]
    truth = logprob_entropy_with_grad_ref(certain.double(), target_ids, ones.double())[1]
    torch.testing.assert_close(
        actual.double(), truth[rows, target_ids], rtol=2**-8, atol=0.0
    )  # one rounding to bf16


@pytest.mark.gpu
def test_gpu_shifted_logits_and_targets_outside():
    logits, target_ids, upstream = make(20, 8192, torch.float32, "cuda", shift=1000.0)
    check("cuda", logits, target_ids, upstream)
    leaf = logits.clone().requires_grad_()  # |lse| > 64: the backward forms the sums again
    scores = logprob_entropy(leaf, target_ids, impl="cuda")
    total = sum((x * g).sum() for x, g in zip(scores, upstream, strict=True))
    (dlogits,) = torch.autograd.grad(total, leaf)
    want = logprob_entropy_with_grad_ref(
        logits.double(), target_ids, *(g.double() for g in upstream)
    )[1]
    base = logprob_entropy_with_grad_ref(logits, target_ids, *upstream)[1]
    assert_as_accurate("dlogits", dlogits, want, base)
    target_ids[3] = 8192
    outside = run("cuda", logits, target_ids, upstream)
    assert outside[0].isnan().nonzero().flatten().tolist() == [3]
    assert outside[3].isnan().all(1).nonzero().flatten().tolist() == [3]
    assert outside[1].isfinite().all()


@pytest.mark.gpu
def test_gpu_inside_a_graph():
    logits, target_ids, upstream = make(200, 151_936, torch.bfloat16, "cuda")
    want = run("cuda", logits, target_ids, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("cuda", logits, target_ids, upstream)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))
