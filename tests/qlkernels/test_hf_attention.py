import copy

import pytest
import torch
from torch import nn

from qlkernels import pack_groups
from qlkernels.attention import BACKENDS
from qlkernels.hf import attention as hf_attention
from qlkernels.hf.attention import disable, enable, packed_groups
from qlkernels.testing import assert_as_accurate
from tests.qlkernels.attention_cases import cuda_or_skip

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {}, "Qwen3Moe": MOE}
# with an empty answer, and a prompt of one token
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9]]
ANSWERS = [[[10, 11, 12], [], [13]], [[14, 15], [16]], [[17, 18, 19, 20]]]


def tiny(family="Qwen3", dtype=torch.float32, attn="sdpa", device="cpu", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES.get(family, {}) | changes)
    config._attn_implementation = attn
    if "num_experts" in FAMILIES.get(family, {}) and dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped product has no fp64
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # far from the symmetric start, so that routes differ
    return model.to(dtype).to(device)


def weights_of(n, like):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, generator=g).to(like.device, like.dtype)


def separately(model, prompts=PROMPTS, answers=ANSWERS):
    """Log-probabilities of all answer tokens from one forward a full sequence; gradients of a
    weighted sum of them.
    """
    found = []
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            ids = torch.tensor([prompt + answer], device=model.device)
            logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
            targets = ids[0, len(prompt) :, None]
            rows = logp[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            found.append(rows.gather(1, targets).squeeze(1))
    found = torch.cat(found)
    return found.detach(), gradients(model, found)


def grouped(model, layout, after_the_block=True, **options):
    with packed_groups(model, layout, **options):
        out = model(
            input_ids=layout.input_ids[None],
            position_ids=layout.position_ids[None],
            use_cache=False,
        )
        logp = answer_logprobs(out.logits, layout)
        if not after_the_block:
            return logp.detach(), gradients(model, logp)
    return logp.detach(), gradients(model, logp)


def answer_logprobs(logits, layout):
    logp = logits[0].log_softmax(dim=-1).gather(1, layout.target_ids[:, None]).squeeze(1)
    return logp[layout.is_answer]


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * weights_of(len(logprobs), logprobs)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, wanted, tolerance):
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, want in wanted[1].items():
        error = (found[1][name] - want).abs().max()
        assert error <= tolerance * want.abs().max(), f"{name}: {error}"


# --- groups ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_equals_its_full_sequences(family, dtype):
    """Log-probabilities and every parameter's gradient."""
    model = tiny(family, dtype)
    # fp64 models norm and rotate in fp32, so that they do not reach 1e-15
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    assert_same(grouped(model, pack_groups(PROMPTS, ANSWERS)), separately(model), tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_runs_again_with_the_same_layout(family, reentrant):
    """The layers run again after the block, and after another layout went through the model."""
    model = tiny(family).train()
    wanted = separately(model)
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layout, other = pack_groups(PROMPTS, ANSWERS), pack_groups([[3, 1]], [[[4], [5, 6]]])
    with packed_groups(model, layout):
        logits = model(input_ids=layout.input_ids[None]).logits
    with packed_groups(model, other):
        model(input_ids=other.input_ids[None])
    logp = answer_logprobs(logits, layout)
    assert_same((logp.detach(), gradients(model, logp)), wanted, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends(backend):
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    found = grouped(model, layout, after_the_block=False, backend=backend)
    assert_same(found, separately(model), 1e-5)


def test_prefix_rows_are_those_of_the_prompt():
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    with packed_groups(model, layout):
        logits = model(input_ids=layout.input_ids[None]).logits[0]
    for span, prompt in zip(layout.spans(), PROMPTS, strict=True):
        full = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[span.start : span.answers_start], full[:-1])


def test_the_decoder_alone_and_a_wrapped_model():
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    with packed_groups(model, layout):
        whole = model(input_ids=layout.input_ids[None]).logits
    with packed_groups(model.model, layout):
        hidden = model.model(layout.input_ids[None]).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), whole)
    wrapped = nn.Sequential(model)
    with packed_groups(wrapped, layout):
        torch.testing.assert_close(wrapped(layout.input_ids[None]).logits, whole)
    embeds = model.get_input_embeddings()(layout.input_ids[None])
    with packed_groups(model, layout):
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, whole)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_outside_of_blocks_the_model_is_as_before(attn):
    model = tiny(attn=attn)
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    calls = [dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)]
    before = [model(**call).logits for call in calls]
    grouped(model, pack_groups(PROMPTS, ANSWERS))
    assert model.config._attn_implementation != attn
    for call, want in zip(calls, before, strict=True):
        assert torch.equal(model(**call).logits, want)
    disable(model)
    assert model.config._attn_implementation == attn
    disable(model)  # nothing to do


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_fsdp2(attn, tmp_path):
    """Layers sharded over one process: hooks, a class put in front of the layer's, gathers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = tiny(attn=attn)
        wanted = separately(model)
        mask = torch.tensor([[0, 1, 1, 1]])
        padded = model(input_ids=torch.arange(4)[None], attention_mask=mask).logits
        mesh = init_device_mesh("cpu", (1,))
        for module in (model.model.layers[0].self_attn, *model.model.layers, model):
            fully_shard(module, mesh=mesh)
        layout = pack_groups(PROMPTS, ANSWERS)
        logprobs, found = grouped(model, layout)
        assert_same((logprobs, {n: g.full_tensor() for n, g in found.items()}), wanted, 1e-5)
        again = model(input_ids=torch.arange(4)[None], attention_mask=mask).logits
        torch.testing.assert_close(again, padded)
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_inside_leaves_nothing_behind():
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), packed_groups(model, layout):
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        model(input_ids=layout.input_ids[None])
    handle.remove()
    assert hf_attention._current.get() is None
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks


def test_another_model_in_the_block_is_not_touched():
    policy, reference = tiny(), tiny(dtype=torch.float64)
    layout = pack_groups(PROMPTS, ANSWERS)
    ids = torch.arange(1, 9)[None]
    before = reference(input_ids=ids).logits
    with packed_groups(policy, layout):
        assert torch.equal(reference(input_ids=ids).logits, before)
        policy(input_ids=layout.input_ids[None])
    with packed_groups(policy, layout), packed_groups(reference, layout):
        first = policy(input_ids=layout.input_ids[None]).logits
        second = reference(input_ids=layout.input_ids[None]).logits
    torch.testing.assert_close(first.double(), second, rtol=1e-4, atol=1e-4)


def test_our_name_is_not_saved(tmp_path):
    model = tiny()
    enable(model)
    model.config.save_pretrained(tmp_path)
    assert "qlkernels" not in (tmp_path / "config.json").read_text()
    copied = copy.deepcopy(model)
    disable(copied)
    assert copied.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "qlkernels:auto:sdpa"


# --- plain causal and packed -------------------------------------------------------


def count_ours(monkeypatch):
    calls = []
    ours = hf_attention.attention

    def counted(*operands, **options):
        calls.append(options["lengths"])
        return ours(*operands, **options)

    monkeypatch.setattr(hf_attention, "attention", counted)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_batch(family, monkeypatch):
    model = tiny(family)
    ids = torch.arange(1, 25).view(2, 12)

    def run():
        logp = model(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)
        logp = logp.gather(2, ids[..., None]).flatten()
        return logp.detach(), gradients(model, logp)

    wanted = run()
    calls = count_ours(monkeypatch)
    enable(model)
    assert_same(run(), wanted, 1e-5)
    assert calls == [(12, 12)] * 2  # one a layer
    disable(model)
    run()
    assert len(calls) == 2


def test_packed_sequences_are_found_by_their_positions(monkeypatch):
    model = tiny()
    parts = [[1, 2, 3, 4], [5], [6, 7, 8]]
    wanted = torch.cat([model(input_ids=torch.tensor([p])).logits[0] for p in parts])
    calls = count_ours(monkeypatch)
    enable(model)
    ids = torch.tensor([sum(parts, [])])
    positions = torch.cat([torch.arange(len(p)) for p in parts])[None]
    found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert calls == [(4, 1, 3)] * 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_and_decoding_stay_with_the_previous_attention(attn, monkeypatch):
    model = tiny(attn=attn).eval()
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generate = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    padded = model(input_ids=ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, **generate)
    plain = model.generate(ids, **generate)
    calls = count_ours(monkeypatch)
    enable(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, padded)
    assert torch.equal(model.generate(ids, attention_mask=mask, **generate), tokens)
    assert not calls
    assert torch.equal(model.generate(ids, **generate), plain)


def test_enabling_twice_and_after_groups():
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    grouped(model, layout)
    enable(model)
    enable(model, backend="torch")
    assert model.config._attn_implementation == "qlkernels:torch:sdpa"
    assert_same(grouped(model, layout), separately(model), 1e-5)
    assert model.config._attn_implementation == "qlkernels:torch:sdpa"
    disable(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="backend='cudnn' cannot run here"):
        enable(model, backend="cudnn")
    assert model.config._attn_implementation == "sdpa"


# --- refused -----------------------------------------------------------------------


OTHERS = {
    "Gemma2": (SIZES, r"gemma2 \(Gemma2ForCausalLM\) is not supported: .*soft-cap"),
    "Mistral": (SIZES | dict(sliding_window=None), "mistral .* nobody has checked"),
    "Qwen2": (
        SIZES | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "qwen2 .* has layers of sliding_attention",
    ),
    "Falcon": (
        dict(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True),
        "falcon .* ALiBi",
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_attention_is_refused_by_name(family):
    sizes, words = OTHERS[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    before = model.config._attn_implementation
    layout = pack_groups(PROMPTS, ANSWERS)
    for change in (lambda: enable(model), lambda: packed_groups(model, layout).__enter__()):
        with pytest.raises(ValueError, match=words):
            change()
    assert model.config._attn_implementation == before


def test_what_is_no_model():
    layout = pack_groups(PROMPTS, ANSWERS)
    with pytest.raises(TypeError, match="Linear holds no transformers model"):
        enable(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a module, got str"):
        enable("qwen")
    with pytest.raises(TypeError, match="layout must come from pack_groups"):
        packed_groups(tiny(), layout.input_ids).__enter__()
    with pytest.raises(ValueError, match="the layout has no rows"):
        packed_groups(tiny(), pack_groups([[1]], [[[], []]])).__enter__()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(input_ids=torch.zeros(1, 3, dtype=torch.int64)), "the layout has 17 rows"),
        (dict(attention_mask=torch.ones(1, 17)), "attention_mask has no place"),
        (dict(use_cache=True), "use_cache has no place"),
        (dict(position_ids=torch.arange(17)[None]), "position_ids must be layout.position_ids"),
    ],
)
def test_wrong_calls(change, words):
    model = tiny()
    layout = pack_groups(PROMPTS, ANSWERS)
    with packed_groups(model, layout), pytest.raises(ValueError, match=words):
        model(**dict(input_ids=layout.input_ids[None]) | change)


def test_dropout_is_refused():
    model = tiny(attention_dropout=0.1).train()
    layout = pack_groups(PROMPTS, ANSWERS)
    with packed_groups(model, layout), pytest.raises(ValueError, match="dropout = 0.1"):
        model(input_ids=layout.input_ids[None])
    model.eval()
    assert_same(grouped(model, layout), separately(model), 1e-5)


# --- on a GPU ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_fp32(family):
    cuda_or_skip("torch", torch.float32, 64)
    model = tiny(family, device="cuda")
    layout = pack_groups(PROMPTS, ANSWERS).to("cuda")
    assert_same(grouped(model, layout), separately(model), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_gpu_bf16(family, backend):
    """Against the same weights in fp32, at most twice the error of separate sequences in bf16."""
    cuda_or_skip(backend, torch.bfloat16, 64)
    sizes = dict(hidden_size=256, head_dim=64, max_position_embeddings=4096)
    model = tiny(family, torch.bfloat16, device="cuda", **sizes)
    g = torch.Generator().manual_seed(0)
    lengths = ([1500, 1, 70], [[300, 0, 40], [5, 6], [90]])
    prompts = [torch.randint(61, (P,), generator=g).tolist() for P in lengths[0]]
    answers = [
        [torch.randint(61, (R,), generator=g).tolist() for R in group] for group in lengths[1]
    ]
    layout = pack_groups(prompts, answers).to("cuda")
    truth = separately(copy.deepcopy(model).float(), prompts, answers)
    baseline = separately(model, prompts, answers)
    found = grouped(model, layout, backend=backend)
    assert_as_accurate("logprobs", found[0], truth[0], baseline[0], floor=2**-8)

    def error(gradients):  # over all parameters
        pairs = [(gradients[1][n].double(), x.double()) for n, x in truth[1].items()]
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in pairs) ** 0.5

    assert error(found) <= 2 * error(baseline), (error(found), error(baseline))
