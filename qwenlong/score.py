"""``qwenlong score``: log-prob and entropy of every token of a document under a language model.

A document longer than the model's context is read in windows. Window 0 reads the first W tokens;
each later one starts ``overlap`` tokens before the end of the window before it and scores only what
is new, so that every token has at least ``overlap`` tokens of context. Tokens that the tokenizer
puts before every text (BOS) stand at the start of each window.

What is in memory: the model, the keys and values of one window, the activations of one prefill
chunk, a chunk of logits inside ``linear_logprob``, and the scores.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
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
from transformers import DynamicCache

from qlkernels.linear_logprob import linear_logprob
from qwenlong.errors import InputError
from qwenlong.models import CausalLM, load_causal_lm, load_tokenizer
from qwenlong.score_plot import draw_scores, uncertain_passages
from qwenlong.storage import atomic_write, write_json
from qwenlong.tokens import Tokens, read_document, tokenize

# Tokens of one forward pass of the base model; attention's mask is [chunk, window].
PREFILL_TOKENS = {"cpu": 1024, "cuda": 4096}

_LOG_SECONDS = 10.0


class Window(NamedTuple):
    """The model reads tokens ``[start, end)`` after the prefix, scores ``[first_scored, end)``."""

    start: int
    first_scored: int
    end: int


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


# --- windows -----------------------------------------------------------------


def plan_windows(
    tokens: int, window_tokens: int, overlap_tokens: int, n_prefix: int = 0
) -> list[Window]:
    """Cover ``tokens`` tokens with windows of at most ``window_tokens``, the prefix included.

    Tokens ``1 ..`` (after a longer prefix: ``n_prefix ..``) are scored by exactly one window each.
    """
    windows = [Window(0, max(1, n_prefix), min(tokens, window_tokens))]
    while (end := windows[-1].end) < tokens:
        start = end - overlap_tokens
        windows.append(Window(start, end, min(tokens, start + window_tokens - n_prefix)))
    return windows


def choose_windows(
    tokens: Tokens, settings: ScoreSettings, context_tokens: int | None
) -> list[Window]:
    """The windows of a run, or an InputError that says which option to change."""
    T, window, overlap = len(tokens.ids), settings.window_tokens, settings.overlap_tokens
    if T <= max(1, tokens.n_prefix):
        raise InputError(
            f"{settings.input} has {T - tokens.n_prefix} token; scoring needs at least two."
        )
    if window is None:
        if overlap is not None:
            raise InputError("--overlap-tokens needs --window-tokens; give both or neither.")
        if context_tokens is not None and T > context_tokens:
            raise InputError(
                f"{settings.input} has {T} tokens and the model reads {context_tokens} at a time; "
                f"use --window-tokens {context_tokens} [--overlap-tokens N] or --max-tokens N."
            )
        return plan_windows(T, T, 1, tokens.n_prefix)
    if context_tokens is not None and window > context_tokens:
        raise InputError(
            f"--window-tokens {window} is more than the model reads at a time; "
            f"use at most {context_tokens}."
        )
    overlap = max(1, window // 8) if overlap is None else overlap
    room = window - tokens.n_prefix
    if overlap >= room:
        raise InputError(
            f"--overlap-tokens {overlap} leaves nothing new to score in a window of {room} tokens; "
            f"use less than {room}."
        )
    return plan_windows(T, window, overlap, tokens.n_prefix)


# --- scores ------------------------------------------------------------------


@torch.inference_mode()
def score_tokens(
    lm: CausalLM,
    tokens: Tokens,
    windows: list[Window],
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    impl: str = "auto",
    prefill_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda scored: None,
) -> DocumentScores:
    """Score a document window by window.

    Args:
        lm: the model, from ``load_causal_lm``.
        tokens: the document, from ``tokenize``.
        windows: from ``plan_windows``.
        temperature: the logits are divided by it, above 0.
        chunk_tokens: rows of the head at a time; None leaves it to ``linear_logprob``.
        impl: of ``linear_logprob``.
        prefill_tokens: tokens of one forward pass; ``PREFILL_TOKENS`` of the device if None.
        on_progress: called with the number of tokens read by each forward pass.

    Raises:
        InputError: the model gave NaN or infinity.
    """
    T = len(tokens.ids)
    scores = DocumentScores(*(np.full(T, np.nan, dtype=np.float32) for _ in range(3)))
    ids = torch.from_numpy(tokens.ids)
    step = prefill_tokens or PREFILL_TOKENS[lm.device.type]
    for window in windows:
        prefix = ids[: tokens.n_prefix] if window.start else ids[:0]
        window_ids = torch.cat([prefix, ids[window.start : window.end]]).to(lm.device)
        shift = window.start - len(prefix)  # row r of the window predicts token r + 1 + shift
        first_row = window.first_scored - 1 - shift
        for row, hidden_states in _hidden_states(lm, window_ids[:-1], step):
            skip = max(0, first_row - row)  # rows of the overlap: read, not scored
            on_progress(len(hidden_states))
            if skip >= len(hidden_states):
                continue
            rows = slice(row + skip, row + len(hidden_states))
            part = linear_logprob(
                hidden_states[skip:],
                lm.lm_head_weight,
                window_ids[rows.start + 1 : rows.stop + 1],
                bias=lm.lm_head_bias,
                temperature=temperature,
                logit_scale=lm.logit_scale,
                softcap=lm.softcap,
                chunk_tokens=chunk_tokens,
                impl=impl,
            )
            into = slice(rows.start + 1 + shift, rows.stop + 1 + shift)
            for name in DocumentScores._fields:
                getattr(scores, name)[into] = getattr(part, name).cpu().numpy()
            _check_finite(scores, into)
    return scores


def _hidden_states(
    lm: CausalLM, ids: torch.Tensor, step: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield hidden states ``[rows, H]`` of ``ids [L]`` in parts, each with its first row."""
    if not lm.can_prefill_in_chunks or len(ids) <= step:
        yield 0, lm.base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return
    cache = DynamicCache(config=lm.model.config)
    for start in range(0, len(ids), step):
        part = ids[None, start : start + step]
        output = lm.base(input_ids=part, past_key_values=cache, use_cache=True)
        yield start, output.last_hidden_state[0]


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


def _check_out(out: Path, force: bool) -> None:
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
    _check_out(out, force)
    text = read_document(settings.input)
    tokenizer = load_tokenizer(settings.model)
    tokens = tokenize(tokenizer, text, settings.max_tokens)
    with console.status(f"loading {settings.model}"):
        lm = load_causal_lm(
            settings.model, dtype=settings.dtype, device=settings.device, impl=settings.impl
        )
    V = lm.lm_head_weight.shape[0]
    if int(tokens.ids.max(initial=0)) >= V:
        raise InputError(
            f"the tokenizer in {settings.model} gives id {tokens.ids.max()} and the model has {V}; "
            "use the tokenizer that belongs to the model."
        )
    windows = choose_windows(tokens, settings, lm.context_tokens)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    started = time.perf_counter()
    with _progress(console, _reads(windows, tokens.n_prefix)) as on_progress:
        scores = score_tokens(
            lm,
            tokens,
            windows,
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
            impl=settings.impl,
            on_progress=on_progress,
        )
    seconds = time.perf_counter() - started

    totals = summarize(tokens, scores)
    passages = uncertain_passages(scores.entropy, tokens.offsets, text)
    summary = {
        **totals,
        "seconds": seconds,
        "tokens_per_second": totals["scored_tokens"] / seconds,
        "peak_memory_bytes": _peak_memory(),
        "most_uncertain": [passage._asdict() for passage in passages],
        "windows": [window._asdict() for window in windows],
        "prefix_tokens": tokens.n_prefix,
        "dtype": str(lm.lm_head_weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if lm.device.type == "cuda" else "cpu",
        "settings": asdict(settings),
        "versions": _versions(),
    }
    _save(out, tokens, scores, summary, windows, passages)
    return summary


def _reads(windows: list[Window], n_prefix: int) -> int:
    """Tokens that the model reads: each window all but its last, which is only predicted."""
    return sum(w.end - w.start - 1 + (n_prefix if w.start else 0) for w in windows)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with tokens/s and time left; in a log, a line every ``_LOG_SECONDS``."""
    started = said = time.perf_counter()
    read = 0
    columns = (
        *(TextColumn("scoring"), BarColumn(), TaskProgressColumn()),
        *(TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("left")),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, speed="")

        def on_progress(tokens: int) -> None:
            nonlocal read, said
            read += tokens
            now = time.perf_counter()
            speed = read / (now - started)
            bar.update(task, completed=read, speed=f"{speed:,.0f} tokens/s")
            if not console.is_terminal and now - said >= _LOG_SECONDS:
                said = now
                left = (total - read) / speed
                console.print(
                    f"read {read:,} of {total:,} tokens, {speed:,.0f} tokens/s, {left:.0f} s left",
                    highlight=False,
                )

        yield on_progress


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
        f"({summary['dtype']}, {summary['device']})",
        "peak memory": f"{memory['host'] / 1e9:.2f} GB{device}",
        "scores": str(out / "scores.safetensors"),
        "summary": str(out / "scores.json"),
        "picture": str(out / "scores.png"),
    }
    for name, value in rows.items():
        console.print(f"{name:>18}  {value}", markup=False, highlight=False, soft_wrap=True)


def run_command(settings: ScoreSettings, out: Path, *, force: bool) -> None:
    """``run`` for a terminal: progress on standard error, the summary on standard output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        summary = run(settings, out, Console(stderr=True), force=force)
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the GPU has too little memory; use a smaller --chunk-tokens or --window-tokens, "
            "or --device cpu."
        ) from error
    print_summary(Console(), summary, out)


def score(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")],
    input: Annotated[str, typer.Option(help="UTF-8 text file, or - for standard input.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; INPUT's name with .scores if left out."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="The logits are divided by it.")] = 1.0,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Rows of logits at a time; less needs less memory.")
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
    force: Annotated[bool, typer.Option("--force", help="Replace earlier scores.")] = False,
) -> None:
    """Log-prob and entropy of every token of a document, in bounded memory at any length."""
    settings = ScoreSettings(
        model=str(model),
        input=input,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        window_tokens=window_tokens,
        overlap_tokens=overlap_tokens,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        impl=impl,
    )
    if out is None:
        source = Path("stdin" if input == "-" else input)
        out = source.parent / f"{source.stem}.scores"
    run_command(settings, out, force=force)
