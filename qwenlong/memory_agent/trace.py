"""The steps of a run on disk: written as each ends, read when it goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlong.errors import InputError
from qwenlong.memory_agent.machine import Step
from qwenlong.storage import JsonlAppender, read_jsonl

SCHEMA = 1


class TraceFile:
    """``trace.jsonl``: a first row that says what was asked, then one row per step.

    Rows survive a kill; a row torn by one is cut away when the file is opened again.

    Args:
        path: the file.
        job: plain JSON that identifies the run: text, questions, config, model.
        resume: go on with the steps that are there; without it there must be none.

    Raises:
        InputError: there are steps and ``resume`` is False, or they belong to another job.
    """

    def __init__(self, path: str | Path, job: Mapping[str, Any], *, resume: bool):
        path = Path(path)
        self.steps: dict[str, list[Step]] = {}
        rows = _rows(path)
        if rows and not resume:
            refuse_run(path)
        head = {"schema": SCHEMA, **job}
        if rows:
            _check_same(path, rows[0], head)
            for row in rows[1:]:
                question = row.pop("question")
                row.pop("seconds", None)
                self.steps.setdefault(question, []).append(Step.from_json(row))
        if not rows:
            path.unlink(missing_ok=True)
        self._file = JsonlAppender(path)
        if not rows:
            self._file.append(head)

    def append(self, question: str, step: Step, seconds: float) -> None:
        """Write a step of a question that took ``seconds``."""
        self.steps.setdefault(question, []).append(step)
        self._file.append({"question": question, "seconds": round(seconds, 3), **step.to_json()})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def refuse_run(path: str | Path) -> None:
    """Raise ``InputError`` if the file holds steps."""
    if _rows(Path(path)):
        raise InputError(f"{path} holds a run; use --resume to go on, or another --out.")


def _rows(path: Path) -> list[dict]:
    """The rows of a run; none where nothing was answered, so that it can begin differently."""
    if not path.exists() or not os.path.getsize(path):
        return []
    try:
        rows = list(read_jsonl(path))
    except ValueError as error:
        raise InputError(f"{error}; the trace is damaged, use another --out.") from error
    if rows and "schema" not in rows[0]:
        raise InputError(f"{path} is no trace of an agent; use another --out.")
    return rows if len(rows) > 1 else []


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differ = []
    for name in sorted({*found, *wanted}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differ += [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        elif a != b:
            differ.append(name)
    if differ:
        raise InputError(
            f"{path} was made with another {', '.join(differ)}; give the same, or another --out."
        )
