"""``qwenlong agent ask``: questions about texts longer than any context, read chunk by chunk.

A run is a folder: ``trace.jsonl`` (every memory and plan, written as each chunk ends), ``calls``
(every answer of the model), and at the end ``answers.json`` and a picture per question. With
``--resume`` an interrupted run goes on at its chunk; nothing that was answered is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from qwenlong.agent_plot import draw_memory
from qwenlong.errors import InputError
from qwenlong.llm import ChatClient, Client, EmbeddedClient, LLMError, RequestRefused, RetryPolicy
from qwenlong.memory_agent import (
    AgentConfig,
    AgentResult,
    AgentTask,
    CharacterTokenizer,
    Step,
    TextSource,
    run_agents,
)
from qwenlong.memory_agent.trace import TraceFile, refuse_run
from qwenlong.storage import atomic_write, lock_folder, write_json

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Questions about texts of any length."
)

_CONVERTED = {".pdf": "pdf", ".html": "html", ".htm": "html", ".xhtml": "html"}
_PLAN_CHARACTERS = 70


@app.callback()
def _group() -> None:
    """Questions about texts of any length: a memory and a plan, chunk by chunk."""


@dataclass(frozen=True)
class AskSettings:
    """What a run was asked for."""

    inputs: tuple[str, ...]
    questions: tuple[str, ...]
    model: str
    config: AgentConfig
    instructions: str | None = None
    base_url: str | None = None
    tokenizer: str | None = None
    concurrency: int = 16
    timeout_seconds: float = 600.0
    retries: int = 6

    def __post_init__(self) -> None:
        if not self.questions or not all(question.strip() for question in self.questions):
            raise InputError("a question is empty; give --question TEXT.")
        for name in ("concurrency", "timeout_seconds"):
            if not getattr(self, name) > 0:
                option = name.removesuffix("_seconds")
                raise InputError(f"--{option} is {getattr(self, name)}; it must be above 0.")
        if self.retries < 0:
            raise InputError(f"--retries is {self.retries}; it must be at least 0.")


# --- what is needed --------------------------------------------------------------


def open_text(inputs: tuple[str, ...], out: Path, *, resume: bool = False) -> TextSource:
    """The documents as one text. Files stay where they are; standard input and files that must be
    converted (PDF, HTML) are kept as text in ``out``.
    """
    if not inputs:
        raise InputError("no document; give --input FILE, or - for standard input.")
    documents = []
    for number, name in enumerate(inputs, 1):
        path = Path(name)
        kind = _CONVERTED.get(path.suffix.lower())
        if name == "-":
            documents.append(
                ("standard input", _from_stdin(out / "input" / f"{number}.txt", resume))
            )
        elif path.is_dir():
            raise InputError(f"{path} is a folder; give its files, one --input each.")
        elif kind and path.is_file():
            converted = _converted(path, kind, out / "input" / f"{number}.txt")
            documents.append((path.name, converted))
        else:
            documents.append((path.name, path))
    return TextSource.from_documents(documents, documents[0][0])


def _from_stdin(path: Path, resume: bool) -> Path:
    if not (resume and path.exists()):
        with atomic_write(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _converted(path: Path, kind: str, text_path: Path) -> Path:
    from qwenlong.data.loaders import LoadFailure, list_units, load_unit
    from qwenlong.data.recipe import SourceConfig

    source = SourceConfig(name="input", kind=kind, path=str(path), include=["*"])
    with atomic_write(text_path) as file:
        for unit in list_units(source):
            for document in load_unit(source, unit):
                if isinstance(document, LoadFailure):
                    raise InputError(f"{path} cannot be read as {kind}: {document.reason}.")
                file.write(document.text)
    return text_path


def open_tokenizer(settings: AskSettings, console: Console) -> Any:
    """The model's tokenizer where it is known, else an estimate of 4 characters a token."""
    folder = settings.tokenizer or (settings.model if settings.base_url is None else None)
    if folder is None:
        console.print(
            "tokens are estimated as 4 characters each; --tokenizer FOLDER counts them.",
            highlight=False,
        )
        return CharacterTokenizer()
    from qwenlong.models import load_tokenizer

    return load_tokenizer(folder)


def open_client(settings: AskSettings, tokenizer: Any, cache: Path) -> Client:
    """A server's client, or the model of a folder in this process."""
    options = {
        "cache": cache,
        "retry": RetryPolicy(max_retries=settings.retries),
        "max_concurrency": settings.concurrency,
    }
    if settings.base_url is not None:
        # Streamed, so that the time-out is about silence, not about a long memory being written.
        return ChatClient(
            settings.base_url,
            model=settings.model,
            timeout=settings.timeout_seconds,
            stream=True,
            **options,
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {settings.model} has no chat template, so it is no model to talk "
            "to; use an instruction-tuned model."
        )
    from transformers.utils import logging

    from qwenlong.models import load_causal_lm

    logging.disable_progress_bar()  # of the weights; ours is the one of the chunks
    lm = load_causal_lm(settings.model)
    config, context = settings.config, lm.context_tokens
    needed = config.context_tokens(
        max(len(tokenizer(question)["input_ids"]) for question in settings.questions)
    )
    if context is not None and needed > context:
        raise InputError(
            f"{settings.model} reads {context} tokens at a time and a step may need {needed}; "
            "use a smaller --chunk-tokens, --memory-tokens or --plan-tokens."
        )
    return EmbeddedClient(
        lm.model,
        tokenizer,
        name=str(Path(settings.model).resolve()),
        batch_size=settings.concurrency,
        **options,
    )


# --- a run -----------------------------------------------------------------------


def run_ask(
    settings: AskSettings, out: Path, console: Console, *, resume: bool
) -> dict[str, AgentResult]:
    """Answer every question, write the run's folder, return the results by question.

    Raises:
        InputError: wrong input, a model that refuses or does not answer; what was answered is kept;
            another process has the folder.
    """
    with lock_folder(out):
        return _run_locked(settings, out, console, resume=resume)


def _run_locked(
    settings: AskSettings, out: Path, console: Console, *, resume: bool
) -> dict[str, AgentResult]:
    if not resume:
        refuse_run(out / "trace.jsonl")  # before anything is written over
    source = open_text(settings.inputs, out, resume=resume)
    tokenizer = open_tokenizer(settings, console)
    names = [f"q{i}" for i in range(1, len(settings.questions) + 1)]
    job = {
        "text": {"sha256": source.fingerprint(), "bytes": source.size},
        "questions": list(settings.questions),
        "instructions": settings.instructions,
        "model": settings.model,
        "tokenizer": settings.tokenizer,
        "config": {**asdict(settings.config), "extra_body": dict(settings.config.extra_body)},
    }
    tasks = [
        AgentTask(name, question, source, settings.instructions)
        for name, question in zip(names, settings.questions, strict=True)
    ]
    go_on = "the same command with --resume goes on from there"
    client = open_client(settings, tokenizer, out / "calls")
    with client, TraceFile(out / "trace.jsonl", job, resume=resume) as trace:
        try:
            with _progress(console, tasks, trace) as on_step:
                results = asyncio.run(
                    _answer(client, tokenizer, tasks, settings.config, trace, on_step)
                )
        except KeyboardInterrupt:
            raise InputError(f"interrupted; {_done(trace)}, {go_on}.") from None
        except LLMError as error:
            raise InputError(f"the model failed: {error}. {_done(trace)}; {go_on}.") from error
        _write(out, settings, trace, results, client.report())
    return results


async def _answer(
    client: Client,
    tokenizer: Any,
    tasks: list[AgentTask],
    config: AgentConfig,
    trace: TraceFile,
    on_step: Callable[[str, Step], None],
) -> dict[str, AgentResult]:
    results: dict[str, AgentResult] = {}
    refused: RequestRefused | None = None
    started = time.monotonic()
    since = {task.id: started for task in tasks}

    def keep(name: str, step: Step) -> None:
        now = time.monotonic()
        trace.append(name, step, now - since[name])
        since[name] = now
        on_step(name, step)

    known = {name: list(steps) for name, steps in trace.steps.items()}
    async for name, result in run_agents(
        client, tokenizer, tasks, config, in_flight=len(tasks), steps=known, on_step=keep
    ):
        if isinstance(result, RequestRefused):
            refused = result  # the other questions are answered first
        else:
            results[name] = result
    if refused is not None:
        raise refused
    return results


def _done(trace: TraceFile) -> str:
    count = sum(len(steps) for steps in trace.steps.values())
    return f"the trace holds {count} step{'s' * (count != 1)}"


def _write(
    out: Path,
    settings: AskSettings,
    trace: TraceFile,
    results: dict[str, AgentResult],
    usage: dict[str, Any],
) -> None:
    rows = []
    for number, (name, question) in enumerate(
        zip(sorted(results, key=lambda n: int(n[1:])), settings.questions, strict=True), 1
    ):
        result = results[name]
        picture = out / ("memory.png" if len(results) == 1 else f"memory-{number}.png")
        with atomic_write(picture, "wb") as file:
            draw_memory(
                file,
                result.trace,
                limit_tokens=settings.config.memory_tokens,
                title=question,
            )
        rows.append(
            {
                "question": question,
                "answer": result.answer,
                "final_memory": result.final_memory,
                "chunks": result.chunks,
                "stopped_early": result.stopped_early,
                "calls": result.calls,
                "tokens": result.tokens,
                "events": dict(result.events),
                "picture": picture.name,
            }
        )
    write_json(out / "answers.json", {"answers": rows, "usage": usage})


@contextlib.contextmanager
def _progress(
    console: Console, tasks: list[AgentTask], trace: TraceFile
) -> Iterator[Callable[[str, Step], None]]:
    """A bar for each question with its plan; in a log, a line for each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bars = {}
        for task in tasks:
            done = [step for step in trace.steps.get(task.id, ()) if step.kind == "read"]
            bars[task.id] = bar.add_task(
                escape(textwrap.shorten(task.question, 30, placeholder="...")),
                total=max(1, task.source.size),
                completed=done[-1].end if done else 0,
                state=escape(_state(done[-1])) if done else "",
            )

        def on_step(name: str, step: Step) -> None:
            if step.kind == "read":
                bar.update(bars[name], completed=step.end, state=escape(_state(step)))
            elif step.kind == "answer":
                bar.update(bars[name], state="answered")
            if not console.is_terminal:
                shown = _state(step) if step.kind == "read" else step.kind
                prefix = f"{name}: " if len(tasks) > 1 else ""
                percent = f"{step.end / max(1, tasks[0].source.size):4.0%}  " * (
                    step.kind == "read"
                )
                console.print(
                    f"{prefix}{percent}{shown}", highlight=False, markup=False, soft_wrap=True
                )

        yield on_step


def _state(step: Step) -> str:
    plan = textwrap.shorten(step.plan, _PLAN_CHARACTERS, placeholder=" ...") or "(none)"
    notes = [event.replace("_", " ") for event in dict.fromkeys(step.events) if event != "thinking"]
    more = f" [{', '.join(notes)}]" if notes else ""
    return f"chunk {step.index + 1}, memory {step.memory_tokens} tokens{more}; plan: {plan}"


def print_results(
    console: Console, settings: AskSettings, results: dict[str, AgentResult], out: Path
) -> None:
    """The answers, and what they cost."""
    for number, question in enumerate(settings.questions, 1):
        result = results[f"q{number}"]
        if len(results) > 1:
            console.print(f"{question}", style="bold", markup=False, highlight=False)
        console.print(result.answer or "(no answer)", markup=False, highlight=False, soft_wrap=True)
        early = ", stopped early by its plan" if result.stopped_early else ""
        console.print(
            f"{result.chunks} chunks, {result.calls} calls, {result.tokens['document']:,} tokens "
            f"of text, {result.tokens['prompt']:,} + {result.tokens['completion']:,} tokens of "
            f"prompts and replies{early}",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{out}: answers.json, trace.jsonl, memory*.png", style="dim", soft_wrap=True)


@app.command("ask")
def ask(
    input: Annotated[
        list[str],
        typer.Option(help="A document (text, Markdown, HTML, PDF), or - ; several are one text."),
    ],
    question: Annotated[list[str], typer.Option(help="Several are answered in one pass.")],
    model: Annotated[
        str, typer.Option(help="The server's name of it; without --base-url a model folder.")
    ],
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server: http://127.0.0.1:8000/v1.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder; with a server, 4 characters a token if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; the input's name with .agent.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    instructions: Annotated[
        str | None, typer.Option(help="Answer format, for the last step alone.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Finds the format in a question: rule, model or none.")
    ] = "rule",
    chunk_tokens: Annotated[int, typer.Option(help="Of the text, at a time.")] = 32_768,
    memory_tokens: Annotated[int, typer.Option(help="At most; more is cut.")] = 15_360,
    plan_tokens: Annotated[int, typer.Option(help="At most; more is cut.")] = 1_024,
    answer_tokens: Annotated[int, typer.Option(help="At most.")] = 4_096,
    thinking_tokens: Annotated[
        int, typer.Option(help="Room for thinking in every reply, for models that do.")
    ] = 0,
    reading: Annotated[
        str,
        typer.Option(help="rewrite a memory, or for small models quotes: keep quotes of the text."),
    ] = "rewrite",
    quote_tokens: Annotated[int, typer.Option(help="Of a reply with --reading quotes.")] = 256,
    order: Annotated[
        str, typer.Option(help="Of a prompt: paper, or chunk_first (for prefix caches).")
    ] = "paper",
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="End reading where a plan says STOP.")
    ] = False,
    fallback: Annotated[
        str, typer.Option(help="Where a reply has no memory: keep the old, or take the reply.")
    ] = "keep",
    repairs: Annotated[int, typer.Option(help="Times to ask again for a malformed reply.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Of sampling.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    concurrency: Annotated[int, typer.Option(help="Calls at the same time, or in a batch.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte from the server.")] = 600.0,
    retries: Annotated[int, typer.Option(help="Of a call that failed, with pauses.")] = 6,
) -> None:
    """Answer questions about documents of any length, chunk by chunk."""
    try:
        config = AgentConfig(
            chunk_tokens=chunk_tokens,
            memory_tokens=memory_tokens,
            plan_tokens=plan_tokens,
            answer_tokens=answer_tokens,
            thinking_tokens=thinking_tokens,
            reading=reading,
            quote_tokens=quote_tokens,
            order=order,
            split=split,
            early_stop=early_stop,
            fallback=fallback,
            repairs=repairs,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    except ValueError as error:
        raise InputError(f"{str(error).removeprefix('AgentConfig: ')}.") from error
    settings = AskSettings(
        inputs=tuple(input),
        questions=tuple(question),
        model=model,
        config=config,
        instructions=instructions,
        base_url=base_url,
        tokenizer=tokenizer,
        concurrency=concurrency,
        timeout_seconds=timeout,
        retries=retries,
    )
    if out is None:
        first = Path("stdin" if input[0] == "-" else input[0])
        out = first.parent / f"{first.stem}.agent"
    results = run_ask(settings, out, Console(stderr=True), resume=resume)
    print_results(Console(), settings, results, out)
