"""Rollouts and weight updates against a real vLLM on the CPU, with a model of random weights.

The model's embeddings are tied, because there a server that renews its body and not its head gives
wrong answers without an error. Numbers are compared with transformers.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenlong.llm import RetryPolicy, ServerUnavailable
from qwenlong.rollout.vllm import VllmRollouts
from qwenlong.tiny import tiny_model
from tests.qwenlong.test_real_server import Server

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 9, 30, 12, 7], list(range(3, 60)), [40]]
OPTIONS = {"group_size": 4, "max_new_tokens": 24, "temperature": 0.7, "seed": 3}


class PolicyServer(Server):
    """Served as ``smol``, ready to take weights from files."""

    def __init__(self, python: str, model: Path, folder: Path):
        super().__init__(python, model, folder)
        self._command += ["--logprobs-mode", "processed_logprobs"]
        self._command += ["--worker-extension-cls", "qwenlong.vllm_worker.WeightsFromFile"]
        self._command += ["--weight-transfer-config", '{"backend": "qwenlong_file"}']


def make_model(folder: Path, seed: int) -> torch.nn.Module:
    """Heads of 32 numbers, the fewest that vLLM takes; weights far from uniform answers."""
    made = tiny_model(folder, seed=seed, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(made)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [make_model(folder / str(seed), seed) for seed in (0, 1)], folder / "0"


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    python = os.environ.get("QL_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "QL_VLLM_PYTHON is not set: make an environment with scripts/vllm_cpu_env.sh FOLDER "
            "and set it to FOLDER/bin/python"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        made = PolicyServer(
            str(Path(python).absolute()), models[1], tmp_path_factory.mktemp("server")
        )
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def rollouts(server, tmp_path):
    made = VllmRollouts(server.root, model="smol", weights_folder=tmp_path, timeout_s=300.0)
    yield made
    made.close()


def check(groups, model, temperature: float = 0.7) -> None:
    """Log-probs are those of ``model`` over the whole sequence; an answer ends at its end token."""
    assert [len(group) for group in groups] == [4, 4, 4]
    end = model.config.eos_token_id
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for turn in group:
            assert turn.prompt_ids == prompt
            ids = torch.tensor([prompt + turn.response_ids])
            with torch.no_grad():
                rows = (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            wanted = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(turn.logprobs), wanted, atol=2e-3, rtol=1e-3)
            if turn.finish_reason == "stop":
                assert turn.response_ids[-1] == end and end not in turn.response_ids[:-1]
            else:
                assert turn.finish_reason == "length" and len(turn.response_ids) == 24
    assert len({tuple(turn.response_ids) for turn in groups[0]}) > 1


def test_answers_and_their_logprobs(rollouts, models):
    (first, _), _ = models
    groups = rollouts.generate(PROMPTS, **OPTIONS)
    check(groups, first)
    again = rollouts.generate(PROMPTS, **OPTIONS)
    assert [[t.response_ids for t in g] for g in again] == [
        [t.response_ids for t in g] for g in groups
    ]


def test_greedy_is_that_of_transformers(rollouts, models):
    (first, _), _ = models
    options = {**OPTIONS, "temperature": 0.0, "group_size": 1}
    for prompt, (turn,) in zip(PROMPTS, rollouts.generate(PROMPTS, **options), strict=True):
        out = first.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert turn.response_ids == out[0, len(prompt) :].tolist()


def test_new_weights_there_and_back(rollouts, models):
    (first, second), _ = models
    rollouts.sync_weights(second, 1)
    check(rollouts.generate(PROMPTS, **OPTIONS), second)
    rollouts.sync_weights(first, 2)
    check(rollouts.generate(PROMPTS, **OPTIONS), first)


def test_a_pause_holds_answers_back(rollouts):
    found = []
    options = {**OPTIONS, "max_new_tokens": 400, "temperature": 1.0}
    with rollouts.paused():
        thread = threading.Thread(
            target=lambda: found.append(rollouts.generate(PROMPTS, **options))
        )
        thread.start()
        thread.join(3.0)
        assert thread.is_alive() and not found
    thread.join(300.0)
    assert len(found[0]) == len(PROMPTS)


def test_a_killed_server_stops_the_run_and_a_new_one_gets_the_weights(server, models, tmp_path):
    (_, second), _ = models
    rollouts = VllmRollouts(
        server.root,
        model="smol",
        weights_folder=tmp_path,
        timeout_s=300.0,
        retry=RetryPolicy(max_retries=1, base=0.05),
    )
    try:
        rollouts.sync_weights(second, 5)
        server.kill()
        with pytest.raises(ServerUnavailable, match="no answer after 2 attempts"):
            rollouts.generate(PROMPTS, **OPTIONS)
        server.start()
        check(rollouts.generate(PROMPTS, **OPTIONS), second)
    finally:
        rollouts.close()
