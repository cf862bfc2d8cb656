"""``hf.apply``: every supported family gives the losses and gradients of the untouched model, and
what people do with a model still works.
"""

import copy
import sys

import pytest
import torch
from torch import nn

from qlkernels import hf, logprob_entropy
from qlkernels.hf import lm_head
from qlkernels.testing import assert_as_accurate

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    "cohere": dict(logit_scale=0.5),
    "gemma2": dict(head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "llama": {},
    "mistral": dict(sliding_window=None),
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    "olmoe": EXPERTS,
    "qwen2": dict(tie_word_embeddings=True),
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=16),
    "qwen3": dict(head_dim=8),
    "qwen3_moe": EXPERTS | dict(head_dim=8, norm_topk_prob=True),
}


def make(family="qwen3_moe", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **COMMON | FAMILIES[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model.to(dtype).train()


def parts(family):
    return {part: part in hf.supported()[family] for part in hf.PARTS}


def batch(padded=True):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 11), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0  # on the left, as trainers pad prompts
        mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :5] = -100
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, labels=labels)


def step(model, **inputs):
    model.zero_grad()
    found = model(**inputs)
    found.loss.backward()
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, want, rtol=2e-5):
    torch.testing.assert_close(found[0].loss, want[0].loss, rtol=rtol, atol=1e-6)
    assert found[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        atol = rtol * max(grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=atol, msg=name)


def test_supported_names_the_families_that_are_tested():
    assert set(hf.supported()) == set(FAMILIES)
    assert hf.supported()["qwen3_moe"] == ("moe", "attention", "lm_head")
    assert hf.supported()["llama"] == ("attention", "lm_head")
    assert hf.supported()["gemma2"] == ("lm_head",)


# --- equality ----------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_untouched_model(family, padded):
    model, inputs = make(family), batch(padded)
    if not padded:
        del inputs["attention_mask"]
    want = step(model, **inputs)
    assert hf.apply(model, **parts(family)) is model
    found = step(model, **inputs)
    assert found[0].logits is None
    assert_same_step(found, want)
    hf.undo(model)
    again = step(model, **inputs)
    assert torch.equal(again[0].loss, want[0].loss)
    assert again[0].logits is not None


def test_the_loss_is_that_of_the_formula():
    """Two tokens, a head of zeros: every token has probability 1/V."""
    model = make("llama")
    nn.init.zeros_(model.lm_head.weight)
    hf.apply(model)
    ids = torch.tensor([[5, 7, 9]])
    loss = model(input_ids=ids, labels=torch.tensor([[5, 7, -100]])).loss
    assert loss.item() == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("options", ["num_items", "shift_labels", "router", "positional", "bf16"])
def test_options_of_the_models_own_forward(options):
    model, inputs = make("qwen3_moe"), batch()
    if options == "num_items":
        inputs["num_items_in_batch"] = torch.tensor(40)
    elif options == "shift_labels":
        inputs["shift_labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[
            :, 1:
        ].contiguous()
    elif options == "router":
        inputs["output_router_logits"] = True
        model.router_aux_loss_coef = 0.5
    elif options == "bf16":
        model = model.bfloat16()
    args = (inputs.pop("input_ids"), inputs.pop("attention_mask"))
    want = model(*args, **inputs)
    hf.apply(model)
    found = model(*args, **inputs)
    # untouched bf16 logits are rounded to 8 bits before the loss
    rtol = 5e-3 if options == "bf16" else 2e-6
    torch.testing.assert_close(found.loss, want.loss, rtol=rtol, atol=1e-6)
    if options == "router":
        torch.testing.assert_close(found.aux_loss, want.aux_loss)
        assert want.aux_loss > 0.1 and len(found.router_logits) == 2


def test_token_scores():
    """Row t has the score of the label at t + 1, of the distribution at the given temperature."""
    model, inputs = make("gemma2"), batch()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    want = logprob_entropy(logits[:, :-1].reshape(-1, 61), inputs["input_ids"][:, 1:].reshape(-1),
                           temperature=0.7)  # fmt: skip
    hf.apply(model, attention=False)
    for mode in (model.train(), model.eval()):
        found = mode(**inputs, token_scores=True, temperature=0.7)
        has_label = inputs["labels"][:, 1:] != -100
        for name in ("logprobs", "entropy", "lse"):
            values = getattr(found, name)
            assert values.shape == (3, 11) and not values[:, -1].any()
            wants = torch.where(has_label, getattr(want, name).view(3, 10), 0.0)
            torch.testing.assert_close(values[:, :-1], wants, rtol=1e-5, atol=1e-5)
        mean = -found.logprobs.sum() / has_label.sum()
        torch.testing.assert_close(found.loss, mean)
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=inputs["input_ids"], token_scores=True)


# --- what people do with a model ---------------------------------------------


def test_logits_where_they_are_needed():
    model, inputs = make("qwen3"), batch()
    want = copy.deepcopy(model)(**inputs).logits
    hf.apply(model)
    assert torch.equal(model.eval()(**inputs).logits, want)
    model.train()
    last = model(**inputs | {"labels": None}, logits_to_keep=1).logits
    torch.testing.assert_close(last, want[:, -1:])
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    torch.testing.assert_close(model(**inputs).loss, want.sum())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, inputs = make("qwen3_moe"), batch(padded=False)
    want = step(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    hf.apply(model)
    assert_same_step(step(model, **inputs), want)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_generate_gives_the_same_tokens(family):
    model = make(family).eval()
    inputs = batch()
    prompt = dict(input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2])
    options = dict(max_new_tokens=6, do_sample=False)
    want = model.generate(**prompt, **options)
    hf.apply(model)
    assert torch.equal(model.generate(**prompt, **options), want)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**prompt, nonsense=torch.ones(1))


def test_save_pretrained_and_deepcopy(tmp_path):
    model, inputs = make("qwen3_moe"), batch()
    model.save_pretrained(tmp_path / "before")
    hf.apply(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after").train()
    want = loaded(**inputs)
    assert want.logits is not None
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    torch.testing.assert_close(model(**inputs).loss, want.loss)
    assert clone(**inputs).loss.item() == pytest.approx(torch.tensor(61.0).log().item())
    assert hf.undo(clone)(**inputs).logits is not None
    assert model(**inputs).logits is None


@pytest.mark.parametrize("apply_first", [False, True])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft(extra, apply_first):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, **extra)
    torch.manual_seed(3)
    want_model = peft.get_peft_model(make("qwen3"), config)
    torch.manual_seed(3)
    model = make("qwen3")
    if apply_first:
        hf.apply(model)
    model = peft.get_peft_model(model, config)
    if not apply_first:
        hf.apply(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        want_model.load_state_dict(model.state_dict())
    inputs = batch()
    want, found = step(want_model, **inputs), step(model, **inputs)
    assert found[0].logits is None and len(found[1]) >= 8
    assert_same_step(found, want)
    with model.disable_adapter(), want_model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, want_model(**inputs).loss)
    hf.undo(model)
    assert torch.equal(model(**inputs).loss, want[0].loss)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(make("qwen3"), peft.LoraConfig(target_modules=["lm_head"]))
    hf.apply(model)
    with pytest.raises(ValueError, match="leave the head out"):
        model(**batch())
    hf.apply(hf.undo(model), lm_head=False)(**batch()).loss.backward()


def test_torch_compile_without_a_break_in_the_graph():
    torch._dynamo.reset()
    model, inputs = make("qwen3", num_hidden_layers=1), batch()
    want = step(model, **inputs)
    hf.apply(model, attention=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = step(compiled, **inputs)
    found = found[0], {n.removeprefix("_orig_mod."): g for n, g in found[1].items()}
    assert found[0].logits is None
    assert_same_step(found, want)


# --- on and off --------------------------------------------------------------


def test_twice_on_and_twice_off():
    model, inputs = make("qwen3_moe"), batch()
    names = set(vars(model))
    want = model(**inputs).loss
    hf.apply(hf.apply(model))
    hf.undo(hf.undo(model))
    assert set(vars(model)) == names
    found = model(**inputs)
    assert found.logits is not None and torch.equal(found.loss, want)
    assert model.config._attn_implementation == "sdpa"


def test_a_forward_put_on_top_of_ours_or_below():
    model, inputs = make("qwen3"), batch()
    calls = []

    def wrap(name):
        inner = model.forward

        def forward(*args, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        model.forward = forward

    wrap("below")
    hf.apply(model, attention=False)
    wrap("above")
    assert model(**inputs).logits is None and calls == ["above"]
    hf.undo(model)  # ours cannot leave the middle of the chain; it only passes on
    assert model(**inputs).logits is not None and calls == ["above", "above", "below"]


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("gemma2", {}, "pass attention=False"),
        ("qwen3_moe", dict(hidden_act="gelu"), "pass moe=False"),
        ("bert", dict(is_decoder=True), "not supported"),
    ],
)
def test_refused_whole_and_with_what_to_do(family, changes, words):
    config = transformers.AutoConfig.for_model(
        family, **COMMON | FAMILIES.get(family, {}) | changes
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = set(vars(model)), model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        hf.apply(model)
    assert (set(vars(model)), model.config._attn_implementation) == before


def test_only_causal_language_models_of_known_families():
    config = transformers.AutoConfig.for_model("bert", **COMMON)
    bert = transformers.AutoModel.from_config(config)
    with pytest.raises(ValueError, match="bert is not among .*; pass lm_head=False"):
        hf.apply(bert, attention=False)
    config = transformers.AutoConfig.for_model("llama", **COMMON)
    with pytest.raises(ValueError, match="no causal language model"):
        lm_head.enable(transformers.AutoModel.from_config(config))
    with pytest.raises(TypeError, match="holds no transformers model"):
        hf.apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a module"):
        hf.apply("a model")


# --- together with Liger -------------------------------------------------------


def liger(family, model, monkeypatch, **parts):
    """Liger's kernels on one model. What it changes of transformers itself goes back afterwards."""
    pytest.importorskip("liger_kernel", reason="pip install 'qlkernels[liger]'")
    from liger_kernel.transformers import monkey_patch

    modeling = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP", "Qwen3MoeRMSNorm"):
        if hasattr(modeling, name):
            monkeypatch.setattr(modeling, name, getattr(modeling, name))
    if hasattr(modeling, "Qwen3MoeExperts"):
        monkeypatch.setattr(modeling, "Qwen3MoeExperts", modeling.Qwen3MoeExperts)
    nothing = dict.fromkeys(("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"), False)
    getattr(monkey_patch, f"apply_liger_kernel_to_{family}")(**nothing | parts, model=model)


def test_ours_after_ligers_loss(monkeypatch):
    """Both replace the model's forward: the later one is called, and undo gives Liger's back."""
    model, inputs = make("qwen3"), batch()
    want = step(model, **inputs)
    liger("qwen3", model, monkeypatch, fused_linear_cross_entropy=True)
    ligers = model.forward
    hf.apply(model)
    assert_same_step(step(model, **inputs), want)
    assert model.forward != ligers
    assert hf.undo(model).forward == ligers


def test_experts_that_liger_replaced_are_refused(monkeypatch):
    model = make("qwen3_moe")
    liger("qwen3_moe", model, monkeypatch, swiglu=True)
    with pytest.raises(ValueError, match="replaced .*; pass moe=False"):
        hf.apply(model)
    hf.apply(model, moe=False)


# every expert for every token: which ones are chosen would hang on the last bit of bf16
ALL_EXPERTS = {"qwen3_moe": dict(num_experts_per_tok=EXPERTS["num_experts"])}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_ligers_layers_and_ours(family, monkeypatch):
    """Liger's norm, rotation and SwiGLU below our experts, attention and head: no further from the
    fp32 model than twice what bf16 costs transformers.
    """
    inputs = {k: v.cuda() for k, v in batch(padded=False).items() if k != "attention_mask"}
    truth = step(make(family, **ALL_EXPERTS.get(family, {})).cuda(), **inputs)
    model = make(family, **ALL_EXPERTS.get(family, {})).cuda().bfloat16()
    baseline = step(model, **inputs)
    liger(family, model, monkeypatch, rope=True, rms_norm=True, swiglu=family == "qwen3")
    hf.apply(model)
    found = step(model, **inputs)
    for name, want in truth[1].items():
        assert_as_accurate(name, found[1][name], want, baseline[1][name], floor=2e-2)
    assert_as_accurate("loss", found[0].loss, truth[0].loss, baseline[0].loss, floor=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_a_bf16_model_on_a_card(family):
    inputs = {k: v.cuda() for k, v in batch(padded=False).items() if k != "attention_mask"}
    truth = step(make(family, **ALL_EXPERTS.get(family, {})).cuda(), **inputs)
    model = make(family, **ALL_EXPERTS.get(family, {})).cuda().bfloat16()
    baseline = step(model, **inputs)
    hf.apply(model)
    found = step(model, **inputs)
    assert found[0].logits is None
    for name, want in truth[1].items():
        assert_as_accurate(name, found[1][name], want, baseline[1][name], floor=2e-2)
