import math
from functools import partial

import pytest
import torch

from qlkernels.linear_logprob import linear_logprob
from qlkernels.linear_logprob.passes import WeightGradient, fp32_reductions
from qlkernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_ref
from qlkernels.policy_loss import policy_loss
from qlkernels.testing import assert_as_accurate

CPU_IMPLS = ["torch", "triton", "cpu"]


def make(lengths=(5, 1, 9, 0, 12), H=16, V=67, dtype=torch.float32, seed=0, device="cpu", prompt=3):
    """A packed batch: a prompt before each response, advantages of both signs and zero."""
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(T, H, generator=g)
    w = 2 * torch.randn(V, H, generator=g) / math.sqrt(H)
    y = torch.randint(V, (T,), generator=g)
    mask = torch.cat([torch.arange(n) >= min(prompt, n - 1) for n in lengths])
    batch = dict(
        target_ids=y,
        advantages=torch.tensor([1.0, -0.5, -1.5, 0.3, 0.0])[: len(lengths)],
        response_mask=mask,
        cu_seqlens=cu_seqlens,
    )
    old = linear_logprob(x, w, y, impl="torch").logprobs + 0.3 * torch.randn(T, generator=g)
    keep = torch.rand(T, generator=g) < 0.7
    batch = {k: v.to(device) for k, v in batch.items()}
    leaves = dict(hidden_states=x.to(dtype).to(device), lm_head_weight=w.to(dtype).to(device))
    return leaves, batch, old.to(device), keep.to(device)


def run(function, leaves, batch, upstream=1.7, **options):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    result = function(**leaves, **batch, **options)
    if result.loss.requires_grad:
        (upstream * result.loss).backward()
    found = {"loss": result.loss.detach()}
    found |= {f"d{k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    found |= {k: v.detach() for k, v in result.scores._asdict().items()}
    return found, result.metrics


def check(impl, leaves, batch, floor=2e-5, chunk_tokens=None, **options):
    def double(x):
        is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.double() if is_float else x

    doubled = [{k: double(v) for k, v in d.items()} for d in (leaves, batch, options)]
    truth, wanted = run(linear_policy_loss_ref, *doubled[:2], **doubled[2])
    baseline, _ = run(linear_policy_loss_ref, leaves, batch, **options)
    actual, metrics = run(
        partial(linear_policy_loss, impl=impl, chunk_tokens=chunk_tokens), leaves, batch, **options
    )
    for name in truth:
        own = floor if name.startswith("d") else 2e-5
        assert_as_accurate(name, actual[name], truth[name], baseline[name], floor=own)
    for name in metrics._fields:
        got, want = getattr(metrics, name).double(), getattr(wanted, name).double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    return actual


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "cispo", "gspo"])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_matches_reference(impl, loss_type, policy):
    leaves, batch, old, keep = make()
    old = old if policy == "off" else None
    check(
        impl, leaves, batch, old_logprobs=old, keep_mask=keep, loss_type=loss_type, temperature=0.7
    )


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_chunks(impl, chunk_tokens):
    leaves, batch, old, _ = make()
    check(impl, leaves, batch, old_logprobs=old, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        dict(entropy_coef=0.01),
        dict(softcap=5.0),
        dict(logit_scale=0.5),
        dict(loss_type="dr_grpo", max_completion_tokens=16),
        dict(denominator="kept"),
        dict(aggregation="group-token-mean", group_ids=torch.tensor([0, 0, 1, 1, 2])),
        dict(num_tokens=40, loss_type="dapo"),
        dict(dual_clip=1.5, eps_high=0.1),
    ],
    ids=lambda o: "-".join(o),
)
def test_options(impl, options):
    leaves, batch, old, keep = make()
    check(impl, leaves, batch, old_logprobs=old, keep_mask=keep, **options)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_kl_term_bias_and_temperatures(impl):
    leaves, batch, old, keep = make()
    g = torch.Generator().manual_seed(3)
    leaves["bias"] = torch.randn(67, generator=g)
    ref = old + 0.2 * torch.randn(old.shape, generator=g)
    tau = 0.5 + torch.rand(old.shape, generator=g)
    options = dict(keep_mask=keep, ref_logprobs=ref, kl_coef=0.1, temperature=tau)
    check(impl, leaves, batch, old_logprobs=old, **options)
    check(impl, leaves, batch, old_logprobs=None, **options)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_advantages_per_token_and_weights(impl):
    leaves, batch, old, _ = make()
    g = torch.Generator().manual_seed(4)
    batch["advantages"] = torch.randn(old.shape, generator=g)
    weights = torch.rand(old.shape, generator=g)
    check(impl, leaves, batch, old_logprobs=old, aggregation=weights, rollout_is_weights=weights)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_operands(impl, dtype):
    leaves, batch, old, keep = make(dtype=dtype)
    # rounded once with the gradient and once with the upstream scalar
    floor = 2**-7 if dtype == torch.bfloat16 else 2**-10
    if impl == "triton":
        floor *= 2  # the interpreter truncates to 16 bits where the compiler rounds
    check(impl, leaves, batch, floor=floor, old_logprobs=old, keep_mask=keep)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("policy", ["on", "off"])
def test_rows_outside_the_response_may_hold_anything(impl, policy):
    leaves, batch, old, keep = make()
    old = old if policy == "off" else None
    options = dict(old_logprobs=old, keep_mask=keep, impl=impl)
    clean, _ = run(linear_policy_loss, leaves, batch, **options)
    outside = ~batch["response_mask"]
    leaves["hidden_states"][outside] = torch.nan
    batch["target_ids"][outside] = -100
    if old is not None:
        old[outside] = torch.nan
    dirty, _ = run(linear_policy_loss, leaves, batch, **options)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    assert (dirty["dhidden_states"][outside] == 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("distance", [150.0, -150.0])
def test_an_offset_that_is_far_off_costs_time_and_not_accuracy(impl, distance):
    """Old log-probs 150 nats away put S beyond fp32; the ratio is cut, the scores are not."""
    leaves, batch, old, _ = make()
    old[1::3] += distance
    check(impl, leaves, batch, old_logprobs=old, loss_type="cispo")


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_an_improbable_target_on_policy(impl):
    """The offset is the target's own logit, 200 nats under the largest."""
    leaves, batch, _, _ = make()
    leaves["hidden_states"][4] *= 200 / leaves["hidden_states"][4].norm()
    leaves["lm_head_weight"][0] = leaves["hidden_states"][4] / 200
    batch["target_ids"][4] = 1
    check(impl, leaves, batch, old_logprobs=None)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_nothing_to_learn_from(impl):
    leaves, batch, old, _ = make()
    for change in (
        dict(advantages=torch.zeros(5)),
        dict(response_mask=torch.zeros(27, dtype=torch.bool)),
    ):
        for policy in (None, old):
            options = dict(old_logprobs=policy, impl=impl)
            found, _ = run(linear_policy_loss, leaves, batch | change, **options)
            assert found["loss"] == 0
            assert all((found[k] == 0).all() for k in ("dhidden_states", "dlm_head_weight"))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_empty_batch(impl):
    leaves = dict(hidden_states=torch.zeros(0, 16), lm_head_weight=torch.randn(67, 16))
    batch = dict(
        target_ids=torch.zeros(0, dtype=torch.int64), advantages=torch.zeros(0),
        response_mask=torch.zeros(0, dtype=torch.bool),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    found, _ = run(linear_policy_loss, leaves, batch, old_logprobs=None, impl=impl)
    assert found["loss"] == 0 and (found["dlm_head_weight"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_adds_up_in_fp32(dtype):
    w = torch.zeros(2, 2, dtype=dtype)
    assert WeightGradient(w).result().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    total, row = WeightGradient(w), torch.tensor([[1.0, 0.0]], dtype=dtype)
    total.add_product(torch.tensor([[256.0], [1.0]], dtype=dtype), row, only=False)
    for _ in range(4):  # each lost in a bf16 sum of 256
        total.add_product(torch.tensor([[0.5], [1.0]], dtype=dtype), row, only=False)
    total.add(torch.ones_like(w))
    assert total.total.dtype == torch.float32
    assert total.total.tolist() == [[259.0, 1.0], [6.0, 1.0]]
    assert total.result().dtype == dtype


def test_cublas_settings_of_the_user_survive():
    backend, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    names = [n for n in (name, f"{name}_split_k") if hasattr(backend, n)]
    before = [getattr(backend, n) for n in names]
    try:
        for chosen in ((True, True), (False, True), (False, False)):
            setattr(backend, name, chosen[: len(names)] if len(names) == 2 else chosen[0])
            with pytest.raises(KeyError), fp32_reductions():
                assert not getattr(backend, name)
                raise KeyError
            assert [getattr(backend, n) for n in names] == list(chosen[: len(names)])
    finally:
        setattr(backend, name, tuple(before) if len(names) == 2 else before[0])


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("frozen", ["hidden_states", "lm_head_weight"])
def test_a_frozen_operand_gets_no_gradient(impl, frozen):
    leaves, batch, old, _ = make()
    want, _ = run(linear_policy_loss, leaves, batch, old_logprobs=old, impl=impl)
    (other,) = set(leaves) - {frozen}
    leaves[other] = leaves[other].clone().requires_grad_()
    result = linear_policy_loss(**leaves, **batch, old_logprobs=old, impl=impl)
    (1.7 * result.loss).backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[other].grad, want[f"d{other}"])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_same_input_same_bits_and_no_gradient_work_without_grad(impl):
    leaves, batch, old, keep = make()
    options = dict(old_logprobs=old, keep_mask=keep, impl=impl)
    first, second = (run(linear_policy_loss, leaves, batch, **options)[0] for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    with torch.no_grad():
        result = linear_policy_loss(**leaves, **batch, **options)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, first["loss"])


def test_equals_the_two_ops_one_after_the_other():
    leaves, batch, old, keep = make()
    x, w = (v.requires_grad_() for v in leaves.values())
    rest = {k: v for k, v in batch.items() if k != "target_ids"}
    scores = linear_logprob(x, w, batch["target_ids"], row_mask=batch["response_mask"])
    want = policy_loss(scores.logprobs, old, keep_mask=keep, **rest)
    got = linear_policy_loss(x, w, old_logprobs=old, keep_mask=keep, **batch)
    torch.testing.assert_close(got.loss, want.loss)
    for a, b in zip(
        torch.autograd.grad(got.loss, (x, w)), torch.autograd.grad(want.loss, (x, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("policy", ["on", "off"])
def test_a_strided_keep_mask(impl, policy):
    leaves, batch, old, keep = make()
    old = old if policy == "off" else None
    strided = torch.stack([keep, ~keep], 1)[:, 0]
    found = [
        run(linear_policy_loss, leaves, batch, old_logprobs=old, keep_mask=mask, impl=impl)[0]
        for mask in (keep, strided)
    ]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_loss_scaling_saves_small_gradients_in_fp16(impl):
    leaves, batch, old, _ = make(dtype=torch.float16)
    options = dict(old_logprobs=old, loss_type="dapo", num_tokens=1_000_000)
    wide = {k: v.float() for k, v in leaves.items()}
    want, _ = run(linear_policy_loss_ref, wide, batch, upstream=32768.0, **options)
    found, _ = run(linear_policy_loss, leaves, batch, upstream=32768.0, impl=impl, **options)
    for name in ("dhidden_states", "dlm_head_weight"):
        error = (found[name].float() - want[name]).abs().max() / want[name].abs().max()
        assert error <= 1e-2, name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_the_default_dtype_does_not_matter(impl):
    leaves, batch, old, keep = make()
    go = partial(run, linear_policy_loss, leaves, batch, old_logprobs=old, keep_mask=keep)
    want, _ = go(impl=impl)
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = go(impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in want:
        assert torch.equal(found[name], want[name]), name


def test_double_backward_is_refused():
    leaves, batch, old, _ = make()
    x, w = (v.requires_grad_() for v in leaves.values())
    loss = linear_policy_loss(x, w, old_logprobs=old, **batch).loss
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss**2, x, create_graph=True)


def test_compiles_without_a_graph_break():
    leaves, batch, old, _ = make()
    x, w = (v.requires_grad_() for v in leaves.values())

    def loss(x, w):
        return linear_policy_loss(x, w, old_logprobs=old, impl="torch", **batch).loss

    want = torch.autograd.grad(loss(x, w), (x, w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, w), (x, w)), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(lm_head_weight=torch.zeros(7, 5)), ValueError, "H = 16"),
        (dict(target_ids=torch.full((27,), 70)), ValueError, "outside"),
        (dict(advantages=torch.zeros(4)), ValueError, "advantages"),
        (dict(old_logprobs=torch.zeros(4)), ValueError, "old_logprobs"),
        (dict(loss_type="ppo"), ValueError, "loss_type"),
        (dict(kl_coef=0.1), ValueError, "ref_logprobs"),
        (dict(chunk_tokens=-1), ValueError, "chunk_tokens"),
        (dict(response_mask=torch.ones(27)), TypeError, "bool"),
        (dict(impl="cuda"), ValueError, "unknown impl"),
        (dict(num_chunks=3), TypeError, "num_chunks"),
    ],
)
def test_refusals_name_the_argument(change, error, words):
    leaves, batch, old, _ = make()
    with pytest.raises(error, match=words):
        linear_policy_loss(**(leaves | batch | dict(old_logprobs=old) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["on", "off"])
def test_gpu_matches_reference(impl, dtype, policy):
    leaves, batch, old, keep = make((300, 1, 513, 0, 77), 256, 5003, dtype, device="cuda")
    floor = 2e-5 if dtype == torch.float32 else 2**-8
    old = old if policy == "off" else None
    for chunk in (None, 100):
        check(impl, leaves, batch, floor, chunk, old_logprobs=old, keep_mask=keep, temperature=0.7)
