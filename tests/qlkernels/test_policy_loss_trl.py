"""Parity with ``GRPOTrainer._compute_loss`` of the installed TRL, value and gradient.

The method is TRL's own; only what surrounds it is replaced: the model's log-probs and entropies are
leaves of the test, and the accelerator is one process. Written against TRL 1.16.
"""

from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl", reason="pip install trl")

from trl import GRPOTrainer  # noqa: E402

from qlkernels.policy_loss import policy_loss  # noqa: E402

B, S = 3, 7
ACCUMULATE, PER_GENERATION, RANKS = 4, 8, 2
NUM_ITEMS = 57.0
IMPLS = {
    "reference-fp64": ("reference", torch.float64, 1e-12),
    "torch-fp64": ("torch", torch.float64, 1e-12),
    "torch-fp32": ("torch", torch.float32, 2e-6),
    "triton-fp32": ("triton", torch.float32, 2e-6),
}


def batch(dtype, seed=0, per_token=False):
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(B, S, generator=g)
    noise = [0.3 * torch.randn(B, S, generator=g) for _ in range(2)]
    found = dict(
        logprobs=logprobs,
        old_logprobs=logprobs + noise[0],
        ref_logprobs=logprobs + noise[1],
        entropy=torch.rand(B, S, generator=g),
        rollout_is_weights=2 * torch.rand(B, S, generator=g),
        advantages=torch.randn((B, S) if per_token else (B,), generator=g),
    )
    found = {k: v.to(dtype) for k, v in found.items()}
    found["response_mask"] = torch.arange(S) < torch.tensor([[7], [3], [5]])
    return found


def trl_loss(data, *, is_training=True, **settings):
    """TRL's loss with the given trainer settings, and its gradients by name."""
    logprobs = data["logprobs"].clone().requires_grad_()
    entropy = data["entropy"].clone().requires_grad_()
    names = dict(
        loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, beta=0.0, max_completion_length=11,
        importance_sampling_level="token", top_entropy_quantile=1.0, use_vllm=False,
        vllm_importance_sampling_correction=True, off_policy_mask_threshold=None,
        aux_loss_enabled=False, entropy_coef=0.0, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=ACCUMULATE,
    )  # fmt: skip
    arguments = dict(delta=None, use_bias_correction_kl=False)
    for key, value in settings.items():
        (arguments if key in arguments else names)[key] = value
    trainer = SimpleNamespace(
        **names,
        args=SimpleNamespace(steps_per_generation=PER_GENERATION, **arguments),
        model=SimpleNamespace(training=is_training),
        accelerator=SimpleNamespace(
            num_processes=RANKS,
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        _entropy_bonus_enabled=names["entropy_coef"] != 0.0,
        _metrics={mode: _Appending() for mode in ("train", "eval")},
        _get_per_token_logps_and_entropies=lambda *_args, **_options: (logprobs, entropy, None),
    )
    ids = torch.zeros(B, S, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1], prompt_mask=torch.ones_like(ids[:, :1]), completion_ids=ids,
        completion_mask=data["response_mask"].long(), advantages=data["advantages"],
        num_items_in_batch=torch.tensor(NUM_ITEMS), ref_per_token_logps=data["ref_logprobs"],
        importance_sampling_ratio=data["rollout_is_weights"],
    )  # fmt: skip
    if data["old_logprobs"] is not None:
        inputs["old_per_token_logps"] = data["old_logprobs"]
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logprobs, entropy)]
    metrics = {k: v[-1] for k, v in trainer._metrics["train" if is_training else "eval"].items()}
    return (loss.detach(), *gradients), metrics


class _Appending(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def our_loss(data, divide=ACCUMULATE, **options):
    logprobs = data["logprobs"].clone().requires_grad_()
    entropy = data["entropy"].clone().requires_grad_()
    found = policy_loss(
        logprobs, data["old_logprobs"], data["advantages"], data["response_mask"],
        entropy=entropy, **options,
    )  # fmt: skip
    (found.loss / divide).backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logprobs, entropy)]
    return (found.loss.detach() / divide, *gradients), found.metrics


# TRL scales `dapo` and `cispo` to one accumulation window itself
WINDOW = NUM_ITEMS / RANKS * ACCUMULATE / PER_GENERATION
# name: settings of TRL, options of ours, what our loss is divided by
PAIRS = {
    "grpo": (dict(), dict(loss_type="grpo"), ACCUMULATE),
    "bnpo": (dict(loss_type="bnpo"), dict(loss_type="bnpo"), ACCUMULATE),
    "dr_grpo": (
        dict(loss_type="dr_grpo"),
        dict(loss_type="dr_grpo", max_completion_tokens=11),
        ACCUMULATE,
    ),
    "dapo": (
        dict(loss_type="dapo", epsilon_high=0.28),
        dict(loss_type="dapo", eps_high=0.28, num_tokens=WINDOW),
        1,
    ),
    # TRL's epsilon_high of cispo is the cap itself, and it has no lower bound
    "cispo": (
        dict(loss_type="cispo", epsilon_high=1.25),
        dict(loss_type="cispo", eps_low=1.0, eps_high=0.25, num_tokens=WINDOW),
        1,
    ),
    # gspo is TRL's grpo with a ratio per sequence
    "gspo": (
        dict(importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.08),
        dict(loss_type="gspo", eps_low=0.05, eps_high=0.08),
        ACCUMULATE,
    ),
}  # fmt: skip
KL = (dict(beta=0.07), dict(kl_coef=0.07, kl_estimator="k3"))
UNBIASED_KL = (KL[0] | dict(use_bias_correction_kl=True), KL[1] | dict(kl_importance=True))
TWO_SIDED = (dict(delta=1.3), dict(ratio_cap=1.3))
VLLM = (dict(use_vllm=True), dict(rollout_is_weights=True))


def compare(kind, impl, *extras, **data_options):
    impl, dtype, rtol = IMPLS[impl]
    data = batch(dtype, **data_options)
    theirs, ours, divide = PAIRS[kind]
    for extra_theirs, extra_ours in extras:
        theirs, ours = theirs | extra_theirs, ours | extra_ours
    if ours.pop("rollout_is_weights", False):
        ours["rollout_is_weights"] = data["rollout_is_weights"]
    wants, _ = trl_loss(data, **theirs)
    if "kl_coef" in ours:
        ours["ref_logprobs"] = data["ref_logprobs"]
    found, _ = our_loss(data, divide, impl=impl, **ours)
    for name, a, b in zip(("loss", "dlogprobs", "dentropy"), found, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-1, msg=lambda m, n=name: n + m)
    assert found[1].count_nonzero() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", PAIRS)
class TestEveryLossType:
    def test_plain(self, kind, impl):
        compare(kind, impl)

    def test_advantages_of_tokens(self, kind, impl):
        compare(kind, impl, per_token=True, seed=1)

    def test_kl(self, kind, impl):
        compare(kind, impl, KL, seed=2)

    def test_kl_with_importance_correction(self, kind, impl):
        compare(kind, impl, UNBIASED_KL, seed=3)

    def test_rollout_weights_before_kl(self, kind, impl):
        compare(kind, impl, VLLM, KL, seed=4)

    def test_two_sided_clip(self, kind, impl):
        if kind == "cispo":
            with pytest.raises(ValueError, match="no meaning for cispo"):  # TRL ignores delta
                compare(kind, impl, TWO_SIDED)
        else:
            compare(kind, impl, TWO_SIDED, UNBIASED_KL, seed=5)


@pytest.mark.parametrize("kind", PAIRS)
def test_on_policy(kind):
    data = batch(torch.float64, seed=6) | dict(old_logprobs=None)
    theirs, ours, divide = PAIRS[kind]
    for a, b in zip(our_loss(data, divide, **ours)[0], trl_loss(data, **theirs)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_entropy_bonus_of_trl_is_always_a_token_mean():
    """TRL aggregates the bonus over tokens whatever the loss; verl and we aggregate it as the loss.

    They agree where the loss is a token mean, and differ elsewhere.
    """
    data = batch(torch.float64, seed=7)
    for kind, same in (("bnpo", True), ("grpo", False)):
        theirs, ours, divide = PAIRS[kind]
        wants, _ = trl_loss(data, **theirs, entropy_coef=0.3)
        found, _ = our_loss(data, divide, **ours, entropy_coef=0.3)
        torch.testing.assert_close(found[1], wants[1])
        assert torch.allclose(found[2], wants[2]) == same


def test_a_fully_masked_sequence_counts_in_trl():
    data = batch(torch.float64, seed=8)
    data["response_mask"][1] = False
    # the metrics of that row divide 0 by 0 in TRL; the loss does not
    wants, _ = trl_loss(data)
    found, _ = our_loss(data, num_sequences=B)
    torch.testing.assert_close(found[0], wants[0])
    torch.testing.assert_close(found[1], wants[1])


def test_metrics():
    data = batch(torch.float64, seed=9)
    _, theirs = trl_loss(data, beta=0.07)
    _, ours = our_loss(data, ref_logprobs=data["ref_logprobs"], kl_coef=0.07)
    for name, key in (
        ("clip_low", "clip_ratio/low_mean"),
        ("clip_high", "clip_ratio/high_mean"),
        ("kl", "kl"),
        ("entropy_token_mean", "entropy"),
    ):
        assert getattr(ours, name).item() == pytest.approx(theirs[key]), name
    assert theirs["clip_ratio/low_mean"] > 0 and theirs["clip_ratio/high_mean"] > 0
