"""The finished dataset: ``samples.jsonl`` with refs, ``documents.jsonl`` with the texts once.

``load_samples`` reads it. ``rejected.jsonl`` holds the samples that a filter failed, with every
verdict; ``summary.json`` the counts of the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwenlong.data.recipe import Recipe
from qwenlong.data.workspace import Stage
from qwenlong.errors import InputError
from qwenlong.storage import atomic_write, read_jsonl, write_json
from qwenlong.types import Sample, Split

_REASONS = 50  # of one route in the summary: a reason may quote what a model wrote
SPREAD_DOCUMENTS = 3  # a multi-hop sample is spread from this many evidence documents apart


def is_exported(out: Path, key: str) -> bool:
    try:
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def export(
    out: Path, key: str, recipe: Recipe, stages: dict[str, Stage], resolve: Callable[[str], str]
) -> dict[str, Any]:
    """Write the dataset into ``out``, the summary last; return the summary."""
    counts = _Counts()
    written: set[bytes] = set()
    with (
        atomic_write(out / "samples.jsonl") as samples,
        atomic_write(out / "rejected.jsonl") as rejected,
        atomic_write(out / "documents.jsonl") as documents,
    ):
        for row in stages["decontaminate"].rows():
            is_kept = counts.add(row)
            file = samples if is_kept else rejected
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            for document in row["documents"] if is_kept else ():
                sha = document["ref"]
                if bytes.fromhex(sha) not in written:
                    written.add(bytes.fromhex(sha))
                    line = {"sha256": sha, "text": resolve(sha)}
                    documents.write(json.dumps(line, ensure_ascii=False) + "\n")
    summary = {
        "key": key,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "tokenizer": recipe.tokenizer,
        "documents": _document_counts(stages, len(written)),
        **counts.summary(),
        "dropped": _dropped_counts(stages),
    }
    write_json(out / "summary.json", summary)
    return summary


def _document_counts(stages: dict[str, Stage], in_samples: int) -> dict[str, Any]:
    folder = stages["collect"].folder
    rejected: Counter[str] = Counter()
    for part in sorted(folder.glob("part-*.rejected.jsonl")):
        for row in read_jsonl(part):
            rejected.update(n for n, v in row["quality"].items() if v["verdict"] == "fail")
    copies = Counter(row["how"] for row in read_jsonl(folder / "duplicates.jsonl"))
    contaminated = len(np.load(stages["extract"].folder / "excluded.npy"))
    return {
        "kept": len(np.load(folder / "index.npy", mmap_mode="r")),
        "rejected": dict(sorted(rejected.items())),
        "duplicates": dict(sorted(copies.items())),
        "contaminated": contaminated,
        "in_samples": in_samples,
    }


def _dropped_counts(stages: dict[str, Stage]) -> dict[str, dict[str, int]]:
    """By route, and for the extraction: what came to nothing before it was a sample, by reason."""
    found: dict[str, Counter[str]] = {}
    for name in ("extract", "compose"):
        for part in sorted(stages[name].folder.glob("part-*.dropped.jsonl")):
            for row in read_jsonl(part):
                found.setdefault(row["by"], Counter())[row["reason"]] += row["count"]
    summary = {}
    for by, reasons in sorted(found.items()):
        ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        summary[by] = dict(ordered[:_REASONS])
        if len(ordered) > _REASONS:
            summary[by]["other reasons"] = sum(n for _, n in ordered[_REASONS:])
    return summary


class _Counts:
    """What the summary says of the samples, gathered row by row."""

    def __init__(self):
        self.composed = self.exported = 0
        self.tasks: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.filters: dict[str, Counter[str]] = {}
        self.failed_by_task: dict[str, Counter[str]] = {}
        self.tokens: list[int] = []
        self.multihop = self.spread = 0

    def add(self, row: dict[str, Any]) -> bool:
        """Count ``row``; True where no filter failed it."""
        self.composed += 1
        verdicts = {name: value["verdict"] for name, value in row["filters"].items()}
        for name, verdict in verdicts.items():
            self.filters.setdefault(name, Counter())[verdict] += 1
        failed = [name for name, verdict in verdicts.items() if verdict == "fail"]
        if failed:
            self.failed_by_task.setdefault(row["task"], Counter()).update(failed)
            return False
        self.exported += 1
        self.tasks[row["task"]] += 1
        self.splits[row["split"]] += 1
        self.tokens.append(row["tokens"]["n"])
        if row["task"] == "multihop_qa":
            self.multihop += 1
            self.spread += row["placement"]["documents_apart"] >= SPREAD_DOCUMENTS
        return True

    def summary(self) -> dict[str, Any]:
        tokens = sorted(self.tokens)
        return {
            "samples": {"composed": self.composed, "exported": self.exported},
            "tasks": dict(sorted(self.tasks.items())),
            "splits": dict(sorted(self.splits.items())),
            "filters": {name: dict(sorted(c.items())) for name, c in self.filters.items()},
            "failed_by_task": {
                task: dict(sorted(c.items())) for task, c in sorted(self.failed_by_task.items())
            },
            "tokens": {
                "total": sum(tokens),
                "least": tokens[0] if tokens else 0,
                "median": tokens[len(tokens) // 2] if tokens else 0,
                "most": tokens[-1] if tokens else 0,
            },
            "multihop": {
                "samples": self.multihop,
                "three_documents_apart": self.spread,
                "share": round(self.spread / self.multihop, 4) if self.multihop else None,
            },
        }


# --- reading -----------------------------------------------------------------


class ExportedTexts:
    """The texts of a ``documents.jsonl`` by sha256, read from disk one at a time."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._places: dict[str, int] = {}
        offset = 0
        with open(self._path, "rb") as file:
            for line in file:
                self._places[json.loads(line)["sha256"]] = offset
                offset += len(line)

    def __call__(self, sha: str) -> str:
        """The text of ``sha``: what ``prompts.render`` takes as ``resolve``."""
        if sha not in self._places:
            raise InputError(
                f"{self._path} has no document {sha[:12]}...; is it another dataset's?"
            )
        with open(self._path, "rb") as file:
            file.seek(self._places[sha])
            return json.loads(file.readline())["text"]


def load_samples(
    folder: str | Path, *, with_text: bool = True, split: Split | None = None
) -> Iterator[Sample]:
    """Samples of an exported dataset, one at a time.

    Args:
        folder: holds ``samples.jsonl`` and ``documents.jsonl``.
        with_text: put the texts into the documents; False leaves the refs, and
            ``ExportedTexts(folder / "documents.jsonl")`` resolves them.
        split: only samples of this split.
    """
    folder = Path(folder)
    if not (folder / "samples.jsonl").is_file():
        raise InputError(f"{folder} holds no samples.jsonl; run `qwenlong synth run` to make it")
    texts = ExportedTexts(folder / "documents.jsonl") if with_text else None
    for row in read_jsonl(folder / "samples.jsonl"):
        sample = Sample.model_validate(row)
        if split is not None and sample.split != split:
            continue
        if texts is not None:
            documents = [
                d.model_copy(update={"text": texts(d.ref), "ref": None}) if d.ref else d
                for d in sample.documents
            ]
            sample = sample.model_copy(update={"documents": documents})
        yield sample
