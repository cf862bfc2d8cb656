"""``qwenlong demo``: a small real model reads a real document on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from qwenlong.models import default_cache, demo_document, demo_model
from qwenlong.score import ScoreSettings, run_command
from qwenlong.storage import atomic_write

# Four windows of SmolLM2's context: 8192 + 3 * (8192 - 512) tokens.
WINDOW_TOKENS, OVERLAP_TOKENS, MAX_TOKENS = 8192, 512, 31_232


def _demo_dtype() -> str:
    """bfloat16 where the CPU multiplies it natively, 2 to 3 times as fast as float32 there."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bf16 and not torch.cuda.is_available() else "auto"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the document and its scores.")] = Path(
        "demo"
    ),
    max_tokens: Annotated[int, typer.Option(help="Tokens of the document to score.")] = MAX_TOKENS,
) -> None:
    """SmolLM2-135M-Instruct reads the reference texts of Python's help()."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = demo_document()
    Console(stderr=True).print(f"SmolLM2-135M-Instruct is converted once, into {default_cache()}")
    model = demo_model()
    document = out / "python-topics.txt"
    with atomic_write(document, "wb") as file:
        file.write(text.encode())
    settings = ScoreSettings(
        model=str(model),
        input=str(document),
        window_tokens=WINDOW_TOKENS,
        overlap_tokens=OVERLAP_TOKENS,
        dtype=_demo_dtype(),
        max_tokens=max_tokens,
    )
    run_command(settings, document.with_suffix(".scores"), force=True)
