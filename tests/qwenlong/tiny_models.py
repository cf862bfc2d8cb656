"""Causal language models of a few thousand random weights, with a tokenizer, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXT = (
    "It was the best of times, it was the worst of times; it was the age of wisdom.\n"
    "Naïve café owners paid 1234567 € for 42 crates of 東京 tea 🙂.\r\n"
    "\tThe quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\n"
) * 6

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
# name: config class, what differs
KINDS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2Config",
        {
            "final_logit_softcapping": 3.0,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "cohere": ("CohereConfig", {"logit_scale": 1.5}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
}


def train_tokenizer(*, bos: bool = False, splits: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``TEXT``; ``bos`` puts <s> before every text, ``splits`` uses words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT.split("\n"), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


def save_tiny_model(folder: Path, kind: str = "llama", *, bos: bool = False, **changes) -> Path:
    """Write config, random fp32 weights (seed 0) and a tokenizer of 320 ids; return ``folder``."""
    tokenizer = train_tokenizer(bos=bos)
    name, differs = KINDS[kind]
    config = getattr(transformers, name)(
        **{**SIZES, "vocab_size": len(tokenizer), **differs, **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that the scores are far from uniform
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
