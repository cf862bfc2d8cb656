"""Stages on disk that can be killed at any moment and give the same bytes when run again.

A stage is a folder of parts. A part is written under a temporary name and renamed, so that it is
there whole or not at all; what it holds depends on the recipe and on its own input alone, never on
which process made it or when. ``done.json`` closes a stage. Its key hashes everything the stage
depends on; a stage with another key is emptied and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from qwenlong.storage import read_jsonl, write_json


def key_of(*parts: Any) -> str:
    """A short hash of plain JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; a second run in it is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{folder} is in use by another run; wait for it or choose another --out"
            ) from None
        yield


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
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def run_jobs(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    on_done: Callable[[Any], None] = lambda result: None,
) -> None:
    """Call ``function`` for every job, in ``workers`` processes (1: in this one), a few in flight.

    Jobs are drawn lazily. The first exception cancels what has not started and is raised.
    """
    if workers <= 1:
        for job in jobs:
            on_done(function(job))
        return
    # spawn: a forked child would inherit threads' locks, and the parent may have started threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool:
        pending: set = set()
        try:
            for job in jobs:
                pending.add(pool.submit(function, job))
                if len(pending) >= 2 * workers:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        on_done(future.result())
            for future in pending:
                on_done(future.result())
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (killed, or out of memory); run the same command again to "
                "continue, with fewer --workers if memory is short"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
