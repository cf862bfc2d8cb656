"""Report and commands: what a person sees of a run."""

import json
import re
from pathlib import Path

import pytest
import toy_route
import yaml
from rich.console import Console
from test_pipeline import toy_recipe
from typer.testing import CliRunner

from qwenlong.data.commands import app
from qwenlong.data.export import load_samples
from qwenlong.data.pipeline import STAGES, run_pipeline
from qwenlong.data.report import draw_report, print_samples, print_summary, show_stage
from qwenlong.data.routes import ROUTES
from qwenlong.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    corpus = toy_route.write_corpus(folder / "pages", 120)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(toy_recipe(corpus).to_json()))
    result = CliRunner().invoke(
        app, ["run", str(recipe), "--out", str(folder / "out"), "--limit", "15", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    return recipe, folder / "out", result


def console():
    return Console(width=200, record=True, force_terminal=False)


def test_run_prints_counts_and_draws(run):
    _, out, result = run
    assert "15 of 15 composed" in result.output
    assert "collect:" in result.output
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(load_samples(out, with_text=False))) == 15


def test_seed_changes_the_samples(run, tmp_path):
    recipe, out, _ = run
    arguments = ["run", str(recipe), "--out", str(tmp_path), "--limit", "15", "--seed", "9"]
    assert CliRunner().invoke(app, [*arguments, "--workers", "1"]).exit_code == 0
    ids = {s.id for s in load_samples(tmp_path, with_text=False)}
    assert ids != {s.id for s in load_samples(out, with_text=False)}


def test_report_prints_samples_with_their_evidence(run):
    _, out, _ = run
    result = CliRunner().invoke(app, ["report", str(out), "--samples", "3"])
    assert result.exit_code == 0
    assert result.output.count("answer: ") == 3
    text = " ".join(result.output.split())
    sample = next(s for s in load_samples(out) if " ".join(s.question.split()) in text)
    assert sample.answers[0] in text
    assert "guards the code" in text


def test_summary_counts_add_up(run):
    _, out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    assert sum(summary["tasks"].values()) == summary["samples"]["exported"] == 15
    assert sum(summary["splits"].values()) == 15
    for counts in summary["filters"].values():
        assert sum(counts.values()) == 15
    samples = list(load_samples(out, with_text=False))
    assert summary["tokens"]["total"] == sum(s.tokens.n for s in samples)
    shown = console()
    print_summary(shown, summary)
    assert "multi-hop: " in shown.export_text()


def test_show_prints_rows_of_a_stage(run):
    _, out, _ = run
    shown = console()
    show_stage(shown, out, "compose", 1)
    text = shown.export_text()
    assert "done" in text and "derivation" in text
    result = CliRunner().invoke(app, ["show", "collect", "--out", str(out), "--count", "2"])
    assert result.output.count('"n_tokens"') == 2
    with pytest.raises(InputError, match=r"has no stage 'colect'; it has \['collect'"):
        show_stage(console(), out, "colect", 1)


def test_wrong_use_is_one_sentence(run, tmp_path):
    recipe, _, _ = run

    def error(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        assert isinstance(result.exception, InputError), result.output
        return str(result.exception)

    assert "no summary.json" in error("report", str(tmp_path))
    assert "--limit is 0" in error("run", str(recipe), "--out", str(tmp_path), "--limit", "0")
    assert "does not exist" in error("run", str(tmp_path / "no.yaml"), "--out", str(tmp_path))
    assert "Is a directory" in error("run", str(tmp_path), "--out", str(tmp_path / "out"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in error("run", str(tmp_path / "binary.yaml"), "--out", str(tmp_path))
    assert "--out takes a folder" in error("run", str(recipe), "--out", str(recipe))
    assert "--workers is -1" in error("run", str(recipe), "--out", str(tmp_path), "--workers", "-1")
    assert "holds no run" in error("show", "collect", "--out", str(tmp_path))
    (tmp_path / "summary.json").write_text("{")
    assert "is damaged" in error("report", str(tmp_path))


def test_the_page_says_what_is_there(run, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "synthesis.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "synth-demo").symlink_to(run[1])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "synthesis.md", "exec"), names)
    assert names["messages"][0]["content"].startswith("Read the documents")
    for stage in STAGES:
        assert f"| {stage} |" in page
    for name in names["sample"].to_json()["filters"]:
        assert f"| `{name}` |" in page
    for route in ROUTES:
        assert f"`{route}`" in page
    for path in re.findall(r"(?:recipes|scripts|docs|qwenlong|tests)/[\w./-]+\.\w+", page):
        assert (ROOT / path).exists(), path


def test_a_run_without_samples_is_drawn(tmp_path):
    pages = toy_route.write_corpus(tmp_path / "pages", 2)
    summary = run_pipeline(toy_recipe(pages), tmp_path / "out")
    assert draw_report(tmp_path / "out", summary).stat().st_size > 10_000
    shown = console()
    print_summary(shown, summary)
    print_samples(shown, tmp_path / "out", 3)
    assert "samples: 0 of 0 composed" in shown.export_text()
