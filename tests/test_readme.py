"""What the README shows is run: its Python blocks, its make targets and its commands."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert len(PYTHON) >= 4


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.strip().splitlines()[0][:40])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_make_targets_exist():
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known, targets - known


def test_files_named_exist():
    for name in re.findall(r"\]\(((?:docs|examples|bench|recipes)/[^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_tables_are_those_of_the_results():
    command = ["python", "-m", "bench", "tables", "--check"]
    done = subprocess.run(
        [Path(__import__("sys").executable), *command[1:]],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
