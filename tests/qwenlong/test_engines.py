"""Sharded engines on two CPU processes against one process with everything."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenlong.errors import InputError
from qwenlong.run_setup import build_run
from tests.qwenlong.train_runs import make_model, tiny_recipe

ROOT = Path(__file__).parents[2]
# Answers differ in length, and so do the ranks in the number of their micro-batches.
BATCH = {"prompts": 6, "group_size": 3, "micro_batch_tokens": 40}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def run_ranks(recipe, folder, processes, *, resume=False):
    """Weights, rollout weights and metrics of a run of ``engine_worker``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    arguments = [folder / "recipe.json", folder / "run", folder / "result.pt"]
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "tests.qwenlong.engine_worker", *map(str, arguments)]
    command += ["resume"] if resume else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return torch.load(folder / "result.pt", weights_only=True)


def recipe_of(model, **changes):
    return tiny_recipe(
        model,
        batch=BATCH,
        steps=changes.pop("steps", 3),
        aepo={"low": 4.0, "high": 4.2, "entropy_source": "scoring_pass"},
        optimizer={"learning_rate": 1e-3},
        **changes,
    )


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    return run_ranks(recipe_of(model), tmp_path_factory.mktemp("one"), 0)


def assert_equal_runs(found, one):
    for step, expected in one["rows"].items():
        for name in ("loss", "entropy", "grad_norm", "reward", "aepo/kept_fraction"):
            assert found["rows"][step][name] == pytest.approx(expected[name], abs=1e-5), (
                step,
                name,
            )
    for kind in ("weights", "rollout"):
        for name, expected in one[kind].items():
            if name in found[kind]:  # a tied weight may have one name
                torch.testing.assert_close(found[kind][name], expected, rtol=0, atol=1e-5)
    missing = set(one["weights"]) - set(found["weights"])
    assert missing <= {"lm_head.weight"}


def run_halves(recipe, folder):
    """One step, and the rest in new processes."""
    run_ranks(recipe.model_copy(update={"steps": 1}), folder, 2)
    return run_ranks(recipe, folder, 2, resume=True)


def test_fsdp2_equals_one_process(model, one, tmp_path):
    assert_equal_runs(run_ranks(recipe_of(model, engine={"kind": "fsdp2"}), tmp_path, 2), one)


@pytest.mark.real
def test_fsdp2_resumes_with_the_same_bits(model, tmp_path):
    recipe = recipe_of(model, engine={"kind": "fsdp2"})
    whole = run_ranks(recipe, tmp_path / "whole", 2)
    resumed = run_halves(recipe, tmp_path / "halves")
    assert all(torch.equal(v, whole["weights"][n]) for n, v in resumed["weights"].items())


@pytest.mark.real
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_equals_one_process_and_resumes(model, one, tmp_path, stage):
    recipe = recipe_of(model, engine={"kind": "deepspeed", "zero_stage": stage})
    whole = run_ranks(recipe, tmp_path / "whole", 2)
    assert_equal_runs(whole, one)
    resumed = run_halves(recipe, tmp_path / "halves")
    for name, value in resumed["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-6)


def test_an_engine_without_its_processes_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="runs under torchrun"):
        build_run(tiny_recipe(model, engine={"kind": "fsdp2"}), tmp_path / "run")
