"""Whole transformers models on ``moe_mlp``: logits and every gradient equal transformers' own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from qlkernels.hf import experts  # noqa: E402
from qlkernels.hf.experts import disable, enable  # noqa: E402

COMMON = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, moe_intermediate_size=24, num_experts_per_tok=2, intermediate_size=40,
    max_position_embeddings=64,
)  # fmt: skip
FAMILIES = {
    "qwen3_moe": dict(num_experts=6, head_dim=8, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=5, intermediate_size=24),
    "qwen2_moe": dict(num_experts=6, shared_expert_intermediate_size=16),
    "olmoe": dict(num_experts=6, intermediate_size=24, norm_topk_prob=True),
}


def make(family="qwen3_moe", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    for parameter in model.parameters():  # larger than transformers' 0.02, so that experts matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def logits_and_gradients(model):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (2, 9), generator=g).to(model.device)
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=g).to(model.device))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found, want):
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert (grad is None) == (found[1][name] is None), name
        if grad is not None:
            scale = grad.abs().max().item()
            torch.testing.assert_close(
                found[1][name], grad, rtol=1e-5, atol=1e-5 * max(scale, 1e-3), msg=name
            )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_equals_transformers(family, implementation):
    model = make(family, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    want = logits_and_gradients(model)
    calls = []
    original = experts.moe_mlp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "moe_mlp", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
        assert_same(logits_and_gradients(enable(model)), want)
    assert len(calls) == 2  # a layer each


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_model_equals_transformers(family):
    model = make(family, experts_implementation="eager").cuda()
    want = logits_and_gradients(model)
    assert_same(logits_and_gradients(enable(model)), want)


@pytest.mark.parametrize("options", [dict(chunk_tokens=5), dict(recompute=True)], ids=str)
def test_options_reach_every_layer(options):
    model = make()
    want = logits_and_gradients(model)
    assert_same(logits_and_gradients(enable(model, **options)), want)


def test_triton_kernels_in_the_interpreter(monkeypatch):
    model = make(num_hidden_layers=1)
    want = logits_and_gradients(model)
    original = experts.moe_mlp
    monkeypatch.setattr(experts, "moe_mlp", lambda *a, **k: original(*a, impl="triton", **k))
    assert_same(logits_and_gradients(enable(model)), want)


def test_by_name():
    experts.register()
    config = AutoConfig.for_model("qwen3_moe", **COMMON | FAMILIES["qwen3_moe"])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="qlkernels")
    assert model.config._experts_implementation == "qlkernels"
    model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("qlkernels")
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


def test_disable_restores_the_model():
    model = make(experts_implementation="eager")
    keys = [set(vars(m)) for m in model.modules()]
    want = logits_and_gradients(model)
    assert enable(enable(model), recompute=True) is model
    assert model.config._experts_implementation == "qlkernels"
    assert disable(model) is model
    assert model.config._experts_implementation == "eager"
    assert [set(vars(m)) for m in model.modules()] == keys
    found = logits_and_gradients(model)
    assert torch.equal(found[0], want[0])
    disable(model)  # nothing to do
    assert model.config._experts_implementation == "eager"


def test_checkpointed_layers():
    model = make()
    want = logits_and_gradients(model)
    model.gradient_checkpointing_enable()
    assert_same(logits_and_gradients(enable(model)), want)


def test_frozen_experts():
    model = make()
    for _, module in experts.experts_modules(model):
        module.requires_grad_(False)
    want = logits_and_gradients(model)
    assert not any("experts" in name for name in want[1])
    assert_same(logits_and_gradients(enable(model)), want)


class LowRank(nn.Module):
    """W + B A of every expert."""

    def __init__(self, shape):
        super().__init__()
        E, out, into = shape
        self.a = nn.Parameter(0.1 * torch.randn(E, 2, into))
        self.b = nn.Parameter(0.1 * torch.randn(E, out, 2))

    def forward(self, w):
        return w + self.b @ self.a


def test_parametrised_experts():
    model = make()
    model.requires_grad_(False)
    for _, module in experts.experts_modules(model):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, name, LowRank(getattr(module, name).shape))
    want = logits_and_gradients(model)
    assert len(want[1]) == 8 and all(g.any() for g in want[1].values())
    assert_same(logits_and_gradients(enable(model)), want)


def test_peft_on_the_experts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(make(), config)
    g = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which hides errors
            nn.init.normal_(parameter, std=0.1, generator=g)
    want = logits_and_gradients(model)
    assert sum("experts" in name for name in want[1]) == 8
    assert_same(logits_and_gradients(enable(model)), want)
    disable(model)
    assert torch.equal(logits_and_gradients(model)[0], want[0])


def test_ids_of_other_ranks_add_nothing():
    """Two ranks of three experts each: the halves sum to the whole."""
    model = enable(make(num_hidden_layers=1))
    (_, module), *_ = experts.experts_modules(model)
    x = torch.randn(7, 32)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    whole = module(x, ids, weights)
    parts = []
    for rank in range(2):
        local = copy.deepcopy(module)
        local.num_experts, local._is_expert_parallel = 3, True
        for name in ("gate_up_proj", "down_proj"):
            mine = getattr(module, name).detach()[3 * rank : 3 * rank + 3].contiguous()
            setattr(local, name, nn.Parameter(mine))
        is_local = ids // 3 == rank
        local_ids = torch.where(is_local, ids - 3 * rank, 3)
        parts.append(local(x, local_ids, torch.where(is_local, weights, 0.0)))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)


def test_models_that_cannot_run_are_refused_and_left_alone():
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", **COMMON | dict(head_dim=8))
    )
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts"):
        enable(dense)
    model = make(hidden_act="gelu")
    before = model.config._experts_implementation
    with pytest.raises(
        ValueError, match="mlp.experts cannot run on moe_mlp: .* activates with GELU"
    ):
        enable(model)
    assert model.config._experts_implementation == before
    experts.register()
    model.set_experts_implementation("qlkernels")
    with pytest.raises(ValueError, match="activates with GELU.*use 'grouped_mm'"):
        model(input_ids=torch.tensor([[1]]))
    oss = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_oss", **COMMON | dict(num_local_experts=4, head_dim=8))
    )
    with pytest.raises(ValueError, match="GptOssExperts interleaves"):
        enable(oss)
