"""The policy loss in one pass inside of the real TRL, against TRL's own loss and gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402
from trl_runs import GROUP, dataset, logged, run, settings, tiny_model, vowels  # noqa: E402

from qwenlong.integrations import trl_one_pass  # noqa: E402
from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer  # noqa: E402
from qwenlong.tiny import tiny_tokenizer  # noqa: E402

METRICS = (
    "entropy", "grad_norm", "aux_loss", "kl", "clip_ratio/low_mean", "clip_ratio/low_min",
    "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "cispo_clip_ratio",
)  # fmt: skip


class Recorded(AEPOGRPOTrainer):
    """Keeps what ``linear_policy_loss`` gave as loss, and which scores TRL computed itself."""

    def _loss_in_one_pass(self, model, inputs):
        made = []
        with pytest.MonkeyPatch.context() as patch:
            original = trl_one_pass.OnePassLoss.with_gradient
            patch.setattr(
                trl_one_pass.OnePassLoss,
                "with_gradient",
                lambda loss, value: made.append(loss) or original(loss, value),
            )
            value = super()._loss_in_one_pass(model, inputs)
        self.policy_losses = [*getattr(self, "policy_losses", []), made[0].loss.item()]
        return value


def assert_same_run(found, want, tolerance=1e-4):
    assert len(found.losses) == len(want.losses) == len(found.policy_losses)
    assert max(map(abs, want.losses)) > 1e-2, "nothing was learned, so nothing is compared"
    assert found.losses == pytest.approx(want.losses, abs=tolerance)
    for name in METRICS:
        assert logged(found, name) == pytest.approx(logged(want, name), abs=tolerance), name
    assert logged(found, "grad_norm") and logged(found, "entropy")


# --- one micro-batch, every input by hand -------------------------------------------


def micro_batch(vocabulary: int, *, old: bool = True, **changes) -> dict:
    """Two prompts in turns, padded on the left, with completions of 0 to 6 tokens."""
    generator = torch.Generator().manual_seed(7)

    def ids(*shape):
        return torch.randint(3, vocabulary, shape, generator=generator)

    def noise(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    prompts = ids(2, 5).repeat(4, 1)
    lengths = torch.tensor([6, 1, 3, 0, 5, 6, 2, 4])
    mask = (torch.arange(6) < lengths[:, None]).long()
    prompt_mask = torch.ones(8, 5, dtype=torch.long)
    prompt_mask[1::2, :2] = 0
    found = dict(
        prompt_ids=prompts, prompt_mask=prompt_mask, completion_ids=ids(8, 6),
        completion_mask=mask, num_items_in_batch=mask.sum() + 3,
        advantages=torch.tensor([1.0, -1.0, 0.5, 2.0, -0.7, 0.0, 1.5, -2.0]),
    )  # fmt: skip
    near = -4.3 + noise(
        8, 6, scale=0.5
    )  # log(1 / 74) = -4.3 is where the model of random weights is
    if old:
        found["old_per_token_logps"] = near * mask
    found["ref_per_token_logps"] = (near + noise(8, 6, scale=0.3)) * mask
    found["importance_sampling_ratio"] = noise(8, 6).exp()
    return found | changes


def trainer_of(trainer_class, config_class, folder, model, **options):
    config = config_class(**settings(folder, **options))
    found = trainer_class(
        model, reward_funcs=vowels, args=config, train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    found.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    found.model.train()
    return found


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    return loss.item(), gradients, {k: v[-1] for k, v in trainer._metrics["train"].items()}


CASES = {
    "on-policy": (dict(loss_type="grpo"), dict(old=False)),
    "grpo": (dict(loss_type="grpo", delta=1.5), {}),
    "grpo, kl": (dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=False), {}),
    "grpo, unbiased kl": (dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=True), {}),
    "on-policy, unbiased kl": (
        dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=True), dict(old=False),
    ),
    "grpo by sequence": (dict(loss_type="grpo", importance_sampling_level="sequence"), {}),
    "grpo by sequence, unbiased kl": (
        dict(
            loss_type="grpo", importance_sampling_level="sequence", beta=0.1,
            use_bias_correction_kl=True, delta=1.1,
        ),
        {},
    ),
    "by sequence, on-policy": (
        dict(loss_type="grpo", importance_sampling_level="sequence"), dict(old=False),
    ),
    "bnpo": (dict(loss_type="bnpo", epsilon=0.1, epsilon_high=0.3), {}),
    "dr_grpo": (dict(loss_type="dr_grpo", gradient_accumulation_steps=3), {}),
    "dapo": (
        dict(loss_type="dapo", gradient_accumulation_steps=2, steps_per_generation=4), {},
    ),
    "dapo, a wide clip": (dict(loss_type="dapo", epsilon=1.5, epsilon_high=2.0), {}),
    "luspo": (dict(loss_type="luspo", importance_sampling_level="sequence"), {}),
    "luspo by token": (dict(loss_type="luspo", beta=0.1), {}),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.2, beta=0.1), {}),
    "cispo, unbiased kl": (
        dict(loss_type="cispo", epsilon_high=1.2, beta=0.1, use_bias_correction_kl=True), {},
    ),
}  # fmt: skip


# every way of TRL's rows to the head, and every case in two of them
WAYS = [(name, shared, shared) for name in CASES for shared in (False, True)]
WAYS += [("grpo, kl", False, True), ("grpo, kl", True, False), ("luspo", False, True)]


@pytest.mark.parametrize("name, shared_prefix, compact", WAYS)
def test_loss_gradients_and_metrics_of_one_micro_batch(
    name, shared_prefix, compact, tmp_path, monkeypatch
):
    """``compact``: TRL hands the head the rows that count, as it does where it uses Triton."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    options, inputs = CASES[name]
    path = tmp_path / "model"  # a reference model is loaded from where the model is from
    tiny_model(moe=False).save_pretrained(path)
    load = AutoModelForCausalLM.from_pretrained
    inputs = micro_batch(load(path).config.vocab_size, **inputs)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, load(path), **options)
    ours = trainer_of(
        Recorded, AEPOGRPOConfig, tmp_path, load(path), one_pass_loss=True,
        shared_prefix=shared_prefix, **options,
    )  # fmt: skip
    want, want_gradients, want_metrics = loss_and_gradients(stock, inputs)
    found, gradients, metrics = loss_and_gradients(ours, inputs)
    assert abs(want) > 1e-3 and found == pytest.approx(want, abs=1e-5)
    assert ours.policy_losses == pytest.approx([want], abs=1e-5)
    assert metrics == pytest.approx(want_metrics, abs=1e-5)
    assert "entropy" in metrics and gradients.keys() == want_gradients.keys()
    for parameter, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=2e-4, atol=2e-6)
    assert want_gradients["lm_head.weight"].norm() > 1e-2


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_importance_ratios_of_vllm_tool_tokens_and_an_advantage_a_token(
    by_sequence, shared_prefix, tmp_path
):
    """Tokens that the loss leaves out have no score here: their ratio must not be infinite."""
    model = tiny_model(moe=False)
    inputs = micro_batch(model.config.vocab_size)
    tool_mask = torch.ones(8, 6, dtype=torch.long)
    tool_mask[7, :2] = 0
    inputs |= dict(
        tool_mask=tool_mask, advantages=inputs["advantages"][:, None] + torch.arange(6.0)
    )
    if by_sequence:
        inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"][:, :1]
    options = dict(loss_type="bnpo", beta=0.0)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, tiny_model(moe=False), **options)
    ours = trainer_of(
        Recorded, AEPOGRPOConfig, tmp_path, model, one_pass_loss=True,
        shared_prefix=shared_prefix, **options,
    )  # fmt: skip
    stock.use_vllm = ours.use_vllm = True
    want, want_gradients, want_metrics = loss_and_gradients(stock, inputs)
    hostile = inputs["old_per_token_logps"].clone()
    hostile[7, :2] = -300.0  # tool tokens, A < 0: e^300 times 0 would be NaN
    found, gradients, metrics = loss_and_gradients(ours, inputs | {"old_per_token_logps": hostile})
    assert [found, *ours.policy_losses] == pytest.approx([want] * 2, abs=1e-5)
    assert metrics == pytest.approx(want_metrics, abs=1e-5)
    for parameter, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_a_micro_batch_with_as_many_tokens_as_completions(compact, tmp_path, monkeypatch):
    """Eight tokens in eight completions, of which two have none: no value is one a sequence."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    lengths = torch.tensor([1, 0, 2, 1, 0, 1, 2, 1])
    mask = (torch.arange(6) < lengths[:, None]).long()
    model = tiny_model(moe=False)
    inputs = micro_batch(model.config.vocab_size, completion_mask=mask)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, tiny_model(moe=False))
    ours = trainer_of(Recorded, AEPOGRPOConfig, tmp_path, model, one_pass_loss=True)
    want, want_gradients, _ = loss_and_gradients(stock, inputs)
    found, gradients, _ = loss_and_gradients(ours, inputs)
    assert [found, *ours.policy_losses] == pytest.approx([want] * 2, abs=1e-5)
    for parameter, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_a_micro_batch_without_a_token(compact, shared_prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    model = tiny_model(moe=False)
    nothing = torch.zeros(8, 6, dtype=torch.long)
    inputs = micro_batch(model.config.vocab_size, completion_mask=nothing)
    ours = trainer_of(
        AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, model, one_pass_loss=True,
        shared_prefix=shared_prefix,
    )  # fmt: skip
    loss, gradients, metrics = loss_and_gradients(ours, inputs)
    assert loss == 0.0 and metrics["entropy"] == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_the_tied_head_gets_both_gradients(tmp_path):
    """The embedding is the head: its gradient is a sum of two."""

    def tied():
        model = tiny_model(moe=False)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    inputs = micro_batch(tied().config.vocab_size)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, tied())
    ours = trainer_of(AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, tied(), one_pass_loss=True)
    _, want, _ = loss_and_gradients(stock, inputs)
    _, found, _ = loss_and_gradients(ours, inputs)
    assert "lm_head.weight" not in want
    for parameter, gradient in want.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=2e-4, atol=2e-6)


def test_soft_capped_and_scaled_logits(tmp_path):
    """TRL takes both from the model's configuration."""

    def capped():
        model = tiny_model(moe=False)
        model.config.final_logit_softcapping, model.config.logit_scale = 0.5, 1.5
        return model

    inputs = micro_batch(capped().config.vocab_size)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, capped())
    ours = trainer_of(AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, capped(), one_pass_loss=True)
    plain = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, tiny_model(moe=False))
    want, want_gradients, _ = loss_and_gradients(stock, inputs)
    found, gradients, _ = loss_and_gradients(ours, inputs)
    assert found == pytest.approx(want, abs=1e-5) and want_gradients.keys() == gradients.keys()
    assert abs(loss_and_gradients(plain, inputs)[0] - want) > 1e-3
    for parameter, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=2e-4, atol=2e-6)


def test_a_head_in_bf16_with_a_bias(tmp_path):
    """TRL's products are in the dtype of the hidden states, here fp32."""

    def biased():
        model = tiny_model(moe=False)
        generator = torch.Generator().manual_seed(3)
        bias = torch.randn(model.config.vocab_size, generator=generator)
        model.lm_head.bias = torch.nn.Parameter(bias)
        model.lm_head.bfloat16()
        return model

    inputs = micro_batch(biased().config.vocab_size)
    stock = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, biased(), temperature=0.7)
    ours = trainer_of(
        AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, biased(), one_pass_loss=True, temperature=0.7
    )
    want, want_gradients, _ = loss_and_gradients(stock, inputs)
    found, gradients, _ = loss_and_gradients(ours, inputs)
    assert found == pytest.approx(want, abs=1e-5)
    assert want_gradients["lm_head.bias"].norm() > 1e-2
    for parameter, gradient in want_gradients.items():
        assert gradients[parameter].dtype == gradient.dtype
        assert (gradients[parameter] - gradient).norm() < 2e-3 * gradient.norm(), parameter


def test_adapters_over_a_frozen_head(tmp_path):
    """The reference is the model without its adapters."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    lora = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = settings(tmp_path, max_steps=4, beta=0.05)
    want, found = (
        run(kind, config, moe=False, peft_config=peft.LoraConfig(**lora))
        for kind, config in (
            (GRPOTrainer, GRPOConfig(**options)),
            (Recorded, AEPOGRPOConfig(**options, one_pass_loss=True)),
        )
    )
    assert_same_run(found, want)
    assert max(logged(want, "kl")) > 0
    assert all("lora" in n for n, p in found.model.named_parameters() if p.requires_grad)


def test_autocast_to_bf16(tmp_path):
    """Against our scores in two passes, which have the same operands; and the gradients are fp32,
    as the weights are.
    """
    inputs = micro_batch(tiny_model(moe=False).config.vocab_size)
    trainers = [
        trainer_of(
            AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, tiny_model(moe=False), bf16=True,
            one_pass_loss=one_pass,
        )
        for one_pass in (False, True)
    ]  # fmt: skip
    (want, want_gradients, _), (found, gradients, _) = (
        loss_and_gradients(trainer, inputs) for trainer in trainers
    )
    assert found == pytest.approx(want, abs=1e-4)
    for parameter, gradient in want_gradients.items():
        assert gradients[parameter].dtype == torch.float32
        assert (gradients[parameter] - gradient).norm() < 2e-2 * gradient.norm(), parameter


# --- whole runs --------------------------------------------------------------------------

RUNS = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo"),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_equal_those_of_trl(name, tmp_path):
    """grpo with a mixture of experts, its router's loss and checkpointed activations."""
    moe = name == "grpo"
    options = settings(tmp_path, max_steps=20, gradient_checkpointing=moe, **RUNS[name])
    want = run(GRPOTrainer, GRPOConfig(**options), moe=moe)
    found = run(Recorded, AEPOGRPOConfig(**options, one_pass_loss=True), moe=moe)
    assert_same_run(found, want)
    routed = [0.001 * x for x in logged(want, "aux_loss")] if moe else [0.0] * 20
    alone = [loss - x for loss, x in zip(want.losses, routed, strict=True)]
    assert found.policy_losses == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_reference_model_truncated_completions_and_accumulation(name, shared_prefix, tmp_path):
    """Three micro-batches of one group a step, and rows that the loss leaves out. TRL's own
    trainer shuffles groups apart, so the trainer without one pass is what is compared with.
    """
    path = tmp_path / "model"
    tiny_model(moe=False).save_pretrained(path)
    load = AutoModelForCausalLM.from_pretrained
    options = settings(
        tmp_path, max_steps=4, per_device_train_batch_size=GROUP, gradient_accumulation_steps=3,
        num_iterations=2, mask_truncated_completions=True, beta=0.05, max_completion_length=20,
        gradient_checkpointing=False, **RUNS[name],
    )  # fmt: skip
    want = run(
        AEPOGRPOTrainer if shared_prefix else GRPOTrainer,
        AEPOGRPOConfig(**options, shared_prefix=True) if shared_prefix else GRPOConfig(**options),
        model=load(path),
    )
    config = AEPOGRPOConfig(**options, shared_prefix=shared_prefix, one_pass_loss=True)
    found = run(Recorded, config, model=load(path))
    assert_same_run(found, want)
    assert 0 < logged(want, "completions/clipped_ratio")[0] < 1 and max(logged(want, "kl")) > 0


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_aepo_is_the_same_in_one_pass(shared_prefix, tmp_path):
    options = settings(
        tmp_path, max_steps=4, aepo_low=0.5, aepo_high=1.0, shared_prefix=shared_prefix
    )
    want = run(AEPOGRPOTrainer, AEPOGRPOConfig(**options))
    found = run(Recorded, AEPOGRPOConfig(**options, one_pass_loss=True))
    assert_same_run(found, want)
    assert max(logged(want, "aepo/dropped_fraction")) > 0
    for name in ("aepo/entropy", "aepo/dropping", "aepo/dropped_fraction"):
        assert logged(found, name) == pytest.approx(logged(want, name), abs=1e-4), name


def test_evaluation_is_the_same_and_makes_no_gradients(tmp_path):
    options = settings(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=GROUP, num_generations_eval=GROUP,
    )  # fmt: skip
    wanted = ("eval_loss", "eval_entropy", "eval_clip_ratio/high_max")
    want, found = (
        run(kind, config, eval_dataset=dataset(2))
        for kind, config in (
            (GRPOTrainer, GRPOConfig(**options)),
            (Recorded, AEPOGRPOConfig(**options, one_pass_loss=True)),
        )
    )
    assert len(found.policy_losses) == 2  # of the steps alone
    for name in wanted:
        assert len(logged(want, name)) == 2
        assert logged(found, name) == pytest.approx(logged(want, name), abs=1e-4), name


def test_scores_outside_of_the_loss_are_not_touched(tmp_path):
    """Old log-probs come from the scores as ever, and the patch does not outlive a step."""
    before = trl_utils._ChunkedLogProbFunction
    calls = []

    class Spy(AEPOGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            calls.append(self._one_pass is not None)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    run(Spy, AEPOGRPOConfig(**settings(tmp_path, max_steps=2), one_pass_loss=True))
    assert calls == [False, True, True]
    assert trl_utils._ChunkedLogProbFunction is before


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(loss_type="sapo"), "loss_type must be one of grpo, .*, got 'sapo'"),
        (dict(loss_type="vespo"), "got 'vespo'"),
        (
            dict(loss_type="cispo", epsilon_high=3.0, importance_sampling_level="sequence"),
            "needs importance_sampling_level='token'",
        ),
        (dict(loss_type="cispo"), "epsilon_high of at least 1, the bound of the ratio, got 0.2"),
        (dict(epsilon=-0.1), "at least 0, got -0.1 and -0.1"),
        (dict(delta=1.0), "delta must be greater than 1, got 1.0"),
        (dict(top_entropy_quantile=0.5), "top_entropy_quantile must be 1"),
        (dict(entropy_coef=0.01), "entropy_coef must be 0"),
        (dict(use_adaptive_entropy=True), "use_adaptive_entropy is not supported"),
        (dict(off_policy_mask_threshold=0.5), "off_policy_mask_threshold is not supported"),
        (dict(torch_compile=True), "torch_compile is not supported"),
    ],
)
def test_settings_that_do_not_fit(options, words, tmp_path):
    AEPOGRPOConfig(**settings(tmp_path, **options))
    with pytest.raises(ValueError, match=f"one_pass_loss=True: .*{words}"):
        AEPOGRPOConfig(**settings(tmp_path, one_pass_loss=True, **options))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    """The model would be copied, and each copy see a part of the rows."""
    config = AEPOGRPOConfig(**settings(tmp_path, one_pass_loss=True))
    config._n_gpu = 2
    with pytest.raises(ValueError, match="one process a GPU, with accelerate or torchrun"):
        AEPOGRPOTrainer(tiny_model(moe=False), vowels, config, dataset())


def test_rows_that_are_not_those_of_the_loss_are_refused(monkeypatch):
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
    head = trl_one_pass.OnePassLoss({}, torch.tensor([[1, 1], [1, 0]]), {})
    with pytest.raises(RuntimeError, match="got 2 rows for 3 completion tokens"):
        head.apply(torch.ones(2, 4), torch.ones(5, 4), None, torch.zeros(2).long(), 1.0, 8)


def test_a_forward_without_the_head_is_refused(tmp_path, monkeypatch):
    model = tiny_model(moe=False)
    ours = trainer_of(AEPOGRPOTrainer, AEPOGRPOConfig, tmp_path, model, one_pass_loss=True)
    monkeypatch.setattr(trl_one_pass.OnePassLoss, "as_head", lambda *_: nullcontext())
    with pytest.raises(RuntimeError, match="did not reach TRL's head"):
        loss_and_gradients(ours, micro_batch(model.config.vocab_size))
    assert ours._one_pass is None


def test_rows_at_a_time():
    """About 512 MB of 2-byte values: 2^28 of them."""

    def rows(V, is_cuda=True):
        return trl_one_pass.chunk_tokens(SimpleNamespace(shape=(V, 8), is_cuda=is_cuda))

    assert rows(151_936) == 2048 and rows(2**18) == 1024 and rows(2**30) == 1
    assert rows(151_936, is_cuda=False) is None
