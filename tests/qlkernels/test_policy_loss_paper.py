"""The policy loss against the paper's equations, and who among the peers does what."""

import pytest
import torch

from qlkernels.policy_loss import policy_loss

# --- the paper, transcribed ------------------------------------------------------

GROUPS = [[5, 3], [2, 4]]  # two prompts, two answers each, with these lengths


def paper_batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    lengths = [n for group in GROUPS for n in group]
    T = sum(lengths)
    logprobs = (-torch.rand(T, generator=g, dtype=dtype)).requires_grad_()
    old = logprobs.detach() + 0.3 * torch.randn(T, generator=g, dtype=dtype)
    rewards = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=dtype)
    A = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)  # eq. 3
    entropy = torch.rand(T, generator=g, dtype=dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return logprobs, old, A.flatten(), entropy, cu


def value_and_gradient(loss, logprobs):
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def assert_same(actual, truth, rtol):
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize(
    "impl, dtype, rtol",
    [
        ("reference", torch.float64, 1e-12),
        ("torch", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-5),
        ("triton", torch.float32, 1e-5),
    ],
    ids=["reference-fp64", "torch-fp64", "torch-fp32", "triton-fp32"],
)
class TestPaper:
    """arXiv 2512.12967, equation by equation, in plain loops; the paper maximises J = -loss."""

    def compare(self, J, batch, impl, rtol, **options):
        logprobs, old, A, _, cu = batch
        found = policy_loss(
            logprobs, old, A, torch.ones(len(logprobs), dtype=torch.bool),
            cu_seqlens=cu, impl=impl, **options,
        )  # fmt: skip
        assert_same(
            value_and_gradient(found.loss, logprobs), value_and_gradient(-J, logprobs), rtol
        )

    def test_eq_2_grpo_with_kl(self, impl, dtype, rtol):
        batch = paper_batch(dtype=dtype)
        logprobs, old, A, _, cu = batch
        ref = old + 0.1
        J, i = 0.0, 0
        for group in GROUPS:
            inner = 0.0
            for n in group:
                t = slice(cu[i], cu[i] + n)
                rho = (logprobs[t] - old[t]).exp()
                kl = (ref[t] - logprobs[t]).exp() - (ref[t] - logprobs[t]) - 1
                term = torch.min(rho * A[i], rho.clamp(1 - 0.2, 1 + 0.2) * A[i]) - 0.04 * kl
                inner, i = inner + term.sum() / n, i + 1
            J = J + inner / len(group) / len(GROUPS)  # E over prompts: their mean
        options = dict(loss_type="grpo", ref_logprobs=ref, kl_coef=0.04, kl_estimator="k3")
        self.compare(J, batch, impl, rtol, **options)

    def test_eq_4_token_mean_of_the_group(self, impl, dtype, rtol):
        batch = paper_batch(dtype=dtype)
        logprobs, _, A, _, cu = batch
        old = logprobs.detach()  # one update per batch: rho is 1 and has the gradient of log pi
        J, i = 0.0, 0
        for group in GROUPS:
            inner = 0.0
            for n in group:
                t = slice(cu[i], cu[i] + n)
                inner, i = inner + A[i] * (logprobs[t] - old[t]).exp().sum(), i + 1
            J = J + inner / sum(group) / len(GROUPS)
        batch = (logprobs, None, A, None, cu)
        groups = dict(aggregation="group-token-mean", group_ids=torch.tensor([0, 0, 1, 1]))
        self.compare(J, batch, impl, rtol, **groups)

    @pytest.mark.parametrize("per_token", [True, False], ids=["token", "sequence"])
    @pytest.mark.parametrize("denominator", ["all", "kept"])
    def test_eq_8_to_10_negative_gradient_clipping(self, impl, dtype, rtol, denominator, per_token):
        batch = paper_batch(dtype=dtype)
        logprobs, _, A, entropy, cu = batch
        old, tau = logprobs.detach(), 0.5
        keep = torch.ones(len(logprobs), dtype=torch.bool)
        J, i = 0.0, 0
        for group in GROUPS:
            inner, kept_tokens = 0.0, 0
            for n in group:
                H = entropy[cu[i] : cu[i] + n]
                for k in range(n):
                    t = cu[i] + k
                    high = H[k] > tau if per_token else H.mean() > tau
                    indicator = 0.0 if A[i] < 0 and high else 1.0  # eq. 9-10
                    keep[t] = indicator == 1.0
                    kept_tokens += indicator
                    inner = inner + A[i] * (logprobs[t] - old[t]).exp() * indicator
                i += 1
            # eq. 8 divides by all tokens of the group; the published snippet removes the rows
            J = J + inner / (sum(group) if denominator == "all" else kept_tokens) / len(GROUPS)
        assert 0 < (~keep).sum() < len(keep)
        self.compare(
            J, (logprobs, None, A, None, cu), impl, rtol, keep_mask=keep, denominator=denominator,
            aggregation="group-token-mean", group_ids=torch.tensor([0, 0, 1, 1]),
        )  # fmt: skip


# --- who does what ---------------------------------------------------------------


def test_gspo_of_verl_differs_once_advantages_vary_inside_a_sequence():
    """verl puts s_i into every token with a token's own gradient; TRL and we differentiate s_i.

    Both agree while a sequence has one advantage and one weight.
    """
    logprobs, old, _, _, cu = paper_batch()
    logprobs, old, cu = logprobs[:8].detach().requires_grad_(), old[:8], cu[:3]
    mask = torch.ones(8, dtype=torch.bool)

    def verl(A):
        total = 0.0
        for i, n in enumerate(GROUPS[0]):
            t = slice(cu[i], cu[i] + n)
            log_s = (logprobs[t] - old[t]).mean().detach()
            s = (log_s + logprobs[t] - logprobs[t].detach()).exp()
            total = total + torch.maximum(-A[t] * s, -A[t] * s.clamp(0.5, 1.5)).mean() / 2
        return value_and_gradient(total, logprobs)

    def ours(A):
        found = policy_loss(
            logprobs, old, A, mask, cu_seqlens=cu, loss_type="gspo", eps_low=0.5, eps_high=0.5
        )
        return value_and_gradient(found.loss, logprobs)

    constant = torch.tensor([1.0] * 5 + [-2.0] * 3, dtype=torch.float64)
    assert_same(ours(constant), verl(constant), 1e-10)
    varying = constant * torch.arange(1, 9)
    assert ours(varying)[0].item() == pytest.approx(verl(varying)[0].item())
    assert (ours(varying)[1] - verl(varying)[1]).abs().max() > 0.01


def test_cispo_of_verl_has_a_lower_bound_and_that_of_trl_has_none():
    """verl: clip(rho, 1 - e_low, 1 + e_high). TRL: min(rho, epsilon_high), so 1 + our eps_high."""
    logprobs, old, A, _, cu = paper_batch()
    rows = A.repeat_interleave(cu.diff())
    rho = (logprobs - old).exp()
    mask = torch.ones(len(rows), dtype=torch.bool)
    both = {
        (0.2, 0.3): -(rho.clamp(0.8, 1.3).detach() * rows * logprobs).mean(),
        (1.0, 0.3): -(rho.clamp(max=1.3).detach() * rows * logprobs).mean(),
    }
    assert rho.min() < 0.8
    for (low, high), want in both.items():
        found = policy_loss(
            logprobs, old, A, mask, cu_seqlens=cu, loss_type="cispo", eps_low=low, eps_high=high
        )
        assert_same(
            value_and_gradient(found.loss, logprobs), value_and_gradient(want, logprobs), 1e-10
        )


def test_a_sequence_without_response_counts_in_trl_but_not_in_verl_or_here():
    logprobs = torch.zeros(4)
    mask = torch.tensor([True, True, False, False])
    arguments = (logprobs, None, torch.tensor([1.0, 1.0]), mask)
    cu = torch.tensor([0, 2, 4])
    assert policy_loss(*arguments, cu_seqlens=cu).loss.item() == -1.0
    assert policy_loss(*arguments, cu_seqlens=cu, num_sequences=2).loss.item() == -0.5
