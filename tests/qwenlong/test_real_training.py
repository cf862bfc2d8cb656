"""``qwenlong train`` through a real vLLM on the CPU: every step samples from the trainer's weights,
and neither a killed trainer nor a killed server loses a completed step.

Log-probs of fixed tokens, at temperature 1, are the server's witness of the weights that it has;
they agree with the trainer's to 2e-3 nats, and one update moves them by more than ten times that.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from qwenlong.checkpoint import checkpoint_folders
from qwenlong.errors import InputError
from qwenlong.llm import RetryPolicy
from qwenlong.metrics import METRICS_FILE, read_metrics
from qwenlong.rollout.vllm import VllmRollouts
from qwenlong.train_command import run_stage
from tests.qwenlong.test_engines import save_moe
from tests.qwenlong.test_real_rollouts import ROOT, PolicyServer, make_model
from tests.qwenlong.train_runs import NoPicture, kill_after, start, tiny_recipe

pytestmark = pytest.mark.real

FIXED = [5, 9, 30, 12, 7, 33, 18, 4]
TOLERANCE = 2e-3  # nats, of two programs in fp32


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("qwenlong.train_command.Dashboard", NoPicture)
    monkeypatch.setattr(
        "qwenlong.rollout.vllm.RetryPolicy", lambda: RetryPolicy(max_retries=2, base=0.1)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    make_model(folder, 0)
    return folder


@contextlib.contextmanager
def serving(model: Path, folder: Path) -> Iterator[PolicyServer]:
    python = os.environ.get("QL_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "QL_VLLM_PYTHON is not set: make an environment with scripts/vllm_cpu_env.sh FOLDER "
            "and set it to FOLDER/bin/python"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        made = PolicyServer(str(Path(python).absolute()), model, folder)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("server")) as made:
        yield made


def recipe_of(model, server, tmp_path, *, max_new_tokens=24, **changes):
    vllm = {
        "base_url": server.root,
        "model": "smol",
        "weights_folder": str(tmp_path / "weights"),
        "timeout_s": 300.0,
    }
    rollout = {"backend": "vllm", "vllm": vllm, "max_new_tokens": max_new_tokens}
    return tiny_recipe(
        model, steps=3, rollout=rollout, optimizer={"learning_rate": 5e-3}, **changes
    )


def run_here(recipe, out, *, resume=False):
    return run_stage(recipe, out, resume=resume, console=Console(file=io.StringIO()))


def ask(server, path, body=None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.root + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def version_of(server) -> str:
    return ask(server, "/weight_info").get("weight_version") or ""


def of_server(server) -> torch.Tensor:
    """Log-probs ``[7]`` of the fixed tokens after the first."""
    body = {"model": "smol", "prompt": FIXED, "max_tokens": 1, "prompt_logprobs": 0}
    reply = ask(server, "/v1/completions", {**body, "temperature": 1.0})
    found = reply["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor(
        [entry[str(token)]["logprob"] for token, entry in zip(FIXED[1:], found, strict=True)]
    )


@torch.no_grad()
def of_model(model) -> torch.Tensor:
    ids = torch.tensor([FIXED])
    logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


def record(server, monkeypatch) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(step, of the trainer, of the server)`` of every update in this process."""
    found, original = [], VllmRollouts.sync_weights

    def recording(self, model, policy_step):
        original(self, model, policy_step)
        was_training = model.training
        found.append((policy_step, of_model(model.eval()), of_server(server)))
        model.train(was_training)

    monkeypatch.setattr(VllmRollouts, "sync_weights", recording)
    return found


@pytest.fixture
def updates(server, monkeypatch):
    return record(server, monkeypatch)


def check_updates(updates, steps) -> None:
    assert [step for step, _, _ in updates] == steps
    for _, trainer, served in updates:
        torch.testing.assert_close(served, trainer, rtol=0, atol=TOLERANCE)
    for (_, before, _), (_, after, _) in zip(updates, updates[1:], strict=False):
        assert (after - before).abs().max() > 10 * TOLERANCE


def check_finished(out: Path, steps: int) -> None:
    rows = read_metrics(out / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["rollout_gap"] < TOLERANCE for row in rows)
    assert (out / "final" / "model.safetensors").is_file()
    assert [p.name for p in checkpoint_folders(out)][-1] == f"step-{steps:08d}"


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_step_samples_from_the_weights_of_the_step_before(model, server, tmp_path, updates):
    run_here(recipe_of(model, server, tmp_path), tmp_path / "run")
    check_updates(updates, [0, 1, 2])
    check_finished(tmp_path / "run", 3)
    torch.testing.assert_close(updates[0][1], of_model(loaded(model)), rtol=0, atol=1e-5)
    assert not list((tmp_path / "weights").iterdir())


def test_a_mixture_of_experts(tmp_path, monkeypatch):
    """Its experts are stacked in the trainer, apart in the file, and packed by the server."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    folder = save_moe(tmp_path / "moe", **sizes)
    model = loaded(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    with serving(folder, tmp_path) as server:
        found = record(server, monkeypatch)
        run_here(recipe_of(folder, server, tmp_path), tmp_path / "run")
    check_updates(found, [0, 1, 2])
    check_finished(tmp_path / "run", 3)


@pytest.mark.parametrize("update_is_open", [False, True])
def test_a_killed_trainer_goes_on_with_a_server_that_is_ahead(
    model, server, tmp_path, updates, update_is_open
):
    """The server has the weights of step 3, the checkpoint those of step 2. With an open update the
    trainer died while the server, paused, was taking weights.
    """
    recipe = recipe_of(model, server, tmp_path, checkpoint={"every_steps": 2})
    recipe = recipe.model_copy(update={"steps": 5})
    out = tmp_path / "run"
    trainer = start(run_stage, recipe, out, resume=False)
    deadline = time.monotonic() + 200
    while not version_of(server).endswith("-step-3"):
        assert trainer.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    assert kill_after(trainer, 0.0)
    (newest,) = checkpoint_folders(out)
    assert newest.name == "step-00000002"
    assert list((tmp_path / "weights").glob("*-step-3.safetensors"))  # of the killed trainer
    saved = of_model(loaded(newest / "model"))
    ask(server, "/resume", {})  # the kill may have come before the trainer's own
    assert (of_server(server) - saved).abs().max() > 10 * TOLERANCE
    if update_is_open:
        for path in ("/pause?mode=keep", "/init_weight_transfer_engine", "/start_weight_update"):
            ask(server, path, {"init_info": {}})

    run_here(recipe, out, resume=True)
    check_updates(updates, [2, 3, 4])
    torch.testing.assert_close(updates[0][2], saved, rtol=0, atol=TOLERANCE)
    check_finished(out, 5)
    assert not list((tmp_path / "weights").iterdir())


def test_a_server_killed_in_the_middle_costs_no_completed_step(
    model, server, tmp_path, updates, monkeypatch
):
    """While answers of the third step are on their way; the run goes on with another server."""
    recipe, out = recipe_of(model, server, tmp_path, max_new_tokens=200), tmp_path / "run"
    original = VllmRollouts.generate

    def generate(self, *args, **kwargs):
        if len(updates) == 3:
            threading.Timer(0.1, server.kill).start()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VllmRollouts, "generate", generate)
        with pytest.raises(InputError, match="no answer after 3 attempts.*go on with --resume"):
            run_here(recipe, out)
    assert [p.name for p in checkpoint_folders(out)][-1] == "step-00000002"
    assert [row["step"] for row in read_metrics(out / METRICS_FILE)] == [1, 2]

    server.start()
    torch.testing.assert_close(of_server(server), of_model(loaded(model)), rtol=0, atol=TOLERANCE)
    run_here(recipe, out, resume=True)
    check_updates(updates[:3], [0, 1, 2])
    [(step, trainer, served)] = updates[3:]  # the third step again, from the same weights
    assert step == 2
    torch.testing.assert_close(trainer, updates[2][1], rtol=0, atol=1e-6)
    torch.testing.assert_close(served, trainer, rtol=0, atol=TOLERANCE)
    check_finished(out, 3)
