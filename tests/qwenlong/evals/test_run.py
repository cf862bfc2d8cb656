"""Asking, resuming, scoring: scripted readers over generated questions."""

import json

import pytest

from qwenlong.errors import InputError
from qwenlong.evals.dataset import write_dataset
from qwenlong.evals.run import RunSettings, ask, read_results, score_run
from qwenlong.llm import (
    RequestRefused,
    RetryPolicy,
    ScriptedClient,
    ServerUnavailable,
    TransientError,
    VirtualTime,
)
from qwenlong.prompts import AGENT_NO_MEMORY, render
from qwenlong.rewards import Judge
from qwenlong.types import Document, Sample
from tests.qwenlong.evals.readers import (
    DistractorCopier,
    EndlessCopier,
    ForgetfulReader,
    Lister,
    PerfectReader,
    said,
)

FULL = RunSettings(max_tokens=500)
AGENT = RunSettings(mode="agent", chunk_tokens=1_000, memory_tokens=8_000, max_tokens=500)


@pytest.fixture(scope="module")
def data(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, samples)
    return folder


def run(data, out, client, settings=FULL):
    with client:
        ask(data, out, client, settings)
    return score_run(data, out)


def mean(results, *kinds):
    scores = [r.score for r in results if not kinds or r.model_extra["kind"] in kinds]
    return sum(scores) / len(scores)


CODES = ("needle_single", "needle_multikey", "needle_multivalue", "needle_multiquery")


# --- scripted readers --------------------------------------------------------


@pytest.mark.parametrize("settings", [FULL, AGENT], ids=["full", "agent"])
def test_the_perfect_reader_answers_every_task(data, tmp_path, samples, settings):
    results = run(data, tmp_path, PerfectReader(samples), settings)
    assert len(results) == len(samples)
    assert [(r.sample_id, r.score) for r in results if r.score < 1] == []
    assert all(r.mode == settings.mode and r.extracted and not r.truncated for r in results)
    assert not (tmp_path / ".contexts").exists()
    if settings.mode == "agent":
        steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").open(encoding="utf-8")]
        for result in results:
            mine = [s for s in steps if f"steps.jsonl#{s['question']}" == result.trace]
            assert len(mine) == result.tokens["calls"] > 6 and mine[-1]["kind"] == "answer"


def test_the_forgetful_reader_fails_in_the_agent_alone(data, tmp_path, samples):
    # Nothing is left when the question is answered; only a guess of the last chunk could be right.
    results = run(data, tmp_path / "agent", ForgetfulReader(samples), AGENT)
    assert mean(results) == 0
    assert mean(run(data, tmp_path / "full", ForgetfulReader(samples), FULL)) == 1


def test_the_distractor_copier_scores_nothing(data, tmp_path, samples):
    results = run(data, tmp_path, DistractorCopier(samples))
    assert mean(results, *CODES, "variable_tracking") == 0


def test_listing_everything_is_not_punished(data, tmp_path, samples):
    """The share of the wanted strings that are named, as RULER counts it: recall alone."""
    assert mean(run(data, tmp_path, Lister(samples)), *CODES, "variable_tracking") == 1


def test_copying_the_prompt_earns_what_stands_at_its_end_alone(data, tmp_path, samples):
    results = run(data, tmp_path, EndlessCopier(samples))
    for sample, result in zip(samples, results, strict=True):
        assert sample.id == result.sample_id
        end = result.response[-1_000:]
        if not any(answer in end for answer in sample.answers):
            assert result.score == 0
    assert mean(results) < 0.2


def test_closed_book_shows_no_document(data, tmp_path, samples):
    client = ScriptedClient(lambda messages: said("unknown"))
    results = run(data, tmp_path, client, RunSettings(mode="closed_book", max_tokens=50))
    assert mean(results) == 0
    assert all("<document" not in c.messages[0]["content"] for c in client.calls)
    assert all(len(c.messages[0]["content"]) < 5_000 for c in client.calls)


@pytest.mark.parametrize("settings", [FULL, AGENT], ids=["full", "agent"])
def test_a_question_without_documents_is_answered_at_once(tmp_path, samples, settings):
    bare = Sample(
        id="bare",
        task="reading_qa",
        question="What is the sum of 19 and 23?",
        instructions="End with: the answer is (N).",
        documents=[],
        answers=["42"],
        answer_type="number",
        reward="numeric",
    )
    write_dataset(tmp_path / "data", [bare, samples[0]])
    asked = []

    class Adder(PerfectReader):
        def answer(self, request):
            if "19 and 23" not in request.messages[-1]["content"]:
                return super().answer(request)
            asked.append(request.messages[-1]["content"])
            return said("42")

    results = run(tmp_path / "data", tmp_path / "run", Adder(samples), settings)
    assert [(r.sample_id, r.score) for r in results] == [("bare", 1.0), (samples[0].id, 1.0)]
    assert results[0].tokens["calls"] == 1
    [prompt] = asked
    assert "<section>" not in prompt and bare.instructions in prompt
    if settings.mode == "agent":
        assert f"<memory>\n{AGENT_NO_MEMORY}\n</memory>" in prompt


@pytest.mark.parametrize("settings", [FULL, AGENT], ids=["full", "agent"])
def test_half_a_surrogate_pair_in_a_reply_does_not_end_the_run(data, tmp_path, samples, settings):
    """The reply is in the cache then: the same command would fail on it for ever."""
    reply = f"<memory>half \ud83d</memory><plan>none</plan> {said('x')}"
    with ScriptedClient(lambda messages: reply, cache=tmp_path / "calls") as client:
        ask(data, tmp_path / "run", client, settings)
    results = score_run(data, tmp_path / "run")
    assert len(results) == len(samples)
    assert all("half ?" in result.response for result in results)


# --- nothing of the answer in a prompt ---------------------------------------


class Recorder(ScriptedClient):
    """Says something useless and remembers every word it was shown."""

    def answer(self, request):
        return "<memory>m</memory><plan>p</plan>"

    def shown(self):
        return "\n".join(m["content"] for call in self.calls for m in call.messages)


@pytest.mark.parametrize("mode", ["full", "agent", "closed_book"])
def test_ground_truth_is_in_no_prompt(tmp_path, mode):
    secrets = {
        "answers": ["SECRET-answer"],
        "derivation": {"kind": "template", "why": "SECRET-derivation"},
        "reward": "cover",
        "unit": "SECRET-unit",
        "filters": {"f": {"verdict": "pass", "note": "SECRET-filter"}},
        "difficulty": {"model": "SECRET-model", "k": 1, "pass_rate": 0.5},
        "answer_prefix": "SECRET-prefix",
        "secret_extra": "SECRET-extra",
        "subtype": "SECRET-subtype",
    }
    documents = [
        Document(id="SECRET-id", title="Tea", role="evidence", text="Tea is a drink. " * 400),
        Document(id="SECRET-id-2", title="Milk", role="distractor", text="Milk is white. " * 400),
    ]
    sample = Sample(
        id="SECRET-sample",
        task="SECRET-task",
        question="What is tea?",
        documents=documents,
        answer_type="text",
        evidence=[{"doc": "SECRET-id", "start": 0, "end": 9}],
        **secrets,
    )
    write_dataset(tmp_path / "data", [sample])
    client = Recorder()
    settings = RunSettings(mode=mode, max_tokens=50, chunk_tokens=500, window=1_500, samples=2)
    run(tmp_path / "data", tmp_path / "out", client, settings)
    shown = client.shown()
    assert "What is tea?" in shown and ("Tea is a drink." in shown) == (mode != "closed_book")
    for word in ("SECRET", "evidence", "distractor", "cover", "template"):
        assert word not in shown


def test_answers_of_generated_questions_stand_in_documents_alone(data, tmp_path, samples):
    client = Recorder()
    run(data, tmp_path, client)
    for call in client.calls:
        prompt = call.messages[0]["content"]
        _, _, rest = prompt.rpartition("</documents>")
        [sample] = [s for s in samples if f"Question: {s.question}\n" in rest][:1]
        for answer in sample.answers:
            if len(answer) > 4:
                assert answer.removeprefix(getattr(sample, "answer_prefix", "")) not in rest


# --- resuming ----------------------------------------------------------------


def dying(reader, after, **options):
    """``reader`` behind a server that dies after so many answers."""

    class Dying(reader):
        def answer(self, request):
            if len(self.calls) > after:
                raise TransientError("connection")
            return super().answer(request)

    options.setdefault("retry", RetryPolicy(max_retries=1))
    return lambda samples: Dying(samples, time=VirtualTime(), max_concurrency=1, **options)


@pytest.mark.parametrize("settings", [FULL, AGENT], ids=["full", "agent"])
def test_an_interrupted_run_asks_nothing_twice(data, tmp_path, samples, settings):
    whole = PerfectReader(samples, max_concurrency=1)
    expected = run(data, tmp_path / "whole", whole, settings)
    asked = []
    with pytest.raises(ServerUnavailable), dying(PerfectReader, 7)(samples) as client:
        ask(data, tmp_path / "parts", client, settings)
    asked += client.calls[:7]
    with pytest.raises(ServerUnavailable), dying(PerfectReader, 11)(samples) as client:
        ask(data, tmp_path / "parts", client, settings)
    asked += client.calls[:11]
    last = PerfectReader(samples, max_concurrency=1)
    results = run(data, tmp_path / "parts", last, settings)
    asked += last.calls
    keys = [c.key("m") for c in asked]
    assert len(set(keys)) == len(keys) == len(whole.calls)
    assert [r.to_json() for r in results] == [r.to_json() for r in expected]
    again = PerfectReader(samples)
    run(data, tmp_path / "parts", again, settings)
    assert not again.calls


def test_a_torn_line_is_asked_again(data, tmp_path, samples):
    run(data, tmp_path, PerfectReader(samples, max_concurrency=1))
    path = tmp_path / "responses.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-30], encoding="utf-8")
    client = PerfectReader(samples)
    assert mean(run(data, tmp_path, client)) == 1
    assert len(client.calls) == 1 and path.read_text(encoding="utf-8") == text


def test_another_run_in_the_same_folder_is_refused(data, tmp_path, samples):
    run(data, tmp_path, PerfectReader(samples))
    with PerfectReader(samples, model="other") as client:
        with pytest.raises(InputError, match=r"model \('scripted', now 'other'\)"):
            ask(data, tmp_path, client, FULL)
    with PerfectReader(samples) as client:
        with pytest.raises(InputError, match=r"temperature \(0.7, now 0.0\)"):
            ask(data, tmp_path, client, RunSettings(max_tokens=500, temperature=0.0))
    write_dataset(tmp_path / "data", samples[:3])
    with PerfectReader(samples) as client, pytest.raises(InputError, match="other data"):
        ask(tmp_path / "data", tmp_path, client, FULL)
    with PerfectReader(samples) as client, pytest.raises(InputError, match="there is no"):
        ask(tmp_path / "nothing", tmp_path / "new", client, FULL)


def test_more_samples_are_added_to_a_run(data, tmp_path, samples):
    run(data, tmp_path, PerfectReader(samples))
    client = PerfectReader(samples)
    results = run(data, tmp_path, client, RunSettings(max_tokens=500, samples=3))
    assert len(client.calls) == 2 * len(samples) and len(results) == 3 * len(samples)
    assert [r.seed for r in results[:3]] == [0, 1, 2]
    assert {c.sample_index for c in client.calls} == {1, 2}


# --- sampling and refusals ---------------------------------------------------


def test_sampling_reaches_the_model(data, tmp_path, samples):
    client = PerfectReader(samples)
    settings = RunSettings(max_tokens=77, temperature=0.3, top_p=0.8, seed=5)
    run(data, tmp_path, client, settings)
    for call in client.calls:
        s = call.sampling
        assert (s.max_tokens, s.temperature, s.top_p, s.seed) == (77, 0.3, 0.8, 5)


def test_a_refused_question_scores_nothing_and_is_counted(data, tmp_path, samples):
    class Choosy(PerfectReader):
        def answer(self, request):
            if "passage" in request.messages[0]["content"].rpartition("Question:")[2]:
                raise RequestRefused("too long", status=400)
            return super().answer(request)

    with Choosy(samples) as client:
        done = ask(data, tmp_path, client, FULL)
    assert (done.asked, done.refused) == (len(samples), 2)
    results = score_run(data, tmp_path)
    assert mean(results, "repeated_requests") == 0 and mean(results, *CODES) == 1
    assert [r.model_extra["refused"] for r in results].count("too long") == 2


def test_a_window_cuts_and_says_so(data, tmp_path, samples):
    client = PerfectReader(samples)
    settings = RunSettings(max_tokens=200, window=3_000)
    results = run(data, tmp_path, client, settings)
    assert all(r.truncated for r in results)
    for call in client.calls:
        assert len(call.messages[0]["content"]) / 4 + 200 <= 3_000
    assert 0 < mean(results, *CODES) < 1


def test_a_question_beyond_the_window_is_refused_and_the_others_go_on(data, tmp_path, samples):
    bare = [render(s.model_copy(update={"documents": []}))[0]["content"] for s in samples]
    middle = sorted(map(len, bare))[len(bare) // 2] // 4
    client = PerfectReader(samples)
    settings = RunSettings(max_tokens=50, window=50 + 64 + middle)
    results = run(data, tmp_path, client, settings)
    refused = [r for r in results if r.model_extra["refused"]]
    assert len(results) == len(samples) and 0 < len(refused) < len(samples)
    assert all("its question alone" in r.model_extra["refused"] and r.score == 0 for r in refused)
    assert len(client.calls) == len(samples) - len(refused)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"mode": "half"}, "mode is 'half'"),
        ({"samples": 0}, "at least 1"),
        ({"window": 2_000, "max_tokens": 2_000}, "must hold the answer"),
        ({"keep": "first"}, "keep is 'first'"),
        ({"chunk_tokens": 3}, "chunk_tokens is 3; it must be at least 16"),
        ({"fallback": "x"}, "fallback is 'x'"),
    ],
)
def test_wrong_settings_are_one_sentence(fields, match):
    with pytest.raises(InputError, match=match):
        RunSettings(**fields)


def test_an_agent_needs_a_tokenizer_that_cuts(data, tmp_path, samples):
    with PerfectReader(samples) as client, pytest.raises(InputError, match="name its folder"):
        ask(data, tmp_path, client, RunSettings(mode="agent", tokenizer="qwen"))


# --- scoring -----------------------------------------------------------------


def test_the_judge_decides_where_the_rule_fails(tmp_path):
    row = {"task": "reading_qa", "documents": [], "answer_type": "text", "reward": "cover"}
    texts = [Document(id="d", text="Paris is in France.")]
    made = [
        Sample(id=str(i), question=f"Q{i}?", answers=["Paris"], **row | {"documents": texts})
        for i in range(3)
    ]
    write_dataset(tmp_path / "data", made)
    answers = {"Q0": "Paris", "Q1": "the French capital", "Q2": "Lyon"}

    def reply(messages):
        text = messages[0]["content"]
        return said(next(a for q, a in answers.items() if f"{q}?" in text))

    out = tmp_path / "out"
    results = run(tmp_path / "data", out, ScriptedClient(reply))
    assert [r.score for r in results] == [1, 0, 0]
    verdict = ScriptedClient(lambda m: "[[YES]]" if "French" in m[0]["content"] else "[[NO]]")
    with verdict as client:
        judged = score_run(tmp_path / "data", out, judge=Judge(client))
    assert [(r.score, r.model_extra["judge"]) for r in judged] == [
        (1, "rule"),
        (1, "judge"),
        (0, "judge"),
    ]
    assert [r.score for r in read_results(out)] == [1, 1, 0]
    assert len(verdict.calls) == 2


def test_scoring_before_asking_is_one_sentence(data, tmp_path):
    with pytest.raises(InputError, match="no run.json"):
        score_run(data, tmp_path)
    with pytest.raises(InputError, match="no results.jsonl"):
        read_results(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"mode": "full", "seed": 0, "samples": 1}))
    with pytest.raises(InputError, match="holds no response"):
        score_run(data, tmp_path)
