"""What the scorer knows of a decoder: its sizes, the weights of each layer and their shapes.

Read from a transformers config alone, so that memory can be planned before a weight is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# model_type: (per-head norms of q and k, bias of q k v, bias of o). None: config.attention_bias.
_FAMILIES: dict[str, tuple[bool, bool | None, bool | None]] = {
    "llama": (False, None, None),
    "qwen2": (False, True, False),
    "qwen3": (True, None, None),
    "qwen3_moe": (True, None, None),
}
# Both change their frequencies with the length of the batch, not of each sequence.
_ROPES_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder in the letters of the code, and what its layers consist of."""

    family: str
    layers: int
    H: int
    V: int
    heads: int
    kv_heads: int
    head_dim: int
    I: int  # noqa: E741  intermediate size of a dense layer
    moe_layers: frozenset[int]
    E: int
    top_k: int
    expert_I: int
    norm_topk_prob: bool
    eps: float
    has_qk_norm: bool
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    is_tied: bool
    max_positions: int

    @classmethod
    def of_config(cls, config: Any) -> Decoder:
        """Read a transformers config.

        Raises:
            ValueError: a family or an option that the scorer does not compute, by name.
        """
        family = getattr(config, "model_type", None)
        if family not in _FAMILIES:
            raise ValueError(
                f"Scorer: model_type {family!r} is not supported; it computes "
                f"{', '.join(sorted(_FAMILIES))}"
            )
        _refuse_options(config, family)
        has_qk_norm, qkv_bias, o_bias = _FAMILIES[family]
        attention_bias = bool(getattr(config, "attention_bias", False))
        heads = config.num_attention_heads
        return cls(
            family=family,
            layers=config.num_hidden_layers,
            H=config.hidden_size,
            V=config.vocab_size,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            I=config.intermediate_size,
            moe_layers=_moe_layers(config) if family == "qwen3_moe" else frozenset(),
            E=getattr(config, "num_experts", 0),
            top_k=getattr(config, "num_experts_per_tok", 0),
            expert_I=getattr(config, "moe_intermediate_size", 0),
            norm_topk_prob=bool(getattr(config, "norm_topk_prob", False)),
            eps=config.rms_norm_eps,
            has_qk_norm=has_qk_norm,
            has_qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
            has_o_bias=attention_bias if o_bias is None else o_bias,
            has_mlp_bias=bool(getattr(config, "mlp_bias", False)),
            is_tied=bool(config.tie_word_embeddings),
            max_positions=config.max_position_embeddings,
        )

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of a layer, as transformers names them."""
        H, D = self.H, self.head_dim
        widths = {
            "q_proj": self.heads * D,
            "k_proj": self.kv_heads * D,
            "v_proj": self.kv_heads * D,
        }
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (H,)}
        for name, width in widths.items():
            shapes[f"self_attn.{name}.weight"] = (width, H)
            if self.has_qkv_bias:
                shapes[f"self_attn.{name}.bias"] = (width,)
        shapes["self_attn.o_proj.weight"] = (H, self.heads * D)
        if self.has_o_bias:
            shapes["self_attn.o_proj.bias"] = (H,)
        if self.has_qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (D,)
        shapes["post_attention_layernorm.weight"] = (H,)
        if layer in self.moe_layers:
            shapes["mlp.gate.weight"] = (self.E, H)
            shapes["mlp.experts.gate_up_proj"] = (self.E, 2 * self.expert_I, H)
            shapes["mlp.experts.down_proj"] = (self.E, H, self.expert_I)
            return shapes
        for name, (width, depth) in dict(
            gate_proj=(self.I, H), up_proj=(self.I, H), down_proj=(H, self.I)
        ).items():
            shapes[f"mlp.{name}.weight"] = (width, depth)
            if self.has_mlp_bias:
                shapes[f"mlp.{name}.bias"] = (width,)
        return shapes

    def layer_weights(self, layer: int) -> int:
        """Number of weights of a layer."""
        return sum(torch.Size(shape).numel() for shape in self.layer_shapes(layer).values())

    def num_weights(self) -> int:
        """Number of weights of the whole model, a tied head counted once."""
        ends = self.V * self.H * (1 if self.is_tied else 2) + self.H
        return ends + sum(self.layer_weights(i) for i in range(self.layers))

    def flops(self, seqlens: list[int], scored_rows: int) -> dict[str, int]:
        """Useful operations of a pass over causal sequences, by part; 2 per multiply-add."""
        T, D = sum(seqlens), self.head_dim
        pairs = sum(n * (n + 1) // 2 for n in seqlens)
        moe = len(self.moe_layers)
        expert = self.top_k * 3 * self.H * self.expert_I
        dense = 3 * self.H * self.I
        projections = 2 * (self.heads + self.kv_heads) * D * self.H
        return {
            "attention": self.layers * 4 * self.heads * D * pairs,
            "projections": self.layers * 2 * T * projections,
            "experts": 2 * T * moe * (expert + self.E * self.H),
            "mlp": 2 * T * (self.layers - moe) * dense,
            "head": 2 * scored_rows * self.H * self.V,
        }


def _moe_layers(config: Any) -> frozenset[int]:
    dense = set(config.mlp_only_layers or ())
    step = config.decoder_sparse_step
    return frozenset(
        i
        for i in range(config.num_hidden_layers)
        if i not in dense and config.num_experts > 0 and (i + 1) % step == 0
    )


def _refuse_options(config: Any, family: str) -> None:
    windows = {kind for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    if windows or getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"Scorer: this {family} has layers of sliding-window attention; only full attention "
            "is computed (config.use_sliding_window=False)"
        )
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"Scorer: hidden_act is {config.hidden_act!r}; only 'silu' is computed")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in _ROPES_BY_LENGTH:
        raise ValueError(
            f"Scorer: rope_type {rope['rope_type']!r} depends on the longest sequence of a batch; "
            "use a fixed one (default, linear, yarn, llama3)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("Scorer: partial_rotary_factor must be 1; every head turns whole")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("Scorer: quantized weights are not supported; load the model unquantized")


def find_parts(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """The base model (``embed_tokens``, ``layers``, ``norm``, ``rotary_emb``) and the head."""
    base = getattr(model, "model", None)
    head = getattr(model, "lm_head", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(base, name)]
    if missing or not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"Scorer: {type(model).__name__} has no base model with {', '.join(parts)} and a "
            "linear lm_head; give a transformers ...ForCausalLM, without an adapter around it "
            "(merge a LoRA first)"
        )
    return base, head


def named_layer(decoder: Decoder, layer: int, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a layer by name, by reference; exactly those the decoder says it has."""
    found = {name: p.detach() for name, p in module.named_parameters()}
    expected = decoder.layer_shapes(layer)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"Scorer: layer {layer} has no weight {name!r}")
        if name not in expected:
            raise ValueError(
                f"Scorer: layer {layer} has a weight {name!r} that its config does not tell of; "
                "merge adapters into the model first"
            )
        if tuple(found[name].shape) != expected[name]:
            raise ValueError(
                f"Scorer: layer {layer}, {name} is {tuple(found[name].shape)}, expected "
                f"{expected[name]} (sharded weights must be gathered first)"
            )
    return found
