"""Files that survive a kill: written under a temporary name and renamed, or appended a whole line
at a time; and folders that one process at a time writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from qwenlong.errors import InputError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path``; rename it to ``path`` when the block ends, delete it
    if it raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write all rows or none; return how many."""
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """Rows of a JSON lines file, one at a time. A last line without its newline is a torn append:
    left out.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None


class JsonlAppender:
    """Append rows that survive a kill. Opening cuts a torn last line away, so that the next row
    starts a line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab+")
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        position = size
        while position > 0:
            step = min(position, 65_536)
            self._file.seek(position - step)
            block = self._file.read(step)
            newline = block.rfind(b"\n")
            if newline >= 0:
                position = position - step + newline + 1
                break
            position -= step
        if position != size:
            self._file.truncate(position)
        self._file.seek(0, os.SEEK_END)

    def append(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was appended survive a power cut as well as a kill."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> JsonlAppender:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


_held: set[IO[bytes]] = set()


def _leave_to_parent() -> None:
    """A forked child has its parent's open files, and would hold the locks after its parent."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keep ``folder`` for the block: made if there is none, and nobody else's until the end.

    An advisory ``flock`` on ``folder/.lock``, which says who holds it. The system frees it when the
    process ends, killed or not, so that a file that was left behind locks nobody out; children that
    it forked hold nothing. It does not nest: a second lock in the same process is refused as
    another process's is.

    Raises:
        InputError: another holds it (with its process), or the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / LOCK_NAME
    is_new = not folder.exists()
    if not is_new and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out takes a folder.")
    file = _locked_file(folder, path)
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        if not file.closed:  # as it is in a forked child
            with file:
                # not where the folder was renamed, and a new one has its name
                if _is_at(file, path):
                    path.unlink()
                    if is_new:
                        with contextlib.suppress(OSError):  # of a block that wrote something
                            folder.rmdir()


def _locked_file(folder: Path, path: Path) -> IO[bytes]:
    while True:
        is_there = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_there = True
            file = open(path, "ab+", buffering=0)
        except OSError as error:
            if is_there and not folder.exists():  # whoever had it removed it in between
                continue
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); choose another folder."
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            raise InputError(
                f"{folder} is in use by {holder}; wait for it or choose another folder."
            ) from None
        except OSError as error:
            file.close()
            raise InputError(
                f"{folder} is on a file system without locks ({error.strerror}); "
                "choose a folder on another one."
            ) from None
        if _is_at(file, path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode())
            return file
        file.close()  # the holder before took the file away: it locks nothing


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
