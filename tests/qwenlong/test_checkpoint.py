"""Killed, starved and misled runs: what was completed stays, and the bits are the same."""

import errno
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from qwenlong import checkpoint as checkpoint_module
from qwenlong.checkpoint import (
    checkpoint_folders,
    latest_checkpoint,
    random_states,
    restore_random_states,
)
from qwenlong.errors import InputError
from qwenlong.run_setup import build_run
from qwenlong.stage_data import TASK_MAKERS
from qwenlong.train import train
from qwenlong.train_command import run_stage
from tests.qwenlong.train_runs import (
    NoPicture,
    is_timing,
    kill_after,
    make_model,
    start,
    tiny_recipe,
    trace,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("qwenlong.train_command.Dashboard", NoPicture)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the runs of other processes: sums are split by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


AEPO = {"low": 4.1, "high": 4.2, "entropy_source": "scoring_pass"}  # both phases occur


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run of four steps: its recipe and its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    recipe = tiny_recipe(model, steps=4, aepo=AEPO)
    process = start(run_stage, recipe, out, resume=False)
    process.join()
    assert process.exitcode == 0
    return recipe, out


def trace_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def killed_run(recipe, out, seed, kills):
    """Kill and resume at random moments, then let it finish; returns how many were alive."""
    rng, hits = random.Random(seed), 0
    for kill in range(kills):
        process = start(run_stage, recipe, out, resume=True)
        # by progress and not by the clock: the first one always hits a living run
        steps = rng.randint(0, recipe.steps - 2 if kill == 0 else recipe.steps)
        hits += kill_after(process, rng.uniform(0.0, 0.15 if kill == 0 else 0.8), out, steps)
    process = start(run_stage, recipe, out, resume=True)
    process.join()
    assert process.exitcode == 0
    return hits


def assert_same(out, whole_out):
    mine, theirs = trace(out), trace(whole_out)
    for name in theirs:
        assert mine[name] == theirs[name], name


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_has_the_bits_of_an_uninterrupted_one(whole, tmp_path, seed):
    recipe, whole_out = whole
    assert killed_run(recipe, tmp_path / "run", seed, kills=2) > 0
    assert_same(tmp_path / "run", whole_out)


@pytest.mark.real
@pytest.mark.parametrize("seed", range(3, 23))
def test_twenty_killed_runs(whole, tmp_path, seed):
    recipe, whole_out = whole
    assert killed_run(recipe, tmp_path / "run", seed, kills=4) > 0
    assert_same(tmp_path / "run", whole_out)


def test_bounds_of_the_entropy_cross_both_phases(whole):
    drops = {row["aepo/drops_negatives"] for row in trace_rows(whole[1])}
    assert drops == {0.0, 1.0}


def run_here(recipe, out, *, resume=False):
    return run_stage(recipe, out, resume=resume, console=Console(file=io.StringIO()))


class FullDisk:
    """``engine.save_optimizer`` finds no room, until ``times`` calls have failed."""

    def __init__(self, times):
        self.times, self.calls = times, 0
        self.original = torch.save

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.original(*args, **kwargs)


def test_a_full_disk_loses_no_completed_step(whole, model, tmp_path, monkeypatch):
    recipe, whole_out = whole
    out = tmp_path / "run"
    two = recipe.model_copy(update={"steps": 2})
    run_here(two, out)
    disk = FullDisk(times=10**9)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.torch, "save", disk)
        with pytest.raises(InputError, match="is full: the checkpoint of step 3 .*--resume"):
            run_here(recipe, out, resume=True)
    assert disk.calls > 0
    assert [p.name for p in checkpoint_folders(out)] == ["step-00000002"]
    assert not list((out / "checkpoints").glob(".*"))
    run_here(recipe, out, resume=True)
    assert_same(out, whole_out)


def test_a_disk_that_gets_room_again_is_waited_for(whole, tmp_path, monkeypatch):
    recipe, whole_out = whole
    settings = recipe.checkpoint.model_copy(update={"disk_wait_s": 60.0})
    recipe = recipe.model_copy(update={"checkpoint": settings})
    monkeypatch.setattr(checkpoint_module.torch, "save", FullDisk(times=2))
    monkeypatch.setattr(checkpoint_module.time, "sleep", lambda seconds: None)
    run_here(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", whole_out)


def test_a_failing_step_saves_the_steps_before_it(whole, model, tmp_path, monkeypatch):
    recipe, whole_out = whole
    settings = recipe.checkpoint.model_copy(update={"every_steps": 100})
    recipe = recipe.model_copy(update={"checkpoint": settings})
    out = tmp_path / "run"
    run = build_run(recipe, out)
    generate, calls = run.environment.rollouts.generate, []

    def fails_in_step_4(*args, **kwargs):
        calls.append(1)
        torch.rand(3), random.random(), np.random.rand()  # what a plugin may have drawn
        if len(calls) == 4:
            raise OSError("the server is gone")
        return generate(*args, **kwargs)

    before = random_states()
    run.environment.rollouts.generate = fails_in_step_4
    with pytest.raises(OSError, match="the server is gone"):
        train(run, lambda step, metrics: None)
    assert [p.name for p in checkpoint_folders(out)] == ["step-00000003"]
    restore_random_states(before)

    def same(row):
        return {k: v for k, v in row.items() if not is_timing(k) and k != "step"}

    resumed, rows = build_run(recipe, out, resume=True), {}
    train(resumed, rows.__setitem__)
    expected = {row["step"]: same(row) for row in trace_rows(whole_out)}
    assert {step: same(row) for step, row in rows.items()} == {s: expected[s] for s in (4,)}


def test_random_states_round_trip():
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    random.gauss(0, 1), np.random.randn()  # both keep a second number back
    state = random_states()
    first = (torch.rand(2).tolist(), random.gauss(0, 1), np.random.randn())
    restore_random_states(state)
    assert (torch.rand(2).tolist(), random.gauss(0, 1), np.random.randn()) == first


def test_another_recipe_is_refused_and_free_settings_are_not(model, tmp_path):
    out = tmp_path / "run"
    run_here(tiny_recipe(model, steps=1), out)
    with pytest.raises(InputError, match="holds a run; add --resume"):
        run_here(tiny_recipe(model, steps=2), out)
    other = tiny_recipe(model, steps=2, optimizer={"learning_rate": 5e-3})
    with pytest.raises(InputError, match=r"optimizer.learning_rate was 0.01 and is 0.005"):
        run_here(other, out, resume=True)
    run_here(tiny_recipe(model, steps=2, checkpoint={"keep": 1}), out, resume=True)
    assert [p.name for p in checkpoint_folders(out)] == ["step-00000002"]


def test_other_samples_under_the_same_recipe_are_refused(model, tmp_path):
    out, plugin = tmp_path / "run", tmp_path / "notes.py"
    plugin.write_text(
        "from qwenlong.stage_data import register_task\n"
        "from qwenlong.types import Sample\n"
        "WORD = ['Hi']\n"
        "@register_task('notes')\n"
        "def notes(count, seed):\n"
        "    return [Sample(id=f'n{i}', task='notes', question=f'Say {WORD[0]} {i}.', documents=[],"
        " answers=['a'], answer_type='text', reward='cover') for i in range(count)]\n"
    )
    data = {"tasks": [{"name": "notes", "count": 8}]}
    recipe = tiny_recipe(model, steps=1, plugins=[str(plugin)], data=data)
    run_here(recipe, out)
    TASK_MAKERS["notes"].__globals__["WORD"][0] = "Yo"
    with pytest.raises(InputError, match="was trained on other samples"):
        run_here(recipe.model_copy(update={"steps": 2}), out, resume=True)


def test_the_last_n_are_kept(whole):
    names = [p.name for p in checkpoint_folders(whole[1])]
    assert names == ["step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    recipe, whole_out = whole
    out = tmp_path / "run"
    shutil.copytree(whole_out, out)
    newest = latest_checkpoint(out)
    with open(newest / "optimizer.pt", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="damaged: optimizer.pt"):
        latest_checkpoint(out)
    shutil.rmtree(newest)
    run_here(recipe, out, resume=True)  # the step after the one before is done again
    assert_same(out, whole_out)
