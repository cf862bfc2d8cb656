"""logprob_entropy and token_entropy: from logits. Memory bound: rows count bytes, no FLOPs."""

from __future__ import annotations

import torch

from bench import peers
from bench.cases.providers import our_op, timed
from bench.inputs import logits_and_targets, upstream
from bench.registry import OPS, Problem, register
from bench.truth import LogitsTruth

V = 151_936  # Qwen3
IMPLS = ("triton", "cuda", "cpu", "torch")


def _points(case: str, dtype: str, *shapes: tuple[int, int, str]) -> list[dict]:
    return [
        {"case": case, "dtype": dtype, "T": T, "V": vocab, "data": data}
        for T, vocab, data in shapes
    ]


def _live_fraction(case: str) -> float | None:
    """Fraction of the rows with a gradient; None for a forward."""
    return {"fwd": None, "fwd_bwd": 1.0, "fwd_bwd_live50": 0.5}[case]


def _bytes(T: int, V: int, dtype: torch.dtype, outputs: int, live: float | None) -> int:
    """Forward: the logits once. With a backward: once more, on the live rows only, and the gradient
    written.

    ``live`` is None for a forward. The second read is part of the least traffic because the
    upstream gradient exists only after the forward has ended.
    """
    passes = 1.0 if live is None else 2.0 + live
    return int(passes * T * V * dtype.itemsize) + T * (8 + 4 * outputs)


@register(
    "logprob_entropy",
    impls=IMPLS,
    cuda=[
        *_points("fwd", "bf16", (2048, V, "peaked"), (8192, V, "peaked"), (8192, V, "random")),
        *_points("fwd", "bf16", (1024, V, "peaked"), (4096, V, "peaked"), (16_384, V, "peaked")),
        *_points("fwd", "bf16", (32_768, V, "peaked"), (131_072, V, "peaked")),
        *_points("fwd", "fp32", (8192, V, "peaked")),
        *_points("fwd_bwd", "bf16", (2048, V, "peaked"), (8192, V, "peaked"), (8192, V, "random")),
        *_points("fwd_bwd", "bf16", (1024, V, "peaked"), (4096, V, "peaked")),
        *_points("fwd_bwd", "bf16", (16_384, V, "peaked")),
        *_points("fwd_bwd_live50", "bf16", (8192, V, "peaked")),
    ],
    cpu=[
        *_points("fwd", "fp32", (64, V, "peaked"), (256, V, "peaked"), (256, 49_152, "peaked")),
        *_points("fwd_bwd", "fp32", (64, V, "peaked"), (256, V, "peaked")),
    ],
)
def _logprob_entropy(
    device: str, case: str, dtype: torch.dtype, T: int, V: int, data: str
) -> Problem:
    op = our_op("logprob_entropy")
    padded, target_ids = logits_and_targets(T, V, dtype, device, data)
    logits = padded[:T]
    live = _live_fraction(case)
    gradients = {}
    if live is not None:
        dlogprobs = upstream(T, device, live=live, seed=1)
        dentropy = torch.where(dlogprobs != 0, 0.1 * upstream(T, device, seed=2), 0.0)
        gradients = {"logprobs": dlogprobs, "entropy": dentropy}
        logits.requires_grad_()

    calls = {
        name: lambda impl=impl: op(logits, target_ids, impl=impl)._asdict()
        for name, impl in OPS["logprob_entropy"].ours(device).items()
    }
    found, scopes, absent = peers.find("logprob_entropy", device, backward=bool(gradients))
    for name, peer in found.items():
        calls[name] = lambda peer=peer: peer(logits, target_ids, padded)
    return Problem(
        timed(calls, {"logits": logits}, gradients),
        LogitsTruth(logits, target_ids, ("logprobs", "entropy"), gradients).check,
        bytes=_bytes(T, V, dtype, 3, live),
        useful_flops=0,
        peer_scope=scopes,
        absent=absent,
    )


@register(
    "logprob_entropy_with_grad",
    impls=IMPLS,
    cuda=_points("known", "bf16", (2048, V, "peaked"), (8192, V, "peaked"), (16_384, V, "peaked")),
    cpu=_points("known", "fp32", (64, V, "peaked")),
)
def _logprob_entropy_with_grad(
    device: str, case: str, dtype: torch.dtype, T: int, V: int, data: str
) -> Problem:
    """Peers compute the same by a forward and a backward."""
    op = our_op("logprob_entropy_with_grad")
    padded, target_ids = logits_and_targets(T, V, dtype, device, data)
    logits = padded[:T]
    dlogprobs = upstream(T, device, seed=1)
    gradients = {"logprobs": dlogprobs, "entropy": 0.1 * upstream(T, device, seed=2)}
    logits.requires_grad_()

    def ours(impl: str) -> dict[str, torch.Tensor]:
        scores, dlogits = op(logits, target_ids, *gradients.values(), impl=impl)
        return scores._asdict() | {"dlogits": dlogits}

    own = OPS["logprob_entropy_with_grad"].ours(device)
    calls = {name: lambda impl=impl: ours(impl) for name, impl in own.items()}
    found, scopes, absent = peers.find("logprob_entropy", device, backward=True)
    calls |= timed(
        {name: lambda peer=peer: peer(logits, target_ids, padded) for name, peer in found.items()},
        {"logits": logits},
        gradients,
    )
    return Problem(
        calls,
        LogitsTruth(logits, target_ids, ("logprobs", "entropy"), gradients).check,
        bytes=2 * T * V * dtype.itemsize + T * (8 + 4 * 5),
        useful_flops=0,
        peer_scope=scopes,
        absent=absent,
    )


@register(
    "token_entropy",
    impls=IMPLS,
    cuda=[
        *_points("fwd", "bf16", (8192, V, "peaked"), (32_768, V, "peaked")),
        *_points("fwd_bwd", "bf16", (8192, V, "peaked")),
    ],
    cpu=[
        *_points("fwd", "fp32", (64, V, "peaked"), (256, V, "peaked")),
        *_points("fwd_bwd", "fp32", (64, V, "peaked")),
    ],
)
def _token_entropy(
    device: str, case: str, dtype: torch.dtype, T: int, V: int, data: str
) -> Problem:
    op = our_op("logprob_entropy", "token_entropy")
    padded, target_ids = logits_and_targets(T, V, dtype, device, data)
    logits = padded[:T]
    live = _live_fraction(case)
    gradients = {}
    if live is not None:
        gradients = {"entropy": upstream(T, device)}
        logits.requires_grad_()

    calls = {
        name: lambda impl=impl: {"entropy": op(logits, impl=impl)}
        for name, impl in OPS["token_entropy"].ours(device).items()
    }
    found, scopes, absent = peers.find("token_entropy", device, backward=bool(gradients))
    for name, peer in found.items():
        calls[name] = lambda peer=peer: peer(logits)
    return Problem(
        timed(calls, {"logits": logits}, gradients),
        LogitsTruth(logits, target_ids, ("entropy",), gradients).check,
        bytes=_bytes(T, V, dtype, 1, live),
        useful_flops=0,
        peer_scope=scopes,
        absent=absent,
    )
