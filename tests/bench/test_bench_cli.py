"""The command line as a user types it, in this process."""

import json

import pytest
import torch

from bench import __main__ as cli
from bench import profile, registry
from bench.gate import Comparison
from bench.registry import Problem
from bench.results import append_rows


def invoke(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(cli.sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(registry, "OPS", {})

    points = [{"case": "fwd", "dtype": "fp32", "T": 3}]

    @registry.register("tiny", cuda=points, cpu=points)
    def _tiny(device, case, dtype, T):
        x = torch.ones(T)

        def check(outputs, strict, complete):
            found = Comparison("y")
            found.add(outputs["y"], x.double().exp())
            return found.relative

        return Problem({"ours-torch": lambda: {"y": x.exp()}}, check, 8 * T, 0)


def test_list_names_ops_shapes_and_absent_peers(monkeypatch, capsys):
    assert invoke(monkeypatch, "--list", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "T=256;V=151936;data=peaked" in out
    assert "logprob_entropy on cpu: ours-cpu, ours-torch" in out
    assert "eager (same)" in out
    assert "absent verl" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["moo"], "unknown op 'moo'"),
        (
            ["policy_loss", "--device", "cpu", "--case", "x*"],
            "policy_loss has no case on cpu that matches x*",
        ),
        (["--device", "tpu"], "'tpu' is not one of"),
    ],
)
def test_a_wrong_argument_is_one_sentence(monkeypatch, capsys, arguments, message):
    assert invoke(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    assert invoke(monkeypatch, "--device", "cuda") == 2
    assert capsys.readouterr().err == "--device cuda: torch sees no CUDA device here\n"


def test_a_results_file_of_another_format_stops_before_any_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    assert invoke(monkeypatch, "policy_loss", "--out", str(tmp_path / "x.csv")) == 2
    assert "not the header" in capsys.readouterr().err
    assert invoke(monkeypatch, "policy_loss", "--out", str(tmp_path)) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_plot_and_tables(monkeypatch, capsys, tmp_path):
    folder = str(tmp_path)
    assert invoke(monkeypatch, "plot", "--folder", folder) == 2
    assert "holds no rows to draw" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("<!-- bench:tiny -->\n<!-- /bench -->\n")
    tables = ["tables", "--root", folder, "--folder", folder]
    assert invoke(monkeypatch, *tables, "--check") == 1
    assert "README.md is stale" in capsys.readouterr().out
    assert invoke(monkeypatch, *tables) == 0
    assert invoke(monkeypatch, *tables, "--check") == 0


def test_torch_profile_writes_a_trace(monkeypatch, capsys, tmp_path, tiny):
    command = ["tiny", "--device", "cpu", "--profile", "torch", "--out", str(tmp_path)]
    assert invoke(monkeypatch, *command) == 0
    (trace,) = tmp_path.glob("*.json")
    assert trace.name == "tiny-fwd-T3-fp32-ours-torch.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"bench.tiny.fwd.ours-torch", "aten::exp"} <= names
    assert "aten::exp" in capsys.readouterr().out


def test_torch_profile_of_nothing(monkeypatch, capsys, tmp_path, tiny):
    command = ["tiny", "--device", "cpu", "--profile", "torch", "--impl", "moo"]
    assert invoke(monkeypatch, *command, "--out", str(tmp_path)) == 2
    assert "nothing was profiled" in capsys.readouterr().err


def test_ncu_needs_a_gpu(monkeypatch, capsys, tiny):
    assert invoke(monkeypatch, "tiny", "--device", "cpu", "--profile", "ncu") == 2
    assert "needs a GPU and --device cuda" in capsys.readouterr().err


def test_ncu_missing_is_said(monkeypatch, capsys, tmp_path, tiny):
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    command = ["tiny", "--device", "cuda", "--profile", "ncu", "--out", str(tmp_path / "r")]
    assert invoke(monkeypatch, *command) == 2
    assert "--profile ncu needs Nsight Compute" in capsys.readouterr().out


def test_ncu_runs_this_command_inside_the_range(monkeypatch, tmp_path, tiny):
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile.shutil, "which", lambda name: "/opt/ncu")
    monkeypatch.setattr(profile.subprocess, "run", lambda c: ran.append(c) or Done())
    command = ["tiny", "--device", "cuda", "--case", "fwd", "--impl", "ours-*", "--profile", "ncu"]
    assert invoke(monkeypatch, *command, "--out", str(tmp_path / "r")) == 0
    (line,) = ran
    inner = line[line.index("bench") + 1 :]
    assert line[0] == "/opt/ncu" and profile.NVTX_RANGE in " ".join(line)
    assert inner == [
        "tiny", "--device", "cuda", "--profile", "ncu", "--in-range", "--case", "fwd",
        "--impl", "ours-*",
    ]  # fmt: skip


def test_a_header_only_file_has_nothing_to_draw(monkeypatch, tmp_path):
    append_rows(tmp_path / "x.csv", [])
    assert invoke(monkeypatch, "plot", "--folder", str(tmp_path)) == 2
