import math
from functools import partial

import pytest
import torch

from qlkernels._target import is_interpreting
from qlkernels.policy_loss import PolicyLossMetrics, aggregation_weights, policy_loss
from qlkernels.testing import assert_as_accurate

IMPLS = ["torch", "triton"]
NAN = float("nan")
# nothing, one row, an empty sequence, one either side of a tile of 1024 rows, a tail of padding
LENGTHS = {
    "one": ([1], 0),
    "short": ([7, 0, 5], 0),
    "tiles": ([1023, 1, 1025], 0),
    "tail": ([4, 9], 6),
}

# Every feature at least once; each impl runs all of them against the fp64 reference.
CASES = {
    "on_policy": dict(old=False),
    "grpo": dict(),
    "dapo_clip_higher": dict(loss_type="dapo", eps_low=0.1, eps_high=0.28),
    "bnpo_kept": dict(loss_type="bnpo", keep=True, denominator="kept"),
    "dr_grpo_keep": dict(loss_type="dr_grpo", max_completion_tokens=7, keep=True),
    "dual_clip": dict(dual_clip=1.5),
    "ratio_cap": dict(ratio_cap=1.3, per_token=True),
    "k1": dict(ref=True, kl_coef=0.1, kl_estimator="k1"),
    "k2_importance": dict(ref=True, kl_coef=0.1, kl_estimator="k2", kl_importance=True),
    "k3_keep": dict(ref=True, kl_coef=0.1, keep=True),
    "k3_kept": dict(ref=True, kl_coef=0.1, keep=True, denominator="kept"),
    "kl_metric_only": dict(ref=True),
    "bonus": dict(entropy_coef=0.05, keep=True, denominator="kept"),
    "rollout_weights": dict(rollout=True, ref=True, kl_coef=0.1),
    "weights": dict(aggregation="given", keep=True, denominator="kept", entropy_coef=0.05),
    "group": dict(aggregation="group-token-mean", keep=True),
    "num_tokens": dict(loss_type="dapo", num_tokens=11),
    "num_sequences": dict(num_sequences=2.5),
    "gspo": dict(loss_type="gspo", eps_low=0.05, eps_high=0.05),
    "gspo_on_policy": dict(loss_type="gspo", old=False, per_token=True),
    "gspo_everything": dict(
        loss_type="gspo", keep=True, denominator="kept", rollout=True, ref=True, kl_coef=0.1,
        kl_importance=True, per_token=True, entropy_coef=0.05, aggregation="given",
    ),
    "gspo_token_mean": dict(loss_type="gspo", aggregation="token-mean", keep=True),
    "cispo": dict(loss_type="cispo", eps_low=1.0, eps_high=0.3),
    "cispo_everything": dict(
        loss_type="cispo", keep=True, rollout=True, ref=True, kl_coef=0.1, kl_importance=True
    ),
}  # fmt: skip


def make(lengths="short", seed=0, device="cpu", **case):
    """Arguments of ``policy_loss`` in fp32; every masked row of every input is NaN."""
    lengths, tail = LENGTHS[lengths] if isinstance(lengths, str) else (lengths, 0)
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), sum(lengths) + tail
    mask = torch.rand(T, generator=g) < 0.7
    if T:
        mask[0] = True

    def rows(x, hidden=NAN):
        return torch.where(mask, x, hidden).to(device)

    logprobs = -torch.rand(T, generator=g)
    options = dict(case)
    has_old, per_token = options.pop("old", True), options.pop("per_token", False)
    old = logprobs + 0.3 * torch.randn(T, generator=g)
    advantages = torch.randn(T if per_token else B, generator=g)
    options["entropy"] = rows(torch.rand(T, generator=g))
    noise, uniform = torch.randn(T, generator=g), torch.rand(T, generator=g)
    if options.pop("ref", False):
        options["ref_logprobs"] = rows(logprobs + 0.3 * noise)
    if options.pop("rollout", False):
        options["rollout_is_weights"] = rows(2 * uniform)
    if options.pop("keep", False):
        options["keep_mask"] = (torch.rand(T, generator=g) < 0.6).to(device)
    if options.get("aggregation") == "given":
        options["aggregation"] = rows(torch.rand(T, generator=g))
    if options.get("aggregation") == "group-token-mean":
        options["group_ids"] = torch.arange(B, device=device) // 2
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return dict(
        logprobs=rows(logprobs),
        old_logprobs=rows(old) if has_old else None,
        advantages=rows(advantages) if per_token else advantages.to(device),
        response_mask=(mask | (torch.arange(T) >= sum(lengths))).to(device),
        cu_seqlens=cu_seqlens.to(device),
        **options,
    )


def run(arguments, impl, dtype=torch.float32, upstream=1.7):
    """Loss, gradients and metrics by name."""
    arguments = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    leaves = {}
    for name in ("logprobs", "entropy"):
        if arguments.get(name) is not None:
            leaves[name] = arguments[name] = arguments[name].detach().clone().requires_grad_()
    result = policy_loss(**arguments, impl=impl)
    (result.loss * upstream).backward()
    found = {"loss": result.loss.detach(), **result.metrics._asdict()}
    for name, leaf in leaves.items():
        found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def check(arguments, impl):
    actual = run(arguments, impl)
    truth = run(arguments, "reference", torch.float64)
    baseline = run(arguments, "reference")
    for name in truth:
        assert_as_accurate(name, actual[name], truth[name], baseline[name])
    return actual


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(impl, case):
    check(make("short", **CASES[case]), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["grpo", "gspo_everything", "weights"])
@pytest.mark.parametrize("lengths", ["one", "tiles", "tail"])
def test_matches_reference_at_awkward_lengths(impl, lengths, case):
    check(make(lengths, seed=1, **CASES[case]), impl)


@pytest.mark.parametrize("case", CASES)
def test_torch_in_double_is_the_reference(case):
    arguments = make("short", seed=2, **CASES[case])
    truth = run(arguments, "reference", torch.float64)
    for name, x in run(arguments, "torch", torch.float64).items():
        torch.testing.assert_close(x, truth[name], rtol=1e-12, atol=1e-14, equal_nan=True)


# not cispo: its ratio is a constant on purpose, which finite differences cannot know
@pytest.mark.parametrize("case", ["gspo_everything", "k3_kept", "k2_importance"])
def test_gradcheck_of_the_reference(case):
    arguments = {
        k: torch.nan_to_num(v).double() if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v for k, v in make([3, 2], seed=3, **CASES[case]).items()
    }  # fmt: skip
    entropy, logprobs = arguments.pop("entropy"), arguments.pop("logprobs").requires_grad_()
    entropy.requires_grad_("entropy_coef" in arguments)

    def loss(logprobs, entropy):
        return policy_loss(logprobs, entropy=entropy, **arguments, impl="reference").loss

    torch.autograd.gradcheck(loss, (logprobs, entropy))


# --- answers that a reader can check ---------------------------------------------


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_by_hand(impl):
    """Two sequences of two tokens; ratios 1.5 and 0.5 by halves, advantages +1 and -1."""
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    found = policy_loss(
        logprobs, old, advantages, torch.ones(4, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, 4]), loss_type="dapo", impl=impl,
    )  # fmt: skip
    # A = 1: min(1.5, 1.2) = 1.2 and 0.5; A = -1: -max(1.5, 1.2) = -1.5 and -max(0.5, 0.8) = -0.8
    assert found.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    found.loss.backward()
    # the clipped ones (first and last) have no gradient; the others -A rho / 4
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.125, 0.375, 0.0])
    metrics = {name: x.item() for name, x in found.metrics._asdict().items()}
    assert metrics.pop("kl") != metrics.pop("entropy_token_mean")  # both NaN: neither was given
    assert math.isnan(metrics.pop("entropy_sequence_mean"))
    assert metrics == pytest.approx(
        dict(
            num_tokens=4, clip_low=0.25, clip_high=0.25, clip_cap=0.0, ratio_mean=1.0,
            ratio_min=0.5, ratio_max=1.5, masked_fraction=0.0, live_fraction=0.5,
        )
    )  # fmt: skip


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_two_entropies(impl):
    """Sequences of 1 and 3 tokens with entropies 1.0 and 0.2: means 0.6 and 0.4."""
    found = policy_loss(
        torch.zeros(5), None, torch.ones(2), torch.tensor([True, True, True, True, False]),
        cu_seqlens=torch.tensor([0, 1, 5]), entropy=torch.tensor([1.0, 0.2, 0.2, 0.2, NAN]),
        impl=impl,
    )  # fmt: skip
    assert found.metrics.entropy_sequence_mean.item() == pytest.approx(0.6)
    assert found.metrics.entropy_token_mean.item() == pytest.approx(0.4)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_identical_policies_have_ratio_one(impl):
    logprobs = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    mask, cu = torch.ones(3, dtype=torch.bool), torch.tensor([0, 2, 3])
    A = torch.tensor([2.0, -1.0])
    for old in (None, logprobs.detach()):
        found = policy_loss(logprobs, old, A, mask, cu_seqlens=cu, loss_type="bnpo", impl=impl)
        assert found.loss.item() == pytest.approx(-(2 + 2 - 1) / 3)
        assert found.metrics.ratio_min.item() == found.metrics.ratio_max.item() == 1.0
        assert found.metrics.clip_low.item() == found.metrics.clip_high.item() == 0.0
        (g,) = torch.autograd.grad(found.loss, logprobs)
        assert g.tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("gap", [25.0, 200.0])
def test_a_log_ratio_beyond_20_nats_is_cut_and_has_no_gradient(impl, gap):
    logprobs = torch.tensor([-1.0, -1.0 - gap], requires_grad=True)
    old = torch.tensor([-1.0 - gap, -1.0])
    found = policy_loss(
        logprobs, old, torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 1, 2]), loss_type="bnpo", ref_logprobs=old, kl_coef=1.0,
        impl=impl,
    )  # fmt: skip
    # A = -1: e^20; A = 1: -e^-20; k3 of differences -20 and 20
    want = (math.exp(20) - math.exp(-20) + math.exp(-20) - 1 + 20 + math.exp(20) - 1 - 20) / 2
    assert found.loss.item() == pytest.approx(want, rel=1e-5)
    found.loss.backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("d", [0.01, -0.2, 0.3])
def test_k3_near_zero_does_not_cancel(impl, d):
    found = policy_loss(
        torch.zeros(1), None, torch.zeros(1), torch.ones(1, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 1]), ref_logprobs=torch.tensor([d]), kl_coef=1.0, impl=impl,
    )  # fmt: skip
    # exp(d) - 1 - d in fp32 is wrong by 1e-3 of itself at d = 0.01
    assert found.loss.item() == pytest.approx(math.expm1(d) - d, rel=3e-5)


# --- laws ------------------------------------------------------------------------


def test_dual_clip_and_two_sided_clip_agree_above_the_clip_range():
    arguments = make("short", seed=4)
    arguments["old_logprobs"] = arguments["logprobs"] - 1.5  # ratio 4.5 everywhere
    dual = run(arguments | dict(dual_clip=3.0), "torch")
    two_sided = run(arguments | dict(ratio_cap=3.0), "torch")
    for name in dual:
        torch.testing.assert_close(dual[name], two_sided[name], equal_nan=True)
    assert dual["clip_cap"] > 0
    # the uncapped loss differs, so that the cap did something
    assert run(arguments, "torch")["loss"] != dual["loss"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["grpo", "gspo_everything", "bnpo_kept", "bonus"])
def test_padded_equals_packed(impl, case):
    arguments = make("short", seed=5, **CASES[case])
    cu = arguments.pop("cu_seqlens")
    B, S = len(cu) - 1, int(cu.diff().max()) + 2
    place = torch.zeros(B, S, dtype=torch.bool)
    for i in range(B):  # left-padded, right-padded and both
        start = [0, 2, 1][i % 3] if cu[i + 1] - cu[i] + 2 <= S else 0
        place[i, start : start + int(cu[i + 1] - cu[i])] = True

    def pad(name, x):
        if not isinstance(x, torch.Tensor) or x.shape != (int(cu[-1]),):
            return x
        out = torch.full((B, S), False if x.dtype == torch.bool else NAN, dtype=x.dtype)
        out[place] = x
        return out

    padded = run({k: pad(k, v) for k, v in arguments.items()}, impl)
    packed = run(arguments | dict(cu_seqlens=cu), impl)
    for name, x in packed.items():
        y = padded[name][place] if name in ("dlogprobs", "dentropy") else padded[name]
        torch.testing.assert_close(y, x, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert padded["dlogprobs"].shape == (B, S)
    assert (padded["dlogprobs"][~place] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_may_hold_nan_and_receive_zero(impl):
    arguments = make("tiles", seed=6, **CASES["gspo_everything"])
    hidden = ~arguments["response_mask"]
    assert arguments["logprobs"][hidden].isnan().all() and hidden.any()
    found = run(arguments, impl)
    assert found["loss"].isfinite() and (found["dlogprobs"][hidden] == 0).all()
    zeros = {
        k: torch.nan_to_num(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    for name, x in run(zeros, impl).items():
        assert torch.equal(x, found[name]), name


NAN_CASES = ["on_policy", "grpo", "gspo", "cispo", "dual_clip", "k3_keep"]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("case", NAN_CASES)
def test_nan_that_counts_is_not_hidden(impl, case, device="cpu"):
    arguments = make("short", seed=14, device=device, **CASES[case])
    row = int(arguments["response_mask"].nonzero()[1])
    arguments["logprobs"][row] = NAN
    if "keep_mask" in arguments:
        arguments["keep_mask"][row] = True
    found = run(arguments, impl)
    assert found["loss"].isnan() and found["dlogprobs"][row].isnan()
    if case != "gspo":  # where it spoils its whole sequence
        assert found["dlogprobs"].isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_past_the_last_sequence_are_padding(impl):
    arguments = make("tail", seed=7)
    found = run(arguments, impl)
    n = int(arguments["cu_seqlens"][-1])
    assert arguments["response_mask"][n:].all() and (found["dlogprobs"][n:] == 0).all()
    T = len(arguments["logprobs"])
    cut = {
        k: v[:n] if isinstance(v, torch.Tensor) and v.shape == (T,) else v
        for k, v in arguments.items()
    }
    assert torch.equal(run(cut, impl)["loss"], found["loss"])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_same_bits(impl):
    arguments = make("tiles", seed=8, **CASES["gspo_everything"])
    first, second = run(arguments, impl), run(arguments, impl)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_micro_batches_with_the_global_count_add_up(impl):
    whole = make([4, 6, 3], seed=9, keep=True, loss_type="dapo")
    cu, n = whole["cu_seqlens"], int(whole["response_mask"].sum())
    total, gradients = 0.0, []
    for i in range(3):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        part = {
            k: v[rows] if isinstance(v, torch.Tensor) and v.shape == (13,) else v
            for k, v in whole.items()
        }
        part |= dict(advantages=whole["advantages"][i : i + 1], cu_seqlens=cu[i : i + 2] - cu[i])
        found = run(part | dict(num_tokens=torch.tensor(n)), impl)
        total, gradients = total + found["loss"], [*gradients, found["dlogprobs"]]
    want = run(whole, impl)
    torch.testing.assert_close(total, want["loss"])
    torch.testing.assert_close(torch.cat(gradients), want["dlogprobs"])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3, 2]], ids=str)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "gspo"])
def test_nothing_to_train_on_is_a_differentiable_zero(impl, lengths, loss_type):
    arguments = make(lengths, loss_type=loss_type)
    arguments["response_mask"] = torch.zeros_like(arguments["response_mask"])
    arguments["logprobs"] = torch.full_like(arguments["logprobs"], NAN)
    found = run(arguments, impl)
    assert found["loss"] == 0 and not found["dlogprobs"].any()
    assert found["num_tokens"] == 0 and found["ratio_mean"].isnan() and found["ratio_max"].isnan()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_everything_dropped_is_a_differentiable_zero(impl):
    arguments = make("short", keep=True, denominator="kept")
    arguments["keep_mask"] = torch.zeros_like(arguments["keep_mask"])
    found = run(arguments, impl)
    assert found["loss"] == 0 and not found["dlogprobs"].any()
    assert found["masked_fraction"] == 1 and found["live_fraction"] == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("upstream", [math.inf, NAN])
def test_dead_rows_stay_zero_under_a_broken_upstream(impl, upstream):
    arguments = make("short", seed=10)
    found = run(arguments, impl, upstream=upstream)
    dead = run(arguments, impl)["dlogprobs"] == 0
    assert dead.any() and (found["dlogprobs"][dead] == 0).all()
    assert not found["dlogprobs"][~dead].isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_and_strided_inputs(impl):
    arguments = make("short", seed=11)
    wide = torch.stack([arguments["logprobs"].bfloat16(), torch.zeros(12)], 1)
    arguments |= dict(logprobs=wide[:, 0], old_logprobs=arguments["old_logprobs"].half())
    arguments["cu_seqlens"] = arguments["cu_seqlens"].long()
    leaf = wide.detach().requires_grad_()
    found = policy_loss(**arguments | dict(logprobs=leaf[:, 0]), impl=impl)
    assert found.loss.dtype == torch.float32
    found.loss.backward()
    exact = {k: v.float() if k.endswith("logprobs") else v for k, v in arguments.items()}
    want = run(exact, "reference", upstream=1.0)
    torch.testing.assert_close(found.loss.detach(), want["loss"])
    torch.testing.assert_close(leaf.grad[:, 0], want["dlogprobs"].to(leaf.dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_padded_batch_longer_than_65536_tokens(impl):
    g = torch.Generator().manual_seed(0)
    rows = [-torch.rand(1, 65_543, generator=g) for _ in range(2)]
    check(
        dict(
            logprobs=rows[0], old_logprobs=rows[1], advantages=torch.ones(1),
            response_mask=rows[0] < -0.5,
        ),
        impl,
    )  # fmt: skip


def test_named_rules_are_the_weights_they_say():
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0], dtype=torch.bool)  # 2, 3 and 0 tokens
    keep = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    cu = torch.tensor([0, 3, 6, 8])
    weights = partial(aggregation_weights, mask, cu)
    per_token = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0]) / 5
    torch.testing.assert_close(weights("token-mean").float(), per_token)
    halves = torch.tensor([1 / 4, 1 / 4, 0, 1 / 6, 1 / 6, 1 / 6, 0, 0])
    torch.testing.assert_close(weights("seq-mean-token-mean").float(), halves)
    constant = weights("constant", max_completion_tokens=10)
    torch.testing.assert_close(constant.float(), torch.tensor([1, 1, 0, 1, 1, 1, 0, 0]) / 20)
    one_group = weights("group-token-mean", group_ids=torch.tensor([2, 2, 0]))
    torch.testing.assert_close(one_group.float(), per_token)
    two_groups = weights("group-token-mean", group_ids=torch.tensor([0, 1, 1]))
    torch.testing.assert_close(two_groups.float(), halves)
    kept = weights("seq-mean-token-mean", keep_mask=keep, denominator="kept")
    want = torch.tensor([1 / 2, 0, 0, 1 / 6, 1 / 6, 1 / 6, 0, 0])
    torch.testing.assert_close(kept.float(), want)


# --- torch citizenship -----------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_compiles_without_a_graph_break(impl):
    arguments = make("short", seed=12, **CASES["gspo_everything"])
    logprobs = arguments.pop("logprobs")

    def loss(logprobs):
        found = policy_loss(logprobs, **arguments, impl=impl)
        return found.loss + 0 * found.metrics.num_tokens

    leaves = [logprobs.detach().clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for f, leaf in zip((loss, compiled), leaves, strict=True):
        f(leaf).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_custom_ops_pass_opcheck(entropy_coef):
    x = make("short", seed=13, keep=True, ref=True)
    logprobs = torch.nan_to_num(x["logprobs"]).requires_grad_()
    entropy = torch.nan_to_num(x["entropy"]).requires_grad_(entropy_coef != 0)
    torch.library.opcheck(
        torch.ops.qlkernels.policy_loss,
        (
            logprobs, x["old_logprobs"], x["advantages"], x["response_mask"], x["keep_mask"],
            x["ref_logprobs"], None, entropy, None, x["cu_seqlens"], None,
            [0.2, 0.2, math.inf, 3.0, 0.1, entropy_coef, 1.0], [False, True, False],
            "gspo k3 seq-mean-token-mean", "torch",
        ),
    )  # fmt: skip


def test_double_backward_is_refused():
    arguments = make("short")
    logprobs = arguments.pop("logprobs").requires_grad_()
    loss = policy_loss(logprobs, **arguments, impl="torch").loss
    (grad,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.nan_to_num(grad).sum().backward()


def test_metrics_carry_no_gradient_and_come_as_declared():
    arguments = make("short", entropy_coef=0.1)
    arguments["logprobs"].requires_grad_()
    found = policy_loss(**arguments)
    assert found.metrics._fields == PolicyLossMetrics._fields
    assert all(x.shape == () and not x.requires_grad for x in found.metrics)


def test_auto_on_the_cpu_is_not_the_interpreter():
    arguments = make("short")
    a, b = run(arguments, "auto"), run(arguments, "torch")
    assert all(torch.equal(a[k], b[k]) or a[k].isnan().all() for k in a)


# --- errors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(logprobs=torch.zeros(2, 2, 2)), ValueError, r"logprobs must be \[T\] or \(B, S\)"),
        (dict(logprobs=torch.zeros(3, dtype=torch.long)), TypeError, "logprobs must be bfloat16"),
        (dict(old_logprobs=torch.zeros(4)), ValueError, r"old_logprobs is \(4,\)"),
        (dict(advantages=torch.zeros(7)), ValueError, r"advantages must be \[B\] = \(2,\)"),
        (dict(advantages=0.5), ValueError, "got float"),
        (dict(response_mask=torch.ones(3)), TypeError, "response_mask must be bool"),
        (dict(response_mask=None), TypeError, "response_mask is needed"),
        (dict(keep_mask=torch.ones(2, dtype=torch.bool)), ValueError, "keep_mask is"),
        (dict(cu_seqlens=None), ValueError, "need cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 2, 4])), ValueError, "end at most at T = 3"),
        (dict(cu_seqlens=torch.tensor([0, 2, 1])), ValueError, "never decrease"),
        (dict(cu_seqlens=torch.tensor([0.0, 3.0])), TypeError, "cu_seqlens must be int32"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError, r"\[B \+ 1\]"),
        (dict(loss_type="ppo"), ValueError, "loss_type must be one of grpo"),
        (dict(kl_estimator="k4"), ValueError, "kl_estimator must be one of k1"),
        (dict(denominator="some"), ValueError, "denominator must be one of all"),
        (dict(eps_low=1.5), ValueError, "eps_low"),
        (dict(eps_high=-0.1), ValueError, "eps_high"),
        (dict(dual_clip=0.5), ValueError, "dual_clip must be greater than 1"),
        (dict(ratio_cap=3.0, loss_type="cispo"), ValueError, "no meaning for cispo"),
        (dict(kl_coef=0.1), ValueError, "needs ref_logprobs"),
        (dict(entropy_coef=0.1), ValueError, "needs entropy"),
        (dict(aggregation="sum"), ValueError, "aggregation must be"),
        (dict(num_tokens=3), ValueError, "num_tokens has no meaning for aggregation 'seq-mean"),
        (dict(num_sequences=torch.zeros(2)), ValueError, "num_sequences must be a number"),
        (dict(group_ids=torch.zeros(2, dtype=torch.long)), ValueError, "group_ids belongs to"),
        (dict(aggregation="group-token-mean"), ValueError, "group_ids belongs to"),
        (dict(loss_type="dr_grpo"), ValueError, "max_completion_tokens belongs to"),
        (dict(impl="cuda"), ValueError, "unknown impl 'cuda'"),
        (dict(entropy=torch.zeros(3, device="meta")), ValueError, "entropy is on meta"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = dict(
        logprobs=torch.zeros(3),
        old_logprobs=None,
        advantages=torch.zeros(2),
        response_mask=torch.ones(3, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 1, 3]),
    )
    with pytest.raises(error, match=f"^policy_loss: .*{words}"):
        policy_loss(**arguments | change)


def test_triton_refuses_double_precision():
    with pytest.raises(RuntimeError, match="fp64"):
        run(make("short"), "triton", torch.float64)


# --- on a GPU --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_gpu_matches_reference(impl, case):
    assert not is_interpreting()
    lengths = [0, 1, 1023, 5000, 120_001, 1025]
    check(make(lengths, device="cuda", **CASES[case]), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("case", NAN_CASES)
def test_gpu_does_not_hide_nan(case):
    test_nan_that_counts_is_not_hidden("triton", case, device="cuda")


@pytest.mark.gpu
def test_gpu_runs_without_a_sync_and_inside_a_graph():
    arguments = make([4000, 0, 7000], device="cuda", **CASES["gspo_everything"])
    logprobs = arguments.pop("logprobs").requires_grad_()

    def step():
        logprobs.grad = None
        found = policy_loss(logprobs, **arguments, impl="triton")
        found.loss.backward()
        return found, logprobs.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, gradient = step()
    with torch.no_grad():
        logprobs.mul_(1.5)
    graph.replay()
    eager, eager_gradient = step()
    assert torch.equal(found.loss, eager.loss)
    assert torch.equal(gradient, eager_gradient)


@pytest.mark.gpu
@pytest.mark.large
def test_gpu_past_2_to_the_31_rows():
    T = 2**31 + 1500
    logprobs = torch.zeros(T, device="cuda")
    mask = torch.zeros(T, dtype=torch.bool, device="cuda")
    logprobs[-3:], mask[-3:] = -0.5, True
    cu = torch.tensor([0, 5, T - 2, T], device="cuda")
    found = policy_loss(
        logprobs.requires_grad_(), None, torch.tensor([1.0, 2.0, 4.0], device="cuda"), mask,
        cu_seqlens=cu, loss_type="bnpo", impl="triton",
    )  # fmt: skip
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-10 / 3)
    want = torch.tensor([-2 / 3, -4 / 3, -4 / 3], device="cuda")
    torch.testing.assert_close(logprobs.grad[-3:], want)
    assert logprobs.grad.count_nonzero().item() == 3
