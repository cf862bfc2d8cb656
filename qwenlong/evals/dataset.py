"""Making an evaluation set: the generators by name, and a folder that holds what they made.

The folder is one that ``qwenlong.data.export.load_samples`` reads: ``samples.jsonl`` with refs,
``documents.jsonl`` with every text once, ``summary.json``. Samples are written as they are made, so
that a set of many 4M-token contexts needs no more memory than one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qwenlong.errors import InputError
from qwenlong.evals import counting, needles, questions, requests
from qwenlong.evals.haystack import Haystack
from qwenlong.storage import atomic_write, write_json
from qwenlong.types import Sample

Generator = Callable[..., Iterator[Sample]]  # (haystack, *, length, count, seed)

TASKS: dict[str, Generator] = {
    "needle_single": needles.needle_single,
    "needle_multikey": needles.needle_multikey,
    "needle_multivalue": needles.needle_multivalue,
    "needle_multiquery": needles.needle_multiquery,
    "variable_tracking": needles.variable_tracking,
    "common_words": counting.common_words,
    "frequent_words": counting.frequent_words,
    "repeated_requests": requests.repeated_requests,
    "multihop": questions.multihop,
    "tables": questions.tables,
}


def generate(
    haystack: Haystack, *, tasks: Sequence[str], lengths: Sequence[int], count: int, seed: int
) -> Iterator[Sample]:
    """``count`` samples of each task at each length (tokens), one at a time.

    The same arguments give the same samples; a sample does not depend on the other tasks and
    lengths.

    Raises:
        InputError: an unknown task, or a length that a task cannot fill.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}; choose of {', '.join(TASKS)}")
    if count < 1 or min(lengths, default=0) < 1:
        raise InputError("there must be at least one sample and one length of at least one token")
    for task in tasks:
        for length in lengths:
            yield from TASKS[task](haystack, length=length, count=count, seed=seed)


def write_dataset(
    folder: str | Path, samples: Iterable[Sample], *, about: dict | None = None
) -> dict:
    """Write ``samples`` into ``folder``; return the summary, which is written last.

    Args:
        about: how they were made; goes into the summary.

    Raises:
        InputError: two samples have one id, or there is none.
    """
    folder = Path(folder)
    ids: set[str] = set()
    kinds: Counter[str] = Counter()
    written: set[bytes] = set()
    n_tokens = 0
    with (
        atomic_write(folder / "samples.jsonl") as samples_file,
        atomic_write(folder / "documents.jsonl") as documents_file,
    ):
        for sample in samples:
            if sample.id in ids:
                raise InputError(f"two samples have the id {sample.id!r}")
            ids.add(sample.id)
            kinds[sample.subtype or sample.task] += 1
            n_tokens += sample.tokens.n if sample.tokens else 0
            documents = []
            for document in sample.documents:
                if document.text is not None:
                    digest = hashlib.sha256(document.text.encode())
                    if digest.digest() not in written:
                        written.add(digest.digest())
                        row = {"sha256": digest.hexdigest(), "text": document.text}
                        documents_file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    update = {"text": None, "ref": digest.hexdigest()}
                    document = document.model_copy(update=update)
                documents.append(document)
            row = sample.model_copy(update={"documents": documents}).to_json()
            samples_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not ids:
            raise InputError("there is no sample to write")
    summary = {
        **(about or {}),
        "samples": len(ids),
        "kinds": dict(sorted(kinds.items())),
        "tokens": n_tokens,
        "documents": len(written),
    }
    write_json(folder / "summary.json", summary)
    return summary
