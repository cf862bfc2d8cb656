"""The scorer on a GPU: a few layers at the true widths in bf16, memory, streaming, backends."""

import dataclasses

import pytest
import torch

from bench.long_context import make_config, peer_scores, random_ids, random_model
from qlkernels.attention.backends import BACKENDS, why_not
from qlkernels.prefix_group import pack_groups
from qlkernels.scorer import NotEnoughMemory, Scorer

pytestmark = pytest.mark.gpu

LAYERS = 3
T = 1500
FIELDS = ("logprobs", "entropy")
ALL = slice(None)


def build(shape):
    return random_model(make_config(shape, LAYERS), "cuda", torch.bfloat16)


def rms(a, b):
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.fixture(scope="module", params=["30b", "4b"])
def known(request):
    """A model, ids, and scores of transformers in bf16 and fp32."""
    model = build(request.param)
    ids = random_ids(T, model.config.vocab_size, "cuda")
    baseline = peer_scores(model, ids)
    wide = build(request.param).float()
    wide.set_experts_implementation("eager")
    truth = peer_scores(wide, ids)
    del wide
    torch.cuda.empty_cache()
    yield request.param, model, ids, baseline, truth
    del model
    torch.cuda.empty_cache()


def expect_as_accurate(actual, known, rows=ALL):
    """A router decides another way by rounding now and then, so the error is not that of the worst
    row.
    """
    *_, baseline, truth = known
    for name in FIELDS:
        error = rms(actual[name], truth[name][rows])
        assert error <= 2 * rms(baseline[name], truth[name]), (name, error)


def fields(scores, rows=ALL):
    return {name: getattr(scores, name)[rows] for name in FIELDS}


def test_one_sequence_and_packed_ones(known):
    _, model, ids, *_ = known
    scorer = Scorer(model)
    whole = scorer.score(ids)
    expect_as_accurate(fields(whole, slice(-1)), known)
    twice = scorer.score(ids.repeat(2), cu_seqlens=torch.tensor([0, T, 2 * T]))
    expect_as_accurate(fields(twice, slice(T, 2 * T - 1)), known)
    again = scorer.score(ids)
    assert all(map(torch.equal, whole, again))


def test_a_group(known):
    _, model, ids, *_ = known
    P = T - 500
    layout = pack_groups([ids[:P]], [[ids[P : P + 20], ids[P:], ids[P : P + 1]]])
    scores = Scorer(model).score(layout)
    expect_as_accurate(fields(scores, slice(P - 1)), known, slice(P - 1))
    answers = {name: layout.gather_answers(getattr(scores, name))[1] for name in FIELDS}
    expect_as_accurate(answers, known, slice(P - 1, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(known, backend):
    _, model, ids, *_ = known
    why = why_not(backend, "cuda", torch.bfloat16, 128)
    if why is not None:
        pytest.skip(why)
    scorer = Scorer(model, attention=backend)
    expect_as_accurate(fields(scorer.score(ids), slice(-1)), known)


def test_chunks(known):
    _, model, ids, *_ = known
    for chunk_tokens in (1, 333):
        parts = Scorer(model, chunk_tokens=chunk_tokens).score(ids)
        expect_as_accurate(fields(parts, slice(-1)), known)


@pytest.mark.parametrize("shape", ["30b", "4b"])
@pytest.mark.parametrize("tokens", [4096, 40_000])
def test_the_estimate_is_what_a_pass_takes(shape, tokens):
    model = build(shape)
    scorer = Scorer(model)
    ids = random_ids(tokens, scorer.decoder.V, "cuda")
    scorer.score(ids[:64])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scorer.score(ids)
    peak = torch.cuda.max_memory_allocated() - before
    estimate = scorer.estimate(tokens).activations
    assert peak <= estimate + (64 << 20) and estimate <= 1.5 * peak + (64 << 20), (peak, estimate)


@pytest.mark.parametrize("shape", ["30b", "4b"])
def test_streamed_weights_give_the_same_bits_in_the_memory_of_two_layers(shape):
    before = torch.cuda.memory_allocated()
    model = build(shape)
    ids = random_ids(T, model.config.vocab_size, "cuda")
    layout = pack_groups([ids[:900]], [[ids[900:], ids[:300]]])
    resident = Scorer(model)
    expected = resident.score(ids), resident.score(layout)
    del resident
    streamed = Scorer(model, stream_weights=True)
    assert streamed.device.type == "cuda" and streamed.is_streaming
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for inputs, want in zip((ids, layout), expected, strict=True):
            assert all(map(torch.equal, streamed.score(inputs), want))
    peak = torch.cuda.max_memory_allocated() - before
    estimate = streamed.estimate(T, is_one_sequence=False)
    assert peak <= estimate.total + (64 << 20), (peak, estimate)
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "cpu"


def test_an_interrupted_pass_leaves_the_next_one_whole():
    scorer = Scorer(build("4b"), stream_weights=True)
    ids = random_ids(T, scorer.decoder.V, "cuda")
    want = scorer.score(ids)

    def stop(_done, _layers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.score(ids, on_layer=stop)
    said = []
    got = scorer.score(ids, on_layer=lambda *a: said.append(a))
    assert all(map(torch.equal, got, want))
    assert said == [(i + 1, LAYERS) for i in range(LAYERS)]


def test_a_folder_goes_to_the_card_and_to_page_locked_memory(tmp_path):
    model = random_model(make_config("tiny", None), "cuda", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    ids = random_ids(200, model.config.vocab_size, "cuda")
    want = Scorer(model).score(ids)
    for stream in (False, True):
        scorer = Scorer.from_folder(tmp_path, stream_weights=stream)
        assert scorer.device.type == "cuda" and scorer.dtype == torch.bfloat16
        assert all(map(torch.equal, scorer.score(ids), want))
    host = scorer._weights._host[0]
    assert host.is_pinned()


def test_too_little_memory_is_refused():
    scorer = Scorer(build("4b"))
    scorer.decoder = dataclasses.replace(scorer.decoder, max_positions=1 << 40)
    with pytest.raises(NotEnoughMemory, match="tokens fit|use chunk_tokens|stream_weights"):
        scorer.score(torch.zeros(30_000_000, dtype=torch.int64))
