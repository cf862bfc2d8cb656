"""Peers of the expert layer, router included: ``(hidden [T, H], router [E, H], gate_up [E, 2 I, H],
down [E, H, I], top_k) -> {"out": [T, H]}``, differentiable. The three weights are parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.peers import Provider, _peer
from bench.registry import Outputs, Unavailable

OP = "moe_layer"


def _transformers(implementation: str) -> Provider:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

    blocks: dict[tuple[int, ...], torch.nn.Module] = {}

    def layer(hidden, router, gate_up, down, top_k: int) -> Outputs:
        key = (id(router), id(gate_up), id(down), top_k)
        if key not in blocks:
            E, H, I = down.shape  # noqa: E741
            config = Qwen3MoeConfig(
                hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=top_k,
                norm_topk_prob=True, num_hidden_layers=1,
            )  # fmt: skip
            config._experts_implementation = implementation
            with torch.device("meta"):
                block = qwen3.Qwen3MoeSparseMoeBlock(config)
            if not hasattr(block.experts, "gate_up_proj"):
                raise Unavailable("this transformers keeps each expert in a module of its own")
            block.gate.weight, block.experts.gate_up_proj = router, gate_up
            block.experts.down_proj = down
            blocks.clear()
            blocks[key] = block
        return {"out": blocks[key](hidden[None])[0]}

    return layer


@_peer(OP, "transformers-grouped_mm", "same", distribution="transformers")
def _grouped_mm() -> Provider:
    return _transformers("grouped_mm")


@_peer(OP, "transformers-eager", "same", distribution="transformers")
def _eager() -> Provider:
    return _transformers("eager")


@_peer(OP, "liger", "same", distribution="liger-kernel", needs_cuda=True)
def _liger() -> Provider:
    """Liger takes ready ids and weights: the router is transformers' arithmetic in torch."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def layer(hidden, router, gate_up, down, top_k: int) -> Outputs:
        probabilities = F.linear(hidden, router).softmax(dim=1, dtype=torch.float32)
        weights, ids = probabilities.topk(top_k, dim=1)
        weights = (weights / weights.sum(1, keepdim=True)).to(hidden.dtype)
        return {"out": LigerFusedMoEFunction.apply(hidden, gate_up, down, ids.int(), weights)}

    return layer


@_peer(OP, "sonicmoe", "same", distribution="sonic-moe", needs_cuda=True)
def _sonic() -> Provider:
    """Its first call at a shape tunes for minutes."""
    from sonicmoe import moe_TC_softmax_topk_layer

    def layer(hidden, router, gate_up, down, top_k: int) -> Outputs:
        out, *_ = moe_TC_softmax_topk_layer(
            hidden, router, gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None, top_k,
            torch.cuda.current_stream().cuda_stream, is_softmax_over_topk=False,
            norm_topk_probs=True, concat_layout=True,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
        )  # fmt: skip
        return {"out": out}

    return layer
