"""The comparison of AEPO and GRPO, with a model of twenty thousand weights in place of SmolLM2."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import aepo_curves
from bench.aepo_curves import RECIPE, arm_recipe, bounds_of, main, run_arms
from bench.aepo_curves_page import main as redraw
from bench.aepo_curves_page import page
from qwenlong import train_plot
from qwenlong.config import Recipe, load_recipe
from qwenlong.errors import InputError
from qwenlong.storage import read_jsonl
from tests.qwenlong.train_runs import tiny_needle_recipe

DOCS = Path(__file__).parents[2] / "docs"
QUIET = Console(quiet=True)
SMALL = {"name": "small-curves", "steps": 3, "optimizer": {"learning_rate": 1e-3}}


def small(**changes) -> Recipe:
    return tiny_needle_recipe(**{**SMALL, **changes})


def by_arm(rows):
    return {(row["arm"], row["seed"]): row for row in rows if row["kind"] == "run"}


def test_bounds_are_the_quantiles():
    # Seven values in order: 1/3 of the way is place 2, 2/3 is place 4.
    assert bounds_of([3.0, 0.1, 0.5, 2.0, 0.2, 1.0, 4.0]) == (0.5, 2.0)
    assert bounds_of([1.0, 2.0]) == (1.333, 1.667)  # interpolated, to 0.001
    assert bounds_of([0.7]) == (0.7, 0.7)


def test_arms_differ_in_advantages_and_aepo_alone():
    base = small()
    arms = [arm_recipe(base, arm, 4, None).model_dump() for arm in ("grpo", "task")]
    aepo = arm_recipe(base, "task+aepo", 4, (0.2, 0.5)).model_dump()
    assert [arm["loss"].pop("advantage") for arm in (*arms, aepo)] == ["group", "task", "task"]
    assert aepo.pop("aepo")["low"] == 0.2 and [arm.pop("aepo") for arm in arms] == [None, None]
    assert [x.pop("name") for x in (*arms, aepo)] == ["grpo-4", "task-4", "task-aepo-4"]
    assert arms[0] == arms[1] == aepo
    plain = base.model_dump()
    del plain["name"], plain["aepo"], plain["loss"]["advantage"]
    assert {**aepo, "seed": 0} == plain


@pytest.fixture(scope="module", autouse=True)
def _no_dashboards():
    """Pictures of single runs take as long as the runs, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_plot, "draw_dashboard", lambda metrics_path, out_png: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the rows of a command that nothing stopped; bits, so one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("curves")
    yield out, run_arms(small(), out, [1], 3, console=QUIET)
    torch.set_num_threads(threads)


def test_the_rows(finished):
    out, (setup, *runs) = finished
    found = by_arm(runs)
    assert list(found) == [("calibration", 0), ("grpo", 1), ("task", 1), ("task+aepo", 1)]
    calibration = found["calibration", 0]
    metrics = [row["entropy"] for row in read_jsonl(out / "task-0" / "metrics.jsonl")]
    assert calibration["entropy"] == [round(value, 5) for value in metrics]
    # Three steps: 2/3 of the way from the lowest to the middle one, and the same above it.
    low, middle, high = sorted(calibration["entropy"])
    assert setup["low"] == pytest.approx(low + 2 / 3 * (middle - low), abs=6e-4)
    assert setup["high"] == pytest.approx(middle + (high - middle) / 3, abs=6e-4)
    aepo = json.loads((out / "task-aepo-1" / "recipe.json").read_text())["aepo"]
    assert (aepo["low"], aepo["high"]) == (setup["low"], setup["high"])
    for run in runs:
        assert len(run["entropy"]) == len(run["drops"]) == 3
        assert sorted(run["reward"]) == ["needle", "reading_qa"]
    # AEPO's first step is decided on nothing: it is the step of the arm without it.
    assert found["task+aepo", 1]["entropy"][0] == found["task", 1]["entropy"][0]
    assert found["task+aepo", 1]["drops"][0] == 0
    for task, passages in setup["held_out"].items():
        assert len(passages) == 3 and all(len(rewards) == 2 for rewards in passages.values())
        assert passages.keys() == found["grpo", 1]["held_out"][task].keys()


def test_arms_of_a_seed_see_the_same_prompts(finished):
    out, _ = finished
    seen = {}
    for run in ("grpo-1", "task-1", "task-aepo-1", "task-0"):
        files = sorted((out / run / "rollouts").glob("step-*.jsonl"))
        seen[run] = [[row["sample_id"] for row in read_jsonl(file)] for file in files]
    assert seen["grpo-1"] == seen["task-1"] == seen["task-aepo-1"] != seen["task-0"]


def test_a_stopped_command_goes_on_and_finished_runs_stay(finished, tmp_path, monkeypatch):
    whole, rows = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "grpo-1")
    trained = []
    run_stage = aepo_curves.run_stage

    def stopped_once(recipe, folder, **options):
        """After two of three steps, with what Ctrl-C leaves."""
        trained.append(recipe.name)
        if len(trained) > 1:
            return run_stage(recipe, folder, **options)
        run_stage(recipe.model_copy(update={"steps": 2}), folder, **options)
        raise InputError("stopped in step 3")

    monkeypatch.setattr(aepo_curves, "run_stage", stopped_once)
    with pytest.raises(InputError, match="stopped in step 3"):
        run_arms(small(), tmp_path, [1], 3, console=QUIET)
    assert len(list(read_jsonl(tmp_path / "grpo-1" / "metrics.jsonl"))) == 2
    again = run_arms(small(), tmp_path, [1], 3, console=QUIET)
    assert _timeless(again) == _timeless(rows)
    assert run_arms(small(), tmp_path, [1], 3, console=QUIET) == again
    assert trained == ["grpo-1", "grpo-1"]

    # Runs of other settings are not mixed in, nor are answers that belong to none.
    def refused(recipe, folder, **options):
        raise InputError("the model cannot be trained")

    monkeypatch.setattr(aepo_curves, "run_stage", refused)
    with pytest.raises(InputError, match="cannot be trained"):
        run_arms(small(), tmp_path / "new", [1], 3, console=QUIET)
    assert not list(tmp_path.glob("new/*.jsonl"))
    other = small(optimizer={"learning_rate": 2e-3})
    with pytest.raises(InputError, match="optimizer.learning_rate"):
        run_arms(other, tmp_path, [1], 3, console=QUIET)


def _timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_command_writes_curves_picture_and_page(finished, tmp_path, capsys):
    out, rows = finished
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small().model_dump_json())  # JSON is YAML
    main(recipe=recipe, out=out, seeds="1", passages=3, results=tmp_path)
    written = tmp_path / "aepo-curves.jsonl"
    assert list(read_jsonl(written)) == rows
    assert (tmp_path / "aepo-curves.png").stat().st_size > 20_000
    text = (tmp_path / "aepo-curves.md").read_text()
    assert text == page(rows)
    assert f"{rows[0]['low']} and {rows[0]['high']} nats" in text
    other = written.rename(tmp_path / "other.jsonl")
    redraw(str(other))
    assert other.with_suffix(".md").read_text() == text.replace("(aepo-curves.png)", "(other.png)")
    assert other.with_suffix(".png").stat().st_size > 20_000
    with pytest.raises(InputError, match="whole numbers"):
        main(recipe=recipe, out=out, seeds="one", passages=3)


def _made(arm, seed, reward, drops, entropy=(1.0, 1.0, 1.0, 0.5, 0.5)):
    held = {task: {f"p{i}": [reward] for i in range(40)} for task in ("needle", "reading_qa")}
    return {
        "kind": "run", "arm": arm, "seed": seed, "entropy": list(entropy), "drops": drops,
        "reward": {t: [0.1, None, 0.3, 0.5, 0.7] for t in held}, "held_out": held,
    }  # fmt: skip


def test_what_the_page_says_follows_from_the_numbers():
    setup = {
        "kind": "setup", "recipe": "r", "model": "m", "device": "d", "steps": 5, "prompts": 4,
        "group_size": 8, "temperature": 1.0, "learning_rate": 1e-5, "seeds": [1],
        "calibration_seed": 0, "quantiles": [0.25, 0.75], "low": 0.6, "high": 0.9,
        "held_out": _made("", 0, 0.0, [])["held_out"],
    }  # fmt: skip
    runs = [
        _made("calibration", 0, 0.0, [0] * 5),
        _made("grpo", 1, 0.5, [0] * 5),
        _made("task", 1, 0.5, [0] * 5),
        _made("task+aepo", 1, 1.0, [0, 1, 1, 1, 0]),
    ]
    text = " ".join(page([setup, *runs]).split())
    assert "all arms learn" in text and "rises by 0.50 to 1.00" in text
    assert "of both kinds, with and without negative advantages, in 1 of 1 seeds" in text
    assert "`task+aepo` against `grpo`: +0.500, better." in text
    assert "`task` against `grpo`: +0.000, no difference that these questions can show." in text
    # Over all steps the mean of those that had the task, and over the last four.
    assert re.search(
        r"\| task\+aepo \| 0\.400 \| 0\.500 \| 0\.400 \| 0\.500 \| 0\.750 \| 3 \|", text
    )

    idle = [_made("grpo", 1, 0.0, [0] * 5), *runs[2:3], _made("task+aepo", 1, 0.0, [0] * 5)]
    text = " ".join(page([setup, runs[0], *idle]).split())
    assert "not clearly under grpo, task+aepo." in text and "in 0 of 1 seeds" in text
    assert "`task+aepo` against `task`: -0.500, worse." in text


def test_what_is_refused(tmp_path):
    for seeds in ([], [1, 1], [0, 1]):
        with pytest.raises(InputError, match="seeds are"):
            run_arms(small(), tmp_path, seeds, 3, console=QUIET)
    with pytest.raises(InputError, match="section aepo"):
        run_arms(small(aepo={"low": 0.1, "high": 0.2}), tmp_path, [1], 3, console=QUIET)
    one = small().model_dump()["data"]
    one["tasks"][0]["options"]["forms"] = ["value"]
    with pytest.raises(InputError, match="all samples are of the task reading_qa"):
        run_arms(small(data=one), tmp_path, [1], 3, console=QUIET)
    with pytest.raises(InputError, match="batch.prompts is 1, and there are 2 tasks"):
        run_arms(small(batch={"prompts": 1}), tmp_path, [1], 3, console=QUIET)
    with pytest.raises(InputError, match="--passages is 0"):
        run_arms(small(), tmp_path, [1], 0, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_the_committed_recipe():
    """Two task types of two prompts each: with one, the task's std would be the group's."""
    recipe = load_recipe(RECIPE)
    assert recipe.data.tasks[0].options["forms"] == ["value", "sentence"]
    assert recipe.batch.prompts >= 4 and recipe.aepo is None


def test_the_committed_page_and_bounds_follow_from_the_committed_curves():
    rows = list(read_jsonl(DOCS / "aepo-curves.jsonl"))
    assert (DOCS / "aepo-curves.md").read_text() == page(rows)
    setup, calibration = rows[:2]
    assert bounds_of(calibration["entropy"]) == (setup["low"], setup["high"])
    arms = {(row["arm"], row["seed"]): row["drops"] for row in rows[2:]}
    assert list(arms) == [(arm, s) for s in setup["seeds"] for arm in ("grpo", "task", "task+aepo")]
    for (arm, _), drops in arms.items():
        assert set(drops) == ({0, 1} if arm == "task+aepo" else {0})
