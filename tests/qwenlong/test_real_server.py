"""A real server: vLLM on the CPU, with a model of 135M parameters, under client and synthesis.

The model is too weak to write questions of its own accord, so the first test of each road counts
what was asked and why it was dropped, and the second has the server constrain the form of the
replies, which leaves a choice to the model and lets it reach the end of the road.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlong.data.documents import SourceDocument
from qwenlong.data.evolve import EvolveConfig, evolve_samples
from qwenlong.data.extract import Reader, model_triples
from qwenlong.data.pipeline import run_pipeline
from qwenlong.data.recipe import load_recipe
from qwenlong.data.verify import MODEL_FILTERS, check_answer_leak, check_evidence
from qwenlong.llm import ChatClient, Request, RequestRefused, RetryPolicy, ServerUnavailable
from qwenlong.models import demo_model
from qwenlong.storage import read_jsonl
from qwenlong.types import Sample

pytestmark = pytest.mark.real

START_SECONDS = 300  # about 30 on two idle cores
CONTEXT_TOKENS = 4096


class Server:
    """vLLM in a process group of its own; ``start`` again after ``kill`` uses the same port."""

    def __init__(self, python: str, model: Path, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self._folder, self._process = folder, None
        self._command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        self._command += ["--model", str(model), "--served-model-name", "smol"]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS)]
        self._command += ["--max-num-seqs", "16", "--enforce-eager"]

    def start(self) -> None:
        settings = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "TORCH_COMPILE_DISABLE": "1",  # the first log-probabilities would compile for seconds
        }
        log = self._folder / "server.log"
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env={**os.environ, **settings},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        self.stop()
        pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")

    def kill(self) -> None:
        """End all its processes at once, without a word to the clients."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # its children, where they outlived it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def answered(self) -> float:
        """Completions so far, by the server's own count."""
        lines = self._get("/metrics").splitlines()
        counts = [n.split()[-1] for n in lines if n.startswith("vllm:request_success_total")]
        assert counts
        return sum(map(float, counts))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=10) as reply:
            return reply.read().decode()

    def client(self, kind: type[ChatClient] = ChatClient, **options) -> ChatClient:
        return kind(f"{self.root}/v1", **{"model": "smol", "timeout": 120.0, **options})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    python = os.environ.get("QL_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "QL_VLLM_PYTHON is not set: make an environment with scripts/vllm_cpu_env.sh FOLDER "
            "and set it to FOLDER/bin/python"
        )
    python = str(Path(python).absolute())  # not resolved: a link out of the environment leaves it
    made = Server(python, demo_model(), tmp_path_factory.mktemp("server"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def reference():
    """Tokenizer and model by transformers, in fp32 as the server's."""
    folder = demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def ask(text: str, **sampling) -> Request:
    return Request.chat([{"role": "user", "content": text}], **{"max_tokens": 24, **sampling})


CAPITAL = "What is the capital of France?"


# --- client ----------------------------------------------------------------------


def test_chat(server):
    with server.client() as client:
        answer = client.generate(ask(CAPITAL))
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    assert answer.prompt_tokens > 10 and 3 < answer.completion_tokens <= 24
    assert client.totals.attempts == client.totals.answers == 1


def test_length_and_stop(server):
    with server.client() as client:
        short = client.generate(ask(CAPITAL, max_tokens=2))
        assert (short.finish_reason, short.completion_tokens) == ("length", 2)
        stopped = client.generate(ask(CAPITAL, stop=(" France",)))
        assert stopped.finish_reason == "stop" and stopped.text == "The capital of"


def test_samples_come_in_one_request(server):
    with server.client() as client:
        answers = client.sample(ask("Write a word.", temperature=1.0), 4)
        assert len(answers) == 4 and client.totals.attempts == 1
        assert len({a.text for a in answers}) > 1
        assert all(a.completion_tokens > 0 for a in answers)


def test_several_greedy_samples_are_alike(server):
    with server.client() as client:
        answers = client.sample(ask(CAPITAL), 3)
    assert len(answers) == 3 and len({a.text for a in answers}) == 1


def scores(reference, prompt: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [R] of the answer's tokens by transformers."""
    ids = torch.tensor([*prompt, *answer])
    with torch.inference_mode():
        logits = reference[1](ids[None]).logits[0, len(prompt) - 1 : -1]  # [R, V]
    return logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_and_token_ids_of_chat(server, reference, stream):
    tokenizer, _ = reference
    request = ask(CAPITAL, logprobs=True, extra_body={"return_token_ids": True})
    with server.client(stream=stream) as client:
        answer = client.generate(request)
    assert len(answer.token_ids) == len(answer.logprobs) == answer.completion_tokens
    assert tokenizer.decode(answer.token_ids, skip_special_tokens=True) == answer.text
    prompt = tokenizer.apply_chat_template(
        list(request.messages), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert len(prompt) == answer.prompt_tokens
    expected = scores(reference, prompt, answer.token_ids)
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-3, rtol=0)


def test_completion_of_text_and_of_token_ids(server, reference):
    tokenizer, _ = reference
    prompt = tokenizer("The capital of France is")["input_ids"]
    options = {"max_tokens": 8, "logprobs": True, "extra_body": {"return_token_ids": True}}
    with server.client() as client:
        by_ids = client.generate(Request.completion(prompt, **options))
        by_text = client.generate(Request.completion("The capital of France is", **options))
    assert by_ids == by_text and by_ids.text.startswith(" Paris")
    assert by_ids.prompt_tokens == len(prompt) and len(by_ids.token_ids) == 8
    expected = scores(reference, prompt, by_ids.token_ids)
    torch.testing.assert_close(torch.tensor(by_ids.logprobs), expected, atol=2e-3, rtol=0)


def test_same_seed_same_text(server):
    def texts(seed):
        with server.client(max_concurrency=1) as client:
            request = ask("Tell me of the sea.", temperature=1.0, seed=seed, max_tokens=12)
            return [a.text for a in client.sample(request, 3)]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first
    assert texts(8)[:2] == first[1:]  # sample i is drawn with seed + i


def test_cached_answer_asks_nothing(server, tmp_path):
    request = ask("Name a river.", temperature=1.0, logprobs=True)
    with server.client(cache=tmp_path) as client:
        first = client.sample(request, 2)
    before = server.answered()
    with server.client(cache=tmp_path) as client:
        again = client.sample(request, 2)
        assert client.totals.attempts == 0 and client.totals.cached == 2
    assert server.answered() == before
    assert [dataclasses.replace(a, cached=False) for a in again] == first


def test_what_the_server_refuses_is_not_repeated(server):
    with server.client() as client:
        with pytest.raises(RequestRefused, match=f"400.*{CONTEXT_TOKENS}"):
            client.generate(ask("word " * CONTEXT_TOKENS))
        assert client.totals.attempts == 1
    with server.client(model="another") as client:
        with pytest.raises(RequestRefused, match="404.*another"):
            client.generate(ask("x"))
        assert client.totals.attempts == 1


# --- synthesis -------------------------------------------------------------------

PEAKS = {"Aldra": "Verland", "Bronn": "Ostmark", "Cerul": "Kamria"}


def documents() -> list[SourceDocument]:
    """A document for each peak, all of one split."""
    made = []
    for peak, country in PEAKS.items():
        for edition in range(100):
            text = (
                f"# Mount {peak}\n\nMount {peak} is the highest peak of {country}. It was first "
                f"climbed in summer by a party of three, who left a copper plate at the top. The "
                f"hut below the north ridge has 24 beds and is open from June to October. "
                f"Edition {edition} of the guide.\n"
            )
            document = SourceDocument(title=f"Mount {peak}", text=text, source="peaks")
            if document.split == "train":
                made.append(document)
                break
    assert len(made) == len(PEAKS)
    return made


def fact(peak: str) -> str:
    return f"Mount {peak} is the highest peak of {PEAKS[peak]}."


class Constrained(ChatClient):
    """The server holds a reply to the form that ``form(prompt)`` gives; None leaves it free."""

    def __init__(self, *args, form, **options):
        super().__init__(*args, **options)
        self._form = form

    async def _attempt(self, request, n):
        form = self._form(request.messages[0]["content"])
        if form is not None:
            sampling = dataclasses.replace(request.sampling, extra_body=form)
            request = dataclasses.replace(request, sampling=sampling)
        return await super()._attempt(request, n)


def json_form(properties: dict) -> dict:
    schema = {"name": "reply", "schema": closed(properties)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def closed(properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def test_triples_of_a_model_left_alone(server):
    dropped = Counter()
    with server.client() as client:
        reader = Reader(client, samples=2, temperature=0.0, max_tokens=48, dropped=dropped)
        found = list(model_triples(reader, documents()))
        assert client.totals.answers == 2 * len(PEAKS) and not client.totals.failures
    assert "the server refused the request" not in dropped
    assert len(found) + dropped.total() > 0
    texts = {d.id: d.text for d in documents()}
    for triple in found:
        stated = texts[triple.doc][triple.start : triple.end].lower()
        assert triple.subject.lower() in stated and triple.object.lower() in stated


def test_triples_in_a_given_form(server):
    def form(prompt):
        peak = next(p for p in PEAKS if f"Mount {p}" in prompt)
        triple = {
            "subject": {"enum": [f"Mount {p}" for p in PEAKS]},
            "relation": {"type": "string", "pattern": "^is the [a-z ]{3,20}$"},
            "object": {"enum": list(PEAKS.values())},
            "quote": {"const": fact(peak)},
        }
        return json_form(
            {"triples": {"type": "array", "items": closed(triple), "minItems": 1, "maxItems": 1}}
        )

    dropped = Counter()
    with server.client(Constrained, form=form) as client:
        reader = Reader(client, samples=2, temperature=0.0, max_tokens=96, dropped=dropped)
        found = list(model_triples(reader, documents()))
    # Which subject and object it takes is the model's choice; only what the quote states counts.
    assert len(found) + dropped["a triple that its quote does not state"] // 2 == len(PEAKS)
    assert found
    by_id = {d.id: d for d in documents()}
    for triple in found:
        document = by_id[triple.doc]
        peak = document.title.removeprefix("Mount ")
        assert (triple.subject, triple.object) == (document.title, PEAKS[peak])
        assert document.text[triple.start : triple.end] == fact(peak)


SMALL = EvolveConfig(
    attempts=2, closed_book_attempts=2, votes=1, temperature=0.0, max_tokens=96, documents=3
)


def check_evolved(samples, server_model="smol"):
    for sample in samples:
        assert Sample.model_validate_json(sample.model_dump_json()) == sample
        texts = {d.id: d.text for d in sample.documents}
        assert check_evidence(sample, texts.__getitem__)["verdict"] == "pass"
        assert check_answer_leak(sample)["verdict"] == "pass"
        assert sample.difficulty.model == server_model and sample.difficulty.pass_rate > 0
        assert not any(note["right"] for note in sample.derivation["closed_book"])


def test_evolve_of_a_model_left_alone(server):
    dropped, rounds = Counter(), 2
    with server.client() as client:
        made = list(
            evolve_samples(
                documents(),
                client=client,
                seed=0,
                limit=5,
                rounds=rounds,
                config=SMALL,
                dropped=dropped,
            )
        )
        assert client.totals.attempts >= rounds and not client.totals.failures
    # One set of documents: every round ends in a sample or in a reason.
    assert len(made) + dropped.total() == rounds
    assert not any("refused" in reason for reason in dropped)
    check_evolved(made)


def test_evolve_in_a_given_form(server):
    def form(prompt):
        if prompt.startswith("You set a question"):
            # Often the number of another document: the quote is looked for in all of them.
            quote = closed({"document": {"const": 1}, "text": {"const": fact("Bronn")}})
            return json_form(
                {
                    "question": {"enum": ["Of which country is Mount Bronn the highest peak?"]},
                    "answer": {"const": "Ostmark"},
                    "quotes": {"type": "array", "items": quote, "minItems": 1, "maxItems": 1},
                }
            )
        if "<documents>" in prompt:
            options = "|".join([*PEAKS.values(), "Norland"])
            regex = rf"Therefore, the answer is \(({options})\)\."
            return {"structured_outputs": {"regex": regex}}
        return None  # closed book and verifier

    dropped = Counter()
    with server.client(Constrained, form=form) as client:
        made = list(
            evolve_samples(
                documents(),
                client=client,
                seed=0,
                limit=5,
                rounds=2,
                config=SMALL,
                dropped=dropped,
            )
        )
    (sample,) = made
    assert sample.answers == ["Ostmark"]
    assert [d.title for d in sample.documents] == ["Mount Bronn"]
    assert [note["right"] for note in sample.derivation["solver"]] == [True, True]
    check_evolved(made)
    # The second round wants two documents, and the proposal names one.
    assert dropped == {"proposal: it rests on fewer documents than its level asks for": 1}


RECIPE = """
name: real-server
seed: 0
tokenizer: chars4
model: {base_url: "%s", model: smol, max_tokens: 32, concurrency: 8}
sources:
  - {name: documents, kind: markdown, path: pages}
  - {name: python-topics, kind: builtin, loader: python-topics}
extract: {triples: [documents]}
routes:
  - {route: multihop, limit: 2, sources: [documents]}
  - {route: evolve, limit: 2, sources: [documents], options: {task_type: causal, rounds: 1}}
  - {route: reading, limit: 3, sources: [python-topics]}
extend: {lengths: {2048: 1}}
verify: {k: 2, temperature: 0.7}
"""


def write_recipe(folder: Path, url: str):
    (folder / "pages").mkdir()
    for number, document in enumerate(documents()):
        (folder / "pages" / f"{number}.md").write_text(document.text, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE % url, encoding="utf-8")
    return load_recipe(path)


def test_synth_run_asks_a_model_once(server, tmp_path):
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, f"{server.root}/v1")
    summary = run_pipeline(recipe, out)
    assert summary["samples"]["composed"] >= 3
    rows = [row for name in ("samples", "rejected") for row in read_jsonl(out / f"{name}.jsonl")]
    assert len(rows) == summary["samples"]["composed"]
    complete = 0
    for row in rows:
        Sample.model_validate(row)
        verdicts = {name: value["verdict"] for name, value in row["filters"].items()}
        if "fail" in (v for name, v in verdicts.items() if name not in MODEL_FILTERS):
            assert {verdicts[name] for name in MODEL_FILTERS} == {"not_run"}
            continue
        assert verdicts["grounding"] in ("pass", "fail")
        if verdicts["grounding"] == "pass":
            assert verdicts["robustness"] in ("pass", "fail")
            assert verdicts["difficulty"] in ("pass", "fail")
            assert row["difficulty"]["model"] == "smol"
            complete += 1
    assert complete > 0
    usage = json.loads((out / "usage.json").read_text())
    # Three readings of each page, which the route `multihop` does not pay for again; one proposal;
    # and both checks of a sample that came through.
    assert usage["answers"] >= 3 * len(PEAKS) + 1 + 4 * complete
    calls = [row for path in (out / "calls").iterdir() for row in read_jsonl(path)]
    assert max(row["value"]["completion_tokens"] for row in calls) <= 32
    assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0

    before = server.answered()
    assert run_pipeline(recipe, out) == summary
    assert server.answered() == before
    # Made anew from the kept answers, where no server listens.
    files = {name: (out / name).read_bytes() for name in ("samples.jsonl", "rejected.jsonl")}
    shutil.rmtree(out / "work")
    for name in (*files, "summary.json"):
        (out / name).unlink()
    nowhere = dataclasses.replace(recipe.model, base_url="http://127.0.0.1:9/v1")
    assert run_pipeline(dataclasses.replace(recipe, model=nowhere), out) == summary
    assert {name: (out / name).read_bytes() for name in files} == files
    assert json.loads((out / "usage.json").read_text()) == usage


# --- a server that dies: last, because it starts one again --------------------------


def test_killed_server_gives_one_error_and_a_restart_resumes(server, tmp_path):
    requests = [ask(f"Write a line about the number {i}.", max_tokens=48) for i in range(12)]
    options = {"cache": tmp_path, "max_concurrency": 2}
    kept = {}
    retry = RetryPolicy(max_retries=1, base=0.05)
    with server.client(retry=retry, **options) as client:
        with pytest.raises(ServerUnavailable, match="smol: no answer after 2 attempts.*are in"):
            for index, answer in client.iter_many(requests):
                kept[index] = answer.text
                if len(kept) == 3:
                    server.kill()
        stored = len(client.cache)
    assert 3 <= len(kept) <= stored < 12
    server.start()
    with server.client(**options) as client:
        answers = dict(client.iter_many(requests))
        assert client.totals.attempts == client.totals.answers == 12 - stored
        assert client.totals.cached == stored
    assert sorted(answers) == list(range(12))
    assert {index: answers[index].text for index in kept} == kept
