"""One process a folder: locks that say who holds them and end with their process."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenlong import cli, storage
from qwenlong.errors import InputError
from qwenlong.storage import LOCK_NAME, lock_folder

ROOT = Path(cli.__file__).parents[1]
HOLD = """
import sys, time
from qwenlong.storage import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of ``tmp_path/run``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_a_killed_one_frees_the_folder(holder, tmp_path):
    folder = tmp_path / "run"
    said = rf"^{re.escape(str(folder))} is in use by process {holder.pid} on .*; wait for it or "
    for _ in range(2):  # being refused frees nothing
        with pytest.raises(InputError, match=said), lock_folder(folder):
            pass
    holder.kill()
    holder.wait()
    assert (folder / LOCK_NAME).exists()  # left behind, and no obstacle
    with lock_folder(folder):
        assert f"process {os.getpid()} on" in (folder / LOCK_NAME).read_text()
    assert list(folder.iterdir()) == []


def test_of_many_processes_one_at_a_time_has_the_folder(tmp_path):
    """Each adds one to a number, slowly; a number that two read at once would be lost."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from qwenlong.errors import InputError\n"
        "from qwenlong.storage import lock_folder\n"
        "number, left = Path(sys.argv[1]).parent / 'number', 20\n"
        "while left:\n"
        "    try:\n"
        "        with lock_folder(sys.argv[1]):\n"
        "            before = int(number.read_text())\n"
        "            time.sleep(0.001)\n"
        "            number.write_text(str(before + 1))\n"
        "            left -= 1\n"
        "    except InputError:\n"
        "        time.sleep(0.0005)\n"
    )
    (tmp_path / "number").write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT)
        for _ in range(3)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "60"


def test_a_new_folder_goes_when_nothing_was_written(tmp_path):
    with lock_folder(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "mine").mkdir()
    with lock_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "rows").write_text("kept")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rows"]


def test_the_lock_of_a_folder_that_was_renamed_leaves_the_new_one_alone(tmp_path):
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "other")
        with lock_folder(tmp_path / "run"):
            pass
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK_NAME).write_text("of another")
    assert (tmp_path / "run" / LOCK_NAME).read_text() == "of another"
    assert (tmp_path / "other" / LOCK_NAME).exists()


def test_a_lock_that_its_holder_took_away_is_no_lock(tmp_path, monkeypatch):
    """The file is opened, the holder ends and removes it, and only then is it locked."""
    real, calls = storage.fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        real(file, how)

    monkeypatch.setattr(storage.fcntl, "flock", late)
    with lock_folder(tmp_path):
        assert len(calls) == 2
        with pytest.raises(InputError, match="in use"), lock_folder(tmp_path):
            pass


FORKS = """
import os, sys, time
from qwenlong.storage import lock_folder
with lock_folder(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_process(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on"):
            with lock_folder(folder):
                pass
        holder.kill()
        holder.wait()
        with lock_folder(folder):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_a_forked_child_that_leaves_the_block_frees_nothing(tmp_path):
    block = lock_folder(tmp_path / "run")
    with block:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                block.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "run" / LOCK_NAME).exists()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            with lock_folder(tmp_path / "run"):
                pass


@pytest.mark.parametrize("number, reason", [(errno.ENOSYS, "not"), (errno.ENOLCK, "locks")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number, reason):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with pytest.raises(InputError, match=f"without locks .*{reason}"), lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"), lock_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="cannot be written"), lock_folder("/proc/run"):
        pass


RECIPES = ROOT / "recipes"


@pytest.mark.parametrize("command", [
    ["score", "--model", "m", "--input", "i", "--out", "{run}"],
    ["score", "--model", "m", "--answers", "i", "--out", "{run}"],
    ["agent", "ask", "--input", "i", "--question", "q", "--model", "m", "--out", "{run}"],
    ["eval", "make", "--out", "{run}", "--text", "{texts}"],
    ["eval", "load", "{texts}/a.txt", "--out", "{run}", "--format", "longbench_v1"],
    ["eval", "run", "{set}", "--out", "{run}", "--model", "m"],
    ["eval", "score", "{set}", "{run}"],
    ["eval", "compare", "{one}", "{two}", "--out", "{run}"],
    ["synth", "run", str(RECIPES / "synth-demo.yaml"), "--out", "{run}"],
    ["train", str(RECIPES / "train-demo.yaml"), "--out", "{run}"],
    ["train", str(RECIPES / "tiny-ladder"), "--out", "{run}"],
    ["train-demo", "--recipe", str(RECIPES / "train-demo.yaml"), "--out", "{run}"],
], ids=lambda command: " ".join(word for word in command[:2] if "/" not in word))  # fmt: skip
def test_every_command_that_fills_a_folder_locks_it(command, tmp_path, capsys):
    names = {name: str(tmp_path / name) for name in ("run", "texts", "set", "one", "two")}
    for name in names.values():
        Path(name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text of some words.\n" * 500)
    (tmp_path / "set" / "samples.jsonl").write_text("")
    (tmp_path / "set" / "summary.json").write_text('{"tokenizer": "chars4"}')
    (tmp_path / "run" / "run.json").write_text("{}")
    row = '{"sample_id": "a", "mode": "full", "seed": 0, "response": "", "extracted": null, '
    row += '"score": 1.0, "scorer": "s", "tokens": {}, "truncated": false, "trace": null}\n'
    for name in ("one", "two"):
        (tmp_path / name / "results.jsonl").write_text(row)
    started = time.monotonic()
    with lock_folder(tmp_path / "run"), pytest.raises(SystemExit) as exit:
        cli.main([word.format(**names) for word in command])
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()}" in " ".join(said.split())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]
    assert time.monotonic() - started < 30  # before any work
