"""Answers on disk, by content: append-only, safe to kill, shared by processes.

A directory of JSON lines files. Every writer appends to a file of its own, whole lines at a time,
and reads all files that were there when it opened; so no two processes write to one file, and a
line torn by a kill is the last of its file and is left out.
"""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import IO, Any

_LINE = re.compile(rb'\{"key": "([0-9a-f]{64})", "value": .*\}\n\Z', re.DOTALL)


class CallCache:
    """Rows by key (64 hex digits). Holds 32 bytes and an offset a row in memory, not the rows."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._paths: list[Path] = []
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (file, offset)
        self._writer: IO[bytes] | None = None
        self._writer_pid = 0
        for path in sorted(self.directory.glob("calls-*.jsonl")):
            self._scan(path)

    def _scan(self, path: Path) -> None:
        number = len(self._paths)
        self._paths.append(path)
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                whole = _LINE.match(line)
                if whole:
                    self._index[bytes.fromhex(whole.group(1).decode())] = (number, offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._index

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of ``key``, or None."""
        with self._lock:
            place = self._index.get(bytes.fromhex(key))
        if place is None:
            return None
        with open(self._paths[place[0]], "rb") as file:
            file.seek(place[1])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError:  # damaged on disk: as if it had never been answered
            return None
        return row["value"] if row["key"] == key else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Append a row. It survives a kill of the process from here on."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            # A fork shares the file position with its parent: it must write elsewhere.
            if self._writer is None or self._writer_pid != os.getpid():
                self._open_writer()
            offset = self._writer.tell()
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._writer.write(rest) :]
            except OSError:
                # A full disk may have taken half a line. Later rows go to a new file.
                self._writer.close()
                self._writer = None
                raise
            self._index[bytes.fromhex(key)] = (len(self._paths) - 1, offset)

    def _open_writer(self) -> None:
        number = len(self._paths)
        while True:
            path = self.directory / f"calls-{number:05d}.jsonl"
            try:
                self._writer = open(path, "xb", buffering=0)
                break
            except FileExistsError:
                number += 1
        self._writer_pid = os.getpid()
        self._paths.append(path)

    def close(self) -> None:
        with self._lock:
            if self._writer is not None and self._writer_pid == os.getpid():
                os.fsync(self._writer.fileno())
                self._writer.close()
            self._writer = None
