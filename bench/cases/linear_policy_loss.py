"""linear_policy_loss: from hidden states to the loss and both gradients, in one op or in two."""

from __future__ import annotations

import torch

from bench import peers, peers_policy
from bench.cases.providers import our_op, timed
from bench.gate import Comparison, require
from bench.inputs import hidden_weight_targets
from bench.registry import OPS, Outputs, Problem, register
from bench.truth import LinearTruth

QWEN3_30B = {"H": 2048, "V": 151_936}
QWEN3_4B = {"H": 2560, "V": 151_936}
SMOLLM2_135M = {"H": 576, "V": 49_152}
EPS = {"eps_low": 0.2, "eps_high": 0.28}
_SEQUENCES = 8


def _points(case: str, dtype: str, head: dict[str, int], *sizes: int) -> list[dict]:
    return [
        {"case": case, "dtype": dtype, "T": T, **head, "B": _SEQUENCES, "data": "peaked"}
        for T in sizes
    ]


@register(
    "linear_policy_loss",
    impls=("triton", "cpu", "torch"),
    cuda=[
        *_points("fwd_bwd_known", "bf16", QWEN3_30B, 8192, 32_768),
        *_points("fwd_bwd", "bf16", QWEN3_30B, 8192, 32_768),
        *_points("fwd_bwd_known_live50", "bf16", QWEN3_30B, 32_768),
        *_points("fwd_bwd_known_prompt75_live50", "bf16", QWEN3_30B, 32_768),
        *_points("fwd_bwd_known_uniform", "bf16", QWEN3_30B, 8192, 32_768),
        *_points("fwd_bwd_known_chunk4096", "bf16", QWEN3_30B, 32_768),
        *_points("fwd_bwd_known", "bf16", QWEN3_4B, 32_768),
        *_points("fwd_bwd_known", "bf16", QWEN3_30B, 120_000),
    ],
    cpu=[
        *_points("fwd_bwd_known", "fp32", SMOLLM2_135M, 128, 512),
        *_points("fwd_bwd", "fp32", SMOLLM2_135M, 512),
        *_points("fwd_bwd_known_prompt75_live50", "fp32", SMOLLM2_135M, 512),
        *_points("fwd_bwd_known_uniform", "fp32", SMOLLM2_135M, 512),
    ],
)
def _linear_policy_loss(
    device: str, case: str, dtype: torch.dtype, T: int, H: int, V: int, B: int, data: str
) -> Problem:
    """``_known``: strictly on-policy, the derivative is -A. Else old log-probs and a clip.
    ``_uniform``: A = 1, the gradient of the mean cross entropy, with its peers. ``_chunk4096``: the
    setting for less memory.
    """
    op = our_op("linear_policy_loss")
    score, loss_of = our_op("linear_logprob"), our_op("policy_loss")
    hidden, weight, target_ids = hidden_weight_targets(T, H, V, dtype, device, data)
    generator = torch.Generator(device).manual_seed(3)
    options = dict(generator=generator, device=device)
    position = torch.arange(T, device=device) % (T // B)
    prompt = round((0.75 if "_prompt75" in case else 0.0) * (T // B))  # tokens of each sequence
    response_mask = position >= prompt
    advantages = torch.randn(B, **options).abs() + 0.1
    advantages[1::2] *= -1.0
    if case.endswith("_live50"):  # groups whose answers all got the same reward
        advantages[: B // 2] = 0.0
    is_uniform = case.endswith("_uniform")
    if is_uniform:
        advantages = torch.ones(B, device=device)
    of_sequence = advantages
    advantages = of_sequence.repeat_interleave(T // B)  # [T]
    cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * (T // B)
    exact = LinearTruth(hidden, weight, target_ids, response_mask).exact()["logprobs"]
    old_logprobs = None
    if "_known" not in case:
        # one token in ten far outside the clip, the rest well inside, so that no peer's rounding
        # moves a token across it
        step = 0.05 * torch.randn(T, **options).clamp(-2.0, 2.0)
        far = torch.where(torch.rand(T, **options) < 0.5, -0.6, 0.6)
        step = torch.where(torch.rand(T, **options) < 0.1, far, step)
        old_logprobs = exact.float() - step
    inputs = (old_logprobs, advantages, response_mask)

    exact.requires_grad_()
    loss = peers.clipped_loss(exact, *inputs, **EPS)
    (dlogprobs,) = torch.autograd.grad(loss, exact)
    live = (dlogprobs != 0).double().mean().item()
    gradients = LinearTruth(hidden, weight, target_ids, response_mask, {"logprobs": dlogprobs})

    def check(outputs: Outputs, strict: bool, complete: bool) -> float:
        require(outputs, ("loss", "logprobs", "entropy", "dhidden", "dweight"), complete)
        losses = {"loss": loss.detach(), "cross_entropy": -exact.detach().mean()}
        errors = []
        for name in losses.keys() & outputs.keys():
            found = Comparison(name)
            found.add(outputs[name], losses[name])
            found.judge(strict)
            errors.append(found.relative)
        rest = {name: x for name, x in outputs.items() if name not in losses}
        return max([*errors, gradients.check(rest, strict, complete)])

    hidden.requires_grad_()
    weight.requires_grad_()
    operands = (hidden, weight, target_ids)
    shared = dict(cu_seqlens=cu_seqlens, loss_type="dapo", **EPS)
    chunk = {"chunk_tokens": 4096} if case.endswith("_chunk4096") else {}

    def ours(impl: str) -> Outputs:
        result = op(*operands, *inputs, **shared, **chunk, impl=impl)
        return {
            "loss": result.loss,
            "logprobs": result.scores.logprobs,
            "entropy": result.scores.entropy,
        }

    def two_ops() -> Outputs:
        found = score(*operands, row_mask=response_mask)
        result = loss_of(found.logprobs, *inputs, **shared)
        return {"loss": result.loss, "logprobs": found.logprobs, "entropy": found.entropy}

    def with_loss(peer: peers.Provider) -> Outputs:
        found = peer(*operands, response_mask)
        return found | {"loss": peers.clipped_loss(found["logprobs"], *inputs, **EPS)}

    calls = {
        name: lambda impl=impl: ours(impl)
        for name, impl in OPS["linear_policy_loss"].ours(device).items()
    }
    calls["ours-two-ops"] = two_ops
    found, *lists = peers.find("linear_logprob", device, backward=True)
    scopes, absent = ({f"{name}+loss": x for name, x in listed.items()} for listed in lists)
    for name, peer in found.items():
        calls[f"{name}+loss"] = lambda peer=peer: with_loss(peer)
    whole, their_scopes, missing = peers.find(peers_policy.OP, device, backward=True)
    scopes, absent = scopes | their_scopes, absent | missing
    for name, peer in whole.items():
        calls[name] = lambda peer=peer: peer(
            *operands, old_logprobs, of_sequence, response_mask, prompt, **EPS
        )
    if is_uniform:
        means, their_scopes, missing = peers.find("linear_cross_entropy", device, backward=True)
        for name, peer in means.items():
            calls[name] = lambda peer=peer: peer(*operands)
        scopes, absent = scopes | their_scopes, absent | missing
    scored = response_mask.double().mean().item()
    one = torch.ones((), device=device)
    return Problem(
        timed(calls, {"hidden": hidden, "weight": weight}, {"loss": one, "cross_entropy": one}),
        check,
        bytes=2 * dtype.itemsize * (T * H + V * H) + T * (8 + 3 * 4 + 1),
        useful_flops=round((2 * scored + 4 * live) * T * H * V),
        peer_scope=scopes,
        absent=absent,
    )
