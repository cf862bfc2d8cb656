"""``qwenlong score``: log-prob and entropy of every token of a document under a language model.

A document longer than the model's context is read in windows. Window 0 reads the first W tokens;
each later one starts ``overlap`` tokens before the end of the window before it and scores only what
is new, so that every token has at least ``overlap`` tokens of context. Tokens that the tokenizer
puts before every text (BOS) stand at the start of each window.

What is in memory: the model (or two of its layers), what one pass over a few windows takes (see
``qlkernels.scorer.memory``), and the scores.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors.numpy import save as to_safetensors

from qlkernels.scorer import NotEnoughMemory
from qwenlong.errors import InputError
from qwenlong.models import load_tokenizer
from qwenlong.score_model import OnRead, Part, Reader, in_options, load_reader
from qwenlong.score_plot import draw_scores, uncertain_passages
from qwenlong.score_windows import Window, choose_windows
from qwenlong.storage import atomic_write, lock_folder, write_json
from qwenlong.tokens import Tokens, read_document, tokenize

_LOG_SECONDS = 10.0


class DocumentScores(NamedTuple):
    """Entry t is the score of token t itself, in nats; NaN for token 0 and the whole prefix."""

    logprobs: np.ndarray  # [T] fp32
    entropy: np.ndarray  # [T] fp32, of the distribution that token t was drawn from
    lse: np.ndarray  # [T] fp32


@dataclass(frozen=True)
class ScoreSettings:
    """What a run was asked for; goes into scores.json."""

    model: str
    input: str
    temperature: float = 1.0
    chunk_tokens: int | None = None
    window_tokens: int | None = None
    overlap_tokens: int | None = None
    max_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    attention: str = "auto"
    stream_weights: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"--temperature is {self.temperature:g}; it must be above 0.")
        for name, least in (
            ("chunk_tokens", 1),
            ("window_tokens", 2),
            ("overlap_tokens", 1),
            ("max_tokens", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {value}; it must be at least {least}.")


# --- scores ------------------------------------------------------------------


def score_tokens(
    reader: Reader,
    tokens: Tokens,
    windows: list[Window],
    *,
    temperature: float = 1.0,
    on_read: OnRead = lambda _tokens, _done, _layers: None,
) -> DocumentScores:
    """Score a document window by window.

    Args:
        reader: the model, from ``load_reader``.
        tokens: the document, from ``tokenize``.
        windows: from ``plan_windows``.
        temperature: the logits are divided by it, above 0.
        on_read: called with the number of tokens read since the last call, and how many of how many
            layers have read them.

    Raises:
        InputError: the model gave NaN or infinity.
    """
    T = len(tokens.ids)
    scores = DocumentScores(*(np.full(T, np.nan, dtype=np.float32) for _ in range(3)))
    ids = torch.from_numpy(tokens.ids)
    parts = []
    for window in windows:
        prefix = ids[: tokens.n_prefix] if window.start else ids[:0]
        shift = window.start - len(prefix)  # row r of the window predicts token r + 1 + shift
        window_ids = torch.cat([prefix, ids[window.start : window.end]])
        parts.append(Part(window_ids, window.first_scored - 1 - shift))
    for window, part in zip(windows, reader.read(parts, temperature, on_read), strict=True):
        into = slice(window.first_scored, window.end)
        for name in DocumentScores._fields:
            getattr(scores, name)[into] = getattr(part, name).numpy()
        _check_finite(scores, into)
    return scores


def _check_finite(scores: DocumentScores, into: slice) -> None:
    finite = np.isfinite(scores.logprobs[into]) & np.isfinite(scores.entropy[into])
    if not finite.all():
        token = into.start + int(np.argmin(finite))
        raise InputError(
            f"the model gives no finite score for token {token}; use --dtype float32, "
            "or download its weights again."
        )


# --- a run -------------------------------------------------------------------


def _peak_memory() -> dict[str, int | None]:
    """Bytes: the process's largest resident set, and what torch allocated on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def summarize(tokens: Tokens, scores: DocumentScores) -> dict[str, Any]:
    """Averages over the scored tokens; ``bits_per_character`` over the text that they span."""
    first = max(1, tokens.n_prefix)
    surprise = -scores.logprobs[first:].astype(np.float64)
    characters = int(tokens.offsets[-1, 1] - tokens.offsets[first, 0])
    return {
        "tokens": len(tokens.ids),
        "scored_tokens": len(surprise),
        "perplexity": math.exp(min(surprise.mean(), 700.0)),  # exp(710) is no double
        "nats_per_token": surprise.mean(),
        "bits_per_character": surprise.sum() / math.log(2) / characters if characters else None,
        "mean_entropy": scores.entropy[first:].astype(np.float64).mean(),
    }


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("qlkernels")
    except PackageNotFoundError:  # run from a checkout that is not installed
        ours = None
    return {
        "qlkernels": ours,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def check_out(out: Path, force: bool) -> None:
    """Refuse before the work what would fail after it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out takes a folder.")
    if (out / "scores.json").exists() and not force:
        raise InputError(f"{out} holds scores already; use --force or another --out.")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{out} cannot be written; use another --out.")


def run(settings: ScoreSettings, out: Path, console: Console, *, force: bool = False) -> dict:
    """Score a document, write scores.safetensors, .png and .json into ``out``, return the summary.

    Nothing is written before everything is computed. Each file appears whole, scores.json last.
    """
    check_out(out, force)
    text = read_document(settings.input)
    tokenizer = load_tokenizer(settings.model)
    tokens = tokenize(tokenizer, text, settings.max_tokens)
    reader = open_reader(settings, console)
    check_vocabulary(tokens.ids, reader, settings.model)
    windows = choose_windows(
        tokens,
        settings.input,
        settings.window_tokens,
        settings.overlap_tokens,
        reader.context_tokens,
    )
    started = time.perf_counter()
    with show_progress(console, _reads(windows, tokens.n_prefix)) as on_read:
        scores = score_tokens(
            reader, tokens, windows, temperature=settings.temperature, on_read=on_read
        )
    seconds = time.perf_counter() - started

    totals = summarize(tokens, scores)
    passages = uncertain_passages(scores.entropy, tokens.offsets, text)
    summary = {
        **totals,
        "seconds": seconds,
        "tokens_per_second": totals["scored_tokens"] / seconds,
        "most_uncertain": [passage._asdict() for passage in passages],
        "windows": [window._asdict() for window in windows],
        "prefix_tokens": tokens.n_prefix,
        **describe_run(settings, reader),
    }
    _save(out, tokens, scores, summary, windows, passages)
    return summary


def open_reader(
    settings: ScoreSettings, console: Console, *, needs_scorer: str | None = None
) -> Reader:
    """The model that ``settings`` ask for, its loading shown."""
    if needs_scorer is None and settings.stream_weights:
        needs_scorer = "--stream-weights"
    if needs_scorer is None and settings.attention != "auto":
        needs_scorer = "--attention"
    with console.status(f"loading {settings.model}") as status:
        reader = load_reader(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            impl=settings.impl,
            attention=settings.attention,
            stream_weights=settings.stream_weights,
            chunk_tokens=settings.chunk_tokens,
            needs_scorer=needs_scorer,
            on_layer_loaded=lambda done, layers: status.update(
                f"loading {settings.model}, layer {done} of {layers}"
            ),
        )
    if reader.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return reader


def check_vocabulary(ids: np.ndarray, reader: Reader, model: str) -> None:
    if int(ids.max(initial=0)) >= reader.V:
        raise InputError(
            f"the tokenizer in {model} gives id {ids.max()} and the model has {reader.V}; "
            "use the tokenizer that belongs to the model."
        )


def describe_run(settings: ScoreSettings, reader: Reader) -> dict[str, Any]:
    """What scores.json says of how it was made."""
    return {
        "peak_memory_bytes": _peak_memory(),
        **reader.describe(),
        "dtype": str(reader.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if reader.device.type == "cuda" else "cpu",
        "settings": asdict(settings),
        "versions": _versions(),
    }


def _reads(windows: list[Window], n_prefix: int) -> int:
    """Tokens that the model reads: each window all but its last, which is only predicted."""
    return sum(w.end - w.start - 1 + (n_prefix if w.start else 0) for w in windows)


@contextlib.contextmanager
def show_progress(console: Console, total: int) -> Iterator[OnRead]:
    """A bar with tokens/s and time left; in a log, a line every ``_LOG_SECONDS``."""
    started = said = time.perf_counter()
    read = 0.0
    columns = (
        *(TextColumn("scoring"), BarColumn(), TaskProgressColumn()),
        *(TextColumn("{task.fields[layer]}"), TextColumn("{task.fields[speed]}")),
        *(TimeRemainingColumn(), TextColumn("left")),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, speed="", layer="")

        def on_read(tokens: float, done: int, layers: int) -> None:
            nonlocal read, said
            read += tokens
            now = time.perf_counter()
            speed = read / (now - started)
            layer = f"layer {done} of {layers}" if layers > 1 else ""
            bar.update(task, completed=read, speed=f"{speed:,.0f} tokens/s", layer=layer)
            if not console.is_terminal and now - said >= _LOG_SECONDS:
                said = now
                left = (total - read) / speed
                where = f" ({layer})" if layer else ""
                console.print(
                    f"read {read:,.0f} of {total:,} tokens{where}, {speed:,.0f} tokens/s, "
                    f"{abs(left):.0f} s left",
                    highlight=False,
                )

        yield on_read


def _save(
    out: Path,
    tokens: Tokens,
    scores: DocumentScores,
    summary: dict,
    windows: list[Window],
    passages: list[Any],
) -> None:
    arrays = {"ids": tokens.ids, "offsets": tokens.offsets, **scores._asdict()}
    name = "standard input" if summary["settings"]["input"] == "-" else summary["settings"]["input"]
    title = f"{Path(name).name} read by {Path(summary['settings']['model']).name}"
    (out / "scores.json").unlink(missing_ok=True)  # never that of other scores
    with atomic_write(out / "scores.safetensors", "wb") as file:
        file.write(to_safetensors(arrays))
    with atomic_write(out / "scores.png", "wb") as file:
        draw_scores(file, scores, [w.first_scored for w in windows[1:]], passages, title)
    write_json(out / "scores.json", summary)


def print_summary(console: Console, summary: dict, out: Path) -> None:
    """A few lines for a person."""
    memory = summary["peak_memory_bytes"]
    device = "" if memory["device"] is None else f", GPU {memory['device'] / 1e9:.2f} GB"
    bits = summary["bits_per_character"]
    rows = {
        "tokens scored": f"{summary['scored_tokens']:,} in {len(summary['windows'])} window(s)",
        "perplexity": f"{summary['perplexity']:.3f} ({summary['nats_per_token']:.4f} nats/token)",
        "bits per character": "none" if bits is None else f"{bits:.4f}",
        "mean entropy": f"{summary['mean_entropy']:.4f} nats",
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['seconds']:.1f} s "
        f"({summary['dtype']}, {summary['device']}, {summary['attention']} attention, "
        f"weights {summary['weights']})",
        "peak memory": f"{memory['host'] / 1e9:.2f} GB{device}",
        "scores": str(out / "scores.safetensors"),
        "summary": str(out / "scores.json"),
        "picture": str(out / "scores.png"),
    }
    for name, value in rows.items():
        console.print(f"{name:>18}  {value}", markup=False, highlight=False, soft_wrap=True)


def run_command(settings: ScoreSettings, out: Path, *, force: bool) -> None:
    """``run`` for a terminal: progress on standard error, the summary on standard output."""
    with _sentences(), lock_folder(out):
        summary = run(settings, out, Console(stderr=True), force=force)
    print_summary(Console(), summary, out)


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """No chatter of transformers; too little memory is one sentence that says what to do."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except NotEnoughMemory as error:
        raise InputError(in_options(error)) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the GPU has too little memory; use --stream-weights, a smaller --chunk-tokens or "
            "--window-tokens, or --device cpu."
        ) from error


def score(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")],
    input: Annotated[
        str | None, typer.Option(help="UTF-8 text file, or - for standard input.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="JSON lines with a prompt and its answers each, instead of --input."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; INPUT's name with .scores if left out."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="The logits are divided by it.")] = 1.0,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens that MLP and experts work on at a time.")
    ] = None,
    window_tokens: Annotated[
        int | None, typer.Option(help="Read a long document in windows of this many tokens.")
    ] = None,
    overlap_tokens: Annotated[
        int | None, typer.Option(help="Tokens that a window rereads; an eighth of it if left out.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Score only the first tokens of the document.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16. auto: float32 on the CPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    impl: Annotated[
        str, typer.Option(help="Of the head: auto, triton, cpu, torch or reference.")
    ] = "auto",
    attention: Annotated[
        str, typer.Option(help="auto, flash-attn-4, flash-attn-3, cudnn, flash-attn-2 or sdpa.")
    ] = "auto",
    stream_weights: Annotated[
        bool,
        typer.Option("--stream-weights", help="Keep the layers in host memory (CPU: on disk)."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier scores.")] = False,
) -> None:
    """Log-prob and entropy of every token of a document, in bounded memory at any length."""
    if (input is None) == (answers is None):
        raise InputError("give either --input or --answers.")
    if answers is not None and (window_tokens or overlap_tokens or max_tokens):
        raise InputError("--answers takes whole prompts; leave the window and --max-tokens out.")
    settings = ScoreSettings(
        model=str(model),
        input=str(answers) if input is None else input,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        window_tokens=window_tokens,
        overlap_tokens=overlap_tokens,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        impl=impl,
        attention=attention,
        stream_weights=stream_weights,
    )
    if out is None:
        source = Path("stdin" if input == "-" else settings.input)
        out = source.parent / f"{source.stem}.scores"
    if answers is None:
        run_command(settings, out, force=force)
        return
    from qwenlong.score_groups import print_groups, run_groups

    with _sentences(), lock_folder(out):
        summary = run_groups(settings, out, Console(stderr=True), force=force)
    print_groups(Console(), summary, out)
