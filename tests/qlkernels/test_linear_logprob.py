import math
import sys
from functools import partial

import pytest
import torch

from qlkernels import linear_logprob, logprob_entropy
from qlkernels.linear_logprob import linear_logprob_ref
from qlkernels.testing import assert_as_accurate, outputs_and_grads

CPU_IMPLS = ["torch", "triton", "cpu"]
# (T, H, V): nothing, one, primes, one either side of the interpreter's tiles (16, 32, 16), several
# tiles
SHAPES = [(0, 8, 37), (1, 1, 1), (3, 5, 37), (15, 16, 31), (17, 33, 65), (33, 16, 129)]


def make(T, H, V, dtype=torch.float32, seed=0, device="cpu", bias=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=g)
    w = 2 * torch.randn(V, H, generator=g) / math.sqrt(H)
    inputs = dict(hidden_states=x, lm_head_weight=w)
    if bias:
        inputs["bias"] = torch.randn(V, generator=g)
    inputs = {k: v.to(dtype).to(device).requires_grad_() for k, v in inputs.items()}
    inputs["target_ids"] = torch.randint(V, (T,), generator=g).to(device)
    return inputs, [torch.randn(T, generator=g).to(device) for _ in range(3)]


def doubled(inputs):
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for k, v in inputs.items()
    }


def check(impl, inputs, upstream, floor=1e-5, chunk_tokens=None, **options):
    run = partial(linear_logprob, impl=impl, chunk_tokens=chunk_tokens, **options)
    ref = partial(linear_logprob_ref, **options)
    actual = outputs_and_grads(run, inputs, upstream)
    truth = outputs_and_grads(ref, doubled(inputs), upstream)
    baseline = outputs_and_grads(ref, inputs, upstream)
    if impl == "triton" and inputs["hidden_states"].dtype == torch.bfloat16:
        floor = 2**-6  # the interpreter truncates dR to bf16 where the compiler rounds
    elif inputs["hidden_states"].dtype != torch.float32:
        # dR is rounded once to the operands' dtype before the GEMMs, by half an ulp: 2**-9 of bf16,
        # and where one element is the whole sum nothing averages it
        floor = 2**-8 if inputs["hidden_states"].dtype == torch.bfloat16 else 2**-9
    for name in truth:
        is_score = name.startswith("out")
        assert_as_accurate(
            name, actual[name], truth[name], baseline[name], floor=1e-5 if is_score else floor
        )
    return actual


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, H, V", SHAPES)
def test_matches_reference(impl, T, H, V, dtype):
    check(impl, *make(T, H, V, dtype))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "softcap, logit_scale", [(None, 1.0), (None, 0.25), (5.0, 1.0), (5.0, 2.0)]
)
def test_options(impl, bias, softcap, logit_scale):
    inputs, upstream = make(7, 16, 67, bias=bias)
    options = dict(softcap=softcap, logit_scale=logit_scale)
    check(impl, inputs, upstream, temperature=0.7, **options)
    tau = torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0, 0.05, 2.0])
    check(impl, inputs, upstream, temperature=tau, **options)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_bias_of_minus_infinity_bans_tokens(impl):
    inputs, upstream = make(5, 16, 67, bias=True)
    with torch.no_grad():
        inputs["bias"][3:40] = -torch.inf  # a whole tile of the interpreter's among them
    inputs["target_ids"] = torch.tensor([0, 1, 2, 50, 66])
    found = check(impl, inputs, upstream, temperature=0.7)
    assert (found["dbias"][3:40] == 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(impl, dtype):
    inputs, upstream = make(5, 16, 67)
    run = partial(linear_logprob, impl=impl, row_mask=torch.tensor([1, 0, 1, 1, 1]).bool())
    want = outputs_and_grads(run, inputs, upstream)
    torch.set_default_dtype(dtype)
    try:
        found = outputs_and_grads(run, inputs, upstream)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in want:
        assert torch.equal(found[name], want[name]), name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_equals_the_op_on_logits(impl):
    inputs, _ = make(6, 16, 67)
    x, w, y = (v.detach() for v in inputs.values())
    got = linear_logprob(x, w, y, temperature=0.7, impl=impl)
    want = logprob_entropy(x @ w.t(), y, temperature=0.7, impl="torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_zero_weight_gives_the_uniform_distribution(impl):
    scores = linear_logprob(
        torch.randn(3, 8), torch.zeros(100, 8), torch.tensor([0, 50, 99]), impl=impl
    )
    for value, want in zip(scores, (-math.log(100), math.log(100), math.log(100)), strict=True):
        torch.testing.assert_close(value, torch.full((3,), want))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "whole"])
def test_masked_rows_may_hold_anything(impl, compact):
    inputs, upstream = make(9, 16, 67)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0]).bool()
    options = dict(row_mask=mask, compact=compact)
    run = partial(linear_logprob, impl=impl, **options)
    clean = outputs_and_grads(run, inputs, upstream)
    truth = outputs_and_grads(partial(linear_logprob_ref, row_mask=mask), doubled(inputs), upstream)
    baseline = outputs_and_grads(partial(linear_logprob_ref, row_mask=mask), inputs, upstream)
    for name in truth:
        assert_as_accurate(name, clean[name], truth[name], baseline[name])
    with torch.no_grad():
        inputs["hidden_states"][~mask] = torch.nan
        inputs["target_ids"][~mask] = -100
    tau = torch.where(mask, 1.0, 0.0)
    dirty = outputs_and_grads(partial(run, temperature=tau), inputs, upstream)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in ("out0", "out1", "out2", "dhidden_states"):
        assert (dirty[name][~mask] == 0).all(), name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rows_with_zero_upstream_are_dropped(impl):
    """Their hidden states are not read: they turn NaN between forward and backward."""
    inputs, upstream = make(8, 16, 67)
    keep = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0])
    want = check(impl, inputs, [g * keep for g in upstream])
    x, w, y = inputs.values()
    scores = linear_logprob(x, w, y, impl=impl)
    total = sum((s * g * keep).sum() for s, g in zip(scores, upstream, strict=True))
    x.data[keep == 0] = torch.nan
    total.backward()
    torch.testing.assert_close(w.grad, want["dlm_head_weight"])
    torch.testing.assert_close(x.grad, want["dhidden_states"])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_no_row_left(impl):
    inputs, upstream = make(4, 16, 67)
    mask = torch.zeros(4, dtype=torch.bool)
    found = outputs_and_grads(partial(linear_logprob, impl=impl, row_mask=mask), inputs, upstream)
    assert all((v == 0).all() for v in found.values())
    zeros = outputs_and_grads(partial(linear_logprob, impl=impl), inputs, [torch.zeros(4)] * 3)
    assert (zeros["dlm_head_weight"] == 0).all() and (zeros["dhidden_states"] == 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("frozen", ["hidden_states", "lm_head_weight"])
def test_a_frozen_operand_gets_no_gradient(impl, frozen):
    inputs, upstream = make(5, 16, 67, bias=True)
    inputs[frozen] = inputs[frozen].detach()
    found = check(impl, inputs, upstream)
    assert f"d{frozen}" not in found


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_chunk_size_does_not_change_the_scores(impl):
    inputs, upstream = make(37, 16, 131)
    runs = [check(impl, inputs, upstream, chunk_tokens=n) for n in (1, 5, 37)]
    for run in runs[:-1]:
        for name, value in run.items():
            same = impl == "triton" and name.startswith("out")  # our own GEMM: to the bit
            limits = dict(rtol=0, atol=0) if same else dict(rtol=4e-6, atol=4e-6)
            torch.testing.assert_close(value, runs[-1][name], msg=name, **limits)


@pytest.mark.parametrize("least", [1, 64])
def test_many_rows_widen_the_blocks_of_the_backward(least, monkeypatch):
    """Memory for one row's logits, 33 rows: blocks of the kernel's tile, or of 64 columns."""
    inputs, upstream = make(33, 16, 129)
    passes = sys.modules["qlkernels.linear_logprob.passes"]
    widths = []

    def remember(total, a, b):
        widths.append(a.shape[1])
        total += a @ b

    monkeypatch.setattr(passes, "GPU_WORKSPACE_BYTES", 2 * 129)
    monkeypatch.setattr(passes, "LEAST_COLUMNS", least)
    monkeypatch.setattr(passes, "add_matmul", remember)
    check("triton", inputs, upstream)
    assert widths == ([32] * 4 + [1] if least == 1 else [64, 64, 1])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_same_input_same_bits(impl):
    inputs, upstream = make(19, 16, 131)
    run = partial(linear_logprob, impl=impl)
    first, second = (outputs_and_grads(run, inputs, upstream) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_batches_and_strided_rows(impl):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 24, generator=g)
    w, y = torch.randn(67, 16, generator=g), torch.randint(67, (2, 4), generator=g)
    part = x[:, :-1, 3:19]
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    got = linear_logprob(part, w, y, row_mask=mask, impl=impl)
    want = linear_logprob(part.reshape(8, 16), w, y.view(-1), row_mask=mask.view(-1), impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.view(2, 4))
    strided = linear_logprob(x[0, :, 3:19], w, torch.arange(5), impl=impl)
    packed = linear_logprob(x[0, :, 3:19].contiguous(), w, torch.arange(5), impl=impl)
    for a, b in zip(strided, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_certain_token_has_no_positive_logprob(impl):
    x = torch.eye(16)[:4] * 30
    scores = linear_logprob(x, torch.eye(16).repeat(3, 1)[:40] * 3, torch.arange(4), impl=impl)
    assert (scores.logprobs <= 0).all()


def test_tied_weights_add_up():
    weight = torch.randn(67, 16, requires_grad=True)
    ids, target_ids = torch.tensor([3, 5, 3]), torch.tensor([5, 3, 66])
    grads = []
    for f in (partial(linear_logprob, impl="cpu"), linear_logprob_ref):
        weight.grad = None
        f(weight[ids], weight, target_ids).logprobs.sum().backward()
        grads.append(weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_autocast_casts_both_operands():
    inputs, _ = make(5, 16, 67)
    x, w, y = inputs.values()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprob(x, w, y)
    want = linear_logprob(x.bfloat16(), w.bfloat16(), y)
    assert torch.equal(got.logprobs, want.logprobs)
    got.logprobs.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


def test_custom_op_passes_opcheck():
    inputs, _ = make(5, 16, 67, bias=True)
    x, w, b, y = inputs.values()
    mask = torch.tensor([1, 1, 0, 1, 1]).bool()
    torch.library.opcheck(
        torch.ops.qlkernels.linear_logprob,
        (x, w, y, b, None, mask, 0.7, 1.0, None, None, True, "torch", None),
    )
    scores = [torch.zeros(5)] * 4
    torch.library.opcheck(
        torch.ops.qlkernels.linear_logprob_bwd_,
        (x.detach(), w.detach(), y, None, None, mask, scores, torch.ones(5), None, None, 1.0, 1.0,
         None, None, True, "torch", True, False, False, torch.zeros(w.shape)),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compiles_without_a_graph_break():
    inputs, upstream = make(5, 16, 67)
    x, w, y = inputs.values()

    def loss(x, w):
        scores = linear_logprob(x, w, y, temperature=0.7)
        return sum((s * g).sum() for s, g in zip(scores, upstream, strict=True))

    want = torch.autograd.grad(loss(x, w), (x, w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w), (x, w))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_double_backward_is_refused():
    inputs, _ = make(3, 8, 17)
    x, w, y = inputs.values()
    (grad,) = torch.autograd.grad(linear_logprob(x, w, y).logprobs.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


class _Partitioned(torch.nn.Parameter):
    ds_id = 0


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(lm_head_weight=torch.zeros(7, 5)), ValueError, "H = 4"),
        (dict(lm_head_weight=torch.zeros(7, 4).half()), TypeError, "lm_head_weight"),
        (dict(lm_head_weight=torch.zeros(4, 7).t()), ValueError, "contiguous"),
        (dict(lm_head_weight=torch.zeros(0, 4)), ValueError, "nothing to multiply"),
        (dict(lm_head_weight=_Partitioned(torch.zeros(0))), ValueError, "ZeRO-3"),
        (dict(hidden_states=torch.zeros(3, 4).int()), TypeError, "int32"),
        (dict(hidden_states=torch.zeros(3)), ValueError, r"\[T, H\]"),
        (dict(bias=torch.zeros(6)), ValueError, "V = 7"),
        (dict(target_ids=torch.tensor([0, 1, 7])), ValueError, "outside"),
        (dict(target_ids=torch.tensor([0, 1])), ValueError, "T = 3"),
        (dict(temperature=-1.0), ValueError, "temperature"),
        (dict(chunk_tokens=0), ValueError, "chunk_tokens"),
        (dict(impl="cuda"), ValueError, "unknown impl"),
        (dict(row_mask=torch.ones(3).int()), TypeError, "bool"),
        (dict(hidden_states=torch.zeros(1, 3, 4)), ValueError, r"\[B, S, H\]"),
        (dict(lm_head_weight=None), TypeError, "must be a tensor"),
    ],
)
def test_refusals_name_the_argument(change, error, words):
    arguments = dict(
        hidden_states=torch.zeros(3, 4),
        lm_head_weight=torch.zeros(7, 4),
        target_ids=torch.tensor([0, 1, 2]),
    )
    with pytest.raises(error, match=words):
        linear_logprob(**(arguments | change))


def test_a_partitioned_weight_is_refused_under_autocast_too():
    weight = _Partitioned(torch.zeros(0))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="ZeRO-3"):
        linear_logprob(torch.zeros(3, 4), weight, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
def test_main_grad_takes_the_gradient_of_the_weight(impl, trains):
    inputs, upstream = make(9, 8, 37, torch.float32)
    want = outputs_and_grads(partial(linear_logprob, impl=impl), inputs, upstream)
    x = inputs["hidden_states"].detach().requires_grad_(trains != "weight")
    w = inputs["lm_head_weight"].detach().requires_grad_(trains != "hidden")
    buffer = torch.full_like(w, 2.0, requires_grad=False)
    for turn in (1, 2):
        scores = linear_logprob(x, w, inputs["target_ids"], main_grad=buffer, impl=impl)
        sum((s * g).sum() for s, g in zip(scores, upstream, strict=True)).backward()
        torch.testing.assert_close(buffer, 2.0 + turn * want["dlm_head_weight"])
    assert w.grad is None
    if trains != "weight":
        torch.testing.assert_close(x.grad, 2 * want["dhidden_states"])


def test_main_grad_of_another_kind_is_refused():
    x, w, y = torch.zeros(3, 4).requires_grad_(), torch.zeros(7, 4), torch.tensor([0, 1, 2])
    for bad in (torch.zeros(7, 5), torch.zeros(7, 4).bfloat16(), torch.zeros(4, 7).t()):
        with pytest.raises(ValueError, match="main_grad must be contiguous fp32"):
            linear_logprob(x, w, y, main_grad=bad)
    with pytest.raises(ValueError, match="takes no main_grad"):
        linear_logprob(x, w, y, main_grad=torch.zeros(7, 4), impl="reference")
    with pytest.raises(ValueError, match="no backward that could add"):
        linear_logprob(x.detach(), w, y, main_grad=torch.zeros(7, 4))


# --- on a GPU ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "T, H, V", [*SHAPES, (257, 128, 1031), (1000, 576, 4099), (130, 2048, 8192)]
)
def test_gpu_matches_reference(impl, T, H, V, dtype):
    check(impl, *make(T, H, V, dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gpu_options_and_bits(impl):
    inputs, upstream = make(515, 256, 5003, torch.bfloat16, device="cuda", bias=True)
    mask = torch.rand(515, device="cuda") < 0.6
    tau = torch.rand(515, device="cuda") + 0.5
    options = dict(row_mask=mask, temperature=tau, softcap=20.0, logit_scale=0.5)
    for compact in (True, False):
        run = partial(linear_logprob, impl=impl, compact=compact, **options)
        first, second = (outputs_and_grads(run, inputs, upstream) for _ in range(2))
        truth = outputs_and_grads(partial(linear_logprob_ref, **options), doubled(inputs), upstream)
        baseline = outputs_and_grads(partial(linear_logprob_ref, **options), inputs, upstream)
        for name in truth:
            assert torch.equal(first[name], second[name]), name
            floor = 1e-5 if name.startswith("out") else 2**-9
            assert_as_accurate(name, first[name], truth[name], baseline[name], floor=floor)


@pytest.mark.gpu
def test_gpu_chunks_give_the_same_bits():
    inputs, _ = make(3001, 512, 9973, torch.bfloat16, device="cuda")
    runs = [linear_logprob(**inputs, impl="triton", chunk_tokens=n) for n in (64, 1000, None)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.large
def test_gpu_more_logits_than_two_to_the_31():
    T, H, V = 14_336, 256, 151_936  # T * V = 2.18e9
    inputs, upstream = make(T, H, V, torch.bfloat16, device="cuda")
    live = torch.zeros(T, device="cuda")
    live[-5:] = 1.0
    found = outputs_and_grads(
        partial(linear_logprob, impl="triton", compact=False), inputs, [g * live for g in upstream]
    )
    tail = {
        k: v.detach()[-5:].requires_grad_(v.requires_grad) if k != "lm_head_weight" else v
        for k, v in inputs.items()
    }
    want = outputs_and_grads(linear_logprob_ref, doubled(tail), [g[-5:] for g in upstream])
    for name in ("out0", "out1", "out2"):
        torch.testing.assert_close(found[name][-5:].double(), want[name], rtol=1e-5, atol=1e-4)
    error = (found["dlm_head_weight"].double() - want["dlm_head_weight"]).abs().max()
    assert error <= 2**-7 * want["dlm_head_weight"].abs().max()
    assert (found["dhidden_states"][:-5] == 0).all()


@pytest.mark.gpu
def test_gpu_graph_capture_needs_no_synchronisation():
    inputs, _ = make(130, 128, 1031, torch.bfloat16, device="cuda")
    inputs = {k: v.detach() for k, v in inputs.items()}
    want = linear_logprob(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = linear_logprob(**inputs)
    graph.replay()
    for a, b in zip(scores, want, strict=True):
        assert torch.equal(a, b)
