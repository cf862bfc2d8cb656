"""What the scorer says a pass takes, against what torch's allocator gave out."""

import itertools
import re

import pytest
import torch
from torch.profiler import ProfilerActivity
from transformers import Qwen3MoeConfig

from qlkernels import linear_logprob
from qlkernels.prefix_group import pack_groups
from qlkernels.scorer import Decoder, NotEnoughMemory, Scorer, estimate_memory, memory
from qlkernels.scorer.memory import what_would_fit
from qlkernels.scorer.weights import layouts_of
from tests.qlkernels.test_scorer import tiny_model

WIDE = dict(
    hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=8192, num_hidden_layers=2, vocab_size=64,
)  # fmt: skip


def measured_peak(scorer, inputs, **given):
    """The largest sum of bytes that torch's allocator had given out, from its own events."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        scorer.score(inputs, **given)
    return peak_of(profile)


def peak_of(profile) -> int:
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


# what the attention kernel of the CPU works in, whatever the number of tokens
BLOCKS = 1 << 20


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("chunk_tokens", [256, 2048])
def test_the_estimate_is_what_a_pass_takes(kind, chunk_tokens):
    scorer = Scorer(tiny_model(kind, **WIDE), chunk_tokens=chunk_tokens)
    peaks, estimates = {}, {}
    for T in (1024, 4096):
        peaks[T] = measured_peak(scorer, torch.arange(T) % 64)
        estimates[T] = scorer.estimate(T).activations
        assert peaks[T] - BLOCKS <= estimates[T] <= 1.3 * peaks[T], (peaks, estimates)
    growth = (peaks[4096] - peaks[1024]) / (estimates[4096] - estimates[1024])
    assert 0.8 < growth < 1.2  # bytes a token, as stated


@pytest.mark.parametrize("inputs", ["sequences", "group"])
def test_pieces_are_counted(inputs):
    scorer = Scorer(tiny_model("qwen3", **WIDE), chunk_tokens=256)
    ids = (torch.arange(3000) % 64).tolist()
    if inputs == "group":
        given = dict(inputs=pack_groups([ids[:1500]], [[ids[:700], ids[:800]]]))
    else:
        given = dict(inputs=torch.tensor(ids), cu_seqlens=torch.tensor([0, 2000, 2500, 3000]))
    peak = measured_peak(scorer, **given)
    estimate = scorer.estimate(3000, is_one_sequence=False).activations
    assert peak - BLOCKS <= estimate <= 1.4 * peak


QWEN3_30B = dict(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, vocab_size=151_936, max_position_embeddings=262_144,
)  # fmt: skip


def test_a_30b_model_by_hand():
    decoder = Decoder.of_config(Qwen3MoeConfig(**QWEN3_30B))
    assert decoder.num_weights() == 30_532_122_624
    resident = estimate_memory(decoder, 120_000)
    assert resident.weights == 61_064_245_248
    # residual 0.49 GB, rotation 0.03, ids; q and output 0.98 each, k and v 0.25, log-sum-exp
    assert resident.always == 120_000 * (2048 + 128) * 2 + 26 * 120_000
    assert resident.parts["attention"] == 120_000 * ((2 * 32 + 2 * 4) * 128 * 2 + 4 * 32)
    assert resident.total < 68e9
    streamed = estimate_memory(decoder, 120_000, stream_weights=True)
    assert streamed.activations == resident.activations
    assert streamed.weights == 2 * 1_246_241_280 + 151_936 * 2048 * 2
    assert streamed.total < 11e9
    assert estimate_memory(decoder, 192_000).total < 70e9


def test_the_head_on_a_gpu_by_hand(monkeypatch):
    """151,936 = 1187 * 128 columns; without Triton 3 fp32 copies of the logits and a byte."""
    decoder = Decoder.of_config(Qwen3MoeConfig(**QWEN3_30B))

    def beside_the_rows(T):
        return estimate_memory(decoder, T).parts["head"] - T * 2 * 2048 * 2 - 28 * T

    monkeypatch.setattr(memory, "has_triton", lambda: True)
    assert beside_the_rows(1000) == 12 * 1000 * 1187
    assert beside_the_rows(50_000) == 512 << 20
    monkeypatch.setattr(memory, "has_triton", lambda: False)
    assert beside_the_rows(100) == 13 * 100 * 151_936
    assert beside_the_rows(1000) == 13 * (128 << 20)


def test_without_triton_the_head_holds_what_is_counted():
    """The fallback on a GPU is the one in plain torch, whose chunks are counted here on the CPU."""
    T, V = 400, 5000
    x, w = torch.randn(T, 8), torch.randn(V, 8)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_logprob(x, w, torch.zeros(T, dtype=torch.int64), impl="torch")
    assert peak_of(profile) == pytest.approx(13 * T * V, rel=0.01)


def test_the_largest_layer_is_what_a_buffer_holds():
    config = Qwen3MoeConfig(**QWEN3_30B)
    decoder = Decoder.of_config(config)
    assert layouts_of(decoder, torch.bfloat16)[0].bytes == 1_246_241_280


REFUSALS = {
    "fewer rows at a time": (15_000_000, 4096, "use chunk_tokens=2048"),
    "fewer tokens": (1_000_000, 4096, r"at most \d+ tokens fit \(with chunk_tokens=256\)"),
    "nothing": (1000, 4096, "not one token fits"),
}


@pytest.mark.parametrize("limit, tokens, says", REFUSALS.values(), ids=REFUSALS)
def test_too_little_memory_is_refused_before_the_pass(limit, tokens, says):
    model = tiny_model("qwen3", **WIDE)
    scorer = Scorer(model, memory_bytes=limit, chunk_tokens=4096)
    with pytest.raises(NotEnoughMemory, match=f"a pass over {tokens} tokens needs .*; {says}"):
        scorer.score(torch.zeros(tokens, dtype=torch.int64), on_layer=lambda *_: pytest.fail())


def test_the_setting_that_is_named_fits():
    model = tiny_model("qwen3", **WIDE)
    scorer = Scorer(model, chunk_tokens=4096)
    limit = scorer.estimate(512).activations + 200_000
    with pytest.raises(NotEnoughMemory) as error:
        Scorer(model, memory_bytes=limit, chunk_tokens=4096).score(torch.arange(4096) % 64)
    found = re.search(r"at most (\d+) tokens fit \(with chunk_tokens=(\d+)\)", str(error.value))
    tokens, chunk = (int(n) for n in found.groups())
    fitting = Scorer(model, memory_bytes=limit, chunk_tokens=chunk)
    fitting.score(torch.arange(tokens) % 64)
    with pytest.raises(NotEnoughMemory):
        fitting.score(torch.arange(tokens + 1) % 64)


def test_streaming_is_offered_where_the_weights_are_in_the_way():
    decoder = Decoder.of_config(Qwen3MoeConfig(**QWEN3_30B))
    says = what_would_fit(
        decoder, 250_000, 3 << 30, dtype=torch.bfloat16, chunk_tokens=32_768,
        stream_weights=False, is_one_sequence=True, device_type="cuda",
    )  # fmt: skip
    assert says == "use stream_weights=True"


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("qlkernels.scorer.loading.available_bytes", lambda _device: 10_000)
    monkeypatch.setattr("qlkernels.scorer.checkpoint.Checkpoint.read_into", pytest.fail)
    with pytest.raises(NotEnoughMemory, match="the weights take .* use stream_weights=True"):
        Scorer.from_folder(tmp_path, device="cpu")
