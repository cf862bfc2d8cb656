"""The scorer against transformers' own forward of each sequence, on the CPU in fp32."""

import dataclasses

import pytest
import torch
import transformers

from qlkernels.prefix_group import pack_groups
from qlkernels.router_replay import record_routing, replay_routing
from qlkernels.scorer import Scorer

V = 97
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
KINDS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "LlamaConfig",
        {"rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        }},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {**MOE, "norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True},
    ),
}  # fmt: skip
FIELDS = ("logprobs", "entropy", "lse")
LENGTHS = (1, 13, 2, 31)


def tiny_model(kind, **changes):
    """Random fp32 weights; those of the head are large, so that scores are far from uniform."""
    name, differs = KINDS[kind]
    config = getattr(transformers, name)(**{**SIZES, **differs, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        model.lm_head.weight.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tiny_model(kind)
        return made[kind]

    return get


def straightforward(model, ids, temperature=1.0):
    """Scores of rows 0 .. T - 2 of one sequence, from all its logits in fp64."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double() / temperature
    logp = logits.log_softmax(-1)
    return {
        "logprobs": logp.gather(-1, ids[1:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "lse": logits.logsumexp(-1),
    }


def expect_close(actual, expected, atol=1e-5):
    for name in FIELDS:
        got = getattr(actual, name) if hasattr(actual, name) else actual[name]
        torch.testing.assert_close(got.double(), expected[name].double(), atol=atol, rtol=0)


def packed(seed=1, lengths=LENGTHS):
    torch.manual_seed(seed)
    ids = torch.randint(V, (sum(lengths),))
    return ids, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def per_sequence(model, ids, cu_seqlens, temperature=1.0):
    """What the packed scores must be: each sequence alone, 0 in its last row."""
    out = {name: torch.zeros(len(ids), dtype=torch.float64) for name in FIELDS}
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if b - a > 1:
            found = straightforward(model, ids[a:b], temperature)
            for name in FIELDS:
                out[name][a : b - 1] = found[name]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_packed_sequences_equal_transformers(kind, stream):
    model = tiny_model(kind)
    ids, cu_seqlens = packed()
    expected = per_sequence(model, ids, cu_seqlens, 0.7)
    scorer = Scorer(model, stream_weights=stream, device="cpu")
    actual = scorer.score(ids, cu_seqlens=cu_seqlens, temperature=0.7)
    expect_close(actual, expected)
    assert expected["logprobs"].std() > 0.5  # far from uniform, so that the test can fail


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 46, 1000])
def test_chunk_size_changes_nothing(models, kind, chunk_tokens):
    ids, cu_seqlens = packed()
    whole = Scorer(models(kind)).score(ids, cu_seqlens=cu_seqlens)
    parts = Scorer(models(kind), chunk_tokens=chunk_tokens).score(ids, cu_seqlens=cu_seqlens)
    expect_close(parts, whole._asdict())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_no_more_than_transformers(kind):
    ids = torch.arange(60) * 7 % V
    model = tiny_model(kind)
    truth = straightforward(model, ids)
    # transformers loads weights so; model.to(bfloat16) would round the rotation's frequencies too
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = frequencies
    baseline = straightforward(model, ids)
    actual = Scorer(model, chunk_tokens=17).score(ids)
    for name in FIELDS:
        error, slip = (
            (x.double() - truth[name]).square().mean().sqrt()
            for x in (getattr(actual, name)[:-1], baseline[name])
        )
        assert 0 < error <= 2 * slip, name


PROMPTS = (list(range(5, 25)), [3], [4, 4], list(range(60, 70)))
ANSWERS = (
    ([9, 8, 7], [], list(range(30)), [1]),
    ([2, 3, 4, 5], [6]),
    (),
    ([11] * 6, [12, 13]),
)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_equal_full_sequences(models, kind):
    model = models(kind)
    layout = pack_groups(PROMPTS, ANSWERS)
    actual = Scorer(model, chunk_tokens=9).score(layout, temperature=1.3)
    answers_only = Scorer(model).score(layout, positions="answers", temperature=1.3)
    padded = {name: layout.gather_answers(getattr(actual, name)) for name in FIELDS}
    a = 0
    for span, prompt, answers in zip(layout.spans(), PROMPTS, ANSWERS, strict=True):
        for answer in answers:
            full = straightforward(model, torch.tensor([*prompt, *answer]), 1.3)
            P, R = len(prompt), len(answer)
            for name in FIELDS:
                want = full[name]
                got = padded[name][a].double()
                torch.testing.assert_close(got[:R], want[P - 1 :], atol=1e-5, rtol=0)
                assert (got[R:] == 0).all()
                prefix = getattr(actual, name)[span.start : span.answers_start].double()
                torch.testing.assert_close(prefix, want[: P - 1], atol=1e-5, rtol=0)
            a += 1
    for name in FIELDS:
        whole = torch.where(layout.is_answer, getattr(actual, name), 0.0)
        torch.testing.assert_close(getattr(answers_only, name), whole, atol=1e-5, rtol=0)


def test_equal_logits_give_log_v():
    model = tiny_model("qwen3")
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = Scorer(model).score(torch.arange(10))
    log_v = torch.tensor(V).log()
    torch.testing.assert_close(scores.entropy[:-1], log_v.expand(9))
    torch.testing.assert_close(scores.logprobs[:-1], -log_v.expand(9))
    assert scores.entropy[-1] == scores.logprobs[-1] == 0


def test_a_mask_scores_its_rows_and_no_others(models):
    ids, cu_seqlens = packed()
    torch.manual_seed(2)
    mask = torch.rand(len(ids)) < 0.3
    whole = Scorer(models("qwen3")).score(ids, cu_seqlens=cu_seqlens)
    some = Scorer(models("qwen3")).score(ids, cu_seqlens=cu_seqlens, positions=mask)
    expect_close(some, {n: torch.where(mask, getattr(whole, n), 0.0) for n in FIELDS})
    none = Scorer(models("qwen3")).score(ids, positions=torch.zeros_like(mask))
    assert all((x == 0).all() for x in none)


def test_temperature_of_each_row(models):
    ids, _ = packed()
    taus = torch.linspace(0.5, 2.0, len(ids))
    scores = Scorer(models("qwen2")).score(ids[:20], temperature=taus[:20])
    with torch.no_grad():
        logits = models("qwen2")(ids[None, :20]).logits[0].double() / taus[:20, None]
    want = logits.log_softmax(-1)[:-1].gather(-1, ids[1:20, None])[:, 0]
    torch.testing.assert_close(scores.logprobs[:-1].double(), want, atol=1e-5, rtol=0)


def test_hidden_states_are_those_of_transformers(models):
    model = models("qwen3-moe")
    ids, cu_seqlens = packed()
    parts = list(Scorer(model, chunk_tokens=10).hidden_states(ids, cu_seqlens=cu_seqlens))
    assert [(s.start, s.stop) for s, _ in parts] == [
        (0, 10), (10, 20), (20, 30), (30, 40), (40, 47),
    ]  # fmt: skip
    actual = torch.cat([x for _, x in parts])
    with torch.no_grad():
        expected = model.model(ids[None, 16:]).last_hidden_state[0]
    torch.testing.assert_close(actual[16:], expected, atol=1e-5, rtol=0)


def test_nothing_to_score(models):
    scorer = Scorer(models("llama"))
    for inputs in (
        torch.empty(0, dtype=torch.int64),
        pack_groups([[1]], [[]]),
        pack_groups([], []),
    ):
        scores = scorer.score(inputs)
        assert all(x.shape == (0,) and x.dtype == torch.float32 for x in scores)
        assert list(scorer.hidden_states(inputs)) == []
    one = scorer.score(torch.tensor([5]))
    assert all(x.tolist() == [0.0] for x in one)


def test_same_input_same_bits(models):
    ids, cu_seqlens = packed()
    first = Scorer(models("qwen3-moe")).score(ids, cu_seqlens=cu_seqlens)
    again = Scorer(models("qwen3-moe")).score(ids, cu_seqlens=cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_scores_can_be_constants_of_a_loss(models):
    scores = Scorer(models("llama")).score(torch.arange(5))
    weight = torch.ones(5, requires_grad=True)
    (weight * scores.logprobs).sum().backward()  # an inference tensor would raise
    torch.testing.assert_close(weight.grad, scores.logprobs)


def test_progress(models):
    said = []
    Scorer(models("llama")).score(torch.arange(5), on_layer=lambda *a: said.append(a))
    assert said == [(1, 3), (2, 3), (3, 3)]


# --- refusals ----------------------------------------------------------------


def test_unknown_family_is_refused_by_name():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="'gpt2' is not supported.*llama, qwen2, qwen3"):
        Scorer(model)


REFUSED = {
    "sliding": ("qwen2", dict(use_sliding_window=True, max_window_layers=1), "sliding-window"),
    "activation": ("llama", dict(hidden_act="gelu"), "gelu"),
    "rope": (
        "llama",
        dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "dynamic",
    ),
}


@pytest.mark.parametrize("kind, changes, says", REFUSED.values(), ids=REFUSED)
def test_options_that_change_the_mathematics_are_refused(kind, changes, says):
    with pytest.raises(ValueError, match=says):
        Scorer(tiny_model(kind, **changes))


def test_structures_that_the_config_does_not_tell_of():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.register_parameter(
        "lora_A", torch.nn.Parameter(torch.zeros(2, 32))
    )
    with pytest.raises(ValueError, match="layer 1 has a weight 'self_attn.q_proj.lora_A'"):
        Scorer(model)
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(32, 47, bias=False)
    with pytest.raises(ValueError, match=r"layer 2, mlp.up_proj.weight is \(47, 32\)"):
        Scorer(model)
    with pytest.raises(ValueError, match="no base model"):
        Scorer(tiny_model("llama").model)
    model = tiny_model("llama")
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype"):
        Scorer(model)


INPUTS = {
    "long": (dict(inputs=torch.zeros(65, dtype=torch.int64)), "65 tokens and the model 64"),
    "negative": (dict(inputs=torch.tensor([3, -1])), r"input_ids\[1\] = -1"),
    "beyond": (dict(inputs=torch.tensor([3, V])), r"input_ids\[1\] = 97"),
    "padded": (dict(inputs=torch.zeros(2, 3, dtype=torch.int64)), "packed"),
    "borders": (
        dict(inputs=torch.arange(5), cu_seqlens=torch.tensor([0, 3])), "rise from 0 to T = 5"
    ),
    "mask": (dict(inputs=torch.arange(5), positions=torch.ones(4, dtype=torch.bool)), "bool"),
    "answers": (dict(inputs=torch.arange(5), positions="answers"), "layout"),
    "positions": (dict(inputs=torch.arange(5), positions="some"), "'some'"),
    "group": (
        dict(inputs=pack_groups([[1] * 50], [[[2] * 3, [2] * 16]])), "65 tokens and the model 64"
    ),
    "target": (dict(inputs=pack_groups([[1]], [[[2, 98]]])), r"target_ids\[1\] = 98"),
    "cold": (dict(inputs=torch.arange(5), temperature=0.0), "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, says", INPUTS.values(), ids=INPUTS)
def test_bad_input(models, arguments, says):
    with pytest.raises(ValueError, match=says):
        Scorer(models("llama")).score(**arguments)


def test_wrong_types(models):
    with pytest.raises(TypeError, match="input_ids"):
        Scorer(models("llama")).score([1, 2, 3])
    with pytest.raises(TypeError, match="int64"):
        Scorer(models("llama")).score(torch.ones(3))
    with pytest.raises(ValueError, match="chunk_tokens"):
        Scorer(models("llama"), chunk_tokens=0)


# --- attention ---------------------------------------------------------------


def test_the_chosen_attention_is_said_and_its_order_kept(models):
    ids, cu_seqlens = packed()
    layout = pack_groups(PROMPTS, ANSWERS)
    auto = Scorer(models("qwen3"))
    assert auto.attention == "sdpa"
    ordered = Scorer(models("qwen3"), attention=("flash-attn-4", "cudnn", "torch", "sdpa"))
    assert ordered.attention == "torch"
    for inputs in (dict(inputs=ids, cu_seqlens=cu_seqlens), dict(inputs=layout)):
        expect_close(ordered.score(**inputs), auto.score(**inputs)._asdict())
    with pytest.raises(RuntimeError, match="'cudnn' cannot run here: it needs tensors on a CUDA"):
        Scorer(models("qwen3"), attention="cudnn")
    with pytest.raises(RuntimeError, match="nothing can run here.*flash-attn-4"):
        Scorer(models("qwen3"), attention=["flash-attn-4", "cudnn"])
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        Scorer(models("qwen3"), attention="magic")


# --- routing -----------------------------------------------------------------


def test_routing_is_recorded_as_transformers_chooses(models):
    model = models("qwen3-moe-mixed")
    ids = torch.arange(20)
    with record_routing(model) as theirs, torch.no_grad():
        model(ids[None])
    scorer = Scorer(model, chunk_tokens=7)
    ours = scorer.routing_recorder()
    plain = scorer.score(ids)
    assert all(map(torch.equal, scorer.score(ids, recorder=ours), plain))
    found, expected = ours.record(), theirs.record()
    assert found.layers == expected.layers == (0, 2)
    assert torch.equal(found.ids.sort().values, expected.ids.sort().values)
    assert all(map(torch.equal, scorer.score(ids, replay=found), plain))


def test_replayed_experts_are_used(models):
    model = models("qwen3-moe")
    scorer, ids = Scorer(model), torch.arange(12)
    recorder = scorer.routing_recorder()
    plain = scorer.score(ids, recorder=recorder)
    record = recorder.record()
    others = dataclasses.replace(record, ids=(record.ids + 1) % 8)
    with replay_routing(model, others), torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    want = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    actual = scorer.score(ids, replay=others)
    torch.testing.assert_close(actual.logprobs[:-1].double(), want, atol=1e-5, rtol=0)
    assert (actual.logprobs - plain.logprobs).abs().max() > 1e-3
    live = dataclasses.replace(record, ids=torch.full_like(record.ids, 255))
    assert all(map(torch.equal, scorer.score(ids, replay=live), plain))


def test_records_that_do_not_fit(models):
    scorer = Scorer(models("qwen3-moe"))
    recorder = scorer.routing_recorder()
    scorer.score(torch.arange(5), recorder=recorder)
    with pytest.raises(ValueError, match=r"8, 2, 6\), the record to replay .* 8, 2, 5\)"):
        scorer.score(torch.arange(6), replay=recorder.record())
    with pytest.raises(ValueError, match="no experts"):
        Scorer(models("llama")).routing_recorder()
