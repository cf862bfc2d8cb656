"""The training step against autograd on whole sequences, and what a run does around it."""

import io
import json
import math
import re
import tokenize
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from qwenlong.advantage_rules import ADVANTAGES, register_advantage
from qwenlong.checkpoint import checkpoint_folders
from qwenlong.config import AGGREGATIONS, Recipe, RecipeLoader, recipe_from
from qwenlong.errors import InputError
from qwenlong.metrics import read_metrics
from qwenlong.policy import loss_totals, pack_trajectories, token_weights
from qwenlong.rewards import Judge, score
from qwenlong.rollout import EmbeddedRollouts
from qwenlong.run_setup import build_run
from qwenlong.stage_data import TASK_MAKERS, load_plugins
from qwenlong.train import Stopped, train, train_step
from qwenlong.train_command import run_stage, train_command
from qwenlong.train_report import describe
from qwenlong.types import Reward, Trajectory, Turn
from tests.qwenlong.train_runs import make_model, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def trajectory(group, turns, *, reward=0.0, index=0):
    """``turns``: pairs of prompt and response ids."""
    return Trajectory(
        sample_id=group,
        group_id=group,
        rollout_index=index,
        policy_step=0,
        turns=[Turn(prompt_ids=p, response_ids=r, finish_reason="stop") for p, r in turns],
        reward=Reward(value=reward, source="rule"),
    )


# --- packing and weights -----------------------------------------------------


def test_answers_to_one_prompt_share_it():
    a = [trajectory("a", [([1, 2, 3], [4] * n)]) for n in (2, 3)]
    other = trajectory("b", [([1, 2, 3], [5])])  # the same prompt, but another group
    (batch,) = pack_trajectories([*a, other], [True] * 3, 100)
    assert batch.layout.prompt_lengths == (3, 3)
    assert batch.layout.answer_lengths == ((2, 3), (1,))
    assert batch.turns == [(0, 0), (1, 0), (2, 0)]
    assert batch.trajectory_of.tolist() == [0, 1, 2]


def test_groups_are_split_between_answers_and_what_cannot_learn_comes_last():
    live = [False, True, True, False]
    group = [trajectory("a", [([1] * 5, [2] * 3)]) for _ in range(3)]
    dead = trajectory("b", [([1] * 5, [2] * 3)])
    # prefix 4 rows and 3 for each answer: two answers fit into 10
    batches = pack_trajectories([*group, dead], live, 10)
    assert [batch.turns for batch in batches] == [[(1, 0), (2, 0)], [(0, 0)], [(3, 0)]]
    assert [batch.is_live for batch in batches] == [True, False, False]
    assert all(len(batch.layout.input_ids) <= 10 for batch in batches)
    everything = pack_trajectories([*group, dead], live, 1000)
    assert [batch.is_live for batch in everything] == [True, False]
    assert everything[0].turns == [(1, 0), (2, 0), (0, 0)]


def test_an_answer_longer_than_a_micro_batch_is_alone_and_an_empty_one_is_left_out():
    long, empty = trajectory("a", [([1], [2] * 50)]), trajectory("b", [([1], [])])
    batches = pack_trajectories([long, empty, long], [True] * 3, 10)
    assert [batch.turns for batch in batches] == [[(0, 0)], [(2, 0)]]
    assert pack_trajectories([empty], [True], 10) == []


def test_turns_of_an_agent_are_grouped_by_prompt():
    two = [trajectory("a", [([1, 2], [3]), ([i, 9], [4, 4])], index=i) for i in range(2)]
    (batch,) = pack_trajectories(two, [True, True], 100)
    assert batch.turns == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert batch.layout.answer_lengths == ((1, 1), (2,), (2,))


def test_weights_of_tokens_by_hand():
    # group a: 1 + 3 tokens in two turns, and 4; group b: 2 tokens
    rolled = [
        trajectory("a", [([1], [2]), ([1], [2] * 3)]),
        trajectory("a", [([1], [2] * 4)]),
        trajectory("b", [([1], [2] * 2)]),
    ]
    everything = torch.ones(3, dtype=torch.bool)
    totals = loss_totals(rolled, everything)
    assert totals.tolist() == [2, 10, 3]

    def weights(rule, counted=everything):
        return token_weights(rolled, counted, rule, loss_totals(rolled, counted)).tolist()

    assert weights("group-token-mean") == [1 / 16, 1 / 16, 1 / 4]
    assert weights("token-mean") == [1 / 10] * 3
    assert weights("seq-mean-token-mean") == [1 / 12, 1 / 12, 1 / 6]
    kept = torch.tensor([False, True, False])
    assert weights("group-token-mean", kept) == [0, 1 / 4, 0]
    assert weights("token-mean", kept) == [0, 1 / 4, 0]
    nothing = torch.zeros(3, dtype=torch.bool)
    assert weights("group-token-mean", nothing) == [0, 0, 0]


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_weights_add_up_to_one(rule):
    rolled = [trajectory(g, [([1], [2] * n)]) for g, n in (("a", 3), ("a", 5), ("b", 7), ("c", 0))]
    counted = torch.ones(4, dtype=torch.bool)
    weights = token_weights(rolled, counted, rule, loss_totals(rolled, counted))
    lengths = torch.tensor([3.0, 5.0, 7.0, 0.0], dtype=torch.float64)
    assert math.isclose(float((weights * lengths).sum()), 1.0, rel_tol=1e-12)


# --- the step against whole sequences ----------------------------------------


class Scripted:
    """Rollouts that give what they are told, in order of the prompts."""

    def __init__(self, rolled):
        self.rolled = rolled
        self.synced = []

    def sync_weights(self, model, policy_step):
        self.synced.append(policy_step)

    def close(self):
        pass


def scripted_run(folder, tmp_path, rolled, monkeypatch, /, **changes):
    """A run whose next step rolls out ``rolled``; their samples are made to fit."""
    recipe = tiny_recipe(folder, batch={"micro_batch_tokens": 40}, **changes)
    run = build_run(recipe, tmp_path / "run")
    ids = list(dict.fromkeys(t.sample_id for t in rolled))
    samples = [run.samples[0].model_copy(update={"id": name, "task": name[0]}) for name in ids]
    run.samples = samples + run.samples[len(samples) :]
    monkeypatch.setattr(run.sampler, "_draw", lambda: list(range(len(samples))))
    monkeypatch.setattr("qwenlong.train.EPISODES", {"full": lambda *a: rolled})
    monkeypatch.setattr("qwenlong.train.with_rewards", lambda env, samples, rolled: rolled)
    run.environment.rollouts = Scripted(rolled)
    return run


def random_trajectories(seed, turns=1):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, 70, (n,), generator=g).tolist()

    rolled = []
    for group in ("a1", "a2", "b1"):
        prompts = [ids(3, 9) for _ in range(turns)]
        for index in range(3):
            reward = float(torch.rand(1, generator=g))
            pairs = [(prompt, ids(1, 7)) for prompt in prompts]
            rolled.append(trajectory(group, pairs, reward=reward, index=index))
    return rolled


def full_sequence_loss(model, rolled, advantages, weights, keep=None, old=None):
    """Eq. 4 on every turn by itself: logits of the whole sequence, autograd for the rest."""
    loss, logprobs = 0.0, []
    for i, t in enumerate(rolled):
        for turn in t.turns:
            ids = torch.tensor([turn.prompt_ids + turn.response_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
            scores = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            scores = scores[len(turn.prompt_ids) - 1 :]
            logprobs.append(scores.detach())
            ratio = (scores - (scores.detach() if old is None else old[len(logprobs) - 1])).exp()
            A = advantages[i].double()
            surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
            if keep is None or keep[i]:
                loss = loss - (weights[i] * surrogate).sum()
    return loss, logprobs


def expected(run, rolled, **kwargs):
    """Advantages by task and weights by eq. 4 of what was rolled out."""
    rewards = torch.tensor([t.reward.value for t in rolled], dtype=torch.float64)
    groups, tasks = [t.group_id for t in rolled], [t.sample_id[0] for t in rolled]
    advantages = ADVANTAGES["task"](rewards, groups, tasks, None)
    lengths = [sum(len(turn.response_ids) for turn in t.turns) for t in rolled]
    in_group = {g: sum(n for h, n in zip(groups, lengths, strict=True) if h == g) for g in groups}
    weights = torch.tensor([1 / (3 * in_group[g]) for g in groups], dtype=torch.float64)
    return advantages, weights


def no_update(run):
    """The engine's gradients stay where they are, for a test to read."""
    run.engine.step = lambda learning_rate: 1.0
    return run


@pytest.mark.parametrize("turns", [1, 3])
def test_gradient_is_that_of_whole_sequences(model, tmp_path, monkeypatch, turns):
    rolled = random_trajectories(turns, turns)
    run = no_update(scripted_run(model, tmp_path, rolled, monkeypatch))
    policy = run.engine.policy.causal_lm
    metrics = train_step(run)
    found = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    loss, _ = full_sequence_loss(policy, rolled, *expected(run, rolled))
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert max(g.abs().max() for g in found.values()) > 1e-3


@pytest.mark.parametrize("source", ["previous_step", "scoring_pass"])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_aepo_drops_negatives_and_the_denominator_is_as_asked(
    model, tmp_path, monkeypatch, source, denominator
):
    rolled = random_trajectories(7)
    aepo = {"low": 0.1, "high": 0.2, "entropy_source": source}  # a random model is far above
    run = no_update(
        scripted_run(
            model, tmp_path, rolled, monkeypatch, aepo=aepo, loss={"denominator": denominator}
        )
    )
    run.controller.dropping = True  # what the step before would have decided
    policy = run.engine.policy.causal_lm
    metrics = train_step(run)
    found = {name: p.grad.clone() for name, p in policy.named_parameters()}
    advantages, weights = expected(run, rolled)
    keep = advantages >= 0
    assert metrics["aepo/drops_negatives"] == 1.0
    assert metrics["aepo/kept_fraction"] == pytest.approx(float(keep.double().mean()))
    if denominator == "kept":
        totals = loss_totals(rolled, keep)
        weights = token_weights(rolled, keep, "group-token-mean", totals)
    policy.zero_grad()
    loss, logprobs = full_sequence_loss(policy, rolled, advantages, weights, keep)
    loss.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    # eq. 11: mean over sequences of the mean entropy; all of the batch, dropped ones too
    assert metrics["entropy"] == pytest.approx(mean_entropy(policy, rolled), abs=1e-5)


@torch.no_grad()
def mean_entropy(policy, rolled):
    """Eq. 11 over trajectories, each the mean over the tokens of all its turns."""
    means = []
    for t in rolled:
        found = []
        for turn in t.turns:
            ids = torch.tensor([turn.prompt_ids + turn.response_ids])
            scores = policy(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            scores = scores[len(turn.prompt_ids) - 1 : -1]
            found.append(-(scores.exp() * scores).sum(-1))
        means.append(torch.cat(found).mean())
    return float(torch.stack(means).mean())


@pytest.mark.parametrize("source", ["previous_step", "scoring_pass"])
def test_the_entropy_of_an_agent_s_batch_is_that_of_its_trajectories(
    model, tmp_path, monkeypatch, source
):
    short = ([5, 6, 7], [11])
    turns = [([5, 6, 7], [12, 13]), ([8] * 20, [14] * 9), ([9] * 30, [15, 16, 17])]
    rolled = [trajectory("a", [short], reward=1.0), trajectory("a", turns, index=1)]
    aepo = {"low": 0.1, "high": 99.0, "entropy_source": source}
    run = no_update(scripted_run(model, tmp_path, rolled, monkeypatch, aepo=aepo))
    assert len(pack_trajectories(rolled, [True, True], 40)) == 2  # over several micro-batches
    policy = run.engine.policy.causal_lm
    with torch.no_grad():
        policy.lm_head.weight.mul_(10)  # its rows are nearly uniform, all of one entropy
    wanted = mean_entropy(policy, rolled)
    turns_alone = mean_entropy(policy, [trajectory("a", [turn]) for turn in [short, *turns]])
    assert abs(turns_alone - wanted) > 0.01
    assert train_step(run)["entropy"] == pytest.approx(wanted, abs=1e-5)
    assert run.controller.last_entropy == pytest.approx(wanted, abs=1e-5)


def test_a_second_update_clips_the_ratio_to_the_policy_that_sampled(model, tmp_path, monkeypatch):
    rolled = random_trajectories(3)
    loss = {"updates_per_batch": 2}
    run = scripted_run(model, tmp_path, rolled, monkeypatch, loss=loss)
    policy, steps, second = run.engine.policy.causal_lm, [], {}
    advantages, weights = expected(run, rolled)
    _, old = full_sequence_loss(policy, rolled, advantages, weights)
    original = run.engine.step

    def step(learning_rate):
        steps.append(learning_rate)
        if len(steps) == 2:
            second.update((name, p.grad.clone()) for name, p in policy.named_parameters())
            policy.zero_grad()
            full_sequence_loss(policy, rolled, advantages, weights, old=old)[0].backward()
            second["expected"] = {n: p.grad.clone() for n, p in policy.named_parameters()}
        return original(learning_rate)

    run.engine.step = step
    train_step(run)
    assert len(steps) == 2
    wanted = second.pop("expected")
    for name, grad in wanted.items():
        torch.testing.assert_close(second[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": False}, {"offload_activations": True}]
)
def test_checkpointing_and_offload_change_nothing(model, tmp_path, monkeypatch, changes):
    rolled, found = random_trajectories(5), []
    for name, settings in (("plain", {}), ("changed", changes)):
        run = no_update(scripted_run(model, tmp_path / name, rolled, monkeypatch, model=settings))
        train_step(run)
        found.append([p.grad.clone() for p in run.engine.policy.parameters()])
    for plain, changed in zip(*found, strict=True):
        assert torch.equal(plain, changed)


def test_offload_moves_what_layers_keep(model, tmp_path, monkeypatch):
    run = scripted_run(
        model, tmp_path, random_trajectories(5), monkeypatch, model={"offload_activations": True}
    )
    opened = []
    original = torch.autograd.graph.save_on_cpu

    def watched(**kwargs):
        opened.append(kwargs)
        return original(**kwargs)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", watched)
    train_step(run)
    assert opened and all(kwargs == {"pin_memory": False} for kwargs in opened)


def test_equal_rewards_change_nothing(model, tmp_path, monkeypatch):
    rolled = [t.model_copy(update={"reward": Reward(value=0.5, source="rule")})
              for t in random_trajectories(1)]  # fmt: skip
    run = scripted_run(model, tmp_path, rolled, monkeypatch)
    before = [p.detach().clone() for p in run.engine.policy.parameters()]
    metrics = train_step(run)
    assert metrics["grad_norm"] == 0.0 and metrics["live_fraction"] == 0.0
    assert metrics["entropy"] > 0  # measured all the same
    for old, new in zip(before, run.engine.policy.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_reward_that_was_left_open_counts_nowhere(model, tmp_path, monkeypatch):
    rolled = random_trajectories(2)
    skipped = Reward(value=0.0, source="error", skipped=True)
    gone = [t.model_copy(update={"reward": skipped}) if i == 4 else t for i, t in enumerate(rolled)]
    found = []
    for name, script in (("gone", gone), ("never", rolled[:4] + rolled[5:])):
        run = no_update(scripted_run(model, tmp_path / name, script, monkeypatch))
        metrics = train_step(run)
        found.append([p.grad.clone() for p in run.engine.policy.parameters()])
        assert metrics["reward_errors"] == (name == "gone")
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_metrics_are_of_the_rewards_that_are_known():
    def row(value, source, advantage):
        return {"task": "a", "sample_id": "s", "reward": {"value": value, "source": source},
                "advantage": advantage, "response_tokens": 2, "finish_reason": "stop"}  # fmt: skip

    found = describe([row(0.5, "rule", 0.0), row(0.5, "rule", 0.0), row(0.0, "error", None)])
    assert found["reward"] == found["reward/a"] == 0.5
    assert found["live_fraction"] == 0.0  # what is not known teaches nothing
    assert found["reward_errors"] == 1


def test_ranks_agree_on_an_error_without_words(model, tmp_path):
    run = build_run(tiny_recipe(model), tmp_path / "run")
    told = []

    class TwoRanks:
        world_size = 2
        largest = staticmethod(lambda value: value)
        gather = staticmethod(lambda value: told.append(value) or [value, None])

    run.engine = TwoRanks()

    def fails():
        raise TimeoutError

    with pytest.raises(Stopped, match="TimeoutError"):
        run.agreed(fails)
    assert told == ["TimeoutError()"]  # the other rank hears of it


def test_a_step_without_any_reward_stops(model, tmp_path, monkeypatch):
    skipped = Reward(value=0.0, source="error", skipped=True)
    rolled = [t.model_copy(update={"reward": skipped}) for t in random_trajectories(1)]
    run = scripted_run(model, tmp_path, rolled, monkeypatch)
    with pytest.raises(Stopped, match="no reward of this step is known"):
        train_step(run)


def test_bf16_computes_and_fp32_is_trained(model, tmp_path, monkeypatch):
    rolled = random_trajectories(5)
    changes = {"model": {"compute_dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-6}}
    run = scripted_run(model, tmp_path, rolled, monkeypatch, **changes)
    before = {name: value.clone() for name, value in run.engine.weights().items()}
    train_step(run)
    after = run.engine.weights()
    assert next(run.engine.policy.parameters()).dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert 0 < moved.max() < 2e-6  # a step that bf16 weights of 0.02 would not feel
    rotary = run.engine.policy.causal_lm.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32


def test_lora_trains_the_adapters_alone_and_the_export_is_merged(model, tmp_path):
    pytest.importorskip("peft")
    recipe = tiny_recipe(model, steps=2, model={"lora": {"rank": 2, "alpha": 4.0}})
    out = tmp_path / "run"
    final = run_stage(recipe, out, resume=False, console=quiet())
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    end = AutoModelForCausalLM.from_pretrained(final).state_dict()
    changed = {n.split(".")[-2] for n in start if not torch.equal(start[n], end[n])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    adapter = torch.load(checkpoint_folders(out)[-1] / "adapter.pt", weights_only=True)
    assert all("lora_" in name for name in adapter)
    # one step, then another after a resume, gives the same model
    other = tmp_path / "other"
    one = recipe.model_copy(update={"steps": 1})
    run_stage(one, other, resume=False, console=quiet())
    run_stage(recipe, other, resume=True, console=quiet())
    again = AutoModelForCausalLM.from_pretrained(other / "final").state_dict()
    assert all(torch.equal(end[name], again[name]) for name in end)


# --- a run -------------------------------------------------------------------


def quiet():
    return Console(file=io.StringIO())


def test_reward_rises(model, tmp_path):
    changes = {"optimizer": {"learning_rate": 2e-2}, "checkpoint": {"every_steps": 100}}
    batch = {"prompts": 4, "group_size": 8, "micro_batch_tokens": 4096}
    rows = {}
    run = build_run(tiny_recipe(model, steps=14, batch=batch, **changes), tmp_path / "run")
    train(run, rows.__setitem__)
    first, last = (sum(rows[i]["reward"] for i in steps) / 3 for steps in ((1, 2, 3), (12, 13, 14)))
    assert last > first + 0.2, (first, last)
    assert rows[1]["rollout_gap"] < 1e-5  # the sampler's log-probs are the trainer's


def test_what_a_run_leaves(model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    console, closed = quiet(), []
    monkeypatch.setattr(EmbeddedRollouts, "close", lambda self: closed.append(1))
    final = run_stage(tiny_recipe(model, steps=2), out, resume=False, console=console)
    assert closed == [1]
    assert final == out / "final" and (final / "tokenizer.json").is_file()
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    names = {"reward", "reward/letters", "entropy", "response_tokens", "truncated_fraction",
             "live_fraction", "tokens_per_s", "loss", "grad_norm", "learning_rate"}  # fmt: skip
    assert names <= set(rows[0])
    assert (out / "dashboard.png").stat().st_size > 1000
    lines = (out / "rollouts" / "step-00000001.jsonl").read_text().splitlines()
    assert len(lines) == 16 and sum("responses" in json.loads(line) for line in lines) == 2
    assert "tiny step 2/2  reward" in console.file.getvalue()
    assert run_stage(tiny_recipe(model, steps=2), out, resume=True, console=quiet()) == final


def test_a_dashboard_that_cannot_be_drawn_is_said_and_stops_nothing(model, tmp_path, monkeypatch):
    def broken(*paths):
        raise OSError("no such font")

    monkeypatch.setattr("qwenlong.train_plot.draw_dashboard", broken)
    console = quiet()
    final = run_stage(tiny_recipe(model, steps=1), tmp_path, resume=False, console=console)
    assert (final / "model.safetensors").is_file()
    assert "dashboard.png could not be drawn (OSError: no such font)" in console.file.getvalue()


def test_a_dead_judge_stops_the_run_and_loses_no_step(model, tmp_path):
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "attempts": 1}
    recipe = tiny_recipe(
        model, steps=4, checkpoint={"every_steps": 10}, reward={"judge": judge},
        data={"tasks": [{"name": "letters", "count": 24}]},
    )  # fmt: skip
    run = build_run(recipe, tmp_path / "run")
    assert isinstance(run.environment.judge, Judge)
    asks_judge = [s.model_copy(update={"reward": "judge"}) for s in run.samples]

    def log(step, metrics):
        if step == 2:
            run.samples = asks_judge

    from qwenlong.rewards import JudgeError

    with pytest.raises(JudgeError, match="no verdict for"):
        train(run, log)
    assert [p.name for p in checkpoint_folders(tmp_path / "run")] == ["step-00000002"]


def test_a_request_to_stop_ends_between_phases(model, tmp_path):
    run = build_run(tiny_recipe(model, checkpoint={"every_steps": 10}), tmp_path / "run")
    generate = run.environment.rollouts.generate
    calls = []

    def stops_in_step_2(*args, **kwargs):
        calls.append(1)
        run.stop_requested = len(calls) == 2
        return generate(*args, **kwargs)

    run.environment.rollouts.generate = stops_in_step_2
    with pytest.raises(Stopped, match="stopped in step 2"):
        train(run, lambda step, metrics: None)
    assert [p.name for p in checkpoint_folders(tmp_path / "run")] == ["step-00000001"]
    assert run.step == 1


def test_a_gradient_that_is_not_finite_updates_nothing(model, tmp_path, monkeypatch):
    run = build_run(tiny_recipe(model), tmp_path / "run")
    before = [p.detach().clone() for p in run.engine.policy.parameters()]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="norm is nan"):
        train(run, lambda step, metrics: None)
    for old, new in zip(before, run.engine.policy.parameters(), strict=True):
        assert torch.equal(old, new)


def test_an_advantage_is_one_function_and_one_line(model, tmp_path):
    @register_advantage("test_sign")
    def sign(rewards, group_ids, task_ids, process_group):
        return torch.where(rewards > 0, 1.0, -1.0)

    run = build_run(tiny_recipe(model, loss={"advantage": "test_sign"}), tmp_path / "run")
    train_step(run)
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/rollouts/step-00000001.jsonl").read_text().splitlines()
    ]
    assert {row["advantage"] for row in rows} <= {1.0, -1.0}
    with pytest.raises(ValueError, match="'test_sign' is registered already"):
        register_advantage("test_sign")(sign)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"loss": {"advantage": "tsak"}}, "loss.advantage is 'tsak'; choose one of batch, group"),
        ({"rollout": {"episodes": "none"}}, "rollout.episodes is 'none'"),
        ({"data": {"tasks": [{"name": "letter", "count": 3}]}}, "task 'letter' is unknown"),
        ({"data": {"max_prompt_tokens": 10}}, "no prompt has more than 0 and at most 10 tokens"),
        ({"batch": {"prompts": 99}}, "batch.prompts: .* takes 99 samples of task 'letters'"),
        ({"data": {"stratify": {"bins": 2, "per_bin": 3}}}, "data.stratify: .* no difficulty"),
        ({"plugins": ["nowhere.py"]}, "plugin nowhere.py cannot be imported"),
        ({"data": {"above_tokens": 1, "retrospective": {"stages": ["x"], "count": 1}}},
         "no earlier stage 'x'"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_is_refused_in_one_sentence(model, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        build_run(tiny_recipe(model, **changes), tmp_path / "run")


def test_a_refused_recipe_leaves_the_folder_free(model, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no prompt has more than"):
        build_run(tiny_recipe(model, data={"max_prompt_tokens": 10}), out)
    longer = {"tasks": [{"name": "letters", "count": 24, "options": {"noise": [50, 60]}}]}
    assert build_run(tiny_recipe(model, data=longer), out).step == 0
    lengths = json.loads((out / "prompt_tokens.json").read_text())["tokens"].values()
    assert min(lengths) > 50
    with pytest.raises(InputError, match="holds a run"):
        build_run(tiny_recipe(model, data=longer), out)


PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from qwenlong.stage_data import register_task

@dataclass
class Maker:
    number: int
    def __call__(self, count, seed):
        return []

register_task({name!r})(Maker(1))
"""


def test_plugins_of_one_file_name_are_all_imported_and_once(tmp_path):
    files = [tmp_path / folder / "mine.py" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text(PLUGIN.format(name=f"plugin_{file.parent.name}"))
    load_plugins([str(file) for file in files])
    load_plugins([str(files[0])])
    assert {"plugin_one", "plugin_two"} <= set(TASK_MAKERS)


def test_a_stage_of_a_ladder_is_not_trained_alone_from_another_model(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny-ladder" / "4-memory.yaml"
    with pytest.raises(InputError, match="goes on from the stage '3-long'; run its folder"):
        train_command(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_page_shows_runs():
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(code, "docs/train.md", "exec"), names)
    samples = list(TASK_MAKERS["greetings"](3, 0, word="Hi"))
    assert [s.question for s in samples] == ["Say Hi."] * 3
    assert score(samples[0], "Hi").value == 1.0
    assert score(samples[0], "Hi, and so on and so forth").value == 0.0
    assert ADVANTAGES["sign"](torch.tensor([0.0, 2.0]), [], [], None).tolist() == [-1, 1]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipe_from(Recipe, yaml.load(recipe, Loader=RecipeLoader))


def test_one_step_can_be_read_in_one_sitting():
    """Code of a step, without comments, docstrings and blank lines."""
    folder = Path(__file__).parents[2] / "qwenlong"
    total = 0
    for name in ("train", "policy", "episodes", "train_report", "advantage_rules"):
        with open(folder / f"{name}.py", "rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                   tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)  # fmt: skip
        code = [t for t in tokens if t.type not in skipped]
        text = {
            line
            for before, t in zip([None, *tokens], tokens, strict=False)
            if t.type == tokenize.STRING
            and before is not None
            and before.type in (tokenize.INDENT, tokenize.NEWLINE, tokenize.ENCODING, tokenize.NL)
            for line in range(t.start[0], t.end[0] + 1)
        }
        lines = {line for t in code for line in range(t.start[0], t.end[0] + 1)}
        total += len(lines - text)
    assert total < 600, total
