"""Imports go one way: csrc <- qlkernels <- qwenlong <- bench, tests; and ops do not import ops."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {
    "qlkernels": {"qwenlong", "bench", "tests"},
    "qwenlong": {"bench", "tests"},
    "bench": {"tests"},
}
# compositions of several ops
COMPOSITIONS = {
    "attention",
    "hf",
    "linear_policy_loss",
    "logprob_entropy_with_grad",
    "moe",
    "router_replay",
    "scorer",
    "vocab_parallel",
}


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def source_files():
    return [p for package in ABOVE for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_up(path):
    package = path.relative_to(ROOT).parts[0]
    found = {name.split(".")[0] for name in imported(path)}
    assert not found & ABOVE[package]


def op_names():
    """Public files and packages of qlkernels: one op each."""
    for path in sorted((ROOT / "qlkernels").iterdir()):
        is_op = path.suffix == ".py" or (path / "__init__.py").exists()
        if is_op and not path.name.startswith(("_", ".")) and path.stem != "testing":
            yield path.stem


@pytest.mark.parametrize("op", list(op_names()))
def test_ops_do_not_import_each_other(op):
    if op in COMPOSITIONS:
        return
    base = ROOT / "qlkernels" / op
    files = base.rglob("*.py") if base.is_dir() else [base.with_suffix(".py")]
    others = {f"qlkernels.{other}" for other in op_names() if other != op}
    for path in files:
        assert not imported(path) & others, path


def test_only_the_bindings_know_python():
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        if path.name != "bindings.cpp":
            text = path.read_text()
            assert "pybind11" not in text and "Python.h" not in text, path
            assert "torch/" not in text and "ATen" not in text, path


@pytest.mark.parametrize("package", ["qlkernels", "qwenlong"])
def test_importing_starts_nothing(package):
    """No CUDA context, no compilation, and no other library is changed or even loaded."""
    code = (
        f"import sys, {package}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'transformers', 'trl', 'verl', 'deepspeed', 'liger_kernel', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_qlkernels_imports_without_triton_and_without_the_extension():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "sys.modules['qlkernels._C'] = None\n"
        "import torch, qlkernels\n"
        "logits, ids = torch.randn(3, 7), torch.tensor([1, 2, 3])\n"
        "qlkernels.logprob_entropy(logits, ids)\n"
        "for impl, words in (('triton', 'not installed'), ('cpu', 'not built'), ('cuda', '_C')):\n"
        "    try:\n"
        "        qlkernels.logprob_entropy(logits, ids, impl=impl)\n"
        "    except RuntimeError as error:\n"
        "        assert words in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(impl)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
