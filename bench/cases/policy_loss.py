"""policy_loss: from log-probabilities. A few values a token, so launches and bytes are all there
is.
"""

from __future__ import annotations

import torch

from bench import peers
from bench.cases.providers import graphed, our_op, timed
from bench.gate import Comparison, require
from bench.registry import OPS, Outputs, Problem, register

LOSS = {"loss_type": "dapo", "eps_low": 0.2, "eps_high": 0.28, "kl_coef": 1e-3}
_ROWS = 4096  # tokens a sequence, half of them prompt
_METRICS = (
    "clip_low", "clip_high", "kl", "entropy_token_mean", "entropy_sequence_mean", "ratio_mean",
    "ratio_min", "ratio_max", "masked_fraction",
)  # fmt: skip


def _points(case: str, *sizes: int) -> list[dict]:
    return [{"case": case, "dtype": "fp32", "T": T, "B": T // _ROWS, "loss": "dapo"} for T in sizes]


@register(
    "policy_loss",
    impls=("triton", "torch"),
    cuda=[
        *_points("fwd", 32_768, 131_072, 1_048_576),
        *_points("fwd_bwd", 32_768, 131_072, 1_048_576),
        *_points("fwd_graph", 32_768, 1_048_576),
        *_points("fwd_bwd_graph", 32_768, 1_048_576),
    ],
    cpu=[
        *_points("fwd", 32_768, 131_072, 1_048_576),
        *_points("fwd_bwd", 32_768, 131_072, 1_048_576),
    ],
)
def _policy_loss(device: str, case: str, dtype: torch.dtype, T: int, B: int, loss: str) -> Problem:
    op = our_op("policy_loss")
    generator = torch.Generator(device).manual_seed(0)
    options = dict(generator=generator, device=device)

    # a peaked policy a few steps away from the one that sampled
    logprobs = -(torch.rand(T, **options).clamp_min(1e-6).log() ** 2) / 4
    old_logprobs = logprobs + 0.1 * torch.randn(T, **options)
    ref_logprobs = logprobs + 0.2 * torch.randn(T, **options)
    entropy = 0.4 * torch.rand(T, **options)
    advantages = torch.randn(B, **options)
    position = torch.arange(T, device=device) % _ROWS
    response_mask = position >= _ROWS // 2
    # AEPO's gate is closed: the policy term of every sequence with a negative advantage is dropped
    keep_mask = (advantages >= 0).repeat_interleave(_ROWS)
    cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * _ROWS
    inputs = dict(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages,
        response_mask=response_mask, ref_logprobs=ref_logprobs, entropy=entropy,
        keep_mask=keep_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip

    backward = case.startswith("fwd_bwd")
    gradients = {"loss": torch.ones((), device=device)} if backward else {}
    logprobs.requires_grad_(backward)

    def ours(impl: str) -> Outputs:
        result = op(**inputs, **LOSS, impl=impl)
        return {"loss": result.loss, **{k: getattr(result.metrics, k) for k in _METRICS}}

    calls = {
        name: lambda impl=impl: ours(impl) for name, impl in OPS["policy_loss"].ours(device).items()
    }
    found, scopes, absent = peers.find("policy_loss", device, backward=backward)
    for name, peer in found.items():
        calls[name] = lambda peer=peer: peer(inputs, LOSS)

    def check(outputs: Outputs, strict: bool, complete: bool) -> float:
        names = ("loss", *_METRICS) + (("dlogprobs",) if backward else ())
        if outputs.keys() == {"copy"}:
            names = ("copy",)
        truth, baseline = (
            _truth(inputs, dtype, backward) for dtype in (torch.float64, torch.float32)
        )
        worst = 0.0
        for name in require(outputs, names, complete):
            comparison = Comparison(name)
            comparison.add(outputs[name], truth[name], baseline[name])
            comparison.judge(strict)
            worst = max(worst, comparison.relative)
        return worst

    runs = timed(calls, {"logprobs": logprobs}, gradients)
    per_token = sum(x.element_size() for x in inputs.values() if x.shape == (T,))
    return Problem(
        graphed(runs) if case.endswith("_graph") else runs,
        check,
        bytes=T * (per_token + (4 if backward else 0)) + 8 * B,
        useful_flops=0,
        peer_scope=scopes,
        absent=absent,
    )


def _truth(inputs: dict[str, torch.Tensor], dtype: torch.dtype, backward: bool) -> Outputs:
    """Loss, metrics and gradient by the formulas of the peer ``eager``, in ``dtype``."""
    cast = {k: x.detach().to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    leaf = cast["logprobs"].requires_grad_(backward)
    outputs = peers.eager_policy_loss(cast, LOSS)
    found = {name: x.detach() for name, x in outputs.items()} | {"copy": leaf.detach()}
    if backward:
        (found["dlogprobs"],) = torch.autograd.grad(outputs["loss"], leaf)
    return found
