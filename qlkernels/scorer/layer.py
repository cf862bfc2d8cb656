"""One decoder layer over all rows of a pass.

    x += O attention(rotate(norm(Q n)), rotate(norm(K n)), V n),  n = rms_norm(x)
    x += mlp(rms_norm(x))

Projections, the dense MLP and the mixing of experts work on ``chunk_tokens`` rows at a time;
queries, keys, values and the attention's output exist for all rows of one layer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlkernels.moe import moe_mlp
from qlkernels.moe_routing import moe_route
from qlkernels.router_replay import RoutingRecord, RoutingRecorder
from qlkernels.scorer.decoder import Decoder
from qlkernels.scorer.elementwise import norm_and_rotate_, rms_norm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share."""

    decoder: Decoder
    cos: torch.Tensor  # [T, head_dim / 2]
    sin: torch.Tensor
    attend: Attend  # (q [T, heads, D], k [T, kv_heads, D], v) -> [T, heads, D]
    chunk_tokens: int
    mark: Callable[[str], None]  # called with the name of the part that begins
    recorder: RoutingRecorder | None = None  # of the experts that are chosen
    replay: RoutingRecord | None = None  # experts to use instead

    def chunks(self, T: int) -> list[slice]:
        return [slice(a, min(T, a + self.chunk_tokens)) for a in range(0, T, self.chunk_tokens)]


def run_layer(x: torch.Tensor, layer: int, w: Weights, step: Pass) -> torch.Tensor:
    """``x [T, H]`` with attention and MLP of ``layer`` added; the memory of ``x`` is written."""
    _add_attention(x, w, step)
    if layer in step.decoder.moe_layers:
        return _plus_experts(x, layer, w, step)
    _add_mlp(x, w, step)
    return x


def _add_attention(x: torch.Tensor, w: Weights, step: Pass) -> None:
    decoder, T = step.decoder, x.shape[0]
    widths = {"q": decoder.heads, "k": decoder.kv_heads, "v": decoder.kv_heads}
    heads = {name: x.new_empty(T, n, decoder.head_dim) for name, n in widths.items()}
    for rows in step.chunks(T):
        step.mark("elementwise")
        n = rms_norm(x[rows], w["input_layernorm.weight"], decoder.eps)
        step.mark("projections")
        for name, whole in heads.items():
            _linear(n, w, f"self_attn.{name}_proj", whole[rows].flatten(1))
        del n
        step.mark("elementwise")
        for name in ("q", "k"):
            norm_and_rotate_(
                heads[name][rows],
                w.get(f"self_attn.{name}_norm.weight"),
                step.cos[rows],
                step.sin[rows],
                decoder.eps,
            )
    step.mark("attention")
    out = step.attend(heads["q"], heads["k"], heads["v"])
    heads.clear()
    step.mark("projections")
    for rows in step.chunks(T):
        _add_linear(x[rows], out[rows].flatten(1), w, "self_attn.o_proj")


def _add_mlp(x: torch.Tensor, w: Weights, step: Pass) -> None:
    for rows in step.chunks(x.shape[0]):
        step.mark("elementwise")
        n = rms_norm(x[rows], w["post_attention_layernorm.weight"], step.decoder.eps)
        step.mark("mlp")
        gate, up = (n.new_empty(n.shape[0], step.decoder.I) for _ in range(2))
        _linear(n, w, "mlp.gate_proj", gate)
        _linear(n, w, "mlp.up_proj", up)
        gate = F.silu(gate, inplace=True).mul_(up)
        del n, up
        _add_linear(x[rows], gate, w, "mlp.down_proj")


def _plus_experts(x: torch.Tensor, layer: int, w: Weights, step: Pass) -> torch.Tensor:
    decoder = step.decoder
    step.mark("elementwise")
    n = rms_norm(x, w["post_attention_layernorm.weight"], decoder.eps)
    step.mark("experts")
    # for all rows at once: the algorithm of a library product may change with their number
    logits = n @ w["mlp.gate.weight"].T  # [T, E]
    routing = moe_route(
        logits,
        decoder.top_k,
        norm_topk_prob=decoder.norm_topk_prob,
        replay_ids=None if step.replay is None else step.replay.layer_ids(layer),
        weights_dtype=x.dtype,
    )
    if step.recorder is not None:
        step.recorder.add(layer, routing.topk_ids)
    return moe_mlp(
        n,
        routing.topk_ids,
        routing.topk_weights,
        w["mlp.experts.gate_up_proj"],
        w["mlp.experts.down_proj"],
        residual=x,
        chunk_tokens=step.chunk_tokens,
    )


def _linear(n: torch.Tensor, w: Weights, name: str, out: torch.Tensor) -> None:
    """``out = n @ weight.T + bias``."""
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if bias is None:
        torch.mm(n, weight.T, out=out)
    else:
        torch.addmm(bias, n, weight.T, out=out)


def _add_linear(x: torch.Tensor, n: torch.Tensor, w: Weights, name: str) -> None:
    """``x += n @ weight.T + bias``, with one rounding."""
    x.addmm_(n, w[f"{name}.weight"].T)
    if (bias := w.get(f"{name}.bias")) is not None:
        x += bias
