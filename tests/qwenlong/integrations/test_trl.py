"""Our trainer and our scores inside of the real TRL, against TRL without them."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402
from trl_runs import GROUP, dataset, logged, run, settings, tiny_model, vowels  # noqa: E402

from qwenlong.advantages import group_advantages  # noqa: E402
from qwenlong.integrations import trl_prefix, trl_scores, versions  # noqa: E402
from qwenlong.integrations.trl import (  # noqa: E402
    STATE_FILE,
    AEPOGRPOConfig,
    AEPOGRPOTrainer,
    RepeatedTaskBatches,
    patch_trl,
)
from qwenlong.sampler import TaskBalancedSampler  # noqa: E402
from qwenlong.tiny import tiny_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """20 steps of TRL's own trainer."""
    config = GRPOConfig(**settings(tmp_path_factory.mktemp("stock"), max_steps=20))
    return run(GRPOTrainer, config)


def assert_same_run(found, want, tolerance=1e-4):
    assert len(found.losses) == len(want.losses)
    assert max(map(abs, want.losses)) > 1e-2, "nothing was learned, so nothing is compared"
    assert found.losses == pytest.approx(want.losses, abs=tolerance)
    for name in ("entropy", "grad_norm", "reward", "completions/mean_length", "aux_loss"):
        assert logged(found, name) == pytest.approx(logged(want, name), abs=tolerance), name


# --- the same as TRL -------------------------------------------------------------


def test_twenty_steps_equal_those_of_trl(stock, tmp_path):
    config = AEPOGRPOConfig(**settings(tmp_path, max_steps=20))
    found = run(AEPOGRPOTrainer, config)
    assert_same_run(found, stock)
    assert not any(name.startswith("aepo") for line in found.state.log_history for name in line)


def test_twenty_steps_of_trl_patched(stock, tmp_path):
    with patch_trl():
        found = run(GRPOTrainer, GRPOConfig(**settings(tmp_path, max_steps=20)))
    assert_same_run(found, stock)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_shared_prefix_gives_the_same_losses(loss_type, tmp_path):
    """The router's loss is off: it counts a shared prompt once."""
    options = settings(
        tmp_path, max_steps=6, loss_type=loss_type, router_aux_loss_coef=0.0, beta=0.01,
        gradient_checkpointing=True,
    )  # fmt: skip
    path = tmp_path / "model"  # TRL loads the reference model from where the model is from
    tiny_model().save_pretrained(path)
    load = AutoModelForCausalLM.from_pretrained
    want = run(GRPOTrainer, GRPOConfig(**options), model=load(path))
    config = AEPOGRPOConfig(**options, shared_prefix=True)
    found = run(AEPOGRPOTrainer, config, model=load(path))
    assert_same_run(found, want)
    assert logged(found, "kl") == pytest.approx(logged(want, "kl"), abs=1e-5)


def test_a_shared_prefix_over_two_micro_batches(tmp_path):
    """Steps with two micro-batches of one group: their sum does not depend on the shuffle."""
    options = settings(
        tmp_path, max_steps=4, per_device_train_batch_size=GROUP, gradient_accumulation_steps=2,
        router_aux_loss_coef=0.0, num_iterations=1,
    )  # fmt: skip
    want = run(GRPOTrainer, GRPOConfig(**options), moe=False)
    calls = []
    pack = trl_prefix.pack_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trl_prefix, "pack_groups", lambda *a: calls.append([len(x) for x in a[1]]) or pack(*a)
        )
        found = run(AEPOGRPOTrainer, AEPOGRPOConfig(**options, shared_prefix=True), moe=False)
    assert set(map(tuple, calls)) == {(GROUP,)}  # every micro-batch is one whole group
    assert logged(found, "grad_norm") == pytest.approx(logged(want, "grad_norm"), abs=1e-4)
    assert logged(found, "entropy") == pytest.approx(logged(want, "entropy"), abs=1e-4)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_shared_prefix_repeats_its_bits_where_torch_is_asked_to(wanted, tmp_path, monkeypatch):
    found = []
    pack = trl_prefix.packed_groups
    monkeypatch.setattr(
        trl_prefix,
        "packed_groups",
        lambda *a, deterministic: found.append(deterministic) or pack(*a),
    )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        options = settings(tmp_path, max_steps=1)
        run(AEPOGRPOTrainer, AEPOGRPOConfig(**options, shared_prefix=True), moe=False)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    assert found and set(found) == {wanted}


# --- the patch -------------------------------------------------------------------


def names():
    return [getattr(trl_utils, n, None) for n in (trl_scores.HEAD, trl_scores._LOGITS)]


def test_the_patch_is_undone_by_the_last_one():
    before = names()
    outer, inner = patch_trl(), patch_trl()
    assert names()[0] is trl_scores._Head
    outer.undo()
    outer.undo()
    assert names()[0] is trl_scores._Head
    inner.undo()
    assert names() == before and before[0] is not trl_scores._Head
    with pytest.raises(RuntimeError, match="stop"), patch_trl():
        raise RuntimeError("stop")
    assert names() == before


def test_importing_patches_nothing():
    code = (
        "import trl.trainer.utils as u\n"
        "before = dict(vars(u))\n"
        "import qlkernels, qlkernels.hf, qwenlong, qwenlong.integrations.trl\n"
        "changed = {k for k, v in vars(u).items() if before.get(k) is not v}\n"
        "assert not changed, changed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0.0.dev0", "0.24.0"])
def test_other_versions_are_refused(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(ImportError, match=r"works with trl>=1\.16,<1\.17"):
        patch_trl()
    assert names()[0] is not trl_scores._Head


def test_without_trl(monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(ImportError, match="pip install 'trl>=1.16,<1.17'"):
        patch_trl()


def head_scores(outputs, bias):
    torch.manual_seed(0)
    hidden = torch.randn(5, 8).requires_grad_()
    weight = torch.randn(13, 8).requires_grad_()
    b = torch.randn(13).requires_grad_() if bias else None
    targets = torch.tensor([0, 12, 3, 3, 7])
    found = trl_utils._ChunkedLogProbFunction.apply(
        hidden, weight, b, targets, 0.7, 4, 2.0, 1.5, outputs
    )
    (
        found[0] @ torch.arange(1.0, 6) + (0 if found[1] is None else found[1].square().sum())
    ).backward()
    return found, [x.grad for x in (hidden, weight, b) if x is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "entropy", "is_top1")]
)
def test_the_head_gives_what_trls_gives(outputs, bias):
    want = head_scores(outputs, bias)
    with patch_trl():
        found = head_scores(outputs, bias)
    for a, b in zip(found[0], want[0], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scores_from_logits():
    torch.manual_seed(0)
    logits, index = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    calls = [
        lambda: trl_utils.selective_log_softmax(logits, index, temperature=0.5, row_mask=mask),
        lambda: trl_utils.entropy_from_logits(logits),
        lambda: torch.stack(trl_utils.selective_log_softmax_and_entropy(logits[0], index[0])),
    ]
    want = [call() for call in calls]
    with patch_trl():
        used = []
        with pytest.MonkeyPatch.context() as patch:
            ours = trl_scores.logprob_entropy
            patch.setattr(
                trl_scores, "logprob_entropy", lambda *a, **k: used.append(1) or ours(*a, **k)
            )
            found = [call() for call in calls]
    assert len(used) == 3
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- tasks -----------------------------------------------------------------------


def test_advantages_are_scaled_by_task(tmp_path):
    """What reached the loss equals ``group_advantages`` of the rewards TRL logged."""
    config = AEPOGRPOConfig(**settings(tmp_path, scale_rewards="task", max_steps=1))
    seen = {}

    class Spy(AEPOGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.update(advantages=output["advantages"], tasks=[x["task"] for x in inputs])
            return output

    trainer = run(Spy, config)
    rewards = torch.tensor(list(trainer._logs["rewards"]["vowels"]), dtype=torch.float32)
    groups = [i // GROUP for i in range(len(rewards))]
    want = group_advantages(rewards, groups, task_ids=seen["tasks"], scale="task")
    torch.testing.assert_close(seen["advantages"], want)
    assert want.abs().max() > 0.1
    assert list(trainer._logs["advantages"]) == pytest.approx(want.tolist())


def test_an_unscored_completion_has_no_advantage(tmp_path):
    def reward(completions, **columns):
        return [None if i == 1 else v for i, v in enumerate(vowels(completions))]

    config = AEPOGRPOConfig(**settings(tmp_path, scale_rewards="task", max_steps=1))
    trainer = run(AEPOGRPOTrainer, config, reward_funcs=reward)
    advantages = list(trainer._logs["advantages"])
    assert advantages[1] == 0.0 and torch.tensor(advantages).isfinite().all()
    assert sum(advantages[:GROUP]) == pytest.approx(0.0, abs=1e-5)


def test_task_balanced_batches(tmp_path):
    config = AEPOGRPOConfig(
        **settings(
            tmp_path, balance_tasks=True, max_steps=8, per_device_train_batch_size=4 * GROUP,
            num_iterations=1,
        )
    )  # fmt: skip
    batches = []

    def reward(completions, task, prompts, **_columns):
        batches.append(list(zip(prompts, task, strict=True)))
        return vowels(completions)

    run(AEPOGRPOTrainer, config, reward_funcs=reward)
    assert len(batches) == 8
    for batch in batches:
        assert Counter(task for _, task in batch) == {"needle": 2 * GROUP, "sums": 2 * GROUP}
        assert [p for p, _ in batch[::GROUP]] == [p for p, _ in batch[GROUP - 1 :: GROUP]]
    # every prompt of a task is seen before one is seen again
    order = [p for batch in batches for p, task in batch[::GROUP] if task == "needle"]
    assert [set(order[:4]), set(order[4:8])] == [set(order)] * 2 and len(set(order)) == 4


def test_repeated_task_batches_are_a_function_of_the_epoch():
    def sampler():
        balanced = TaskBalancedSampler(["a", "b"] * 4, 2, seed=3)
        return RepeatedTaskBatches(balanced, copies=2, repeats=2)

    first = sampler()
    one, two = list(first), list(first)
    assert len(one) == len(first) == 4 * 2 * 2 * 2 and one != two
    assert one[0] == one[1] and one[:4] == one[4:8]
    again = sampler()
    next(iter(again))  # an iteration that is given up changes nothing
    again.set_epoch(1)
    assert list(again) == two
    again.set_epoch(0)
    assert list(again) == one


@pytest.mark.parametrize("stop", [2, 3])
def test_balanced_batches_go_on_after_a_checkpoint(stop, tmp_path):
    """An epoch is two batches (of two tasks, 3 needles and 6 sums, four prompts each): checkpoints
    at the end of an epoch and within one.
    """
    options = settings(
        tmp_path, balance_tasks=True, max_steps=5, per_device_train_batch_size=4 * GROUP,
        num_iterations=1, save_strategy="steps", save_steps=stop, save_only_model=False,
    )  # fmt: skip
    seen = []

    def reward(completions, prompts, **_columns):
        seen.append(list(prompts[::GROUP]))
        return vowels(completions)

    arguments = dict(reward_funcs=reward, train_dataset=dataset(9), moe=False)
    run(AEPOGRPOTrainer, AEPOGRPOConfig(**options), **arguments)
    want, seen[:] = list(seen), []
    folder = str(tmp_path / f"checkpoint-{stop}")
    run(AEPOGRPOTrainer, AEPOGRPOConfig(**options), resume=folder, **arguments)
    assert seen == want[stop:] and len({tuple(batch) for batch in want}) == 5


# --- AEPO ------------------------------------------------------------------------


def advantages_of(trainer_options, **run_options):
    """Advantages that reach the loss, one list a generation batch, and the trainer."""
    seen = []

    class Spy(AEPOGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append(output["advantages"].clone())
            return output

    return seen, run(Spy, AEPOGRPOConfig(**trainer_options), **run_options)


def test_aepo_drops_negative_advantages_after_a_step_of_high_entropy(tmp_path):
    """A random model over about 100 tokens has 4 nats and more: above 1, so from the second batch
    on it drops; the first one knows no entropy yet.
    """
    seen, trainer = advantages_of(
        settings(tmp_path, aepo_low=0.5, aepo_high=1.0, max_steps=3, num_iterations=1)
    )
    assert (seen[0] < 0).any() and all((a >= 0).all() and (a > 0).any() for a in seen[1:])
    assert logged(trainer, "aepo/dropping") == [0.0, 1.0, 1.0]
    fractions = logged(trainer, "aepo/dropped_fraction")
    assert fractions[0] == 0 and all(0 < f < 1 for f in fractions[1:])
    assert len(logged(trainer, "aepo/entropy")) == 3
    # every completion has the same length where none ends early: then the two means agree
    assert logged(trainer, "aepo/entropy") == pytest.approx(logged(trainer, "entropy"), abs=0.2)


def test_aepo_decides_on_the_batch_itself_with_a_scoring_pass(tmp_path):
    options = dict(aepo_low=0.5, aepo_high=1.0, max_steps=2, num_iterations=1)
    seen, trainer = advantages_of(settings(tmp_path, aepo_entropy_source="scoring_pass", **options))
    assert all((a >= 0).all() for a in seen)
    assert logged(trainer, "aepo/dropping") == [1.0, 1.0]
    assert trainer._controller.last_entropy == pytest.approx(
        logged(trainer, "aepo/entropy")[-1], abs=1e-4
    )


@pytest.mark.parametrize("source", ["previous_step", "scoring_pass"])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_steps_without_a_token(source, shared_prefix, tmp_path):
    """Completions of one token never end, and truncated ones are masked: no entropy, no loss."""
    options = settings(
        tmp_path, max_steps=2, max_completion_length=1, mask_truncated_completions=True,
        num_iterations=1, router_aux_loss_coef=0.0,
    )  # fmt: skip
    config = AEPOGRPOConfig(
        **options, aepo_low=0.5, aepo_high=1.0, aepo_entropy_source=source,
        shared_prefix=shared_prefix,
    )  # fmt: skip
    trainer = run(AEPOGRPOTrainer, config)
    assert trainer.losses == [0.0, 0.0] and logged(trainer, "completions/clipped_ratio")[0] == 1
    assert trainer._controller.last_entropy is None and not any(logged(trainer, "aepo/dropping"))


def test_aepo_below_the_bounds_changes_nothing(tmp_path):
    options = settings(tmp_path, max_steps=4)
    want = run(GRPOTrainer, GRPOConfig(**options))
    found = run(AEPOGRPOTrainer, AEPOGRPOConfig(**options, aepo_low=90.0, aepo_high=100.0))
    assert_same_run(found, want)
    assert not any(logged(found, "aepo/dropping"))


def test_the_decision_survives_a_checkpoint(tmp_path):
    options = settings(
        tmp_path, aepo_low=0.5, aepo_high=1.0, num_iterations=1, save_strategy="steps",
        save_steps=2, max_steps=2,
    )  # fmt: skip
    run(AEPOGRPOTrainer, AEPOGRPOConfig(**options))
    folder = tmp_path / "checkpoint-2"
    assert (folder / STATE_FILE).is_file()
    seen, trainer = advantages_of(options | dict(max_steps=3), resume=str(folder))
    assert logged(trainer, "aepo/dropping")[-1] == 1.0
    assert len(seen) == 1 and (seen[0] >= 0).all()


# --- refusals --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(scale_rewards="tasks"), "must be one of group, batch, none, task"),
        (dict(aepo_low=0.1), "both aepo_low and aepo_high"),
        (dict(aepo_low=0.3, aepo_high=0.1), "0 <= low <= high"),
        (dict(aepo_low=0.1, aepo_high=0.3, aepo_mode="latched"), "mode must be one of"),
        (dict(aepo_entropy="mean"), "kind must be one of"),
        (dict(task_weights={"a": 1.0}), "belongs to balance_tasks"),
        (dict(balance_tasks=True, shuffle_dataset=False), "leave shuffle_dataset=True"),
        (
            dict(scale_rewards="task", multi_objective_aggregation="normalize_then_sum"),
            "sum_then_normalize",
        ),
    ],
)
def test_settings_that_do_not_fit(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        AEPOGRPOConfig(**settings(tmp_path, **options))


def test_a_plain_config_and_a_missing_column_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be an AEPOGRPOConfig"):
        AEPOGRPOTrainer(tiny_model(), vowels, GRPOConfig(**settings(tmp_path)), dataset())
    for options in (dict(scale_rewards="task"), dict(balance_tasks=True)):
        config = AEPOGRPOConfig(**settings(tmp_path, **options, task_column="kind"))
        with pytest.raises(ValueError, match="no column 'kind', only prompt, task"):
            AEPOGRPOTrainer(tiny_model(), vowels, config, dataset())
    config = AEPOGRPOConfig(**settings(tmp_path, scale_rewards="task"))
    bare = dataset().remove_columns("task")
    for evaluated in (bare, {"a": dataset(), "b": bare}):  # at once, not at the first evaluation
        with pytest.raises(ValueError, match="no column 'task', only prompt"):
            AEPOGRPOTrainer(tiny_model(), vowels, config, dataset(), evaluated)
    config = AEPOGRPOConfig(**settings(tmp_path, balance_tasks=True))
    with pytest.raises(ValueError, match="IterableDataset"):
        AEPOGRPOTrainer(tiny_model(), vowels, config, dataset().to_iterable_dataset())


def test_completions_padded_on_the_left_are_refused():
    ids, mask = torch.ones(1, 5, dtype=torch.long), torch.tensor([[1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="on the right only"):
        trl_prefix.group_rows(ids, mask, 3)


def test_arguments_may_be_positional_as_in_trl(tmp_path):
    config = AEPOGRPOConfig(**settings(tmp_path, scale_rewards="task"))
    tokenizer, held_out = tiny_tokenizer(), dataset(2)
    trainer = AEPOGRPOTrainer(
        tiny_model(moe=False), vowels, config, dataset(), held_out, tokenizer, None, [Marker()]
    )
    assert trainer.processing_class is tokenizer and len(trainer.eval_dataset) == 2
    assert any(isinstance(x, Marker) for x in trainer.callback_handler.callbacks)


class Marker(TrainerCallback):
    pass


def test_prompts_of_one_token_without_completions_keep_a_row():
    """Nothing else would go through the model; the mask of the loss hides it as before."""
    ids, mask = torch.tensor([[0, 7, 1, 2], [0, 7, 3, 4]]), torch.tensor([[0, 1, 0, 0]] * 2)
    layout, rows = trl_prefix.group_rows(ids, mask, 2)
    assert rows.tolist() == [0, 1] and layout.answer_lengths == ((1, 0),)
    assert layout.input_ids.tolist() == [7] and layout.target_ids.tolist() == [1]


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_step_of_one_token_prompts_that_are_all_truncated(one_pass, tmp_path):
    options = settings(
        tmp_path, max_steps=1, max_completion_length=1, mask_truncated_completions=True,
        num_iterations=1, shared_prefix=True, one_pass_loss=one_pass, learning_rate=0.1,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["a", "b"] * 4})
    want = [p.detach().clone() for p in tiny_model(moe=False).parameters()]
    found = run(AEPOGRPOTrainer, AEPOGRPOConfig(**options), moe=False, train_dataset=prompts)
    assert found.losses == [0.0] and logged(found, "grad_norm") == [0.0]
    for parameter, before in zip(found.model.parameters(), want, strict=True):
        assert torch.equal(parameter, before)


def test_rows_are_grouped_by_prompt():
    """Rows 0 and 2 share the prompt [7, 8]; row 1 has [8]; its completion is empty."""
    ids = torch.tensor([[7, 8, 1, 2, 0], [0, 8, 0, 0, 0], [7, 8, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    layout, rows = trl_prefix.group_rows(ids, mask, 3)
    assert rows.tolist() == [0, 2, 1]
    assert layout.prompt_lengths == (2, 1) and layout.answer_lengths == ((2, 3), (0,))
    assert layout.target_ids.tolist() == [8, 1, 2, 3, 4, 5]
