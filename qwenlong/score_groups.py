"""``qwenlong score --answers``: every answer to a prompt, the prompt read once.

A line of the file is ``{"prompt": TEXT, "answers": [TEXT, ...]}``, or with ids instead of texts
``{"prompt_ids": [...], "answer_ids": [[...], ...]}``, and may have an ``"id"``. What is done
stays done: a run that was stopped goes on with the first line that has no scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from safetensors.numpy import save as to_safetensors

from qlkernels.prefix_group import PackedGroups, pack_groups
from qwenlong.errors import InputError
from qwenlong.models import load_tokenizer
from qwenlong.score import (
    ScoreSettings,
    check_out,
    describe_run,
    open_reader,
    show_progress,
)
from qwenlong.score_model import ScorerReader, packed
from qwenlong.score_plot import draw_groups
from qwenlong.storage import JsonlAppender, atomic_write, read_jsonl, write_json

# What may differ between a run and its continuation.
_ONLY_SPEED = ("chunk_tokens", "attention", "stream_weights", "impl", "device", "input")


class Group(NamedTuple):
    """A line of the file, as token ids."""

    line: int  # from 0
    name: str | None
    prompt: list[int]
    answers: list[list[int]]

    @property
    def rows(self) -> int:
        """Of the packed layout."""
        return len(self.prompt) - 1 + sum(len(answer) for answer in self.answers)


class GroupScores(NamedTuple):
    """Answer tokens of one group, one answer behind the other; nats."""

    answer_ids: np.ndarray  # [N] int64
    answer_offsets: np.ndarray  # [A + 1] int64
    logprobs: np.ndarray  # [N] fp32
    entropy: np.ndarray  # [N] fp32
    lse: np.ndarray  # [N] fp32


# --- the file ----------------------------------------------------------------


def read_groups(path: Path, tokenizer: Any) -> Iterator[Group]:
    """The groups of a file, one at a time.

    Raises:
        InputError: a line that is no group, by its number (from 1).
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        number = 0
        for position, line in enumerate(file, 1):
            if line.strip():
                yield _to_group(line, number, f"{path}, line {position}", tokenizer)
                number += 1


def _to_group(line: bytes, number: int, where: str, tokenizer: Any) -> Group:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or bytes that are no UTF-8
        raise InputError(f"{where} is not JSON.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object with a prompt and answers.")
    prompt = _ids(row, "prompt", "prompt_ids", where, tokenizer, special=True)
    if not prompt:
        raise InputError(f"{where} has no prompt; give at least one token in prompt or prompt_ids.")
    texts, ids = row.get("answers"), row.get("answer_ids")
    given = texts if ids is None else ids
    if not isinstance(given, list) or (texts is not None and ids is not None):
        raise InputError(f"{where} needs a list, answers (texts) or answer_ids, and not both.")
    key = ("answer", "answer_ids")
    field = key[0] if ids is None else key[1]
    answers = [_ids({field: a}, *key, where, tokenizer, special=False) for a in given]
    name = row.get("id")
    return Group(number, None if name is None else str(name), prompt, answers)


def _ids(
    row: dict, text_key: str, ids_key: str, where: str, tokenizer: Any, *, special: bool
) -> list[int]:
    text, ids = row.get(text_key), row.get(ids_key)
    if text is not None and ids is not None:
        raise InputError(f"{where} has both {text_key} and {ids_key}; give one.")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError(f"{where}: {ids_key} must be a list of token ids.")
        return ids
    if text is None:
        return []
    if not isinstance(text, str):
        raise InputError(f"{where}: {text_key} must be a text.")
    if not text and not special:
        return []
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def _check(group: Group, reader: ScorerReader, path: str) -> None:
    """Refuse before the first score what the model cannot read."""
    where = f"{path}, group {group.line + 1}"
    for ids in (group.prompt, *group.answers):
        wrong = next((i for i in ids if not 0 <= i < reader.V), None)
        if wrong is not None:
            raise InputError(
                f"{where} has token id {wrong} and the model has {reader.V}; use the tokenizer "
                "that belongs to the model."
            )
    longest = len(group.prompt) - 1 + max((len(a) for a in group.answers), default=0)
    if longest > reader.context_tokens:
        raise InputError(
            f"{where} reads {longest} tokens and the model has {reader.context_tokens} positions; "
            "shorten its prompt or answers."
        )


# --- a run -------------------------------------------------------------------


def run_groups(
    settings: ScoreSettings, out: Path, console: Console, *, force: bool = False
) -> dict[str, Any]:
    """Score every answer of ``settings.input``, return the summary.

    ``out`` gets ``groups/NNNNNN.safetensors`` and a line of ``groups.jsonl`` as each group is done,
    scores.png and scores.json at the end. Lines that are there already are kept, unless the file or
    what the scores depend on has changed, which is an error without ``force``.
    """
    check_out(out, force)
    tokenizer = load_tokenizer(settings.model)
    path = Path(settings.input)
    rows_of_groups = [group.rows for group in read_groups(path, tokenizer)]
    if not rows_of_groups:
        raise InputError(f"{path} holds no group; give a line with a prompt and its answers.")
    total = sum(rows_of_groups)
    reader = open_reader(settings, console, needs_scorer="--answers")
    assert isinstance(reader, ScorerReader)
    for group in read_groups(path, tokenizer):
        _check(group, reader, settings.input)
    key = _key(settings, reader)
    done = {} if force else _done(out, key, path, tokenizer)
    if force:
        for name in ("scores.json", "groups.jsonl"):
            (out / name).unlink(missing_ok=True)

    started = time.perf_counter()
    kept = len(done)
    total -= sum(row["rows"] for row in done.values())
    waiting = (group for group in read_groups(path, tokenizer) if group.line not in done)
    with show_progress(console, total) as on_read:
        for batch in packed(waiting, lambda group: group.rows, reader.pass_tokens):
            layout = pack_groups([g.prompt for g in batch], [g.answers for g in batch])
            found = reader.read_groups(layout, settings.temperature, on_read)
            with JsonlAppender(out / "groups.jsonl") as log:
                for group, scores in zip(batch, _split(layout, found), strict=True):
                    done[group.line] = _row(group, scores, key)
                    _save(out, group, scores, done[group.line])
                    log.append(done[group.line])
    seconds = time.perf_counter() - started

    rows = [done[line] for line in sorted(done)]
    summary = {
        **_totals(rows),
        "scored_now": len(done) - kept,
        "seconds": seconds,
        "tokens_per_second": total / seconds,
        **describe_run(settings, reader),
    }
    title = f"{path.name} read by {Path(settings.model).name}"
    with atomic_write(out / "scores.png", "wb") as file:
        draw_groups(file, rows, _by_position(out, rows), title)
    write_json(out / "scores.json", summary)
    return summary


def _key(settings: ScoreSettings, reader: ScorerReader) -> str:
    """Of everything that the scores of a group depend on, beside the group."""
    given = {k: v for k, v in asdict(settings).items() if k not in _ONLY_SPEED}
    given |= {"model": str(Path(settings.model).absolute()), "dtype": str(reader.dtype)}
    return _digest(given)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _done(out: Path, key: str, path: Path, tokenizer: Any) -> dict[int, dict]:
    """Rows of an earlier run by line, checked against this one."""
    if not (out / "groups.jsonl").is_file():
        return {}
    rows = {row["line"]: row for row in read_jsonl(out / "groups.jsonl")}
    groups = {group.line: _digest(group[2:]) for group in read_groups(path, tokenizer)}
    for line, row in rows.items():
        if row["key"] != key or groups.get(line) != row["digest"]:
            raise InputError(
                f"{out} holds scores of another file or of other settings; use --force or another "
                "--out."
            )
    return {line: row for line, row in rows.items() if _file(out, line).is_file()}


def _file(out: Path, line: int) -> Path:
    return out / "groups" / f"{line:06d}.safetensors"


def _split(layout: PackedGroups, found: Any) -> Iterator[GroupScores]:
    """The answer rows of each group."""
    for span in layout.spans():
        rows = slice(span.answers_start, span.stop)
        yield GroupScores(
            layout.target_ids[rows].numpy(),
            np.concatenate([[0], np.cumsum(span.answer_lengths, dtype=np.int64)]).astype(np.int64),
            *(getattr(found, name)[rows].numpy() for name in GroupScores._fields[2:]),
        )


def _row(group: Group, scores: GroupScores, key: str) -> dict[str, Any]:
    if not (np.isfinite(scores.logprobs).all() and np.isfinite(scores.entropy).all()):
        raise InputError(
            f"the model gives no finite score for group {group.line + 1}; use --dtype float32, or "
            "download its weights again."
        )
    answers = []
    for a, b in zip(scores.answer_offsets[:-1], scores.answer_offsets[1:], strict=True):
        logprobs, entropy = (x[a:b].astype(np.float64) for x in (scores.logprobs, scores.entropy))
        answers.append(
            {
                "tokens": int(b - a),
                "logprob": float(logprobs.sum()),
                "mean_entropy": float(entropy.mean()) if b > a else None,
            }
        )
    return {
        "line": group.line,
        "id": group.name,
        "prompt_tokens": len(group.prompt),
        "rows": group.rows,
        "answers": answers,
        "key": key,
        "digest": _digest(group[2:]),
    }


def _save(out: Path, group: Group, scores: GroupScores, row: dict) -> None:
    # one entry, because safetensors writes several in no fixed order
    metadata = {"group": json.dumps({k: row[k] for k in ("line", "id", "digest")})}
    arrays = {name: np.ascontiguousarray(x) for name, x in scores._asdict().items()}
    with atomic_write(_file(out, group.line), "wb") as file:
        file.write(to_safetensors(arrays, metadata=metadata))


def _totals(rows: list[dict]) -> dict[str, Any]:
    answers = [answer for row in rows for answer in row["answers"]]
    tokens = sum(answer["tokens"] for answer in answers)
    nats = -sum(answer["logprob"] for answer in answers) / tokens if tokens else None
    weighted = sum((a["mean_entropy"] or 0.0) * a["tokens"] for a in answers)
    return {
        "groups": len(rows),
        "answers": len(answers),
        "scored_tokens": tokens,
        "rows_read": sum(row["rows"] for row in rows),
        "rows_without_sharing": sum(
            row["prompt_tokens"] - 1 + answer["tokens"]
            for row in rows
            for answer in row["answers"]
            if answer["tokens"]
        ),
        "nats_per_token": nats,
        "perplexity": None if nats is None else math.exp(min(nats, 700.0)),
        "mean_entropy": weighted / tokens if tokens else None,
    }


def _by_position(out: Path, rows: list[dict]) -> dict[str, np.ndarray]:
    """Mean entropy and surprise of the r-th token of all answers, and how many answers have one."""
    longest = max((a["tokens"] for row in rows for a in row["answers"]), default=0)
    sums = {name: np.zeros(longest) for name in ("entropy", "surprise", "answers")}
    from safetensors.numpy import load_file

    for row in rows:
        scores = load_file(_file(out, row["line"]))
        offsets = scores["answer_offsets"]
        for a, b in zip(offsets[:-1], offsets[1:], strict=True):
            sums["entropy"][: b - a] += scores["entropy"][a:b]
            sums["surprise"][: b - a] -= scores["logprobs"][a:b]
            sums["answers"][: b - a] += 1
    counts = sums.pop("answers")
    return {name: x / np.maximum(counts, 1) for name, x in sums.items()} | {"answers": counts}


def print_groups(console: Console, summary: dict, out: Path) -> None:
    """A few lines for a person."""
    memory = summary["peak_memory_bytes"]
    device = "" if memory["device"] is None else f", GPU {memory['device'] / 1e9:.2f} GB"
    shared = summary["rows_without_sharing"] / max(1, summary["rows_read"])
    none = summary["nats_per_token"] is None
    rows = {
        "groups": f"{summary['groups']:,}, {summary['scored_now']:,} of them in this run",
        "answers": f"{summary['answers']:,} with {summary['scored_tokens']:,} tokens",
        "perplexity": "none"
        if none
        else f"{summary['perplexity']:.3f} ({summary['nats_per_token']:.4f} nats/token)",
        "mean entropy": "none" if none else f"{summary['mean_entropy']:.4f} nats",
        "rows read": f"{summary['rows_read']:,}, {shared:.2f} times fewer than without sharing",
        "speed": f"{summary['tokens_per_second']:,.0f} rows/s, {summary['seconds']:.1f} s "
        f"({summary['dtype']}, {summary['device']}, {summary['attention']} attention, "
        f"weights {summary['weights']})",
        "peak memory": f"{memory['host'] / 1e9:.2f} GB{device}",
        "scores": str(out / "groups"),
        "summary": str(out / "scores.json"),
        "picture": str(out / "scores.png"),
    }
    for name, value in rows.items():
        console.print(f"{name:>18}  {value}", markup=False, highlight=False, soft_wrap=True)
