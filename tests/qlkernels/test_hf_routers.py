import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlkernels.hf import routers
from qlkernels.router_replay import record_routing, replay_routing

transformers = pytest.importorskip("transformers")


def served_classes():
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+TopKRouter)\(", path.read_text(), re.MULTILINE):
            if name in routers._SERVED:
                yield f"transformers.models.{path.parent.name}.{path.stem}", name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize(
    "module, name", list(served_classes()), ids=[name for _, name in served_classes()]
)
def test_a_router_returns_what_it_returned(module, name, norm_topk_prob, dtype):
    config = SimpleNamespace(
        hidden_size=16, num_experts=12, num_local_experts=12, num_experts_per_tok=3,
        norm_topk_prob=norm_topk_prob,
    )  # fmt: skip
    router = getattr(importlib.import_module(module), name)(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    router = router.to(dtype)
    hidden = torch.randn(20, 16, dtype=dtype)
    with torch.no_grad():  # rows whose choice hangs on a tie are another matter
        best = router(hidden)[0].topk(4, dim=1).values
        hidden = hidden[(best.diff(dim=1) < 0).all(1)]
    assert len(hidden) > 5
    upstream = torch.randn(len(hidden), 3)

    def run():
        logits, weights, ids = router(hidden)
        total = (weights.float() * upstream).sum()
        return logits, weights, ids, torch.autograd.grad(total, router.weight)[0]

    plain = run()
    holder = torch.nn.ModuleDict({"gate": router})
    routers.enable(holder)
    ours = run()
    for actual, expected in zip(ours, plain, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        torch.testing.assert_close(actual, expected)
    routers.disable(holder)
    assert "forward" not in vars(router)


def tiny_model():
    config = transformers.Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=True, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss  # with the load-balancing loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_model_computes_what_it_computed_and_is_restored():
    model, ids = tiny_model(), torch.arange(14).view(2, 7)
    plain, names = loss_and_gradients(model, ids), list(model.state_dict())
    routers.enable(routers.enable(model))
    for name, value in loss_and_gradients(model, ids).items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)  # its routers are its own
    with torch.no_grad():
        twin.model.layers[0].mlp.gate.weight.zero_()
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    routers.disable(routers.disable(model))
    assert all("forward" not in vars(m) for m in model.modules())
    for name, value in loss_and_gradients(model, ids).items():
        assert torch.equal(value, plain[name]), name


def test_replay_goes_on_top():
    model, ids = tiny_model(), torch.arange(14).view(2, 7)
    with record_routing(model) as recorder, torch.no_grad():
        model(ids)
    record = recorder.record()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    with replay_routing(model, record):
        plain = loss_and_gradients(model, ids)
        routers.enable(model)
        for name, value in loss_and_gradients(model, ids).items():
            torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-5)


def test_a_forward_of_its_own_comes_back():
    model = tiny_model()
    gate = model.model.layers[1].mlp.gate
    gate.forward = own = lambda hidden_states: type(gate).forward(gate, hidden_states)
    routers.enable(model)
    assert gate.forward is not own
    routers.disable(model)
    assert gate.forward is own


def test_what_is_not_served_is_refused():
    with pytest.raises(ValueError, match="Linear has no router"):
        routers.enable(torch.nn.Linear(2, 2))

    class SigmoidTopKRouter(torch.nn.Linear):
        pass

    model = torch.nn.ModuleDict({"a": tiny_model(), "gate": SigmoidTopKRouter(2, 2)})
    with pytest.raises(ValueError, match="gate is a SigmoidTopKRouter, which does not choose"):
        routers.enable(model)
    assert all("forward" not in vars(m) for m in model.modules())
