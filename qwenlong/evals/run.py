"""Asking a model the questions of an evaluation set, and scoring what it said.

A run is a folder: ``run.json`` (what was asked of whom), ``responses.jsonl`` (one line an answer,
appended as it comes), in agent mode ``steps.jsonl`` (one line a step), and ``results.jsonl`` (the
scores, made anew from the responses). A run that was interrupted goes on where it was: a question
that is answered is not asked again, and an agent goes on at its next chunk. Scoring asks nobody but
the judge, so it may be repeated with another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenlong import prompts
from qwenlong.data.export import ExportedTexts, load_samples
from qwenlong.errors import InputError
from qwenlong.evals.reading import CHAT_TOKENS, Keep, fit
from qwenlong.evals.texts import TokenCounter
from qwenlong.llm import Client, Completion, LLMError, Request
from qwenlong.memory_agent import (
    AgentConfig,
    AgentResult,
    AgentTask,
    CharacterTokenizer,
    Step,
    TextSource,
    run_agents,
)
from qwenlong.rewards import score_many
from qwenlong.storage import JsonlAppender, read_jsonl, write_json, write_jsonl
from qwenlong.types import EvalResult, Sample

if TYPE_CHECKING:
    from qwenlong.rewards import Judge

Mode = Literal["full", "closed_book", "agent"]
MODES = ("full", "closed_book", "agent")
Progress = Callable[[], None]


@dataclass(frozen=True)
class RunSettings:
    """How questions are put to a model. The defaults of sampling are the paper's (section 5.1).

    Args:
        mode: ``"full"`` shows the context, ``"closed_book"`` does not, ``"agent"`` reads it in
            chunks.
        samples: answers to each question; sample i is drawn with ``seed + i``.
        window: tokens that prompt and answer may take together; None never truncates.
        keep: of a context beyond the window, see ``reading.fit``.
        tokenizer: of ``count_tokens``; with a window it must be the model's for the limit to hold.
        chunk_tokens, memory_tokens, plan_tokens, thinking_tokens, reading, quote_tokens, repairs,
            fallback: of the agent, see ``AgentConfig``.
    """

    mode: Mode = "full"
    samples: int = 1
    max_tokens: int = 2048
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    window: int | None = None
    keep: Keep = "ends"
    tokenizer: str = "chars4"
    chunk_tokens: int = 32_768
    memory_tokens: int = 15_360
    plan_tokens: int = 1_024
    thinking_tokens: int = 0
    reading: Literal["rewrite", "quotes"] = "rewrite"
    quote_tokens: int = 256
    repairs: int = 1
    fallback: Literal["keep", "take"] = "keep"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}; choose of {', '.join(MODES)}")
        if self.samples < 1 or self.max_tokens < 1:
            raise InputError("samples and max_tokens must be at least 1")
        if self.window is not None and self.window <= self.max_tokens + CHAT_TOKENS:
            raise InputError(
                f"window is {self.window}; it must hold the answer ({self.max_tokens}) and more"
            )
        if self.keep not in ("ends", "last"):
            raise InputError(f"keep is {self.keep!r}; choose ends or last")
        try:
            self.agent_config()
        except ValueError as error:
            raise InputError(f"{error}") from None

    def agent_config(self) -> AgentConfig:
        return AgentConfig(
            chunk_tokens=self.chunk_tokens,
            memory_tokens=self.memory_tokens,
            plan_tokens=self.plan_tokens,
            answer_tokens=self.max_tokens,
            thinking_tokens=self.thinking_tokens,
            reading=self.reading,
            quote_tokens=self.quote_tokens,
            repairs=self.repairs,
            fallback=self.fallback,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass
class Answered:
    """What a run has of its answers."""

    asked: int = 0
    known_before: int = 0
    refused: int = 0
    rows: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict, repr=False)


# --- asking ------------------------------------------------------------------


def ask(
    data: str | Path,
    out: str | Path,
    client: Client,
    settings: RunSettings,
    *,
    tick: Progress = lambda: None,
    step_tick: Progress = lambda: None,
) -> Answered:
    """Put every question of the set ``data`` to ``client``; responses go to ``out``.

    Args:
        tick: called once for each answer, those of an earlier run first.
        step_tick: called when the agent has read a chunk or answered.

    Raises:
        InputError: ``out`` holds a run with other settings, model or questions.
        ServerUnavailable: the server does not answer; the same call goes on later.
    """
    data, out = Path(data), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _check_same_run(data, out, client, settings)
    texts = ExportedTexts(data / "documents.jsonl")
    done = Answered(rows=read_responses(out))
    wanted = 0
    for sample in load_samples(data, with_text=False):
        for index in range(settings.samples):
            wanted += 1
            if (sample.id, index) in done.rows:
                done.known_before += 1
                tick()
    if done.known_before == wanted:
        return done

    def open_questions() -> Iterator[tuple[Sample, int]]:
        for sample in load_samples(data, with_text=False):
            for index in range(settings.samples):
                if (sample.id, index) not in done.rows:
                    yield sample, index

    with JsonlAppender(out / "responses.jsonl") as responses:

        def keep(sample: Sample, index: int, row: dict[str, Any]) -> None:
            row = {"sample_id": sample.id, "index": index, **row}
            responses.append(row)
            done.rows[sample.id, index] = row
            done.asked += 1
            done.refused += row["refused"] is not None
            tick()

        if settings.mode == "agent":
            with _Contexts(out / ".contexts", texts) as contexts:
                asyncio.run(
                    _ask_agents(out, client, settings, contexts, open_questions(), keep, step_tick)
                )
        else:
            _ask_once(client, settings, texts, open_questions(), keep)
    return done


def _check_same_run(data: Path, out: Path, client: Client, settings: RunSettings) -> None:
    described = {
        "data": sha256_of(data / "samples.jsonl"),
        "model": client.model,
        **{name: value for name, value in asdict(settings).items() if name != "samples"},
    }
    path = out / "run.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(k for k in described if known.get(k) != described[k])
        if other:
            shown = ", ".join(f"{k} ({known.get(k)!r}, now {described[k]!r})" for k in other)
            raise InputError(f"{out} holds another run, with other {shown}; take a new folder")
    write_json(path, {**described, "samples": settings.samples, "folder": str(data)})


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise InputError(f"there is no {path}; `qwenlong eval make` writes it") from None
    return digest.hexdigest()


def read_responses(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Responses of a run by (sample id, index of the sample)."""
    path = Path(out) / "responses.jsonl"
    if not path.exists():
        return {}
    return {(row["sample_id"], row["index"]): row for row in read_jsonl(path)}


def _ask_once(client, settings: RunSettings, texts, questions, keep) -> None:
    """One call an answer: the whole context, or none of it."""
    tokens = TokenCounter(settings.tokenizer)
    asked: dict[int, tuple[Sample, int, bool]] = {}

    def requests() -> Iterator[Request]:
        last: tuple[str, list[prompts.Message], bool] | None = None
        number = 0
        for sample, index in questions:
            if last is None or last[0] != sample.id:  # samples of one question share its prompt
                try:
                    last = (sample.id, *_messages(sample, settings, texts, tokens))
                except InputError as error:  # the question alone does not fit the window
                    keep(sample, index, _refusal(error, True))
                    continue
            asked[number] = (sample, index, last[2])
            number += 1
            yield Request.chat(
                last[1],
                sample_index=index,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                seed=settings.seed,
            )

    for number, said in client.iter_many(requests(), on_error="yield"):
        sample, index, truncated = asked.pop(number)
        keep(sample, index, _row(said, truncated))


def _messages(
    sample: Sample, settings: RunSettings, texts: Callable[[str], str], tokens: TokenCounter
) -> tuple[list[prompts.Message], bool]:
    if settings.mode == "closed_book":
        return prompts.render(sample, "closed_book"), False
    truncated = False
    if settings.window is not None:
        room = settings.window - settings.max_tokens - CHAT_TOKENS
        sample, truncated = fit(sample, room, tokens, keep=settings.keep, resolve=texts)
    return prompts.render(sample, "full", resolve=texts), truncated


def _row(said: Completion | LLMError, truncated: bool) -> dict[str, Any]:
    if isinstance(said, LLMError):
        return _refusal(said, truncated)
    return {
        "response": said.text,
        "finish_reason": said.finish_reason,
        "tokens": {"prompt": said.prompt_tokens, "completion": said.completion_tokens, "calls": 1},
        "truncated": truncated,
        "refused": None,
    }


def _refusal(error: Exception, truncated: bool) -> dict[str, Any]:
    return {
        "response": "",
        "finish_reason": "refused",
        "tokens": {},
        "truncated": truncated,
        "refused": str(error),
    }


class _Contexts:
    """The contexts that agents are reading, as files: memory does not grow with their length."""

    def __init__(self, folder: Path, texts: Callable[[str], str]):
        self._folder, self._texts = folder, texts
        self._open: dict[str, tuple[TextSource, Path]] = {}
        self._readers: Counter[str] = Counter()

    def __enter__(self) -> _Contexts:
        self._folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *exc) -> None:
        shutil.rmtree(self._folder)

    def source(self, sample: Sample) -> TextSource:
        """The context of ``sample`` as its full-context prompt shows it, for one more reader.

        It is empty without documents: the agent's first call is its answer then.
        """
        if sample.id not in self._open:
            path = self._folder / f"{hashlib.sha256(sample.id.encode()).hexdigest()}.txt"
            with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
                blocks = prompts.document_blocks(prompts.view(sample).documents, self._texts)
                for number, block in enumerate(blocks):
                    gap = prompts.DOCUMENT_GAP if number else ""
                    file.write(gap + block.replace("\0", ""))  # a text file holds no zero bytes
            if path.stat().st_size:
                source = TextSource.from_documents([("", path)], name=sample.id)
            else:
                source = TextSource.from_text("", name=sample.id)
            self._open[sample.id] = (source, path)
        self._readers[sample.id] += 1
        return self._open[sample.id][0]

    def close(self, sample: Sample) -> None:
        """One reader of ``sample`` has ended; the file goes with the last."""
        self._readers[sample.id] -= 1
        if not self._readers[sample.id]:
            self._open.pop(sample.id)[1].unlink()


async def _ask_agents(
    out: Path, client, settings: RunSettings, contexts: _Contexts, questions, keep, step_tick
) -> None:
    """The memory agent reads the context chunk by chunk; each step is on disk when it ends."""
    steps: dict[str, list[Step]] = {}
    path = out / "steps.jsonl"
    if path.exists():
        for row in read_jsonl(path):
            steps.setdefault(row.pop("question"), []).append(Step.from_json(row))
    asked: dict[str, tuple[Sample, int]] = {}

    def tasks() -> Iterator[AgentTask]:
        for sample, index in questions:
            seen = prompts.view(sample)
            name = f"{sample.id}#{index}"
            asked[name] = (sample, index)
            question = prompts.question_with_choices(seen.question, seen.choices)
            yield AgentTask(name, question, contexts.source(sample), seen.instructions, index)

    with JsonlAppender(path) as file:

        def on_step(name: str, step: Step) -> None:
            file.append({"question": name, **step.to_json()})
            step_tick()

        answers = run_agents(
            client,
            agent_tokenizer(settings.tokenizer),
            tasks(),
            settings.agent_config(),
            steps=steps,
            on_step=on_step,
        )
        async for name, result in answers:
            sample, index = asked.pop(name)
            contexts.close(sample)
            steps.pop(name, None)
            if not isinstance(result, AgentResult):
                keep(sample, index, _refusal(result, False))
                continue
            row = {
                "response": result.answer,
                "finish_reason": "stop",
                "tokens": {
                    "prompt": result.tokens["prompt"],
                    "completion": result.tokens["completion"],
                    "calls": result.calls,
                },
                "truncated": False,
                "refused": None,
                "events": dict(sorted(result.events.items())),
            }
            keep(sample, index, row)


def agent_tokenizer(name: str) -> Any:
    """The tokenizer that cuts the agent's chunks, by its name in ``count_tokens``."""
    if name == "chars4":
        return CharacterTokenizer(4)
    if not Path(name).is_dir():
        raise InputError(
            f"agent mode cuts text with a model's tokenizer; name its folder or chars4, not {name}"
        )
    from qwenlong.models import load_tokenizer

    return load_tokenizer(name)


# --- scoring -----------------------------------------------------------------


def score_run(data: str | Path, out: str | Path, *, judge: Judge | None = None) -> list[EvalResult]:
    """Score the responses of the run ``out``; writes ``results.jsonl`` in the order of the set.

    A refused question scores 0. ``trace`` of an agent's result names its rows in ``steps.jsonl`` by
    their ``question``. A response that a failed judge left open has ``judge`` set to
    ``"error"`` and keeps the rule's score.
    """
    out = Path(out)
    described = read_run(out)
    rows = read_responses(out)
    pairs: list[tuple[Sample, dict[str, Any]]] = []
    for sample in load_samples(data, with_text=False):
        bare = sample.model_copy(update={"documents": []})
        for index in range(described["samples"]):
            if (sample.id, index) in rows:
                pairs.append((bare, rows[sample.id, index]))
    if not pairs:
        raise InputError(f"{out} holds no response to a question of {data}")
    scores = score_many([(sample, row["response"]) for sample, row in pairs], judge=judge)
    results, is_agent = [], described["mode"] == "agent"
    for (sample, row), score in zip(pairs, scores, strict=True):
        extra = sample.model_extra or {}
        results.append(
            EvalResult(
                sample_id=sample.id,
                mode=described["mode"],
                seed=described["seed"] + row["index"],
                response=row["response"],
                extracted=score.extracted,
                score=score.value,
                scorer=score.scorer,
                tokens=row["tokens"],
                truncated=row["truncated"],
                trace=f"steps.jsonl#{sample.id}#{row['index']}" if is_agent else None,
                judge=score.source,
                refused=row["refused"],
                kind=sample.subtype or sample.task,
                length=extra.get("length"),
            )
        )
    write_jsonl(out / "results.jsonl", (result.to_json() for result in results))
    return results


def read_run(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{out} holds no run.json; `qwenlong eval run` writes it") from None


def read_results(out: str | Path) -> list[EvalResult]:
    """The results of a scored run."""
    path = Path(out) / "results.jsonl"
    if not path.exists():
        raise InputError(f"{out} holds no results.jsonl; `qwenlong eval score` makes it")
    return [EvalResult.model_validate(row) for row in read_jsonl(path)]


def by_question(results: Sequence[EvalResult]) -> dict[str, list[float]]:
    """Scores of each question, in the order of its samples."""
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result.sample_id, []).append(result.score)
    return scores
