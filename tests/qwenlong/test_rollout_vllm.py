"""Rollouts over HTTP against a server that fails on demand; a real one is in
``test_real_rollouts.py``."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest
import torch
from torch import nn

from qwenlong.errors import InputError
from qwenlong.llm import RequestRefused, RetryPolicy, ServerUnavailable
from qwenlong.rollout import vllm
from qwenlong.rollout.vllm import VllmRollouts, _claim, _seed
from tests.qwenlong.vllm_server import FakeVllm, answer_ids, serving

PROMPTS = [[5, 6, 7], [8], [5, 6, 7]]
OPTIONS = {"group_size": 2, "max_new_tokens": 3, "temperature": 0.7, "seed": 11}
QUICK = RetryPolicy(max_retries=2, base=0.01)


class Policy(nn.Module):
    """A weight, a tied one, and a number that is no parameter."""

    def __init__(self, value: float):
        super().__init__()
        self.w = nn.Parameter(torch.full((2, 3), value))
        self.tied = self.w
        self.register_buffer("count", torch.tensor(3))


@pytest.fixture
def server():
    made = FakeVllm()
    with serving(made) as made.url:
        yield made


@pytest.fixture
def rollouts(server, tmp_path):
    made = VllmRollouts(
        server.url, model="policy", weights_folder=tmp_path / "weights", retry=QUICK, timeout_s=0.5
    )
    yield made
    made.close()


def expected(weight: float = 0.0, *, seed: int = 11, max_tokens: int = 3):
    return [
        [
            answer_ids({"seed": _seed(seed, p, a), "max_tokens": max_tokens}, weight)
            for a in range(2)
        ]
        for p in range(len(PROMPTS))
    ]


def ids(groups):
    return [[turn.response_ids for turn in group] for group in groups]


# --- answers ------------------------------------------------------------------


def test_token_ids_in_and_out(server, rollouts):
    groups = rollouts.generate(PROMPTS, **OPTIONS)
    assert ids(groups) == expected()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for turn in group:
            assert turn.prompt_ids == prompt
            assert turn.logprobs == [-0.5, -0.5, -0.5] and turn.finish_reason == "stop"
    (cut,) = rollouts.generate([[5]], **{**OPTIONS, "group_size": 1, "max_new_tokens": 2})[0]
    assert len(cut.response_ids) == 2 and cut.finish_reason == "length"
    assert rollouts.generate([], **OPTIONS) == []


def test_the_request_leaves_nothing_to_the_server(server, rollouts):
    rollouts.generate([[5, 6]], **OPTIONS)
    body = server.requests[-1][1]
    assert body["prompt"] == [5, 6] and body["temperature"] == 0.7 and body["max_tokens"] == 3
    assert body["top_p"] == 1.0 and body["top_k"] == 0 and body["min_p"] == 0.0
    assert body["repetition_penalty"] == 1.0 and body["return_token_ids"] is True


def test_logprobs_of_unscaled_logits_are_not_taken(tmp_path):
    """With a temperature, a server that reports raw log-probs gives none; at 1 they are right."""
    server = FakeVllm(scaled=False)
    with serving(server) as url:
        rollouts = VllmRollouts(url, model="policy", retry=QUICK)
        (group,) = rollouts.generate([[5]], **OPTIONS)
        assert [turn.logprobs for turn in group] == [None, None]
        (group,) = rollouts.generate([[5]], **{**OPTIONS, "temperature": 1.0})
        assert group[0].logprobs == [-0.5] * 3
        rollouts.close()


def test_temperature_0_asks_once_a_prompt(server, rollouts):
    (group,) = rollouts.generate([[5]], **{**OPTIONS, "temperature": 0.0})
    assert group[0] == group[1] and group[0].logprobs is None
    assert server.paths() == ["/v1/completions"]


def test_a_server_without_token_ids_is_refused(tmp_path):
    server = FakeVllm(token_ids=False)
    with serving(server) as url:
        rollouts = VllmRollouts(url, model="policy", retry=QUICK)
        with pytest.raises(RequestRefused, match="no token ids"):
            rollouts.generate([[5]], **OPTIONS)
        rollouts.close()


@pytest.mark.parametrize(
    "changes, words",
    [({"group_size": 0}, "group_size 0"), ({"temperature": float("inf")}, "temperature inf")],
)
def test_wrong_settings_are_refused(rollouts, changes, words):
    with pytest.raises(InputError, match=words):
        rollouts.generate(PROMPTS, **{**OPTIONS, **changes})
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        rollouts.generate([[5], []], **OPTIONS)


# --- faults of answers --------------------------------------------------------


@pytest.mark.parametrize("fault", ["hang up", "half", "stall", 503, 429])
def test_a_fault_is_repeated(server, rollouts, fault):
    server.faults["/v1/completions"] = ["ok", "ok", fault, "ok", fault]
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected()


def test_a_dead_server_is_a_clear_stop(server, rollouts):
    server.faults["/v1/completions"] = ["hang up"] * 100
    with pytest.raises(ServerUnavailable, match="policy: no answer after 3 attempts"):
        rollouts.generate(PROMPTS, **OPTIONS)
    server.faults.clear()
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected()


def test_a_refusal_is_not_repeated(server, rollouts):
    rollouts.generate([[5]], **OPTIONS)
    server.faults["/v1/completions"] = [400]
    count = len(server.requests)
    with pytest.raises(RequestRefused, match="HTTP 400"):
        rollouts.generate([[5]], **{**OPTIONS, "group_size": 1})
    assert len(server.requests) == count + 1


# --- weights ------------------------------------------------------------------


def test_new_weights_answer(server, rollouts, tmp_path):
    rollouts.sync_weights(Policy(0.25), 3)
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    assert server.version.endswith("-step-3") and not server.paused
    assert set(server.loaded) == {"w", "count"}  # the tied weight once
    torch.testing.assert_close(server.loaded["w"], torch.full((2, 3), 0.25))
    wanted = ["/pause?mode=keep", "/init_weight_transfer_engine", "/start_weight_update"]
    wanted += ["/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    assert server.paths()[:7] == wanted
    rollouts.sync_weights(Policy(0.5), 4)
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.5)
    (left,) = (tmp_path / "weights").glob("*.safetensors")  # of the last step alone
    assert left.name.endswith("step-4.safetensors")
    rollouts.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_weights_of_a_killed_trainer_are_deleted(server, rollouts, tmp_path):
    """Those of one that lives are not: it holds its lock."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("dead-step-7.safetensors", "dead-step-8.partial", "dead.lock", "live-step-1.x"):
        (folder / f"policy-{name}").touch()
    with open(folder / "policy-live.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rollouts.sync_weights(Policy(0.25), 1)
    rollouts.close()
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["policy-live-step-1.x", "policy-live.lock"]


def test_a_lock_that_cannot_be_opened_leaves_the_weights_locked(server, rollouts, tmp_path):
    """Like that of another user; the folder is shared."""
    folder = tmp_path / "weights"
    (folder / "policy-other.lock").mkdir(parents=True)
    rollouts.sync_weights(Policy(0.25), 1)
    assert len(list(folder.glob("policy-*.lock"))) == 2
    rollouts.close()
    assert [path.name for path in folder.iterdir()] == ["policy-other.lock"]


def test_a_lock_that_another_trainer_deletes_before_it_is_taken_is_made_again(
    tmp_path, monkeypatch
):
    """The other one finds the file between its making and its locking, and takes it for a dead
    trainer's.
    """
    flock, others = fcntl.flock, []

    def flock_late(file, how):
        if how == fcntl.LOCK_EX and not others:
            others.append(None)  # once, and not inside of itself
            others[0] = _claim(tmp_path, "11111111")
            assert not (tmp_path / "policy-00000000.lock").exists()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with _claim(tmp_path, "00000000") as lock, others[0]:
        path = tmp_path / "policy-00000000.lock"
        assert path.samefile(lock.name) and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        (tmp_path / "policy-00000000-step-1.safetensors").touch()
        _claim(tmp_path, "22222222").close()  # a third finds it in use
        assert (tmp_path / "policy-00000000-step-1.safetensors").exists()


def test_without_locks_no_lock_file_is_left(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks"):
        _claim(tmp_path, "00000000")
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_a_killed_trainer_left_open_is_ended(server, rollouts):
    server.is_updating = True
    rollouts.sync_weights(Policy(0.25), 1)
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    assert server.paths().count("/start_weight_update") == 2 and not server.paused


def test_weights_in_another_dtype(server, tmp_path):
    rollouts = VllmRollouts(
        server.url, model="policy", weights_folder=tmp_path, weights_dtype=torch.bfloat16
    )
    rollouts.sync_weights(Policy(0.25), 0)
    assert server.loaded["w"].dtype == torch.bfloat16 and server.loaded["count"].item() == 3
    rollouts.close()


def test_a_restarted_server_gets_the_weights_again(server, rollouts):
    rollouts.sync_weights(Policy(0.25), 1)
    before = server.version
    server.restart()
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    assert server.paths().count("/update_weights") == 2
    # Not the old name: a rank that knows only that one must see that something happened.
    assert server.version != before


def test_another_rank_goes_on_when_the_weights_were_sent_again(server, rollouts):
    """Rank 0 has the file; the others know the version that it told them."""
    rollouts.sync_weights(Policy(0.25), 1)
    other = VllmRollouts(server.url, model="policy", retry=QUICK)
    other._version = server.version
    assert ids(other.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    server.restart()
    with pytest.raises(ServerUnavailable, match="which rank 0 alone can send"):
        other.generate(PROMPTS, **OPTIONS)
    for _ in range(2):
        server.restart()
        rollouts.generate([[5]], **OPTIONS)
    assert ids(other.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    other.close()


def test_the_weights_of_another_trainer_are_not_answered_with(server, rollouts, tmp_path):
    rollouts.sync_weights(Policy(0.25), 1)
    other = VllmRollouts(server.url, model="policy", weights_folder=tmp_path / "o", retry=QUICK)
    other.sync_weights(Policy(0.5), 1)
    with pytest.raises(ServerUnavailable, match=r"another trainer has sent .*-step-1\) to this"):
        rollouts.generate(PROMPTS, **OPTIONS)
    assert ids(other.generate(PROMPTS, **OPTIONS)) == expected(0.5)  # and are left alone
    other.close()


def test_answers_across_a_restart_are_thrown_away(server, rollouts):
    rollouts.sync_weights(Policy(0.25), 1)
    rollouts.generate([[5]], **OPTIONS)  # the question about log-probs is behind us
    server.faults["/v1/completions"] = ["ok", "ok", "restart"]
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.25)
    server.faults["/v1/completions"] = ["restart"] * 100
    with pytest.raises(ServerUnavailable, match="lost the policy's weights 3 times"):
        rollouts.generate(PROMPTS, **OPTIONS)


@pytest.mark.parametrize(
    "path", ["/pause", "/init_weight_transfer_engine", "/resume", "/reset_prefix_cache"]
)
def test_a_fault_around_an_update_is_repeated(server, rollouts, path):
    server.faults[path] = ["hang up", 503]
    rollouts.sync_weights(Policy(0.25), 1)
    assert server.weight == 0.25 and not server.paused


@pytest.mark.parametrize(
    "path", ["/start_weight_update", "/update_weights", "/finish_weight_update"]
)
def test_an_update_that_breaks_off_is_a_clear_stop(server, rollouts, path):
    server.faults[path] = ["hang up"]
    with pytest.raises(ServerUnavailable, match="start the server again"):
        rollouts.sync_weights(Policy(0.25), 1)
    assert server.paths().count(path) == 1
    server.restart()
    rollouts.sync_weights(Policy(0.25), 1)
    assert ids(rollouts.generate(PROMPTS, **OPTIONS)) == expected(0.25)


def test_a_server_that_takes_no_weights(server, rollouts, tmp_path):
    server.faults["/init_weight_transfer_engine"] = ["missing"]
    with pytest.raises(InputError, match="has no /init_weight_transfer_engine: start it as"):
        rollouts.sync_weights(Policy(0.25), 1)
    assert not server.paused  # and it goes on
    plain = VllmRollouts(server.url, model="policy")
    with pytest.raises(InputError, match="pass weights_folder"):
        plain.sync_weights(Policy(0.25), 1)
    plain.close()


def test_other_ranks_hear_of_an_error_without_words(rollouts, monkeypatch):
    told = []
    monkeypatch.setattr(vllm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vllm.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(vllm.dist, "broadcast_object_list", lambda shared, src: told.extend(shared))
    policy = Policy(0.25)
    monkeypatch.setattr(policy, "state_dict", lambda: next(iter(())))
    with pytest.raises(StopIteration):
        rollouts.sync_weights(policy, 1)
    assert told == [("StopIteration()", None)]


def test_lora_is_refused(rollouts):
    policy = Policy(0.25)
    policy.lora_A = nn.Linear(2, 2)
    with pytest.raises(InputError, match="LoRA"):
        rollouts.sync_weights(policy, 1)


def test_pause(server, rollouts):
    with rollouts.paused():
        assert server.paused
    assert not server.paused
    with pytest.raises(KeyError), rollouts.paused():
        raise KeyError
    assert not server.paused
