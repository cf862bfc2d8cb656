"""``qwenlong agent ask``: the folder of a run, faults, interruptions, pictures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from qwenlong import agent_command, cli
from qwenlong.agent_command import AskSettings, open_text, run_ask
from qwenlong.agent_plot import draw_memory, memory_changes, memory_entries
from qwenlong.errors import InputError
from qwenlong.llm import (
    EmbeddedClient,
    RetryPolicy,
    ScriptedClient,
    ServerUnavailable,
    TransientError,
)
from qwenlong.memory_agent import AgentConfig, Step
from qwenlong.memory_agent.trace import TraceFile
from qwenlong.storage import read_jsonl
from tests.qwenlong.agent_models import PerfectReader, fact, filler, part
from tests.qwenlong.llm_server import serve
from tests.qwenlong.tiny_models import save_tiny_model

QUESTION = "What is the price of tea? Answer in one word."
TEXT = "\n\n".join(
    [filler(400), fact("price", "tea", "four"), filler(400, seed=1), filler(400, seed=2)]
)
SIZES = ["--chunk-tokens", "400", "--memory-tokens", "200", "--plan-tokens", "50"]


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def reader_reply(body):
    text = PerfectReader()(body["messages"])
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return {"id": "x", "object": "o", "created": 1, "choices": [choice], "usage": usage}


@pytest.fixture
def reading(monkeypatch):
    """Servers of ``serve`` read as the perfect reader does."""
    monkeypatch.setattr("tests.qwenlong.llm_server._reply", reader_reply)


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts are short."""
    monkeypatch.setattr(
        agent_command, "RetryPolicy", lambda max_retries: RetryPolicy(max_retries, base=0.001)
    )


def run(document, url, *more, out=None):
    arguments = ["agent", "ask", "--input", str(document), "--model", "m", "--base-url", url]
    arguments += ["--out", str(out)] if out else []
    if "--question" not in more:
        arguments += ["--question", QUESTION]
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments, *SIZES, *map(str, more)])
    return exit.value.code


def steps_of(out):
    return list(read_jsonl(out / "trace.jsonl"))[1:]


# --- a whole run -----------------------------------------------------------------


def test_a_run_end_to_end(document, reading, capsys):
    with serve() as (server, url):
        assert run(document, url) == 0
    shown = capsys.readouterr()
    out = document.parent / "book.agent"
    assert shown.out.splitlines()[0] == "four"
    assert "chunk 1, memory 0 tokens; plan: read on" in shown.err and "100%" in shown.err
    assert "4 characters each" in shown.err
    answers = json.loads((out / "answers.json").read_text())
    [row] = answers["answers"]
    chunks = row["chunks"]
    assert chunks > 3 and row["calls"] == chunks + 1 == len(server.bodies)
    assert row["answer"] == "four" and row["final_memory"] == "The price of tea is four."
    assert row["tokens"]["prompt"] == 100 * (chunks + 1) == answers["usage"]["prompt_tokens"]
    assert (out / row["picture"]).read_bytes().startswith(b"\x89PNG")
    head, *steps = read_jsonl(out / "trace.jsonl")
    assert head["questions"] == [QUESTION] and head["config"]["chunk_tokens"] == 400
    assert [s["kind"] for s in steps] == ["read"] * chunks + ["answer"]
    assert steps[0]["plan"] == "read on" and steps[-2]["memory"] == row["final_memory"]
    assert steps[-2]["end"] == head["text"]["bytes"] == len(TEXT)
    # the rules about form reach the last call alone
    shown = ["one word" in b["messages"][0]["content"] for b in server.bodies]
    assert shown == [False] * chunks + [True]


def test_several_questions_in_one_pass(document, reading, capsys):
    second = "How many times is the price of tea given?"
    with serve() as (server, url):
        code = run(
            document, url, "--question", QUESTION, "--question", second, "--order", "chunk_first"
        )
    assert code == 0
    rows = json.loads((document.parent / "book.agent" / "answers.json").read_text())["answers"]
    assert [(r["question"], r["answer"]) for r in rows] == [(QUESTION, "four"), (second, "1")]
    assert [r["picture"] for r in rows] == ["memory-1.png", "memory-2.png"]
    assert len(server.bodies) == sum(r["calls"] for r in rows)
    assert "q2: " in capsys.readouterr().err


def test_a_finished_run_asks_nothing_again(document, reading, capsys):
    with serve() as (server, url):
        run(document, url)
        asked = len(server.bodies)
        assert run(document, url) == 2
        assert "--resume to go on, or another --out" in capsys.readouterr().err
        assert run(document, url, "--resume") == 0
    assert len(server.bodies) == asked
    assert capsys.readouterr().out.splitlines()[0] == "four"


def test_resume_without_a_run_begins_one(document, reading):
    with serve() as (_, url):
        assert run(document, url, "--resume") == 0


@pytest.mark.parametrize(
    "change, named",
    [
        (["--question", "Who?"], "questions"),
        (["--chunk-tokens", "300"], "chunk_tokens"),
        (["--instructions", "Be brief."], "instructions"),
        (["--model", "other"], "model"),
        ("text", "bytes, sha256"),
    ],
)
def test_resume_with_another_job_is_refused(document, reading, change, named, capsys):
    with serve() as (server, url):
        run(document, url)
        asked = len(server.bodies)
        if change == "text":
            document.write_text(TEXT + "!")
            change = []
        assert run(document, url, "--resume", *change) == 2
    assert f"was made with another {named};" in capsys.readouterr().err
    assert len(server.bodies) == asked


# --- faults ----------------------------------------------------------------------

REFUSED = ("status", 400, ())


@pytest.mark.parametrize(
    "fault",
    [
        "hang up",
        ("status", 500, ()),
        ("status", 503, ()),
        ("status", 429, (("Retry-After", "0"),)),
        "half",
        "no finish",
        "bad chunk",
        "not json",
    ],
)
def test_a_fault_is_ridden_out(document, reading, quick, fault):
    script = ["ok", fault, fault, "ok", fault]
    with serve(script) as (server, url):
        assert run(document, url) == 0
    [row] = json.loads((document.parent / "book.agent" / "answers.json").read_text())["answers"]
    assert row["answer"] == "four" and len(server.bodies) == row["calls"] + 3


@pytest.mark.parametrize("stall", ["stall", "half stall"])
def test_a_stall_ends_with_the_time_out(document, reading, quick, stall):
    with serve(["ok", stall]) as (server, url):
        started = time.monotonic()
        assert run(document, url, "--timeout", "0.3") == 0
    assert time.monotonic() - started < 4
    assert len(server.bodies) == len(steps_of(document.parent / "book.agent")) + 1


@pytest.mark.parametrize(
    "fault, message",
    [
        (("status", 500, ()), "HTTP 500"),
        ("hang up", "connection"),
        ("not json", "malformed reply"),
        (REFUSED, "chunk 3 was refused (HTTP 400: "),
    ],
)
def test_a_dead_server_ends_the_run_and_a_living_one_resumes_it(
    document, reading, quick, fault, message, capsys
):
    out = document.parent / "run"
    with serve(["ok", "ok", *[fault] * 9]) as (server, url):
        assert run(document, url, "--retries", "2", out=out) == 2
        broken = len(server.bodies)
        assert broken == (3 if fault == REFUSED else 5)
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ") and "--resume goes on" in error
    assert "the trace holds 2 steps" in error
    assert not (out / "answers.json").exists()
    before = steps_of(out)
    assert [s["index"] for s in before] == [0, 1]
    with serve() as (server, url):
        assert run(document, url, "--resume", out=out) == 0
    after = steps_of(out)
    assert after[:2] == before
    # the next chunk is the first that is asked for
    assert len(server.bodies) == len(after) - 2
    whole = part(server.bodies[0]["messages"][0]["content"], "section")
    assert TEXT[before[1]["end"] :].startswith(whole)


def test_nobody_listens(document, quick, capsys):
    assert run(document, "http://127.0.0.1:9/v1", "--retries", "1") == 2
    assert "no answer after 2 attempts" in capsys.readouterr().err


class Counting(ScriptedClient):
    """Answers, then dies for good after ``dies_after`` calls."""

    def __init__(self, dies_after, **options):
        super().__init__(PerfectReader(), **options)
        self.dies_after = dies_after

    async def _attempt(self, request, n):
        if len(self.calls) >= self.dies_after:
            raise TransientError("connection", "gone")
        return await super()._attempt(request, n)


def test_whenever_the_server_dies_nothing_is_asked_twice(document, tmp_path, monkeypatch, quick):
    """Three questions at once, a death after every number of calls: the calls of both runs add up
    to those of an undisturbed one."""
    questions = (QUESTION, "How many times is the price of tea given?", "List every price of tea")
    config = AgentConfig(chunk_tokens=400, memory_tokens=200, plan_tokens=50)
    settings = AskSettings((str(document),), questions, "m", config, base_url="http://x/v1")

    def attempt(out, dies_after):
        clients = []

        def client(settings, tokenizer, cache):
            options = dict(cache=cache, retry=RetryPolicy(0), model="m")
            clients.append(Counting(dies_after, **options))
            return clients[0]

        monkeypatch.setattr(agent_command, "open_client", client)
        try:
            results = run_ask(settings, out, Console(quiet=True), resume=True)
        except InputError as error:
            assert isinstance(error.__cause__, ServerUnavailable)
            results = None
        return results, len(clients[0].calls)

    monkeypatch.setattr(agent_command, "draw_memory", lambda file, steps, **options: None)
    whole, calls = attempt(tmp_path / "whole", 10**6)
    for dies_after in range(0, calls, 4):
        out = tmp_path / str(dies_after)
        nothing, first = attempt(out, dies_after)
        assert nothing is None and first == dies_after
        results, second = attempt(out, 10**6)
        assert first + second == calls
        assert {n: r.answer for n, r in results.items()} == {n: r.answer for n, r in whole.items()}
        assert {n: r.trace for n, r in results.items()} == {n: r.trace for n, r in whole.items()}


def test_a_killed_process_goes_on(document, reading):
    """kill -9 while the third chunk is being read; the trace may end with half a row."""
    out = document.parent / "killed"
    with serve() as (server, url):
        server.delay = 0.15
        command = [sys.executable, "-m", "qwenlong.cli", "agent", "ask", "--input", str(document)]
        command += ["--model", "m", "--base-url", url, "--out", str(out), "--question", QUESTION]
        process = subprocess.Popen(
            [*command, *SIZES], cwd=Path(cli.__file__).parents[1], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(server.bodies) < 3:
            time.sleep(0.01)
        process.kill()
        process.wait()
        steps = steps_of(out)
        assert 2 <= len(steps) <= 3
        with open(out / "trace.jsonl", "ab") as file:
            file.write(b'{"question": "q1", "seco')
        asked, server.delay = len(server.bodies), 0
        assert run(document, url, "--resume", out=out) == 0
    after = steps_of(out)
    assert after[: len(steps)] == steps and after[-1]["text"] == "four"
    assert len(server.bodies) - asked == len(after) - len(steps)


def test_an_interrupt_says_how_to_go_on(document, reading, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(agent_command, "run_agents", interrupt)
    assert run(document, "http://x/v1") == 2
    assert "interrupted; the trace holds 0 steps, the same command" in capsys.readouterr().err


# --- input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--question", " "], "a question is empty"),
        (["--chunk-tokens", "3"], "chunk_tokens is 3; it must be at least 16"),
        (["--order", "x"], "order is 'x'"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--retries", "-1"], "--retries is -1"),
        (["--input", "nothing.txt"], "nothing.txt cannot be read"),
        (["--input", "."], "is a folder"),
        (["--tokenizer", "nothing"], "there is no folder nothing"),
        (["--out", __file__], "is a file"),
    ],
)
def test_wrong_input_is_one_sentence(document, more, message, capsys):
    assert run(document, "http://x/v1", *more) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("qwenlong: ") and message in line


def test_html_is_read_as_text_and_stdin_is_kept(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("<html><script>x()</script><p>Tea costs <b>four</b>.</p></html>")
    text = open_text((str(page),), tmp_path / "out").read(0, 1000).decode()
    assert text == "Tea costs four."

    class Stdin:
        buffer = open(page, "rb")

    monkeypatch.setattr("sys.stdin", Stdin)
    first = open_text(("-",), tmp_path / "out2")
    again = open_text(("-",), tmp_path / "out2", resume=True)  # the stream is at its end
    assert first.read(0, 1000) == again.read(0, 1000) == page.read_bytes()
    with pytest.raises(InputError, match="is empty"):  # without resume the stream is what counts
        open_text(("-",), tmp_path / "out2")
    Stdin.buffer.close()


@pytest.fixture
def tiny(tmp_path):
    """Random weights, and a chat template."""
    folder = save_tiny_model(tmp_path / "tiny", "llama", max_position_embeddings=8192)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def ask_model(document, folder, *more):
    arguments = ["agent", "ask", "--input", str(document), "--question", "Who?"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments, "--model", str(folder), *more])
    return exit.value.code


def test_an_embedded_model_reads(tmp_path, tiny, capsys):
    """A model of random weights writes nothing of use: the memory stays empty, and that is said."""
    document = tmp_path / "short.txt"
    document.write_text(filler(80))
    small = ["--chunk-tokens", "200", "--memory-tokens", "16", "--plan-tokens", "8"]
    small += ["--answer-tokens", "8", "--repairs", "0", "--seed", "1"]
    assert ask_model(document, tiny, *small) == 0
    assert "kept memory" in capsys.readouterr().err
    [row] = json.loads((tmp_path / "short.agent" / "answers.json").read_text())["answers"]
    assert row["events"]["kept_memory"] == row["chunks"] == row["calls"] - 1 > 1
    assert row["final_memory"] == "" and row["tokens"]["document"] > 200


@pytest.mark.parametrize("concurrency, batch", [(9, 9), (3, 3)])
def test_an_embedded_model_is_asked_in_batches_of_the_concurrency(
    tmp_path, tiny, monkeypatch, concurrency, batch
):
    """Nine questions about one chunk, asked at once."""
    monkeypatch.setattr("qwenlong.llm.embedded._GATHER_SECONDS", 0.25)
    sizes, generate = [], EmbeddedClient._generate

    def watched(self, requests, *others):
        sizes.append(len(requests))
        return generate(self, requests, *others)

    monkeypatch.setattr(EmbeddedClient, "_generate", watched)
    document = tmp_path / "short.txt"
    document.write_text(filler(20))
    more = ["--memory-tokens", "4", "--plan-tokens", "4", "--answer-tokens", "4", "--repairs", "0"]
    more += [part for i in range(8) for part in ("--question", f"What is {i}?")]
    more += ["--chunk-tokens", "800", "--concurrency", str(concurrency), "--temperature", "0"]
    assert ask_model(document, tiny, *more) == 0
    assert max(sizes) == batch and sum(sizes) == 18


def test_a_model_that_cannot_read_so_much(document, tiny, capsys):
    assert ask_model(document, tiny) == 2
    assert "reads 8192 tokens at a time and a step may need" in capsys.readouterr().err


def test_a_model_without_a_chat_template(document, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "plain", "llama")
    assert ask_model(document, folder) == 2
    assert "has no chat template" in capsys.readouterr().err


# --- trace -----------------------------------------------------------------------


def test_a_damaged_trace_is_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"schema": 1}\nnot json\n')
    with pytest.raises(InputError, match="damaged"):
        TraceFile(path, {}, resume=True)
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(InputError, match="no trace of an agent"):
        TraceFile(path, {}, resume=True)
    path.write_text('{"sche')  # torn before anything was asked
    with TraceFile(path, {"text": "t"}, resume=True) as trace:
        assert trace.steps == {}
    assert list(read_jsonl(path)) == [{"schema": 1, "text": "t"}]


def test_a_run_without_an_answer_can_begin_differently(document, reading, quick, capsys):
    """A wrong model name, say: nothing was answered, so nothing is refused or kept."""
    out = document.parent / "run"
    with serve([REFUSED]) as (_, url):
        assert run(document, url, out=out) == 2
    with serve() as (_, url):
        assert run(document, url, "--chunk-tokens", "300", out=out) == 0
    assert next(read_jsonl(out / "trace.jsonl"))["config"]["chunk_tokens"] == 300


# --- picture ---------------------------------------------------------------------


def test_entries_and_changes():
    memories = ["A is 1.", "A is 1. B is 2.", "B is 2.\n- C is 3.", "", "A is 1."]
    assert [tuple(e) for e in memory_entries(memories)] == [
        ("A is 1.", 0, 1),
        ("B is 2.", 1, 2),
        ("C is 3.", 2, 2),
        ("A is 1.", 4, 4),
    ]
    assert memory_changes(memories) == [
        (0, 1, 0),
        (0.5, 0.5, 0),
        (0.5, 0.5, 0.5),
        (0, 0, 1),
        (0, 1, 0),
    ]
    assert memory_entries([]) == [] and memory_changes([]) == []


@pytest.mark.parametrize("chunks", [0, 1, 130])
def test_the_picture_of_any_number_of_chunks(tmp_path, chunks):
    steps = [
        Step(
            *("read", i, i, i + 1, 5, f"Fact {i // 9} costs $5_a^b. {'x' * 300}", "plan $x$", 20),
            events=("long_memory", "stop") if i % 50 == 0 else (),
        )
        for i in range(chunks)
    ]
    path = tmp_path / "a.png"
    for kinds in ([], [Step("answer", -1, text="4 $")]):
        with open(path, "wb") as file:
            draw_memory(file, [*steps, *kinds], limit_tokens=30, title="What is $ \\frac?" * 30)
        assert path.stat().st_size > 10_000
