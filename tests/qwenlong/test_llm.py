"""The model client against a real HTTP server that misbehaves, and against a scripted model."""

import asyncio
import json
import multiprocessing
import os
import random
import socket
import threading
import time
from concurrent.futures import CancelledError

import pytest

from qwenlong.llm import (
    CallCache,
    ChatClient,
    Client,
    Completion,
    Request,
    RequestRefused,
    RetryPolicy,
    Sampling,
    ScriptedClient,
    ServerUnavailable,
    TransientError,
    VirtualTime,
)
from qwenlong.llm.limits import RateLimiter
from tests.qwenlong.llm_server import serve

pytest.importorskip("openai")


def ask(text, **options):
    return Request.chat([{"role": "user", "content": text}], **options)


def connect(url, **options):
    options.setdefault("time", VirtualTime())
    options.setdefault("timeout", 20.0)
    return ChatClient(url, model="m", **options)


# --- one call ----------------------------------------------------------------


def test_chat_sends_what_was_asked_and_reads_the_answer():
    with serve() as (server, url), connect(url) as client:
        request = ask(
            "two words",
            temperature=0.7,
            top_p=0.9,
            max_tokens=5,
            stop=("x",),
            seed=10,
            sample_index=3,
            logprobs=True,
            extra_body={"return_token_ids": True, "top_k": 4},
        )
        assert client.generate(request) == Completion(
            text="TWO WORDS",
            finish_reason="stop",
            prompt_tokens=7,
            completion_tokens=2,
            reasoning="hm",
            logprobs=(-0.5, -1.0),
            token_ids=(0, 1),
        )
        assert server.bodies == [
            {
                "model": "m",
                "messages": [{"role": "user", "content": "two words"}],
                "temperature": 0.7,
                "top_p": 0.9,
                "max_tokens": 5,
                "stop": ["x"],
                "seed": 13,  # of sample 3
                "logprobs": True,
                "return_token_ids": True,
                "top_k": 4,
            }
        ]


def test_completions_take_text_and_token_ids():
    with serve() as (server, url), connect(url) as client:
        answer = client.generate(Request.completion("one two three", logprobs=True))
        assert (answer.text, answer.logprobs) == ("ONE TWO THREE", (-0.5, -1.0, -1.5))
        assert client.generate(Request.completion([4, 5])).text == "2 TOKENS"
        assert server.bodies[1]["prompt"] == [4, 5]


@pytest.mark.parametrize("n", [1, 3])
def test_stream_gives_the_same_as_one_piece(n):
    extra = {"return_token_ids": True}
    request = ask("a longer sentence", temperature=1.0, logprobs=True, extra_body=extra)
    with serve() as (server, url), connect(url) as whole, connect(url, stream=True) as pieces:
        expected, actual = whole.sample(request, n), pieces.sample(request, n)
        assert server.bodies[1]["stream_options"] == {"include_usage": True}
    # The server's chunks carry no thinking text.
    assert [c.to_json() | {"reasoning": None} for c in expected] == [c.to_json() for c in actual]


def test_samples_are_one_request_unless_seeded():
    with serve() as (server, url), connect(url) as client:
        answers = client.sample(ask("a b c", temperature=1.0), 4)
        assert [b.get("n") for b in server.bodies] == [4]
        assert [a.completion_tokens for a in answers] == [3, 3, 3, 3]
        assert (client.totals.prompt_tokens, client.totals.completion_tokens) == (7, 12)
        client.sample(ask("a", temperature=1.0, seed=5), 3)
        assert sorted(b["seed"] for b in server.bodies[1:]) == [5, 6, 7]


@pytest.mark.parametrize("cached", [False, True])
def test_samples_without_temperature_are_asked_one_by_one(tmp_path, cached):
    # vLLM: "n must be 1 when using greedy sampling".
    with serve() as (server, url), connect(url, cache=tmp_path if cached else None) as client:
        assert [c.text for c in client.sample(ask("a b", temperature=0.0), 3)] == ["A B"] * 3
        assert len(server.bodies) == 3 and not any("n" in body for body in server.bodies)
        assert client.totals.prompt_tokens == 3 * 7


def test_server_that_ignores_n_is_refused_with_advice():
    choice = {"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}
    with serve([("raw", {"choices": [choice]})]) as (_, url), connect(url) as client:
        with pytest.raises(RequestRefused, match="ignores n; set a seed"):
            client.sample(ask("x", temperature=1.0), 2)


# --- faults ------------------------------------------------------------------

FAULTS = {
    "500": ("status", 500, ()),
    "503": ("status", 503, ()),
    "408": ("status", 408, ()),
    "429": ("status", 429, ()),
    "half": "half",
    "not-json": "not json",
    "html": "text",
    "no-choices": "no choices",
    "list": ("raw", [1, 2]),
    "wrong-types": ("raw", {"choices": [3]}),
    "text-for-message": (
        "raw",
        {"choices": [{"index": 0, "message": "A", "finish_reason": "stop"}]},
    ),
    "no-log-prob": (
        "raw",
        {
            "choices": [
                {
                    "index": 0,
                    "message": {"content": "A"},
                    "finish_reason": "stop",
                    "logprobs": {"content": [{"token": "A", "logprob": None}]},
                }
            ]
        },
    ),
    "hang-up": "hang up",
    "abort": (
        "raw",
        {"choices": [{"index": 0, "message": {"content": "A"}, "finish_reason": "abort"}]},
    ),
}
NOT_STREAMED = ("list", "wrong-types", "text-for-message", "no-log-prob", "abort")


@pytest.mark.parametrize(
    "name, stream",
    [(name, False) for name in FAULTS]
    + [(name, True) for name in FAULTS if name not in NOT_STREAMED],
)
def test_fault_is_retried_until_the_answer(name, stream):
    fault = FAULTS[name]
    with serve([fault, fault]) as (server, url), connect(url, stream=stream) as client:
        assert client.generate(ask("hello there")).text == "HELLO THERE"
        assert len(server.bodies) == client.totals.attempts == 3
        assert sum(client.totals.failures.values()) == 2
        assert client.totals.answers == 1


@pytest.mark.parametrize("fault, stream", [("stall", False), ("stall", True), ("half stall", True)])
def test_stall_is_noticed(fault, stream):
    with serve([fault, fault]) as (_, url):
        with connect(url, stream=stream, timeout=0.15) as client:
            assert client.generate(ask("hello there, all")).text == "HELLO THERE, ALL"
            assert client.totals.failures["timeout"] >= 2  # more on a machine that is busy


@pytest.mark.parametrize(
    "fault",
    [
        "no finish",
        "bad chunk",
        ("chunk", {"choices": ["A"]}),
        ("chunk", {"choices": [{"delta": "A"}]}),
        ("chunk", {"choices": [{"delta": {"content": 3}}]}),
        ("chunk", {"choices": [{"logprobs": {"content": [{"token": "A"}]}}]}),
    ],
    ids=str,
)
def test_broken_stream_is_retried(fault):
    with serve([fault]) as (server, url), connect(url, stream=True) as client:
        assert client.generate(ask("hello there, all of you")).text == "HELLO THERE, ALL OF YOU"
        assert len(server.bodies) == 2


def test_deadline_ends_an_attempt_that_is_not_silent():
    with serve() as (server, url):
        server.delay = 0.3
        client = connect(url, deadline=0.05, retry=RetryPolicy(max_retries=1))
        with client, pytest.raises(ServerUnavailable, match="not done within 0.05 s"):
            client.generate(ask("x"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusal_is_not_retried(status):
    with serve([("status", status, ())]) as (server, url), connect(url) as client:
        with pytest.raises(RequestRefused, match=f"HTTP {status}: .*told to fail") as caught:
            client.generate(ask("x"))
        assert caught.value.status == status and len(server.bodies) == 1


def test_text_that_cannot_be_sent_is_refused():
    with serve() as (server, url), connect(url) as client:
        with pytest.raises(RequestRefused, match="surrogate"):
            client.generate(ask("half \ud800 pair"))
        assert client.generate(ask("whole \U0001f600")).text == "WHOLE \U0001f600"
        assert len(server.bodies) == 1


def test_exhausted_quota_is_not_retried():
    fault = ("status", 429, (), "insufficient_quota")
    with serve([fault]) as (server, url), connect(url) as client:
        with pytest.raises(RequestRefused, match="HTTP 429"):
            client.generate(ask("x"))
        assert len(server.bodies) == 1


def test_retry_after_is_read_from_the_header():
    seconds = VirtualTime()
    fault = ("status", 429, [("Retry-After", "17")])
    with serve([fault]) as (_, url), connect(url, time=seconds) as client:
        client.generate(ask("x"))
    assert seconds.now() == 17.0


def test_retry_after_holds_back_every_call():
    seconds, asked_at = VirtualTime(), []

    def reply(messages):
        asked_at.append(seconds.now())
        return "x"

    faults = [TransientError("HTTP 429", retry_after=17.0)]
    with ScriptedClient(reply, faults=faults, time=seconds) as client:
        list(client.iter_many(ask(f"q{i}") for i in range(5)))
    assert len(asked_at) == 5 and min(asked_at) >= 17.0


def test_retry_after_may_be_a_date_in_the_past():
    seconds = VirtualTime()
    fault = ("status", 503, [("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")])
    with serve([fault]) as (_, url), connect(url, time=seconds) as client:
        assert client.generate(ask("x")).text == "X"
    assert 0 < seconds.now() <= 0.5  # the backoff alone


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_dead_server_stops_with_one_error_and_keeps_the_answers(tmp_path):
    port = closed_port()
    requests = [ask(f"q{i}") for i in range(6)]
    with serve(port=port) as (_, url), connect(url, cache=tmp_path) as client:
        assert len(list(client.iter_many(requests[:4]))) == 4
    retry = RetryPolicy(max_retries=2)
    with connect(url, cache=tmp_path, retry=retry) as client:
        answered = []
        with pytest.raises(ServerUnavailable, match="after 3 attempts.* 4 answers are in"):
            for item in client.iter_many(requests):
                answered.append(item)
        assert {i for i, _ in answered} <= {0, 1, 2, 3}
        assert all(c.cached for _, c in answered)
    with serve(port=port) as (server, url), connect(url, cache=tmp_path) as client:
        assert sorted(i for i, _ in client.iter_many(requests)) == list(range(6))
        assert sorted(b["messages"][0]["content"] for b in server.bodies) == ["q4", "q5"]


def test_server_that_comes_back_is_waited_for():
    port = closed_port()
    with_server = []

    class Restart(VirtualTime):  # the server starts while the client waits for the second time
        async def sleep(self, seconds):
            await super().sleep(seconds)
            if len(self.slept) == 2:
                context = serve(port=port)
                with_server.append((context, context.__enter__()))

    with connect(f"http://127.0.0.1:{port}/v1", time=Restart()) as client:
        assert client.generate(ask("back")).text == "BACK"
        assert client.totals.failures == {"connection": 2}
    with_server[0][0].__exit__(None, None, None)


def test_backoff_doubles_with_jitter_up_to_a_cap():
    policy = RetryPolicy(base=1.0, max_delay=10.0, max_retry_after=30.0)
    rng = random.Random(1)
    for attempt, full in [(0, 1), (1, 2), (2, 4), (3, 8), (4, 10), (9, 10)]:
        delays = [policy.delay(attempt, None, rng) for _ in range(50)]
        assert all(full / 2 <= d <= full for d in delays) and len(set(delays)) > 40
    assert policy.delay(0, 25.0, rng) == 25.0 and policy.delay(0, 3600.0, rng) == 30.0


# --- limits ------------------------------------------------------------------


def test_concurrency_limit_is_kept_and_used():
    with serve() as (server, url), connect(url, max_concurrency=3) as client:
        server.delay = 0.02
        assert len(list(client.iter_many(ask(f"q{i}") for i in range(12)))) == 12
        assert server.most_busy == 3


def test_request_rate_limit():
    seconds = VirtualTime()
    client = ScriptedClient(lambda m: "x", requests_per_minute=60, time=seconds)
    with client:
        list(client.iter_many(ask(f"q{i}") for i in range(90)))
    assert seconds.now() == pytest.approx(30.0)  # 60 at once, then one a second


def test_token_rate_limit_uses_what_was_counted():
    # Estimate: 400 characters / 4 + 100 = 200 tokens; counted: 1 + 1.
    seconds = VirtualTime()
    client = ScriptedClient(lambda m: "x", tokens_per_minute=600, time=seconds, max_concurrency=1)
    with client:
        list(client.iter_many([ask("y" * 400, max_tokens=100, seed=i) for i in range(10)]))
    assert seconds.now() == 0.0

    async def estimates_alone():
        limiter = RateLimiter(None, 600, seconds)
        for _ in range(4):
            await limiter.acquire(300)
        await limiter.acquire(10**9)  # more than a minute holds: a full bucket

    asyncio.run(estimates_alone())
    assert seconds.now() == pytest.approx(60.0 + 60.0)


# --- cache -------------------------------------------------------------------


def test_same_call_is_asked_once_and_samples_are_told_apart(tmp_path):
    with ScriptedClient(lambda m: m[0]["content"], cache=tmp_path, prices=(2.0, 8.0)) as client:
        first = client.generate(ask("a b"))
        again = client.generate(ask("a b"))
        assert (first.cached, again.cached) == (False, True) and first.text == again.text
        client.sample(ask("a b", temperature=1.0), 3)
        client.sample(ask("a b", temperature=1.0), 5)
        assert [r.sample_index for r in client.calls] == [0, 0, 1, 2, 3, 4]
        assert len(client.cache) == 6
        report = client.report()
    assert (report["answers"], report["cached"]) == (6, 4)
    assert (report["prompt_tokens"], report["saved_prompt_tokens"]) == (12, 8)
    assert report["cost_usd"] == pytest.approx(12 * 2e-6 + 12 * 8e-6)
    assert report["saved_usd"] == pytest.approx(8 * 2e-6 + 8 * 8e-6)


def test_key_covers_everything_that_changes_the_answer():
    base = ask("a")
    others = [
        ask("b"),
        ask("a", temperature=0.5),
        ask("a", top_p=0.5),
        ask("a", max_tokens=4),
        ask("a", stop=("x",)),
        ask("a", seed=1),
        ask("a", logprobs=True),
        ask("a", extra_body={"top_k": 3}),
        ask("a", sample_index=1),
        Request.completion("a"),
        Request.completion([97]),
    ]
    keys = [r.key("m") for r in [base, *others]] + [base.key("n"), base.key("m", "step 2")]
    assert len(set(keys)) == len(keys)
    assert base.key("m") == ask("a").key("m")
    one, two = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert ask("a", extra_body=one).key("m") == ask("a", extra_body=two).key("m")


def test_every_field_survives_the_cache(tmp_path):
    said = Completion("ü\n\u2028", "length", 3, 2, "think", (-0.25, -1e-30), (5, 6))
    with ScriptedClient(lambda m: said, cache=tmp_path) as client:
        assert client.generate(ask("a")) == said
    with ScriptedClient(lambda m: "other", cache=tmp_path) as client:
        cached = client.generate(ask("a"))
    assert cached.cached and cached.to_json() == said.to_json()
    assert isinstance(cached.logprobs, tuple) and isinstance(cached.token_ids, tuple)


def test_call_that_waits_for_the_same_call_gets_its_answer(tmp_path):
    with serve() as (server, url), connect(url, cache=tmp_path) as client:
        server.delay = 0.03
        answers = [c for _, c in client.iter_many([ask("same")] * 5 + [ask("other")])]
        assert len(server.bodies) == 2 and len(answers) == 6
        assert client.totals.cached == 4


def test_cancelled_call_does_not_take_its_twin_with_it(tmp_path):
    with serve() as (server, url), connect(url, cache=tmp_path) as client:
        server.delay = 0.05

        async def run():
            first = asyncio.ensure_future(client.agenerate(ask("same")))
            second = asyncio.ensure_future(client.agenerate(ask("same")))
            await asyncio.sleep(0.02)
            first.cancel()
            return await second

        assert asyncio.run(run()).text == "SAME"


def test_twin_of_a_refused_call_asks_for_itself(tmp_path):
    class RefusesOnce(Client):
        refused = 0

        async def _attempt(self, request, n):
            await asyncio.sleep(0.01)  # the twin has come to wait by then
            if self.refused == 0:
                self.refused = 1
                raise RequestRefused("no")
            return [Completion("x", "stop")]

    with RefusesOnce(model="m", cache=tmp_path) as client:
        out = [c for _, c in client.iter_many([ask("same")] * 3, on_error="yield")]
        assert sorted(getattr(c, "text", "refused") for c in out) == ["refused", "x", "x"]
        assert client.totals.attempts == 2


@pytest.mark.parametrize("cut", [1, 10, 60, 100])
def test_torn_last_line_is_asked_again_and_the_rest_kept(tmp_path, cut):
    with ScriptedClient(lambda m: "old", cache=tmp_path) as client:
        for i in range(3):
            client.generate(ask(f"q{i}"))
    (path,) = tmp_path.glob("*.jsonl")
    os.truncate(path, path.stat().st_size - cut)
    with ScriptedClient(lambda m: "new", cache=tmp_path) as client:
        texts = [client.generate(ask(f"q{i}")).text for i in range(3)]
    assert texts == ["old", "old", "new"]
    with ScriptedClient(lambda m: "x", cache=tmp_path) as client:
        assert [client.generate(ask(f"q{i}")).text for i in range(3)] == texts


def test_damaged_line_in_the_middle_is_asked_again(tmp_path):
    with ScriptedClient(lambda m: "old", cache=tmp_path) as client:
        for i in range(3):
            client.generate(ask(f"q{i}"))
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"old"', b'"o\xffd')
    path.write_bytes(b"".join(lines))
    with ScriptedClient(lambda m: "new", cache=tmp_path) as client:
        assert [client.generate(ask(f"q{i}")).text for i in range(3)] == ["old", "new", "old"]


def _write_until_killed(directory, started):
    cache = CallCache(directory)
    for i in range(10**6):
        cache.put(f"{i:064x}", {"text": "x" * 500, "i": i})
        if i == 200:
            started.set()


def test_killed_writer_loses_nothing_that_was_put(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=_write_until_killed, args=(tmp_path, started))
    writer.start()
    assert started.wait(30)
    writer.kill()
    writer.join()
    cache = CallCache(tmp_path)
    assert len(cache) > 200
    assert all(cache.get(f"{i:064x}")["i"] == i for i in range(len(cache)))


def test_two_open_caches_do_not_disturb_each_other(tmp_path):
    one, two = CallCache(tmp_path), CallCache(tmp_path)
    for i in range(20):
        (one if i % 2 else two).put(f"{i:064x}", {"i": i})
    one.close()
    two.close()
    both = CallCache(tmp_path)
    assert [both.get(f"{i:064x}") for i in range(20)] == [{"i": i} for i in range(20)]
    assert both.get("f" * 64) is None and f"{3:064x}" in both


def test_failed_write_raises_and_later_rows_are_whole(tmp_path):
    cache = CallCache(tmp_path)
    cache.put("1" * 64, {"i": 1})

    class Full:  # takes part of a line, then there is no room
        def tell(self):
            return 0

        room = 40

        def write(self, rest):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            taken, self.room = self.room, 0
            with open(next(tmp_path.glob("*.jsonl")), "ab") as file:
                return file.write(rest[:taken])

        def close(self):
            pass

    cache._writer.close()
    cache._writer = Full()
    with pytest.raises(OSError, match="No space left"):
        cache.put("2" * 64, {"i": 2})
    cache.put("3" * 64, {"i": 3})
    for reader in (cache, CallCache(tmp_path)):
        assert [reader.get(c * 64) for c in "123"] == [{"i": 1}, None, {"i": 3}]
        reader.close()


# --- many calls --------------------------------------------------------------


def test_fast_answers_do_not_wait_for_slow_ones():
    release = threading.Event()

    class Slow(Client):
        async def _attempt(self, request, n):
            text = request.messages[0]["content"]
            while text == "slow" and not release.is_set():
                await asyncio.sleep(0.001)
            return [Completion(text, "stop")]

    with Slow(model="m", max_concurrency=2) as client:
        order = []
        for _, answer in client.iter_many([ask("slow"), *(ask(f"q{i}") for i in range(10))]):
            order.append(answer.text)
            if len(order) == 10:
                release.set()
        assert order[-1] == "slow" and len(order) == 11


def test_requests_are_read_no_further_than_in_flight_allows():
    read = 0

    def requests():
        nonlocal read
        for i in range(50):
            read += 1
            yield ask(f"q{i}")

    with ScriptedClient(lambda m: "x") as client:
        for seen, _ in enumerate(client.iter_many(requests(), in_flight=4), 1):
            assert read <= seen + 4


def test_async_iteration_equals_sync_iteration_and_works_in_any_loop():
    with ScriptedClient(lambda m: m[0]["content"] * 2) as client:

        async def collect():
            requests = (ask(f"q{i}") for i in range(7))
            return sorted([(i, c.text) async for i, c in client.generate_many(requests)])

        wanted = [(i, f"q{i}" * 2) for i in range(7)]
        assert asyncio.run(collect()) == wanted
        assert asyncio.run(collect()) == wanted
        assert sorted((i, c.text) for i, c in client.iter_many(ask(f"q{i}") for i in range(7)))
        assert list(client.iter_many([])) == []


def test_refused_request_raises_or_is_yielded():
    def reply(messages):
        if messages[0]["content"] == "q1":
            raise RequestRefused("too long", status=400)
        return "fine"

    requests = [ask(f"q{i}") for i in range(3)]
    with ScriptedClient(reply) as client:
        with pytest.raises(RequestRefused):
            list(client.iter_many(requests))
        out = dict(client.iter_many(requests, on_error="yield"))
    assert [getattr(out[i], "text", None) for i in range(3)] == ["fine", None, "fine"]
    assert out[1].status == 400


def test_answers_come_before_the_error_that_ends_it():
    replied = []

    def reply(messages):
        replied.append(messages)
        if messages[0]["content"] == "q0":
            raise RequestRefused("no")
        return "fine"

    def requests():
        yield ask("q0")
        yield ask("q1")
        while len(replied) < 2:
            time.sleep(0.001)
        time.sleep(0.05)  # both have ended when the first is looked at

    with ScriptedClient(reply) as client:
        answered = []
        with pytest.raises(RequestRefused):
            for i, _ in client.iter_many(requests()):
                answered.append(i)
    assert answered == [1]


def test_answers_of_a_group_are_kept_when_one_of_it_fails(tmp_path):
    class Unlucky(ScriptedClient):
        def answer(self, request):
            if request.sample_index == 1:
                raise RequestRefused("no")
            return str(request.sample_index)

    with Unlucky(cache=tmp_path) as client:
        with pytest.raises(RequestRefused):
            client.sample(ask("x", temperature=1.0), 4)
        assert len(client.cache) == 3
    with ScriptedClient(lambda m: "late", cache=tmp_path) as client:
        texts = [c.text for c in client.sample(ask("x", temperature=1.0), 4)]
        assert texts == ["0", "late", "2", "3"] and len(client.calls) == 1


def test_threads_share_a_client():
    with ScriptedClient(lambda m: m[0]["content"]) as client:
        texts = {}

        def work(name):
            texts[name] = [client.generate(ask(f"{name}{i}")).text for i in range(20)]

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == {name: [f"{name}{i}" for i in range(20)] for name in "abc"}


# --- scripted model and records ----------------------------------------------


def test_scripted_faults_are_retried_like_a_server_s():
    seconds = VirtualTime()
    faults = [TransientError("HTTP 500"), None, TransientError("HTTP 429", retry_after=9.0)]
    with ScriptedClient(lambda m: "x", faults=faults, time=seconds) as client:
        client.generate(ask("a"))
        client.generate(ask("b"))
        assert [r.messages[0]["content"] for r in client.calls] == ["a", "b"]
        assert client.totals.failures == {"HTTP 500": 1, "HTTP 429": 1}
    assert 9.25 <= seconds.now() <= 9.5


def test_error_in_a_scripted_reply_reaches_the_caller():
    with ScriptedClient(lambda m: 1 / 0) as client:
        with pytest.raises(ZeroDivisionError):
            client.generate(ask("x"))
        with pytest.raises(ZeroDivisionError):
            list(client.iter_many([ask("x")], on_error="yield"))  # a bug is not a refusal


def test_closed_client_starts_again():
    client = ScriptedClient(lambda m: "x")
    assert client.generate(ask("a")).text == "x"
    client.close()
    client.close()
    assert client.generate(ask("a")).text == "x"
    client.close()


def test_a_call_that_meets_a_close_is_cancelled():
    """Another thread closes the client as soon as the call lets go of its lock."""
    client = ScriptedClient(lambda m: "x")
    lock = client._start_lock

    class ClosedAfter:
        def __enter__(self):
            lock.acquire()

        def __exit__(self, *error):
            lock.release()
            client._start_lock = lock
            client.close()

    client._start_lock = ClosedAfter()
    with pytest.raises(CancelledError):
        client.generate(ask("a"))
    assert client.generate(ask("a")).text == "x"
    client.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": "x"}, "pass a tuple"),
    ],
)
def test_bad_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        Request()
    with pytest.raises(ValueError, match="exactly one"):
        Request(messages=(), prompt="x")
    with pytest.raises(ValueError, match="max_concurrency is 0"):
        ScriptedClient(lambda m: "x", max_concurrency=0)
    with pytest.raises(ValueError, match="tokens_per_minute is 0; it must be at least 1"):
        ScriptedClient(lambda m: "x", requests_per_minute=1, tokens_per_minute=0)
    with ScriptedClient(lambda m: "x") as client, pytest.raises(ValueError, match="n is 0"):
        client.sample(ask("x"), 0)


def test_api_key_is_nowhere_in_the_cache(tmp_path):
    with serve() as (_, url), connect(url, api_key="sk-secret", cache=tmp_path) as client:
        client.generate(ask("x"))
        assert "sk-secret" not in json.dumps(client.report())
    assert all("sk-secret" not in p.read_text() for p in tmp_path.iterdir())
