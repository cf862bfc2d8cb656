"""linear_logprob: from hidden states. Compute bound: 2·T·H·V to score, 4 more on the rows that get
a gradient.
"""

from __future__ import annotations

import torch

from bench import peers
from bench.cases.providers import our_op, timed
from bench.inputs import hidden_weight_targets, upstream
from bench.registry import OPS, Problem, register
from bench.truth import LinearTruth

QWEN3_30B = {"H": 2048, "V": 151_936}
QWEN3_4B = {"H": 2560, "V": 151_936}
SMOLLM2_135M = {"H": 576, "V": 49_152}

# case -> (fraction of the rows that is scored, fraction that gets a gradient)
_FRACTIONS = {
    "fwd": (1.0, 0.0),
    "fwd_bwd": (1.0, 1.0),
    "fwd_bwd_live50": (1.0, 0.5),
    "fwd_bwd_prompt75_live50": (0.25, 0.125),  # half of the quarter that is not prompt
}


def _points(case: str, dtype: str, head: dict[str, int], *sizes: tuple[int, str]) -> list[dict]:
    return [{"case": case, "dtype": dtype, "T": T, **head, "data": data} for T, data in sizes]


@register(
    "linear_logprob",
    impls=("triton", "cpu", "torch"),
    cuda=[
        *_points("fwd", "bf16", QWEN3_30B, (1024, "peaked"), (8192, "peaked"), (8192, "random")),
        *_points("fwd", "bf16", QWEN3_30B, (4096, "peaked"), (32_768, "peaked")),
        *_points("fwd", "bf16", QWEN3_30B, (131_072, "peaked")),
        *_points("fwd", "bf16", QWEN3_4B, (32_768, "peaked")),
        *_points("fwd_bwd", "bf16", QWEN3_30B, (8192, "peaked"), (8192, "random")),
        *_points("fwd_bwd", "bf16", QWEN3_30B, (1024, "peaked"), (4096, "peaked")),
        *_points("fwd_bwd", "bf16", QWEN3_30B, (32_768, "peaked"), (131_072, "peaked")),
        *_points("fwd_bwd", "bf16", QWEN3_4B, (32_768, "peaked")),
        *_points("fwd_bwd_live50", "bf16", QWEN3_30B, (32_768, "peaked")),
        *_points("fwd_bwd_prompt75_live50", "bf16", QWEN3_30B, (32_768, "peaked")),
    ],
    cpu=[
        *_points("fwd", "fp32", SMOLLM2_135M, (128, "peaked"), (512, "peaked")),
        *_points("fwd_bwd", "fp32", SMOLLM2_135M, (128, "peaked"), (512, "peaked")),
        *_points("fwd_bwd_prompt75_live50", "fp32", SMOLLM2_135M, (512, "peaked")),
    ],
)
def _linear_logprob(
    device: str, case: str, dtype: torch.dtype, T: int, H: int, V: int, data: str
) -> Problem:
    op = our_op("linear_logprob")
    hidden, weight, target_ids = hidden_weight_targets(T, H, V, dtype, device, data)
    scored, live = _FRACTIONS[case]
    row_mask = None
    if scored < 1.0:  # the prompt comes first
        row_mask = torch.arange(T, device=device) >= round((1.0 - scored) * T)
    gradients = {}
    if live:
        dlogprobs = upstream(T, device, live=live / scored, seed=1)
        dlogprobs = dlogprobs if row_mask is None else torch.where(row_mask, dlogprobs, 0.0)
        dentropy = torch.where(dlogprobs != 0, 0.1 * upstream(T, device, seed=2), 0.0)
        gradients = {"logprobs": dlogprobs, "entropy": dentropy}
        hidden.requires_grad_()
        weight.requires_grad_()

    def ours(impl: str) -> dict[str, torch.Tensor]:
        scores = op(hidden, weight, target_ids, row_mask=row_mask, impl=impl)
        return {"logprobs": scores.logprobs, "entropy": scores.entropy}

    calls = {
        name: lambda impl=impl: ours(impl)
        for name, impl in OPS["linear_logprob"].ours(device).items()
    }
    found, scopes, absent = peers.find("linear_logprob", device, backward=bool(gradients))
    for name, peer in found.items():
        calls[name] = lambda peer=peer: peer(hidden, weight, target_ids, row_mask)
    operands = T * H + V * H
    return Problem(
        timed(calls, {"hidden": hidden, "weight": weight}, gradients),
        LinearTruth(hidden, weight, target_ids, row_mask, gradients).check,
        bytes=dtype.itemsize * operands * (2 if live else 1) + T * (8 + 3 * 4),
        useful_flops=round((2 * scored + 4 * live) * T * H * V),
        peer_scope=scopes,
        absent=absent,
    )
