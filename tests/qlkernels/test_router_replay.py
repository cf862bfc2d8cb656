import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlkernels.router_replay import NORMALISES, RoutingRecord, record_routing, replay_routing

transformers = pytest.importorskip("transformers")

E, TOP_K, MOE_LAYERS = 8, 3, (0, 2, 3)


def tiny_model(seed=0, **options):
    """Four decoder layers, the second without experts."""
    config = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=E, num_experts_per_tok=TOP_K, norm_topk_prob=True, mlp_only_layers=[1],
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(config | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def tokens(B=2, S=7, seed=1):
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(seed))


def chosen_experts(model, run):
    """[layers, T, top_k]: what the experts were called with."""
    seen, handles = [], []
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            handles.append(module.register_forward_pre_hook(lambda m, args: seen.append(args[1])))
    run()
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def record_of(model, ids):
    with record_routing(model) as recorder, torch.no_grad():
        model(ids)
    return recorder.record()


def loss_of(model, ids):
    logits = model(ids).logits
    return logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).sum()


def gradients(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def perturbed(model, seed=5):
    """The same model after a large step: it routes otherwise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_a_record_holds_what_the_experts_were_called_with():
    model, ids = tiny_model(), tokens()
    record = record_of(model, ids)
    assert record.layers == MOE_LAYERS and record.num_experts == E and record.top_k == TOP_K
    assert record.ids.dtype == torch.uint8 and record.ids.shape == (3, 14, TOP_K)
    called = chosen_experts(model, lambda: model(ids))
    for layer, expected in zip(MOE_LAYERS, called, strict=True):
        assert torch.equal(record.layer_ids(layer), expected.int())


@torch.no_grad()
def test_replaying_a_models_own_routing_changes_nothing():
    model, ids = tiny_model(), tokens()
    plain = model(ids).logits
    with replay_routing(model, record_of(model, ids)):
        replayed = model(ids).logits
    torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=1e-5)


def forced_router(ids):
    """The textbook replay: gather the given experts from the full softmax and normalise."""

    def forward(self, hidden_states):
        logits = hidden_states.reshape(-1, self.hidden_dim) @ self.weight.T
        weights = logits.softmax(-1).gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    return forward


def test_a_replayed_pass_uses_exactly_those_experts_and_routers_get_their_gradient():
    model, ids = tiny_model(), tokens()
    record = record_of(model, ids)
    perturbed(model)
    live = chosen_experts(model, lambda: model(ids))
    with replay_routing(model, record):
        called = chosen_experts(model, lambda: model(ids))
        got = gradients(model, ids)
        loss = loss_of(model, ids)
    recorded = torch.stack([record.layer_ids(layer) for layer in MOE_LAYERS])
    assert torch.equal(called.int(), recorded)
    assert not torch.equal(live.int(), recorded)

    for layer in MOE_LAYERS:
        gate = model.model.layers[layer].mlp.gate
        gate.forward = forced_router(record.layer_ids(layer).long()).__get__(gate)
    torch.testing.assert_close(loss, loss_of(model, ids))
    want = gradients(model, ids)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4)
        if "gate.weight" in name:
            assert (got[name].abs().sum(1) > 0).any(), name
    for layer in MOE_LAYERS:
        del model.model.layers[layer].mlp.gate.forward
    assert torch.equal(chosen_experts(model, lambda: model(ids)), live)  # nothing stays behind


def test_tokens_without_a_route_route_live():
    model, ids = tiny_model(), tokens(1, 9)
    record = record_of(model, ids)
    perturbed(model)
    routes = torch.stack([record.layer_ids(layer) for layer in MOE_LAYERS], dim=1)  # [T, layers, k]
    partial = RoutingRecord.from_engine(routes[:4], E, num_tokens=9, layers=MOE_LAYERS)
    router_logits = []
    gates = [model.model.layers[layer].mlp.gate for layer in MOE_LAYERS]
    for gate in gates:
        gate.register_forward_hook(lambda m, args, output: router_logits.append(output[0]))
    with replay_routing(model, partial), torch.no_grad():
        called = chosen_experts(model, lambda: model(ids))
    for layer, experts, logits in zip(MOE_LAYERS, called, router_logits, strict=True):
        assert torch.equal(experts[:4].int(), record.layer_ids(layer)[:4])
        assert torch.equal(experts[4:], logits.topk(TOP_K).indices[4:])


def test_gradient_checkpointing_records_once_and_replays_again():
    model, ids = tiny_model(), tokens()
    record = record_of(model, ids)
    perturbed(model)
    with replay_routing(model, record):
        want = gradients(model, ids)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with replay_routing(model, record):
        got = gradients(model, ids)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)
    with record_routing(model) as recorder:
        gradients(model, ids)
    assert recorder.record().num_tokens == ids.numel()


def checkpointed_model(reentrant):
    """Its record, the gradients of a replayed pass, and the model, to be trained."""
    model, ids = tiny_model(), tokens()
    record = record_of(model, ids)
    perturbed(model)
    with replay_routing(model, record):
        want = gradients(model, ids)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # a reentrant checkpoint of other inputs has no gradient
    model.zero_grad()
    return model, ids, record, want


def test_reentrant_checkpointing_replays_again_inside_the_block():
    model, ids, record, want = checkpointed_model(True)
    with replay_routing(model, record):
        loss = loss_of(model, ids)
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-5, rtol=1e-5)


def test_a_reentrant_checkpoint_that_outlives_the_block_is_refused():
    model, ids, record, _ = checkpointed_model(True)
    with pytest.raises(RuntimeError, match="before the backward .* 3 checkpoints again"):
        with replay_routing(model, record):
            loss = loss_of(model, ids)
    assert loss.requires_grad
    with pytest.raises(ValueError, match="of the caller"), replay_routing(model, record):
        loss = loss_of(model, ids)
        raise ValueError("of the caller")


def test_checkpoints_without_a_backward_to_come_are_no_error():
    model, ids, record, _ = checkpointed_model(True)
    with replay_routing(model, record), torch.no_grad():
        scored = loss_of(model, ids)
    with replay_routing(model, record):
        dropped = loss_of(model, ids).item()
    assert dropped == scored.item()


def test_torch_refuses_another_checkpoint_whose_backward_is_outside():
    model, ids, record, _ = checkpointed_model(False)
    with replay_routing(model, record):
        loss = loss_of(model, ids)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"):
        loss.backward()


@torch.no_grad()
def test_prefill_and_decode_follow_each_other():
    model, ids = tiny_model(), tokens(1, 9)
    whole = record_of(model, ids)
    with record_routing(model) as recorder:
        cache = model(ids[:, :6], use_cache=True).past_key_values
        for t in range(6, 9):
            cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
    assert torch.equal(recorder.record().ids, whole.ids)


def test_micro_batches_replay_their_rows():
    model, ids = tiny_model(), tokens(2, 7)
    record = record_of(model, ids)
    perturbed(model)
    with replay_routing(model, record):
        want = gradients(model, ids)
    model.zero_grad()
    for b in range(2):
        with replay_routing(model, record.rows(slice(7 * b, 7 * b + 7))):
            loss_of(model, ids[b : b + 1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_experts, dtype", [(255, torch.uint8), (256, torch.int16)])
def test_compact_ids(num_experts, dtype):
    routes = torch.tensor([[[0, 254], [3, 1]], [[-1, -1], [0, 0]], [[7, 200], [5, 5]]])
    record = RoutingRecord.from_engine(routes, num_experts, num_tokens=5, layers=(1, 4))
    assert record.ids.dtype == dtype
    assert record.ids.numel() * record.ids.element_size() == 2 * 5 * 2 * dtype.itemsize
    none = [-1, -1]
    assert record.layer_ids(1).tolist() == [[0, 254], none, [7, 200], none, none]
    assert record.layer_ids(4).tolist() == [[3, 1], none, none, none, none]
    assert record.rows(slice(1, 3)).layer_ids(1).tolist() == [none, [7, 200]]
    assert record.to("cpu").num_tokens == 5


def test_bytes_of_a_token():
    routes = torch.arange(8).expand(2, 48, 8)
    assert RoutingRecord.from_engine(routes, 128).rows(slice(0, 1)).ids.nbytes == 384


def test_with_one_expert_a_token_nothing_repeats():
    record = RoutingRecord.from_engine(torch.tensor([[[0]], [[0]]]), 4)
    assert record.layer_ids(0).tolist() == [[0], [0]]


def router_classes():
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+TopKRouter)\(", path.read_text(), re.MULTILINE):
            if name in NORMALISES:
                yield f"transformers.models.{path.parent.name}.{path.stem}", name


@pytest.mark.parametrize("module, name", list(router_classes()), ids=lambda x: x.split(".")[-1])
def test_every_named_router_is_reproduced(module, name):
    """Replaying what it chose gives its weights and their gradient."""
    config = SimpleNamespace(
        hidden_size=16, num_experts=12, num_local_experts=12, num_experts_per_tok=3,
        norm_topk_prob=False,
    )  # fmt: skip
    router = getattr(importlib.import_module(module), name)(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"gate": router})])
    hidden = torch.randn(20, 16)
    upstream = torch.randn(20, 3)

    def run():
        logits, weights, ids = router(hidden)
        return weights, ids, torch.autograd.grad((weights * upstream).sum(), router.weight)[0]

    weights, ids, dweight = run()
    with record_routing(decoder) as recorder:
        router(hidden)
    with replay_routing(decoder, recorder.record()):
        for actual, expected in zip(run(), (weights, ids, dweight), strict=True):
            torch.testing.assert_close(actual, expected)


def test_what_does_not_fit_is_refused():
    model, ids = tiny_model(), tokens()
    record = record_of(model, ids)
    with replay_routing(model, record), pytest.raises(ValueError, match="7 tokens, the record 14"):
        model(ids[:1])
    other = tiny_model(num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"\(\(0, 2, 3\), 8, 2\), the record \(\(0, 2, 3\), 8, 3"):
        with replay_routing(other, record):
            pass
    with pytest.raises(ValueError, match="layer 1 is not recorded"):
        record.layer_ids(1)
    with pytest.raises(ValueError, match="Linear has no router"):
        with record_routing(torch.nn.Linear(2, 2)):
            pass
    with record_routing(model) as recorder:
        pass
    with pytest.raises(RuntimeError, match="run a whole pass"):
        recorder.record()
    with pytest.raises(ValueError, match="holds expert 9, but the model has 8"):
        RoutingRecord.from_engine(torch.full((2, 3, 1), 9), 8)
    with pytest.raises(ValueError, match=r"routes must be \[T, layers, top_k\]"):
        RoutingRecord.from_engine(torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="routes has 2 tokens and 1 layers, but num_tokens = 1"):
        RoutingRecord.from_engine(torch.zeros(2, 1, 1), 8, num_tokens=1)


def test_a_router_of_another_kind_is_refused():
    class SigmoidTopKRouter(torch.nn.Linear):
        pass

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"gate": SigmoidTopKRouter(2, 2)})])
    with pytest.raises(ValueError, match="is a SigmoidTopKRouter, which does not choose the top_k"):
        with record_routing(model):
            pass
