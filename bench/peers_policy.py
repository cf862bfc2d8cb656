"""Peers of the whole policy loss, which keep the scores to themselves: ``(hidden [T, H], weight
[V, H], target_ids [T], old_logprobs [T] or None, advantages [B], response_mask [T], prompt,
eps_low, eps_high) -> {"loss": scalar}``, differentiable. The B packed sequences are of one length,
and their first ``prompt`` tokens are masked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bench.peers import Provider, _peer
from bench.registry import Outputs, Unavailable

OP = "linear_policy_loss"


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """fp32 products in TF32, as a user's ``torch.set_float32_matmul_precision("high")``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_peer(OP, "liger-grpo", "less", distribution="liger-kernel")
def _liger_grpo() -> Provider:
    """``LigerFusedLinearGRPOLoss``: neither scores nor an entropy, one advantage per sequence, a
    batch ``[B, L]`` of answers alone, without their prompts.

    ``chunk_size`` counts sequences, not tokens. It is B: the inner tiles are the same for every
    value, but each chunk fills, casts and adds a ``[V, H]`` gradient of its own. ``compiled``
    concerns the ``[B, L]`` arithmetic alone, less than a hundredth of the time, and Dynamo failed
    at T=32768; it is off.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def call(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target_ids: torch.Tensor,
        old_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        prompt: int,
        eps_low: float,
        eps_high: float,
    ) -> Outputs:
        B = len(advantages)
        if len(target_ids) % B:
            raise Unavailable(f"Liger's batch [B, L] needs B={B} sequences of one length")

        def answers(x: torch.Tensor) -> torch.Tensor:
            return x.view(B, -1, *x.shape[1:])[:, prompt:]

        function = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=B, loss_type="dapo",
            epsilon_low=eps_low, epsilon_high=eps_high,
        )  # fmt: skip
        loss, _metrics = function(
            answers(hidden), weight, answers(target_ids), answers(response_mask), advantages,
            old_per_token_logps=None if old_logprobs is None else answers(old_logprobs),
        )  # fmt: skip
        return {"loss": loss}

    return call


@_peer(OP, "liger-grpo-tf32", "less", distribution="liger-kernel", needs_cuda=True)
def _liger_grpo_tf32() -> Provider:
    """Its gradient products are fp32, far from the tensor cores' speed until a user allows TF32."""
    exact = _liger_grpo()

    def call(*inputs, **options) -> Outputs:
        with tf32():  # the forward computes the gradients too
            return exact(*inputs, **options)

    return call
