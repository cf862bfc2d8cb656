"""A causal language model of twenty thousand random weights, one token a character: what recipes
and tests run on where the model does not matter.
"""

from __future__ import annotations

import shutil
import string
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qwenlong.config import BUILTIN
from qwenlong.errors import InputError
from qwenlong.models import default_cache, demo_model

_SPECIALS = ("<pad>", "<eos>", "<unk>")
_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation + " \n"
_VERSION = 1  # of what `tiny_model` makes


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character: lower-case ASCII; upper case is lowered, anything else is ``<unk>``."""
    vocab = {token: i for i, token in enumerate((*_SPECIALS, *_CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(
    folder: str | Path, *, seed: int = 0, layers: int = 2, hidden_size: int = 32
) -> Path:
    """Write a random Qwen3 model and its tokenizer to ``folder``, whole or not at all."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o755)  # mkdtemp makes it private
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def model_folder(path: str) -> Path:
    """The folder of ``model.path``: ``builtin:tiny`` and ``builtin:smollm2`` are made on first use.

    Raises:
        InputError: an unknown builtin name.
    """
    if not path.startswith(BUILTIN):
        return Path(path)
    name = path.removeprefix(BUILTIN)
    if name == "smollm2":
        return demo_model()
    if name != "tiny":
        raise InputError(f"model.path: builtin model {name!r} is unknown; choose tiny or smollm2.")
    folder = default_cache() / f"tiny-qwen3-{_VERSION}"
    if not (folder / "config.json").is_file():
        try:
            tiny_model(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    return folder
