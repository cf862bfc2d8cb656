"""``qwenlong eval`` from the command line."""

import json

import pytest

from qwenlong import eval_command
from qwenlong.cli import main
from qwenlong.errors import InputError
from qwenlong.eval_command import parse_length
from qwenlong.storage import read_jsonl
from tests.qwenlong.evals.readers import PerfectReader
from tests.qwenlong.evals.test_formats import V2, write_lines
from tests.qwenlong.llm_server import serve


def run(*args):
    """The exit status of ``qwenlong eval ARGS``."""
    try:
        main(["eval", *map(str, args)])
    except SystemExit as exit:
        return exit.code or 0
    return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "data"
    tasks = "needle_single,variable_tracking"
    assert run("make", "--out", folder, "--tasks", tasks, "--lengths", "1K,2K", "--count", 2) == 0
    return folder


@pytest.mark.parametrize(
    "text, tokens",
    [("4096", 4096), ("4K", 4096), ("128k", 131072), ("1M", 1 << 20), (" 1.5K ", 1536)],
)
def test_lengths(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-4K", "4G", "0.3", "nan", "infM", "1e20"])
def test_what_is_no_length_is_one_sentence(text):
    with pytest.raises(InputError, match="is no length"):
        parse_length(text)


def test_make_says_what_it_made(data, capsys):
    summary = json.loads((data / "summary.json").read_text(encoding="utf-8"))
    assert summary["lengths"] == [1024, 2048] and summary["samples"] == 8
    assert summary["kinds"] == {"needle_single": 4, "variable_tracking": 4}


def test_a_server_is_asked_scored_drawn_and_not_asked_again(data, tmp_path, capsys):
    out = tmp_path / "run"
    with serve() as (server, url):
        arguments = ["run", data, "--out", out, "--model", "m", "--base-url", url]
        assert run(*arguments, "--max-tokens", 20, "--samples", 2) == 0
        assert len(server.bodies) == 16
        assert {body["seed"] for body in server.bodies} == {0, 1}
        assert run(*arguments, "--max-tokens", 20, "--samples", 2) == 0
        assert len(server.bodies) == 16
        capsys.readouterr()
        assert run(*arguments, "--max-tokens", 30) == 2
        assert "max_tokens (20, now 30)" in capsys.readouterr().err
    assert len(list(read_jsonl(out / "results.jsonl"))) == 16
    names = {"table.md", "table.csv", "plot.png", "summary.json", "run.json", "responses.jsonl"}
    assert names <= {path.name for path in out.iterdir()}
    assert "| needle_single | 1K | 2 | 4 |" in (out / "table.md").read_text(encoding="utf-8")


def test_a_dead_server_is_one_sentence_and_the_run_goes_on(data, tmp_path, capsys, monkeypatch):
    from qwenlong.llm import limits

    monkeypatch.setattr(limits.RetryPolicy, "delay", lambda *args: 0.0)
    arguments = ["run", data, "--out", tmp_path / "run", "--model", "m", "--max-tokens", 20]
    arguments += ["--concurrency", 1]
    with serve(["ok"] * 3 + [("status", 500, ())] * 500) as (server, url):
        assert run(*arguments, "--base-url", url) == 2
        error = capsys.readouterr().err
        assert "the model failed" in error and "run the same command again" in error
    with serve() as (server, url):
        assert run(*arguments, "--base-url", url) == 0
        assert len(server.bodies) == 5


@pytest.mark.parametrize("mode", ["full", "agent"])
def test_a_reader_that_knows_gets_everything_right(data, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(eval_command, "_open_client", lambda *args: PerfectReader([]))
    out = tmp_path / mode
    options = ["--mode", mode, "--tokenizer", "chars4", "--chunk-tokens", "512"]
    assert run("run", data, "--out", out, "--model", "m", *options) == 0
    assert {row["score"] for row in read_jsonl(out / "results.jsonl")} == {1.0}
    if mode == "agent":
        assert all(row["tokens"]["calls"] > 2 for row in read_jsonl(out / "results.jsonl"))


@pytest.mark.parametrize("mode", ["full", "agent"])
def test_a_model_in_this_process(tmp_path, mode, capsys):
    from qwenlong.models import load_tokenizer
    from tests.qwenlong.tiny_models import save_tiny_model

    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=4096)
    made = ["make", "--out", tmp_path / "data", "--tokenizer", folder, "--lengths", 2000]
    assert run(*made, "--count", 2) == 0
    options = ["--model", folder, "--max-tokens", 4, "--mode", mode, "--window", 1500]
    options += ["--chunk-tokens", 900, "--memory-tokens", 8, "--plan-tokens", 4, "--repairs", 0]
    asked = ["run", tmp_path / "data", "--out", tmp_path / "run", *options, "--device", "cpu"]
    assert run(*asked) == 2
    assert "no chat template" in capsys.readouterr().err
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert run(*asked) == 0
    rows = list(read_jsonl(tmp_path / "run" / "results.jsonl"))
    assert len(rows) == 2 and all(row["truncated"] == (mode == "full") for row in rows)
    calls = 1 if mode == "full" else 4  # three chunks and the answer
    assert [row["tokens"]["calls"] for row in rows] == [calls, calls]
    if mode == "full":
        assert all(1300 < row["tokens"]["prompt"] <= 1500 for row in rows)


def test_two_runs_are_compared(data, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_command, "_open_client", lambda *args: PerfectReader([]))
    options = ["--model", "m", "--tokenizer", "chars4"]
    assert run("run", data, "--out", tmp_path / "whole", *options) == 0
    window = ["--window", "800", "--max-tokens", "100", "--keep", "last"]
    assert run("run", data, "--out", tmp_path / "last", *options, *window) == 0
    out = tmp_path / "both"
    assert run("compare", tmp_path / "whole", tmp_path / "last", "--out", out) == 0
    table = (out / "comparison.md").read_text(encoding="utf-8")
    assert "| whole | last | difference |" in table and "both combined" in table
    assert (out / "comparison.png").stat().st_size > 5_000


def test_runs_of_one_name_are_two_runs_and_the_terminal_shortens_no_name(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(eval_command, "_open_client", lambda *args: PerfectReader([]))
    monkeypatch.setenv("COLUMNS", "40")
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        assert run("run", data, "--out", folder, "--model", "m", "--tokenizer", "chars4") == 0
        assert "| task | length | questions | samples | score |" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr("qwenlong.evals.report.draw", lambda runs, path: drawn.append(list(runs)))
    assert run("compare", *folders, "--out", tmp_path / "both") == 0
    assert drawn == [[str(folder) for folder in folders]]
    assert f"| {folders[0]} | {folders[1]} | difference |" in capsys.readouterr().out


def test_score_again_needs_no_model(data, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_command, "_open_client", lambda *args: PerfectReader([]))
    out = tmp_path / "run"
    assert run("run", data, "--out", out, "--model", "m", "--tokenizer", "chars4") == 0
    before = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").unlink()
    assert run("score", data, out) == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_a_public_file_is_loaded(tmp_path):
    path = write_lines(tmp_path / "v2.jsonl", [V2, V2 | {"_id": "b"}, V2 | {"_id": "c"}])
    out = tmp_path / "data"
    assert run("load", path, "--out", out, "--format", "longbench_v2", "--limit", 2) == 0
    assert [row["id"][-1] for row in read_jsonl(out / "samples.jsonl")] == ["5", "b"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["make", "--tasks", "nothing"], "unknown task 'nothing'"),
        (["make", "--lengths", "4G"], "is no length"),
        (["make", "--count", "0"], "at least one sample"),
        (["make", "--text", "/nowhere"], "/nowhere is not a folder"),
        (["make", "--tokenizer", "gpt"], "unknown tokenizer 'gpt'"),
        (["run", "DATA", "--model", "m", "--mode", "half"], "mode is 'half'"),
        (["run", "DATA", "--model", "m", "--concurrency", "0"], "--concurrency is 0"),
        (["run", "DATA", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["run", "/nowhere", "--model", "m"], "holds no samples.jsonl"),
    ],
)
def test_wrong_input_is_one_sentence(data, tmp_path, capsys, arguments, sentence):
    capsys.readouterr()
    arguments = [data if word == "DATA" else word for word in arguments]
    assert run(*arguments, "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and sentence in lines[0]


def test_a_judge_needs_both_names(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_command, "_open_client", lambda *args: PerfectReader([]))
    options = ["--model", "m", "--tokenizer", "chars4", "--judge-model", "j"]
    assert run("run", data, "--out", tmp_path / "run", *options) == 2
    assert "--judge-url and --judge-model" in capsys.readouterr().err
