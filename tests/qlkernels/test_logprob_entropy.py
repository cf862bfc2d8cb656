import math
from functools import partial

import pytest
import torch

from qlkernels import _ext, logprob_entropy, token_entropy
from qlkernels._ext import why_not_cpu
from qlkernels.logprob_entropy import logprob_entropy_ref
from qlkernels.testing import AWKWARD_TV, assert_as_accurate, outputs_and_grads, peaked_logits

CPU_IMPLS = ["torch", "triton", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(T, V, dtype=torch.float32, seed=0, shift=0.0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(T, V, generator=g) + shift).to(dtype).to(device)
    target_ids = torch.randint(V, (T,), generator=g).to(device)
    upstream = [torch.randn(T, generator=g).to(device) for _ in range(3)]
    return logits.requires_grad_(), target_ids, upstream


def check(impl, logits, target_ids, upstream, **options):
    inputs = dict(logits=logits, target_ids=target_ids)
    doubles = dict(logits=logits.detach().double().requires_grad_(), target_ids=target_ids)
    actual = outputs_and_grads(partial(logprob_entropy, impl=impl, **options), inputs, upstream)
    truth = outputs_and_grads(partial(logprob_entropy_ref, **options), doubles, upstream)
    baseline = outputs_and_grads(partial(logprob_entropy_ref, **options), inputs, upstream)
    for name in truth:
        floor = 1e-5
        if (
            name == "dlogits"
            and impl == "triton"
            and logits.dtype == torch.bfloat16
            and logits.device.type == "cpu"
        ):
            floor = 2**-7  # the interpreter truncates to bf16 where the compiler rounds
        assert_as_accurate(name, actual[name], truth[name], baseline[name], floor=floor)
    return actual


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T, V", AWKWARD_TV)
def test_matches_reference(impl, T, V, dtype):
    check(impl, *make(T, V, dtype))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_a_constant_added_to_every_logit_does_no_harm(impl, shift):
    check(impl, *make(5, 503, shift=shift))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
@pytest.mark.parametrize("per_row", [False, True], ids=["tau", "tau_per_row"])
def test_temperature_scale_and_softcap(impl, softcap, logit_scale, per_row):
    logits, target_ids, upstream = make(6, 307)
    tau = torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0, 0.05]) if per_row else 0.7
    options = dict(temperature=tau, softcap=softcap, logit_scale=logit_scale)
    check(impl, logits, target_ids, upstream, **options)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_uniform_logits_have_known_scores(impl):
    scores = logprob_entropy(torch.full((3, 1000), 7.0), torch.tensor([0, 5, 999]), impl=impl)
    torch.testing.assert_close(scores.entropy, torch.full((3,), math.log(1000)))
    torch.testing.assert_close(scores.logprobs, torch.full((3,), -math.log(1000)))
    torch.testing.assert_close(scores.lse, torch.full((3,), 7 + math.log(1000)))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_masked_rows_are_never_read(impl):
    logits, target_ids, upstream = make(5, 67)
    mask = torch.tensor([True, False, True, False, True])
    clean = check(impl, logits, target_ids, upstream, row_mask=mask)
    with torch.no_grad():
        logits[~mask] = torch.nan
        target_ids[1] = -100
    dirty = outputs_and_grads(
        partial(logprob_entropy, impl=impl, row_mask=mask),
        dict(logits=logits, target_ids=target_ids),
        upstream,
    )
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
        assert (value[~mask] == 0).all(), name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_row_with_zero_upstream_is_not_read_in_the_backward(impl):
    logits, target_ids, upstream = make(4, 67)
    upstream = [g * torch.tensor([1.0, 0.0, 1.0, 0.0]) for g in upstream]
    scores = logprob_entropy(logits, target_ids, impl=impl)
    total = sum((x * g).sum() for x, g in zip(scores, upstream, strict=True))
    with torch.no_grad():
        logits.data[1] = torch.nan
        logits.data[3] = torch.nan
    total.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("only", [0, 1, 2], ids=["dlogprobs", "dentropy", "dlse"])
def test_one_upstream_gradient_alone(impl, only):
    logits, target_ids, upstream = make(5, 129)
    inputs = dict(logits=logits, target_ids=target_ids)
    pick = lambda f: lambda **kw: f(**kw)[only]  # noqa: E731
    found = [
        outputs_and_grads(pick(f), i, upstream[:1])["dlogits"]
        for f, i in (
            (partial(logprob_entropy, impl=impl), inputs),
            (logprob_entropy_ref, inputs | {"logits": logits.detach().double().requires_grad_()}),
            (logprob_entropy_ref, inputs),
        )
    ]
    assert_as_accurate("dlogits", *found)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_logits_of_minus_infinity_have_probability_zero(impl):
    logits, target_ids, upstream = make(4, 67)
    with torch.no_grad():
        logits[:, 10:50] = -torch.inf
        logits[2, :] = -torch.inf
        logits[2, 3] = 5.0  # one token left: certain
    target_ids = torch.tensor([0, 60, 3, 55])
    actual = check(impl, logits, target_ids, upstream)
    assert actual["out0"][2] == 0 and actual["out1"][2] == 0
    assert (actual["dlogits"][:, 10:50] == 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_nearly_certain_target(impl):
    """1 - p is 7e-6 and 1.3e-7: a few units in the last place of 1 are all that fp32 has."""
    logits = torch.zeros(2, 64, requires_grad=True)
    with torch.no_grad():
        logits[0, 1], logits[1, 2] = 16.0, 20.0
    target_ids, upstream = torch.tensor([1, 2]), [torch.ones(2), torch.zeros(2), torch.zeros(2)]
    run = partial(outputs_and_grads, upstream=upstream)
    actual = run(partial(logprob_entropy, impl=impl), dict(logits=logits, target_ids=target_ids))
    doubles = dict(logits=logits.detach().double().requires_grad_(), target_ids=target_ids)
    truth = run(logprob_entropy_ref, doubles)
    for name in ("out0", "out1", "dlogits"):
        assert (actual[name] - truth[name]).abs().max() <= 5e-7, name
    assert (actual["out0"] <= 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_peaked_logits_of_the_real_vocabulary(impl):
    logits, target_ids = peaked_logits(4, 151_936)
    upstream = [torch.randn(4) for _ in range(3)]
    check(impl, logits.requires_grad_(), target_ids, upstream)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_nan_stays_in_its_row(impl):
    logits, target_ids, _ = make(3, 67)
    with torch.no_grad():
        logits[1, 40] = torch.nan
    scores = logprob_entropy(logits.detach(), target_ids, impl=impl)
    for value in scores:
        assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_strided_rows_and_batches(impl):
    wide = torch.randn(6, 100)
    target_ids = torch.randint(61, (6,))
    strided = logprob_entropy(wide[:, 3:64], target_ids, impl=impl)
    packed = logprob_entropy(wide[:, 3:64].contiguous(), target_ids, impl=impl)
    batch = torch.randn(2, 4, 61)
    shifted = logprob_entropy(batch[:, :-1], target_ids.view(2, 3), impl=impl)
    flat = logprob_entropy(batch[:, :-1].reshape(6, 61), target_ids, impl=impl)
    for a, b in zip(strided + shifted, packed + tuple(x.view(2, 3) for x in flat), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_inplace_backward_equals_the_other(impl):
    logits, target_ids, upstream = make(5, 129)
    found = []
    for inplace in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        block = leaf * 1.0
        scores = logprob_entropy(block, target_ids, inplace_backward=inplace, impl=impl)
        sum((x * g).sum() for x, g in zip(scores, upstream, strict=True)).backward()
        found.append(leaf.grad)
        assert (block.grad_fn is not None) and torch.equal(block, leaf.grad) == inplace
    assert torch.equal(*found)
    shared = logits.detach()[:1].expand(5, -1)
    with pytest.raises(ValueError, match="rows of their own"):
        logprob_entropy(shared, target_ids, inplace_backward=True, impl=impl)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_same_input_same_bits(impl):
    logits, target_ids, upstream = make(7, 1031)
    inputs = dict(logits=logits, target_ids=target_ids)
    first, second = (
        outputs_and_grads(partial(logprob_entropy, impl=impl), inputs, upstream) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_token_entropy_is_the_entropy():
    logits = torch.randn(4, 37)
    probabilities = logits.double().softmax(1)
    want = -(probabilities * probabilities.log()).sum(1)
    torch.testing.assert_close(token_entropy(logits).double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(token_entropy(logits.view(2, 2, 37)).view(4), token_entropy(logits))


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_custom_ops_pass_opcheck(impl):
    logits, target_ids, _ = make(3, 37)
    mask = torch.tensor([True, False, True])
    torch.library.opcheck(
        torch.ops.qlkernels.logprob_entropy,
        (logits, target_ids, mask, None, 0.7, None, 1.0, False, impl),
    )


def test_compiles_without_a_graph_break():
    logits, target_ids, upstream = make(3, 37)

    def loss(logits):
        scores = logprob_entropy(logits, target_ids, temperature=0.7, impl="torch")
        return sum((x * g).sum() for x, g in zip(scores, upstream, strict=True))

    leaf = logits.detach().clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    loss(logits).backward()
    assert torch.equal(leaf.grad, logits.grad)


def test_double_backward_is_refused():
    logits, target_ids, _ = make(3, 37)
    total = logprob_entropy(logits, target_ids, impl="torch").logprobs.sum()
    (grad,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target_ids = torch.tensor([0, 4, 2])
    options = dict(temperature=0.7, softcap=3.0, logit_scale=0.5)
    assert torch.autograd.gradcheck(
        lambda x: tuple(logprob_entropy_ref(x, target_ids, **options)), (logits,)
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(target_ids=torch.zeros(4, dtype=torch.int64)), ValueError, "T = 3"),
        (dict(target_ids=torch.zeros(3)), TypeError, "int64"),
        (dict(target_ids=torch.tensor([0, 1, 7])), ValueError, r"target_ids\[2\] = 7"),
        (dict(target_ids=torch.tensor([0, -100, 1])), ValueError, "row_mask"),
        (dict(logits=torch.zeros(3, 7).double()), TypeError, "float64"),
        (dict(logits=torch.zeros(7, 3).t()), ValueError, "contiguous"),
        (dict(logits=torch.zeros(3, 0)), ValueError, "empty vocabulary"),
        (dict(logits=torch.zeros(3)), ValueError, r"\[T, V\]"),
        (dict(logits=None), TypeError, "must be a tensor"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(temperature=torch.ones(2)), ValueError, "temperature"),
        (dict(softcap=-1.0), ValueError, "softcap"),
        (dict(logit_scale=-1.0), ValueError, "logit_scale"),
        (dict(row_mask=torch.ones(3)), TypeError, "bool"),
        (dict(impl="fast"), ValueError, "unknown impl"),
        (dict(impl="cuda"), RuntimeError, "cannot run here"),
    ],
)
def test_refusals_name_the_argument(change, error, words):
    arguments = dict(logits=torch.zeros(3, 7), target_ids=torch.tensor([0, 1, 2])) | change
    with pytest.raises(error, match=words):
        logprob_entropy(**arguments)


def test_cpu_tensors_take_the_extension_by_default(monkeypatch):
    assert why_not_cpu(torch.zeros(1)) is None, "the extension must be built where tests run"
    calls, forward = [], _ext.logprob_entropy_fwd
    monkeypatch.setattr(_ext, "logprob_entropy_fwd", lambda *a: calls.append(1) or forward(*a))
    logprob_entropy(torch.randn(2, 5), torch.tensor([0, 1]))
    logprob_entropy(torch.randn(2, 5), torch.tensor([0, 1]), impl="torch")
    assert calls == [1]


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_finite_mask_values_and_a_low_temperature(impl):
    """finfo.min over a temperature below 1 is -inf; the target may be such a token too."""
    logits, target_ids, upstream = make(4, 67)
    with torch.no_grad():
        logits[:, 5:30] = torch.finfo(torch.float32).min
    check(impl, logits, torch.full((4,), 40), upstream, temperature=0.7)
    run = partial(token_entropy, temperature=0.7, impl=impl)
    with torch.no_grad():
        logits[:, 0] = torch.finfo(torch.float32).min
    found = outputs_and_grads(run, dict(logits=logits), upstream[:1])
    want = outputs_and_grads(
        lambda logits: logprob_entropy_ref(
            logits, torch.full((4,), 40), temperature=0.7
        ).entropy, dict(logits=logits.detach().double().requires_grad_()), upstream[:1],
    )  # fmt: skip
    for name in want:
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-5, atol=1e-6)


# --- on a GPU ----------------------------------------------------------------

GPU_IMPLS = ["triton", "cuda", "torch"]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T, V", [*AWKWARD_TV, (3, 151_936), (1025, 4099)])
def test_gpu_matches_reference(impl, T, V, dtype):
    check(impl, *make(T, V, dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_gpu_options_masks_and_bits(impl):
    logits, target_ids, upstream = make(33, 5003, torch.bfloat16, device="cuda")
    mask = torch.rand(33, device="cuda") < 0.7
    with torch.no_grad():
        logits[~mask] = torch.nan
    tau = torch.rand(33, device="cuda") + 0.5
    options = dict(temperature=tau, row_mask=mask, softcap=30.0, logit_scale=0.5)
    first = check(impl, logits, target_ids, upstream, **options)
    second = check(impl, logits, target_ids, upstream, **options)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_gpu_offsets_past_two_to_the_31(impl):
    T, V = 14_336, 151_936  # T * V = 2.18e9
    logits = torch.empty(T, V, dtype=torch.bfloat16, device="cuda").normal_()
    target_ids = torch.randint(V, (T,), device="cuda")
    upstream = [torch.zeros(T, device="cuda") for _ in range(3)]
    for g in upstream:
        g[-3:] = torch.randn(3, device="cuda")
    last = [g[-3:] for g in upstream]
    tail = logits[-3:].clone().requires_grad_()
    want = check(impl, tail, target_ids[-3:], last)
    scores = logprob_entropy(logits.requires_grad_(), target_ids, impl=impl)
    for value, name in zip(scores, ("out0", "out1", "out2"), strict=True):
        if impl == "torch":  # its reductions depend on the number of rows
            torch.testing.assert_close(value[-3:], want[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value[-3:], want[name])
    sum((x * g).sum() for x, g in zip(scores, upstream, strict=True)).backward()
    if impl == "torch":
        torch.testing.assert_close(logits.grad[-3:], want["dlogits"], rtol=2**-8, atol=1e-9)
    else:
        assert torch.equal(logits.grad[-3:], want["dlogits"])
    assert (logits.grad[:-3] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_gpu_target_outside_the_vocabulary_gives_nan(impl):
    logits = torch.randn(3, 64, device="cuda")
    target_ids = torch.tensor([1, 64, -100], device="cuda")
    scores = logprob_entropy(logits, target_ids, impl=impl)
    assert scores.logprobs.isnan().tolist() == [False, True, True]
    with pytest.raises(ValueError, match="outside"):
        logprob_entropy(logits, target_ids, validate=True, impl=impl)
