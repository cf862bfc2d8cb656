"""Questions in flight without a barrier, against the lock-step loop on the same server; memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwenlong.evals.dataset import TASKS, generate
from qwenlong.evals.haystack import Haystack
from qwenlong.evals.texts import TokenCounter
from qwenlong.memory_agent import (
    AgentConfig,
    AgentTask,
    CharacterTokenizer,
    ChunkStream,
    TextSource,
    run_agents,
)
from qwenlong.rewards import score_many
from tests.qwenlong.agent_lockstep import run_lockstep
from tests.qwenlong.agent_models import PerfectReader, SlowServer, WordTokenizer, fact, filler
from tests.qwenlong.evals.readers import PerfectReader as TaskReader
from tests.qwenlong.test_real_server import server  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
WORDS = WordTokenizer()
CONFIG = AgentConfig(chunk_tokens=160, memory_tokens=40, plan_tokens=16)


async def collect(client, tokenizer, tasks, config, **options):
    found = run_agents(client, tokenizer, tasks, config, **options)
    return {name: result async for name, result in found}


def timed(coroutine):
    started = time.perf_counter()
    return asyncio.run(coroutine), time.perf_counter() - started


# --- no barrier ------------------------------------------------------------------


def texts_of_lengths(chunks):
    return [
        TextSource.from_text(fact("price", "tea", f"v{i}") + " " + filler(160 * n - 8, seed=i))
        for i, n in enumerate(chunks)
    ]


def test_without_a_barrier_the_same_server_is_done_sooner():
    """Eight texts of 2 to 16 chunks on four slots. A step takes 0.5 to 2 times 30 ms, by its
    prompt: lock-step waits for the slowest of each round, and its last rounds leave slots idle.

    Work is 80 calls of about 37 ms: 0.75 s on four slots at best.
    """
    lengths = (2, 4, 6, 8, 10, 12, 14, 16)
    question = "What is the price of tea?"
    tasks = [AgentTask(f"t{i}", question, s) for i, s in enumerate(texts_of_lengths(lengths))]
    seconds, answers = {}, {}
    for name, run in (("lock-step", run_lockstep), ("continuous", collect)):
        with SlowServer(PerfectReader(), 0.03, max_concurrency=4) as client:
            answers[name], seconds[name] = timed(run(client, WORDS, tasks, CONFIG))
            assert client.busy == 4 and len(client.calls) == sum(lengths) + len(lengths)
    answers["continuous"] = {name: r.answer for name, r in answers["continuous"].items()}
    assert answers["continuous"] == answers["lock-step"] == {f"t{i}": f"v{i}" for i in range(8)}
    assert seconds["continuous"] < 0.9 * seconds["lock-step"], seconds


def test_a_short_text_does_not_wait_for_a_long_one():
    tasks = [
        AgentTask(name, "What is the price of tea?", source)
        for name, source in zip(("long", "short"), texts_of_lengths((20, 1)), strict=True)
    ]

    async def first_done(client):
        async for name, _ in run_agents(client, WORDS, tasks, CONFIG):
            return name, len(client.calls)

    with SlowServer(PerfectReader(), 0.005, max_concurrency=2) as client:
        name, calls = asyncio.run(first_done(client))
    assert name == "short" and calls < 15


def test_no_more_calls_at_once_than_allowed():
    tasks = [
        AgentTask(f"t{i}", "What is the price of tea?", source)
        for i, source in enumerate(texts_of_lengths([2] * 12))
    ]
    for slots, in_flight, most in ((3, 12, 3), (8, 2, 2)):
        with SlowServer(PerfectReader(), 0.003, max_concurrency=slots) as client:
            asyncio.run(collect(client, WORDS, tasks, CONFIG, in_flight=in_flight))
        assert client.busy == most


class CountingStream(ChunkStream):
    found = 0

    def _next(self, start):
        CountingStream.found += 1
        return super()._next(start)


def test_questions_about_one_text_share_its_chunks(monkeypatch):
    monkeypatch.setattr("qwenlong.memory_agent.run.ChunkStream", CountingStream)
    [source] = texts_of_lengths([20])
    tasks = [AgentTask(f"q{i}", "What is the price of tea?", source) for i in range(5)]
    with SlowServer(PerfectReader(), 0.002, max_concurrency=8) as client:
        results = asyncio.run(collect(client, WORDS, tasks, CONFIG))
    assert {r.answer for r in results.values()} == {"v0"}
    chunks = {r.chunks for r in results.values()}
    assert chunks == {CountingStream.found} and len(client.calls) == 5 * (CountingStream.found + 1)


def test_the_next_chunk_is_cut_while_the_model_writes(monkeypatch):
    """Cutting takes 20 ms, writing 20 ms, 15 chunks: one after the other would be 0.6 s."""

    class SlowCut(ChunkStream):
        def _next(self, start):
            time.sleep(0.02)
            return super()._next(start)

    monkeypatch.setattr("qwenlong.memory_agent.run.ChunkStream", SlowCut)
    [source] = texts_of_lengths([15])
    tasks = [AgentTask("q", "What is the price of tea?", source)]
    with SlowServer(PerfectReader(), 0.016) as client:  # 8 to 32 ms
        results, seconds = timed(collect(client, WORDS, tasks, CONFIG))
        alone = len(client.calls) * 0.02 + results["q"].chunks * 0.02
    assert results["q"].answer == "v0" and seconds < 0.9 * alone


# --- against a real server -------------------------------------------------------


def cache_hits(server):  # noqa: F811
    """Prompt tokens that the server found in its prefix cache so far."""
    lines = server._get("/metrics").splitlines()
    found = [n.split()[-1] for n in lines if n.startswith("vllm:prefix_cache_hits_total")]
    assert found
    return sum(map(float, found))


REAL = AgentConfig(
    chunk_tokens=400,
    memory_tokens=32,
    plan_tokens=16,
    answer_tokens=16,
    repairs=0,
    fallback="take",
    temperature=0.0,
    extra_body={"return_token_ids": True},
)


@pytest.fixture(scope="module")
def smol():
    from qwenlong.models import demo_document, demo_model, load_tokenizer

    return load_tokenizer(demo_model()), demo_document()


@pytest.mark.real
def test_a_real_server_counts_as_we_do(server, smol):  # noqa: F811
    """Calls and prompt tokens of a run are those that the server says it read."""
    tokenizer, words = smol
    source = TextSource.from_text(words[:4_000])
    tasks = [AgentTask("q", "What is a name? Answer in one word.", source)]
    with server.client(max_concurrency=4, stream=True) as client:
        run = collect(client, tokenizer, tasks, REAL, record_turns=True)
        result = asyncio.run(run)["q"]
    assert result.chunks >= 2 and len(result.turns) == result.calls == REAL.calls(result.chunks)
    assert sum(len(turn.prompt_ids) for turn in result.turns) == result.tokens["prompt"]
    assert sum(len(turn.response_ids) for turn in result.turns) == result.tokens["completion"]
    for step, turn in zip(result.trace, result.turns, strict=True):
        text = tokenizer.decode(turn.response_ids, skip_special_tokens=True)
        if "took_reply" in step.events and "long_memory" not in step.events:
            assert step.memory == text.removeprefix("Updated memory:").strip()


@pytest.mark.real
def test_the_chunk_first_order_is_found_in_a_real_prefix_cache(server, smol):  # noqa: F811
    tokenizer, words = smol
    questions = ["What is a name?", "Which statements are described?", "What raises an exception?"]
    hits = {}
    with server.client(max_concurrency=3) as client:
        for number, order in enumerate(("paper", "chunk_first")):
            source = TextSource.from_text(words[6_000 + 4_000 * number :][:4_000])
            tasks = [AgentTask(q, q, source) for q in questions]
            before = cache_hits(server)
            results = asyncio.run(collect(client, tokenizer, tasks, replace(REAL, order=order)))
            hits[order] = cache_hits(server) - before
            document = sum(r.tokens["document"] for r in results.values())
    print(json.dumps({"prefix_cache_hits": hits, "tokens_of_chunks": document}))
    # two of three readings of a chunk, less the blocks at its end and those computed at once
    assert hits["chunk_first"] - hits["paper"] > 0.1 * document


@pytest.mark.real
def test_throughput_of_a_real_server(server, smol):  # noqa: F811
    """Eight texts of 1 to 4 chunks on 4 slots, both ways. Prints both times (pytest -s)."""
    tokenizer, words = smol
    report, position = {}, 20_000
    with server.client(max_concurrency=4) as client:
        for name, run in (("lock-step", run_lockstep), ("continuous", collect)):
            tasks = []  # of new texts, so that no prefix cache helps the second
            for i, chunks in enumerate((1, 1, 1, 2, 2, 3, 3, 4)):
                source = TextSource.from_text(words[position:][: 1_200 * chunks])
                tasks.append(AgentTask(f"t{i}", "What does the text say about names?", source))
                position += 1_200 * chunks
            before = client.totals.completion_tokens, client.totals.prompt_tokens
            found, seconds = timed(run(client, tokenizer, tasks, REAL))
            assert set(found) == {f"t{i}" for i in range(8)}
            written = client.totals.completion_tokens - before[0]
            read = client.totals.prompt_tokens - before[1]
            report[name] = {"seconds": round(seconds, 1), "read": read, "written": written}
    print(json.dumps(report))
    rate = {name: (row["read"] + row["written"]) / row["seconds"] for name, row in report.items()}
    assert rate["continuous"] > 0.8 * rate["lock-step"]  # others may use the machine


# --- length ----------------------------------------------------------------------

# Run in a process of its own: writes a text of so many tokens, reads it from disk with three
# questions in flight, and prints the growth of the resident set in MB.
MEMORY_SCRIPT = """
import asyncio, json, resource, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from qwenlong.llm import ScriptedClient
from qwenlong.memory_agent import AgentConfig, AgentTask, TextSource, run_agents
from tests.qwenlong.agent_models import PerfectReader, fact, filler

path, tokens, chunk = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokenizer = None
if sys.argv[4] == "model":
    from qwenlong.models import demo_model, load_tokenizer
    tokenizer = load_tokenizer(demo_model())
else:
    from qwenlong.memory_agent import CharacterTokenizer
    tokenizer = CharacterTokenizer()
with open(path, "w") as file:
    written = 0
    for i in range(tokens // 4_000):
        place = {{3: fact("owner", "Lighthouse", "Moss"),
                 tokens // 4_000 - 2: fact("colour", "Moss", "green")}}.get(i, "")
        written += file.write(filler(3_704, seed=i) + " " + place + "\\n")

class Forgets(ScriptedClient):
    calls_made = prompt_tokens = 0
    async def _attempt(self, request, n):
        answered = await super()._attempt(request, n)
        self.calls.clear()
        self.calls_made += 1
        return answered

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

async def main():
    source = TextSource.from_files([path])
    questions = ["What is the colour of the owner of Lighthouse?",
                 "How many times is the owner of Lighthouse given?", "List every colour of Moss"]
    config = AgentConfig(chunk_tokens=chunk, memory_tokens=1_000, plan_tokens=100)
    tasks = [AgentTask(q, q, source) for q in questions]
    with Forgets(PerfectReader(), max_concurrency=8) as client:
        found = {{n: r async for n, r in run_agents(client, tokenizer, tasks, config)}}
    return [found[q].answer for q in questions], found[questions[0]], client.calls_made

before, started = used(), time.perf_counter()
answers, result, calls = asyncio.run(main())
print(json.dumps({{
    "answers": answers, "chunks": result.chunks, "tokens": result.tokens["document"],
    "calls": calls, "bytes": path.stat().st_size, "seconds": time.perf_counter() - started,
    "before_mb": before, "grown_mb": used() - before, "total_mb": used(),
}}))
"""


def read_in_a_process(path, tokens, chunk_tokens, tokenizer):
    script = MEMORY_SCRIPT.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tokens), str(chunk_tokens), tokenizer],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_reading(found, tokens):
    assert found["answers"] == ["green", "1", "green"]
    assert found["tokens"] >= tokens and found["calls"] == 3 * (found["chunks"] + 1)


def test_memory_of_a_process_does_not_grow_with_the_text(tmp_path):
    small, large = (
        read_in_a_process(tmp_path / f"{tokens}.txt", tokens, 8_192, "characters")
        for tokens in (100_000, 800_000)
    )
    check_reading(small, 100_000)
    check_reading(large, 800_000)
    assert large["grown_mb"] < small["grown_mb"] + 20


@pytest.mark.real
def test_four_million_tokens_in_less_than_a_gigabyte(tmp_path):
    found = read_in_a_process(tmp_path / "long.txt", 4_000_000, 32_768, "model")
    print(json.dumps(found))
    check_reading(found, 4_000_000)
    assert found["total_mb"] < 1_000  # of the whole process, Python, tokenizer and text


@pytest.mark.real
@pytest.mark.parametrize("task", list(TASKS))
def test_the_perfect_reader_answers_every_task_at_four_million_tokens(task):
    haystack = Haystack.load(TokenCounter("chars4"))
    [sample] = generate(haystack, tasks=[task], lengths=[4_000_000], count=1, seed=3)
    config = AgentConfig(memory_tokens=400_000, split="none")
    tokenizer = CharacterTokenizer()
    source = TextSource.from_sample(sample)
    tasks = [AgentTask(sample.id, sample.question, source, sample.instructions)]
    with TaskReader([sample]) as client:
        result = asyncio.run(collect(client, tokenizer, tasks, config))[sample.id]
        calls = len(client.calls)
    assert score_many([(sample, result.answer)])[0].value == 1
    assert calls == result.calls == config.calls(result.chunks, is_split=False)
    assert result.tokens["document"] >= 3_300_000 and not result.events
