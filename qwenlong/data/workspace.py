"""Stages on disk that can be killed at any moment and give the same bytes when run again.

A stage is a folder of parts. A part is written under a temporary name and renamed, so that it is
there whole or not at all; what it holds depends on the recipe and on its own input alone, never on
which process made it or when. ``done.json`` closes a stage. Its key hashes everything the stage
depends on; a stage with another key is emptied and made again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from qwenlong.errors import InputError
from qwenlong.storage import read_jsonl, write_json


def key_of(*parts: Any) -> str:
    """A short hash of plain JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Stage:
    """The folder of one stage of one run."""

    def __init__(self, work: Path, name: str, key: str):
        self.name, self.key = name, key
        self.folder = work / name
        self._done = self.folder / "done.json"
        self._key = self.folder / "key.json"

    @property
    def is_done(self) -> bool:
        return self._read(self._done) == self.key

    def open(self) -> None:
        """Make the folder ready: leave parts of the same key, remove anything else."""
        if self.folder.exists() and self._read(self._key) != self.key:
            shutil.rmtree(self.folder)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(self._key, {"key": self.key})
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

    def finish(self) -> None:
        write_json(self._done, {"key": self.key})

    def parts(self, suffix: str = ".jsonl") -> list[Path]:
        """Committed parts in order."""
        return sorted(p for p in self.folder.glob(f"part-*{suffix}") if p.stem.count(".") == 0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of all parts, in order."""
        for part in self.parts():
            yield from read_jsonl(part)

    @staticmethod
    def _read(path: Path) -> str | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError):
            return None


def _watch_parent(parent: int) -> None:
    """End a worker whose parent is gone: a killed run leaves no process behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent says when to stop
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


class Workers:
    """Processes that run jobs, started at the first use and kept until the ``with`` block ends."""

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable[Any],
        on_done: Callable[[Any], None] = lambda result: None,
    ) -> None:
        """Call ``function`` for every job, a few in flight; with one worker in this process.

        Jobs are drawn lazily. The first exception cancels what has not started and is raised.
        """
        if self.count <= 1:
            for job in jobs:
                on_done(function(job))
            return
        if self._pool is None:
            # spawn: a forked child would inherit the locks of threads that it does not have.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker, (os.getpid(),))
        pending: set = set()
        try:
            for job in jobs:
                pending.add(self._pool.submit(function, job))
                if len(pending) >= 2 * self.count:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        on_done(future.result())
            for future in pending:
                on_done(future.result())
        except BrokenProcessPool:
            raise InputError(
                "a worker process died (killed, or out of memory); run the same command again to "
                "continue, with fewer --workers if memory is short"
            ) from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
