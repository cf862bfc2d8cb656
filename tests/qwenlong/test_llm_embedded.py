"""The embedded client against transformers' own generate, on a tiny random model."""

import asyncio
import math
import threading
import time
from concurrent.futures import CancelledError

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from qwenlong.llm import EmbeddedClient, Request, RequestRefused  # noqa: E402
from qwenlong.llm.embedded import _Row  # noqa: E402

WORDS = [f"w{i}" for i in range(60)]
CONTEXT = 64


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "user:", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=0,
        initializer_range=0.6,
    )
    return transformers.LlamaForCausalLM(config).eval(), make_tokenizer()


@pytest.fixture
def client(parts):
    with EmbeddedClient(*parts, name="tiny", batch_size=4) as client:
        yield client


PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]


def test_greedy_batch_equals_transformers_one_by_one(client, parts):
    model, tokenizer = parts
    requests = [Request.completion(p, max_tokens=8, logprobs=True) for p in PROMPTS]
    answers = dict(client.iter_many(requests))
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected = out[0, ids.shape[1] :].tolist()
        assert list(answers[i].token_ids) == expected
        assert answers[i].prompt_tokens == ids.shape[1]
        with torch.no_grad():
            logprobs = model(out).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        wanted = logprobs.gather(1, torch.tensor(expected)[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(answers[i].logprobs), wanted, atol=1e-4, rtol=1e-4)


def test_samples_repeat_and_do_not_depend_on_neighbours(client):
    options = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 12}
    alone = [client.sample(Request.completion(p, **options), 3) for p in PROMPTS]
    requests = [Request.completion(p, sample_index=i, **options) for p in PROMPTS for i in range(3)]
    together = [c for _, c in sorted(client.iter_many(requests))]
    assert [c.token_ids for group in alone for c in group] == [c.token_ids for c in together]
    assert len({c.token_ids for c in alone[0]}) > 1
    seeded = client.sample(Request.completion("w1", seed=5, **options), 2)
    assert seeded[1] == client.generate(Request.completion("w1", seed=6, **options))


def test_top_p_keeps_the_smallest_set_that_reaches_it(client, parts):
    model, tokenizer = parts
    with torch.no_grad():
        probs = model(tokenizer("w3", return_tensors="pt")["input_ids"]).logits[0, -1].softmax(-1)
    ordered, order = probs.sort(descending=True)
    size = next(k for k in range(1, 65) if ordered[:k].sum() >= 0.5)
    request = Request.completion("w3", temperature=1.0, top_p=0.5, max_tokens=1, logprobs=True)
    drawn = client.sample(request, 60)
    assert {c.token_ids[0] for c in drawn} <= set(order[:size].tolist())
    for c in drawn[:5]:  # of the untruncated distribution
        assert math.exp(c.logprobs[0]) == pytest.approx(probs[c.token_ids[0]].item(), rel=1e-4)


def test_stop_string_cuts_the_text(client):
    whole = client.generate(Request.completion("w1 w2 w3", max_tokens=8)).text.split()
    cut = client.generate(Request.completion("w1 w2 w3", max_tokens=8, stop=(whole[3],)))
    assert cut.text.split() == whole[: whole.index(whole[3])] and cut.finish_reason == "stop"


def test_a_stop_string_of_which_every_byte_is_a_token_is_found():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    stop = "最终答案如下所示请查看谢谢你们好"
    request = Request.completion("x", max_tokens=1000, stop=(stop,))
    row = _Row(request, 0, 1000, Bytes(), set())
    logits = torch.eye(256)
    for token in f"so: {stop}".encode():
        assert not row.finish_reason
        row.step(logits[token], token, 0.0)
    assert row.finish_reason == "stop" and row.completion(1).text == "so: "


def test_chat_template_length_limit_and_too_long_prompt(client):
    answer = client.generate(Request.chat([{"role": "user", "content": "w1 w2"}], max_tokens=3))
    assert answer.prompt_tokens == 3 and answer.completion_tokens <= 3
    long = Request.completion(" ".join(["w1"] * (CONTEXT - 2)))
    assert client.generate(long).completion_tokens <= 2  # no limit given: the context is full
    with pytest.raises(RequestRefused, match="context is 64"):
        client.generate(Request.completion(" ".join(["w1"] * CONTEXT)))
    with pytest.raises(RequestRefused, match="no tokens"):
        client.generate(Request.completion([]))


def test_a_broken_request_leaves_its_batch_alone(client):
    good = Request.completion("w1", max_tokens=2)
    bad = Request.completion([1, 10**9], max_tokens=2)  # no such token

    async def both():
        return await asyncio.gather(
            client.agenerate(Request.completion([], max_tokens=2)),
            client.agenerate(good),
            return_exceptions=True,
        )

    refused, answered = asyncio.run(both())
    assert isinstance(refused, RequestRefused) and answered.completion_tokens >= 1
    with pytest.raises(RequestRefused, match="ids 1 to 1000000000, the model's are 0 to 63"):
        client.generate(bad)
    assert client.generate(good) == answered


def test_an_error_while_a_batch_is_written_is_one_request_s_alone(parts):
    sizes = []

    class Breaks(EmbeddedClient):
        def _generate(self, requests, prompts, futures):
            sizes.append(len(prompts))
            if any(len(prompt) == 3 for prompt in prompts):
                raise RuntimeError("too long for this card")
            return super()._generate(requests, prompts, futures)

    options = {"temperature": 1.3, "max_tokens": 8}
    with EmbeddedClient(*parts, name="tiny") as client:
        expected = [client.generate(Request.completion(p, **options)) for p in PROMPTS[1:]]

    async def ask(client):
        requests = [Request.completion(p, **options) for p in PROMPTS]
        return await asyncio.gather(*map(client.agenerate, requests), return_exceptions=True)

    with Breaks(*parts, name="tiny") as client:
        broken, *answered = asyncio.run(ask(client))
    assert isinstance(broken, RuntimeError) and answered == expected
    assert sizes == [4, 1, 1, 1, 1]


# --- batches -----------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch):
    """A busy machine may take longer than 50 ms from one asker to the next."""
    monkeypatch.setattr("qwenlong.llm.embedded._GATHER_SECONDS", 0.25)


def sizes_and_texts(parts, batch_size, askers, rounds=1):
    """Sizes of the batches, and the texts, of ``askers`` that ask ``rounds`` times one after the
    other, each 2 ms behind the one before.
    """
    sizes = []

    class Watched(EmbeddedClient):
        def _generate(self, requests, prompts, futures):
            sizes.append(len(requests))
            return super()._generate(requests, prompts, futures)

    async def asker(client, i):
        said = ""
        for _ in range(rounds):
            await asyncio.sleep(0.002 * i)
            request = Request.completion(f"w{i} w{i + 1} {said}", temperature=1.0, max_tokens=4)
            said = (await client.agenerate(request)).text
        return said

    async def ask(client):
        return await asyncio.gather(*(asker(client, i) for i in range(askers)))

    with Watched(*parts, name="tiny", batch_size=batch_size) as client:
        return sizes, asyncio.run(ask(client))


def test_a_batch_fills_up_in_every_round(parts, patient):
    sizes, texts = sizes_and_texts(parts, 8, 6, rounds=3)
    assert sizes == [6, 6, 6]
    apart, expected = sizes_and_texts(parts, 1, 6, rounds=3)
    assert apart == [1] * 18 and texts == expected


def test_those_left_over_wait_for_those_who_ask_again(parts, patient):
    sizes, _ = sizes_and_texts(parts, 4, 6, rounds=2)
    assert sizes == [4, 4, 4]


def test_a_full_batch_does_not_wait_and_one_request_is_answered(parts, patient):
    sizes, _ = sizes_and_texts(parts, 2, 6)
    assert sizes == [2, 2, 2]
    assert sizes_and_texts(parts, 8, 1)[0] == [1]


@pytest.fixture
def slow(parts):
    """A client whose passes take 20 ms, and whose answers end at their limit alone."""
    passes = []

    def count(*_):
        passes.append(None)
        time.sleep(0.02)

    model, tokenizer = parts
    hook = model.register_forward_pre_hook(count)
    client = EmbeddedClient(model, tokenizer, name="tiny", batch_size=2)
    client._eos = set()
    yield client, passes
    client.close()
    hook.remove()


def test_what_nobody_waits_for_is_not_written_to_its_end(slow):
    """60 tokens would take 1.2 s. A neighbour is answered as soon as it is done itself."""
    client, passes = slow
    long = Request.completion("w1", max_tokens=60)
    short = Request.completion("w2", max_tokens=8)

    async def cancel_one():
        doomed = asyncio.ensure_future(client.agenerate(long))
        answer = asyncio.ensure_future(client.agenerate(short))
        while not passes:
            await asyncio.sleep(0.005)
        doomed.cancel()
        return await answer

    assert asyncio.run(cancel_one()).completion_tokens == 8
    assert len(passes) < 40
    passes.clear()

    asked = threading.Thread(target=lambda: pytest.raises(CancelledError, client.generate, long))
    asked.start()
    while not passes:
        time.sleep(0.005)
    client.close()  # as Ctrl-C does
    asked.join()
    time.sleep(0.1)
    written = len(passes)
    assert written < 40
    time.sleep(0.1)
    assert len(passes) == written
    assert client.generate(short).completion_tokens == 8  # and it starts again


def test_model_from_a_folder(parts, client, tmp_path):
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    request = Request.chat([{"role": "user", "content": "w1 w2"}], max_tokens=6)
    with EmbeddedClient(tmp_path / "m", cache=tmp_path / "calls") as loaded:
        assert loaded.model == str(tmp_path / "m")
        assert loaded.generate(request) == client.generate(request)
        assert loaded.generate(request).cached


def test_cache_needs_a_name(parts, tmp_path):
    with pytest.raises(ValueError, match="needs name="):
        EmbeddedClient(*parts, cache=tmp_path)
