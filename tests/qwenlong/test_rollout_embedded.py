"""Embedded rollouts against the full forward pass of transformers, on tiny random models."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from qwenlong.errors import InputError
from qwenlong.rollout import EmbeddedRollouts, embedded, shared_prefix
from tests.qwenlong.tiny_models import KINDS, SIZES

V, END = 61, 7


def make_model(kind: str = "llama", **changes):
    name, differs = KINDS[kind]
    config = getattr(transformers, name)(
        **{**SIZES, "vocab_size": V, "eos_token_id": END, **differs, **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def some_prompts() -> list[list[int]]:
    """Two documents of 40 and 23 tokens with questions of several lengths; one prompt twice; one of
    a single token; one that is the beginning of another."""
    draw = np.random.default_rng(0)
    a, b = draw.integers(8, V, 40).tolist(), draw.integers(8, V, 23).tolist()
    tails = [draw.integers(8, V, n).tolist() for n in (1, 5, 2, 9)]
    prompts = [a + tails[0], b + tails[1], a + tails[1], [9], a + tails[3], b + tails[2]]
    return [*prompts, prompts[2], a]


def scored(model, turn, temperature: float) -> torch.Tensor:
    """Log-probs of a turn's answer by one plain forward pass over the whole sequence."""
    ids = torch.tensor([turn.prompt_ids + turn.response_ids])
    with torch.no_grad():
        logits = model(ids).logits[0].float() / temperature
    rows = logits[len(turn.prompt_ids) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(turn.response_ids)[:, None])[:, 0]


def generate(model, prompts, **changes):
    options = {"group_size": 3, "max_new_tokens": 12, "temperature": 0.8, "seed": 5, **changes}
    rollouts = EmbeddedRollouts(model, **options.pop("settings", {}))
    return rollouts.generate(prompts, **options)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logprobs_are_those_of_the_whole_sequence(kind):
    model = make_model(kind)
    prompts = some_prompts()
    groups = generate(model, prompts)
    reasons = set()
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == 3
        for turn in group:
            assert turn.prompt_ids == prompt
            torch.testing.assert_close(
                torch.tensor(turn.logprobs), scored(model, turn, 0.8), atol=2e-5, rtol=2e-5
            )
            reasons.add(turn.finish_reason)
            if turn.finish_reason == "stop":
                assert turn.response_ids.index(END) == len(turn.response_ids) - 1
            else:
                assert END not in turn.response_ids and len(turn.response_ids) == 12
    assert reasons == {"stop", "length"}  # the seed shows both


def test_an_answer_does_not_depend_on_its_neighbours(model):
    prompts = some_prompts()
    together = generate(model, prompts)
    for settings in (
        {"max_rows": 1},
        {"max_rows": 2},
        {"max_rows": 6, "cache_tokens": 50},
        {"cache_tokens": 1},  # one answer at a time
        {"prefill_tokens": 7},
    ):
        apart = generate(model, prompts, settings=settings)
        for one, other in zip(sum(together, []), sum(apart, []), strict=True):
            assert one.response_ids == other.response_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    # A smaller group is the beginning of a larger one; a longer limit only goes on.
    smaller = generate(model, prompts, group_size=2)
    assert [[t.response_ids for t in g] for g in smaller] == [
        [t.response_ids for t in g[:2]] for g in together
    ]
    shorter = generate(model, prompts, max_new_tokens=4)
    for one, other in zip(sum(together, []), sum(shorter, []), strict=True):
        assert one.response_ids[:4] == other.response_ids


def test_repeats_bitwise_and_the_seed_matters(model):
    prompts = some_prompts()
    first, again, other = (generate(model, prompts, seed=seed) for seed in (5, 5, -5))
    assert first == again
    assert first != other
    answers = {tuple(turn.response_ids) for turn in first[2]}
    assert len(answers) > 1  # the answers of a group differ
    assert first[2] != first[6]  # and so do two groups of the same prompt


def test_temperature_0_is_greedy_and_has_no_logprobs(model):
    prompts = some_prompts()
    for prompt, (turn,) in zip(
        prompts, generate(model, prompts, temperature=0, group_size=1), strict=True
    ):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert turn.response_ids == out[0, len(prompt) :].tolist()
        assert turn.logprobs is None


def test_tokens_are_drawn_from_the_distribution(model):
    """4,000 first tokens against their probabilities: chi-square, 3.1 sigma of its mean."""
    prompt, n = [9, 20, 33], 4_000
    (group,) = generate(
        model, [prompt], group_size=n, max_new_tokens=1, settings={"max_rows": 1_000}
    )
    counts = np.bincount([turn.response_ids[0] for turn in group], minlength=V)
    with torch.no_grad():
        probs = (model(torch.tensor([prompt])).logits[0, -1] / 0.8).double().softmax(-1).numpy()
    likely = probs * n >= 5
    observed = [*counts[likely], counts[~likely].sum()]
    expected = [*(probs[likely] * n), probs[~likely].sum() * n]
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(observed) - 1
    assert chi_square < freedom + 3.1 * math.sqrt(2 * freedom)


def test_a_token_of_probability_0_is_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).repeat(3, 1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = embedded._choose(logits, uniforms, 1.0)
    assert tokens.tolist() == [0, 2, 2]
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(2.0)))


def test_a_shared_prefix_is_read_once(model):
    document = np.random.default_rng(1).integers(8, V, 50).tolist()
    prompts = [document + [8 + i] for i in range(20)]
    read = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: read.append(args[0].numel())
    )
    try:
        # 20 prompts in batches of 4: the document once, then 4 * 1 own tokens and 11 steps of 8
        # answers a batch at most.
        generate(model, prompts, group_size=2, settings={"max_rows": 8})
    finally:
        hook.remove()
    assert read[0] == 50
    assert sum(read) <= 50 + 5 * (4 + 11 * 8)


def test_families_are_written_together(model, monkeypatch):
    """Two documents with two questions each are two families, and their answers take one forward
    pass a token together; limits part them."""
    draw = np.random.default_rng(2)
    documents = [draw.integers(8, V, 300).tolist() for _ in range(2)]
    model = make_model(max_position_embeddings=1024)
    prompts = [document + [9, i] for i in (10, 11) for document in documents]
    families = list(embedded._families(prompts, 8))
    assert sorted(family.shared for family in families) == [301, 301]
    assert sorted(sum((family.prompts for family in families), [])) == [0, 1, 2, 3]

    def passes(**settings):
        calls = []
        hook = model.lm_head.register_forward_hook(lambda *args: calls.append(1))
        try:
            groups = generate(model, prompts, group_size=2, max_new_tokens=5, settings=settings)
        finally:
            hook.remove()
        return len(calls), [turn.response_ids for turn in sum(groups, [])]

    together, answers = passes()
    assert together <= 2 + 5
    for settings in ({"max_rows": 4}, {"cache_tokens": 400}):
        apart, same = passes(**settings)
        assert same == answers and apart > together


def test_own_tokens_are_bounded(model, monkeypatch):
    """Prompts with long ends of their own go apart; the answers stay."""
    prompts = some_prompts()
    together = generate(model, prompts)
    monkeypatch.setattr(embedded, "MAX_OWN_TOKENS", 3)
    assert len(list(embedded._families(prompts, 100))) > 3
    apart = generate(model, prompts)
    assert [t.response_ids for t in sum(apart, [])] == [t.response_ids for t in sum(together, [])]


def test_blocks_of_scores_do_not_matter(model, monkeypatch):
    prompts = some_prompts()
    whole = generate(model, prompts)
    monkeypatch.setattr(shared_prefix, "SCORE_ELEMENTS", 1)
    for one, other in zip(sum(whole, []), sum(generate(model, prompts), []), strict=True):
        assert one.response_ids == other.response_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_new_weights_are_used_at_once(model):
    trained = make_model()
    prompts = some_prompts()[:2]
    rollouts = EmbeddedRollouts(trained)
    options = {"group_size": 1, "max_new_tokens": 6, "temperature": 1.0, "seed": 0}
    before = rollouts.generate(prompts, **options)
    with torch.no_grad():
        trained.lm_head.weight.mul_(-1.0)
    rollouts.sync_weights(trained, 1)
    after = rollouts.generate(prompts, **options)
    assert before != after
    # From another model its weights are copied.
    rollouts.sync_weights(model, 2)
    assert rollouts.generate(prompts, **options) == before
    rollouts.close()


def test_the_model_is_left_as_it_was(model):
    attention = model.config._attn_implementation
    model.train()
    try:
        generate(model, [[9, 10]])
        assert model.training and model.config._attn_implementation == attention
    finally:
        model.eval()


def test_bf16(model):
    """Log-probs of a bf16 model are fp32 numbers, near those of the whole sequence in fp32."""
    half = make_model().to(torch.bfloat16)
    (group,) = generate(half, [[9] * 30])
    for turn in group:
        wanted = scored(model, turn, 0.8)
        torch.testing.assert_close(torch.tensor(turn.logprobs), wanted, atol=0.2, rtol=0.05)
        assert not torch.equal(torch.tensor(turn.logprobs), wanted)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 250}, "prompt 0 has 41 tokens and may get 250 more"),
    ],
)
def test_wrong_settings_are_refused(model, changes, words):
    with pytest.raises(InputError, match=words):
        generate(model, some_prompts(), **changes)


def test_wrong_prompts_and_models_are_refused(model):
    assert generate(model, []) == []
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        generate(model, [[9], []])
    with pytest.raises(InputError, match="do not attend to the whole context"):
        generate(make_model("gemma2", vocab_size=V), [[9, 10, 11]])
    with pytest.raises(InputError, match="names no end token"):
        EmbeddedRollouts(model, eos_token_ids=[])
    with pytest.raises(InputError, match="cache_tokens 0"):
        EmbeddedRollouts(model, cache_tokens=0)
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, [[9, 10]])


def test_the_example_of_the_page_runs(model):
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"model": model}
    exec(compile(block, "rollouts.md", "exec"), names)
    assert len(names["groups"][0]) == 8
