"""Stages in order: hand-over, merge, samples of earlier stages, and a ladder that was killed."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qwenlong.config import MergeRecipe
from qwenlong.errors import InputError
from qwenlong.ladder import load_ladder, run_ladder
from qwenlong.merge import sce_merge
from qwenlong.run_setup import build_run
from qwenlong.stage_data import draw_earlier, measured_rewards, recorded_rewards
from qwenlong.types import Reward
from tests.qwenlong.train_runs import kill_after, make_model, start, tiny_recipe

LADDERS = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def short_ladder(tmp_path_factory):
    """The tiny ladder with one step a stage and few, short answers."""
    folder = tmp_path_factory.mktemp("ladder") / "recipes"
    shutil.copytree(LADDERS / "tiny-ladder", folder)
    for file in folder.glob("*.yaml"):
        text = file.read_text().replace("steps: 6", "steps: 1").replace("steps: 2", "steps: 1")
        text = text.replace("prompts: 8, group_size: 8", "prompts: 4, group_size: 6")
        text = text.replace("count: 8", "count: 2").replace(
            "measure_rollouts: 4", "measure_rollouts: 2"
        )
        text = text.replace("builtin:tiny", str(make_once(folder.parent)))
        file.write_text(text)
    return folder


def make_once(folder):
    return folder / "model" if (folder / "model").is_dir() else make_model(folder)


@pytest.fixture(scope="module")
def climbed(short_ladder):
    out = short_ladder.parent / "out"
    process = start(quiet_ladder, short_ladder, out, resume=False)
    process.join()
    assert process.exitcode == 0
    return out


def quiet_ladder(folder, out, *, resume, console):
    return run_ladder(folder, out, resume=resume, console=console)


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def test_stages_of_the_paper_and_their_lengths():
    stages = load_ladder(LADDERS / "qwenlong-l1.5")
    assert [s.name for s in stages] == [
        "1-short", "2-medium", "3-long", "4-memory", "5-merge", "6-final",
    ]  # fmt: skip
    sizes = [
        (s.data.max_prompt_tokens, s.rollout.max_new_tokens)
        for s in stages
        if not isinstance(s, MergeRecipe)
    ]
    assert sizes == [
        (20_000, 12_000), (60_000, 20_000), (120_000, 50_000), (128_000, 12_000), (120_000, 50_000),
    ]  # fmt: skip
    assert stages[3].rollout.agent.chunk_tokens == 32_000
    assert [s.start_from for s in stages if not isinstance(s, MergeRecipe)] == [
        None, "1-short", "2-medium", "3-long", "5-merge",
    ]  # fmt: skip


def test_every_stage_leaves_a_model_and_the_next_goes_on_from_it(climbed):
    names = sorted(p.name for p in climbed.iterdir())
    assert names == ["1-short", "2-medium", "3-long", "4-memory", "5-merge", "6-final"]
    for before, after in (("1-short", "2-medium"), ("3-long", "4-memory"), ("5-merge", "6-final")):
        recipe = json.loads((climbed / after / "recipe.json").read_text())
        assert recipe["model"]["path"] == str(climbed / before / "final")
        one, other = weights(climbed / before), weights(climbed / after)
        change = max(float((one[n] - other[n]).abs().max()) for n in one)
        assert 0 < change < 0.05  # one step of Adam at 1e-2 away, not another model
    turns = json.loads(
        (climbed / "4-memory/rollouts/step-00000001.jsonl").read_text().split("\n")[0]
    )
    assert len(turns["responses"]) >= 3  # updates of the memory, and the answer


def test_the_merge_is_sce_over_the_first_model(climbed, short_ladder):
    base = load_file(short_ladder.parent / "model" / "model.safetensors")
    experts = [weights(climbed / name) for name in ("3-long", "4-memory")]
    merged = weights(climbed / "5-merge")
    for name in base:
        expected = sce_merge(base[name], [e[name] for e in experts], select_topk=0.8)
        torch.testing.assert_close(merged[name], expected.tensor, rtol=0, atol=0)
    assert not (climbed / "5-merge" / "base").exists()


@pytest.mark.real
def test_a_killed_ladder_ends_with_the_same_model(climbed, short_ladder, tmp_path):
    rng, out = random.Random(0), tmp_path / "out"
    for _ in range(3):
        kill_after(start(quiet_ladder, short_ladder, out, resume=True), rng.uniform(0.5, 4.0))
    process = start(quiet_ladder, short_ladder, out, resume=True)
    process.join()
    assert process.exitcode == 0
    mine, theirs = weights(out / "6-final"), weights(climbed / "6-final")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_finished_ladder_is_not_begun_again(climbed, short_ladder):
    console = Console(file=io.StringIO())
    with pytest.raises(InputError, match="holds a ladder; add --resume"):
        run_ladder(short_ladder, climbed, resume=False, console=console)


MERGE = "name: m\nmodel: {path: 'builtin:tiny'}\nmerge: {experts: [1-short, 9-late]}\n"


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("0-a.yaml", "extends: common.yaml\nname: a\nstart_from: 1-short\n", "not come before"),
        ("7-a.yaml", "extends: common.yaml\nname: 1-short\n", "two stages named '1-short'"),
        ("5-x.yaml", MERGE, "stage '9-late' does not come before it"),
        ("7-b.yaml", "extends: common.yaml\nname: b\nstepz: 3\n", "did you mean 'steps'"),
    ],
)  # fmt: skip
def test_a_ladder_is_checked_before_it_runs(tmp_path, name, text, sentence):
    folder = tmp_path / "ladder"
    shutil.copytree(LADDERS / "tiny-ladder", folder)
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_ladder(folder)


def test_an_empty_folder_is_no_ladder(tmp_path):
    with pytest.raises(InputError, match="holds no stage"):
        load_ladder(tmp_path)


# --- samples of earlier stages -----------------------------------------------


def write_rollouts(stage, step, rows):
    folder = stage / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"sample_id": name, "reward": {"value": value, "source": source}})
        for name, value, source in rows
    ]
    (folder / f"step-{step:08d}.jsonl").write_text("\n".join(lines) + "\n")


def test_recorded_rewards_are_means_and_the_later_stage_counts(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_rollouts(one, 1, [("a", 1.0, "rule"), ("a", 0.0, "rule"), ("b", 1.0, "judge")])
    write_rollouts(one, 2, [("a", 0.5, "rule"), ("b", 0.0, "error"), ("c", 0.0, "error")])
    write_rollouts(two, 1, [("b", 0.25, "rule")])
    assert recorded_rewards([one]) == {"a": 0.5, "b": 1.0}
    assert recorded_rewards([one, two]) == {"a": 0.5, "b": 0.25}


def test_unsolved_samples_are_drawn_first_and_unknown_ones_never(tmp_path):
    run = build_run(tiny_recipe(make_model(tmp_path)), tmp_path / "run")
    samples = run.samples[:6]
    rewards = {s.id: (0.0 if i < 2 else 0.9) for i, s in enumerate(samples[:5])}
    assert draw_earlier(samples, rewards, 2, seed=0) == samples[:2]
    assert draw_earlier(samples, rewards, 100, seed=0) == samples[:5]


def test_a_sample_that_the_judge_left_open_has_no_difficulty(tmp_path, monkeypatch):
    run = build_run(tiny_recipe(make_model(tmp_path)), tmp_path / "run")
    samples, path = run.samples[:3], tmp_path / "difficulty.jsonl"

    def first_is_open(environment, part, rolled):
        source = {s.id: "error" if s.id == samples[0].id else "rule" for s in samples}
        rewards = [Reward(value=0.0, source=source[t.sample_id]) for t in rolled]
        return [t.model_copy(update={"reward": r}) for t, r in zip(rolled, rewards, strict=True)]

    monkeypatch.setattr("qwenlong.stage_data.with_rewards", first_is_open)
    known = {s.id: 0.0 for s in samples[1:]}
    for _ in range(2):  # the second time from the file
        assert measured_rewards(run.environment, "full", samples, 1, path, block=3) == known


def test_a_measurement_goes_on_where_it_was_left(tmp_path):
    run = build_run(tiny_recipe(make_model(tmp_path)), tmp_path / "run")
    samples, path = run.samples[:5], tmp_path / "difficulty.jsonl"

    def measure(samples, path):
        return measured_rewards(run.environment, "full", samples, 1, path, block=2)

    whole = measure(samples, tmp_path / "whole.jsonl")
    assert set(whole) == {s.id for s in samples}
    measure(samples[:3], path)  # a block and a half
    with open(path, "a") as file:
        file.write('{"id": "torn')
    calls = []
    generate = run.environment.rollouts.generate
    run.environment.rollouts.generate = lambda *a, **k: calls.append(len(a[0])) or generate(*a, **k)
    assert measure(samples, path) == whole
    assert calls == [2, 1]
