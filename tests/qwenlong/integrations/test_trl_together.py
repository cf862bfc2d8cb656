"""Our parts together, and with other trainers: each run equals the one of TRL alone."""

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl_runs import dataset, logged, run, settings, tiny_model, vowels  # noqa: E402

from qlkernels import hf  # noqa: E402
from qwenlong.integrations import trl_scores  # noqa: E402
from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer, patch_trl  # noqa: E402
from qwenlong.tiny import tiny_tokenizer  # noqa: E402


@pytest.fixture
def head_calls(monkeypatch):
    """How often our head computed something."""
    calls = []
    ours = trl_scores.linear_logprob
    monkeypatch.setattr(
        trl_scores, "linear_logprob", lambda *a, **k: calls.append(1) or ours(*a, **k)
    )
    return calls


def assert_same(found, want, names=("loss", "grad_norm")):
    for name in names:
        values = logged(want, name)
        assert len(values) >= 2 and logged(found, name) == pytest.approx(values, abs=1e-4), name


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_peft(shared_prefix, tmp_path, head_calls):
    peft = pytest.importorskip("peft", reason="pip install peft")
    options = settings(tmp_path, max_steps=3, router_aux_loss_coef=0.0, gradient_checkpointing=True)
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    want = run(GRPOTrainer, GRPOConfig(**options), peft_config=adapter)
    config = AEPOGRPOConfig(**options, shared_prefix=shared_prefix)
    found = run(AEPOGRPOTrainer, config, peft_config=adapter)
    assert head_calls
    assert_same(found, want, ("loss", "grad_norm", "entropy"))


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_model_with_everything_applied(shared_prefix, tmp_path, head_calls):
    options = settings(tmp_path, max_steps=3, router_aux_loss_coef=0.0)
    want = run(GRPOTrainer, GRPOConfig(**options))
    config = AEPOGRPOConfig(**options, shared_prefix=shared_prefix)
    found = run(AEPOGRPOTrainer, config, model=hf.apply(tiny_model()))
    assert head_calls
    assert_same(found, want, ("loss", "grad_norm", "entropy", "reward"))


def test_rloo_patched(tmp_path, head_calls):
    options = settings(tmp_path, max_steps=3, num_iterations=1, beta=0.0)
    want = run(RLOOTrainer, RLOOConfig(**options))
    with patch_trl():
        found = run(RLOOTrainer, RLOOConfig(**options))
    assert head_calls
    assert_same(found, want, ("loss", "grad_norm", "entropy"))


def finetune(trainer_class, config, data):
    path = f"{config.output_dir}/model"  # DPO loads its reference from where the model is from
    tiny_model().save_pretrained(path)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(path),
        args=config,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def plain_settings(folder):
    return dict(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, max_steps=3, per_device_train_batch_size=4, seed=5,
        learning_rate=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trainers_that_ask_for_more_statistics(kind, tmp_path, head_calls):
    """Their head is TRL's own, patched or not; DPO's reference model asks for less, and is ours."""
    data = dataset()
    if kind == "sft":
        trainer_class, config = SFTTrainer, SFTConfig(**plain_settings(tmp_path), max_length=32)
        data = data.rename_column("prompt", "text").remove_columns("task")
    else:
        trainer_class, config = DPOTrainer, DPOConfig(**plain_settings(tmp_path))
        data = data.remove_columns("task").map(lambda x: {"chosen": "yes", "rejected": "no way"})
    want = finetune(trainer_class, config, data)
    with patch_trl():
        found = finetune(trainer_class, config, data)
    if kind == "sft":
        assert not head_calls and logged(found, "loss") == logged(want, "loss")
    assert_same(found, want)
    assert logged(want, "loss")[0] > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_of_transformers(smoothing, tmp_path):
    """With label smoothing it asks for logits, and gets them."""
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (12, 9), generator=g)]

    def trained(model):
        args = TrainingArguments(
            **plain_settings(tmp_path), gradient_accumulation_steps=2,
            label_smoothing_factor=smoothing, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4])
        trainer.train()
        return trainer

    want, found = trained(tiny_model()), trained(hf.apply(tiny_model()))
    assert_same(found, want, ("loss", "grad_norm", "eval_loss"))
    assert logged(want, "loss")[0] > 1


def test_the_reward_function_is_worth_learning_from():
    """Otherwise every comparison here would be of zeros."""
    assert vowels(["aeiou", "xyz", "ab"]) == [1.0, 0.0, 0.5]
