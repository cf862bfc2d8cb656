"""``qwenlong eval``: make a set of questions, ask a model, score, draw."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwenlong.errors import InputError
from qwenlong.storage import atomic_write, lock_folder

if TYPE_CHECKING:
    from qwenlong.llm import Client
    from qwenlong.rewards import Judge
    from qwenlong.types import EvalResult

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Long-context evaluation.")

Data = Annotated[Path, typer.Argument(help="Folder of a set: samples.jsonl, documents.jsonl.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
BaseUrl = Annotated[str, typer.Option(help="OpenAI-compatible server, as in http://host:8000/v1.")]
ApiKey = Annotated[str, typer.Option(help="Environment variable that holds the server's key.")]
JudgeUrl = Annotated[str, typer.Option(help="Server of a judge for what the rule rejects.")]
JudgeModel = Annotated[str, typer.Option(help="Name of the judge on its server.")]


def parse_length(text: str) -> int:
    """``4K`` is 4,096, ``1M`` is 1,048,576, a number is itself."""
    text = text.strip().upper()
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    number = text if unit == 1 else text[:-1]
    try:
        value = float(number) * unit
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e12 or value != int(value):
        raise InputError(f"{text!r} is no length; write 4096, 4K or 1M")
    return int(value)


@app.command("make")
def make(
    out: Annotated[Path, typer.Option(help="Folder of the set.")],
    tasks: Annotated[str, typer.Option(help="Names with commas, or all.")] = "needle_single",
    lengths: Annotated[str, typer.Option(help="Tokens, with commas: 4K,128K,1M.")] = "4K,32K",
    count: Annotated[int, typer.Option(help="Questions of each task and length.")] = 20,
    seed: Annotated[int, typer.Option(help="The same seed gives the same questions.")] = 0,
    tokenizer: Annotated[
        str, typer.Option(help="chars4, qwen, or a model's folder: what a token is.")
    ] = "chars4",
    text: Annotated[
        Path | None, typer.Option(help="Folder of texts to hide things in; default: Python's own.")
    ] = None,
) -> None:
    """Make a set of questions at given context lengths, offline."""
    from qwenlong.evals.dataset import TASKS, generate, write_dataset
    from qwenlong.evals.haystack import Haystack
    from qwenlong.evals.texts import TokenCounter

    names = list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    sizes = [parse_length(length) for length in lengths.split(",")]
    console = Console(stderr=True)
    haystack = Haystack.load(TokenCounter(tokenizer), text)
    about = {
        "tasks": names,
        "lengths": sizes,
        "count": count,
        "seed": seed,
        "tokenizer": tokenizer,
        "text": haystack.name,
    }
    with lock_folder(out), _progress(console) as progress:
        task = progress.add_task("made", total=len(names) * len(sizes) * count)

        def counted():
            for sample in generate(haystack, tasks=names, lengths=sizes, count=count, seed=seed):
                yield sample
                progress.advance(task)

        summary = write_dataset(out, counted(), about=about)
    console.print(
        f"{out}: {summary['samples']:,} questions, {summary['tokens']:,} tokens, "
        f"{summary['documents']:,} texts"
    )


@app.command("load")
def load(
    source: Annotated[Path, typer.Argument(help="File of a public benchmark.")],
    out: Annotated[Path, typer.Option(help="Folder of the set.")],
    form: Annotated[str, typer.Option("--format", help="Its format; see docs/eval.md.")],
    tokenizer: Annotated[str, typer.Option(help="chars4, qwen, or a model's folder.")] = "chars4",
    documents: Annotated[
        Path | None, typer.Option(help="Texts that the benchmark only names (frames).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first questions only.")] = None,
) -> None:
    """Bring a file of a public benchmark into the form of a set."""
    from itertools import islice

    from qwenlong.evals.dataset import write_dataset
    from qwenlong.evals.formats import load_benchmark

    samples = load_benchmark(form, source, tokenizer=tokenizer, documents=documents)
    about = {"format": form, "file": str(source), "tokenizer": tokenizer}
    with lock_folder(out):
        summary = write_dataset(out, islice(samples, limit), about=about)
    Console(stderr=True).print(f"{out}: {summary['samples']:,} questions of {form}")


@app.command("run")
def run(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[str, typer.Option(help="Name on the server; without one, a model's folder.")],
    base_url: BaseUrl = "",
    api_key_env: ApiKey = "OPENAI_API_KEY",
    mode: Annotated[str, typer.Option(help="full, closed_book or agent.")] = "full",
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 2048,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Sample i is drawn with seed + i.")] = 0,
    window: Annotated[
        str, typer.Option(help="Tokens of prompt and answer: longer contexts are cut. 0: never.")
    ] = "0",
    keep: Annotated[str, typer.Option(help="Of a longer context: ends, or last.")] = "ends",
    tokenizer: Annotated[
        str, typer.Option(help="What a token is; default the folder of --model, or the set's.")
    ] = "",
    chunk_tokens: Annotated[str, typer.Option(help="Agent: of a chunk.")] = "32K",
    memory_tokens: Annotated[str, typer.Option(help="Agent: most of a memory.")] = "15K",
    plan_tokens: Annotated[str, typer.Option(help="Agent: most of a plan.")] = "1K",
    thinking_tokens: Annotated[str, typer.Option(help="Agent: room for thinking.")] = "0",
    reading: Annotated[
        str, typer.Option(help="Agent: rewrite a memory, or keep quotes of the text.")
    ] = "rewrite",
    quote_tokens: Annotated[int, typer.Option(help="Agent: of a reply that quotes.")] = 256,
    repairs: Annotated[int, typer.Option(help="Agent: times to ask again.")] = 1,
    fallback: Annotated[str, typer.Option(help="Agent: keep, or take a reply as it is.")] = "keep",
    concurrency: Annotated[int, typer.Option(help="Calls at the same time.")] = 16,
    device: Annotated[str, typer.Option(help="Without a server: auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Without a server: auto, bfloat16, ...")] = "auto",
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
) -> None:
    """Ask, score, write table and plot. Killed at any moment, the same command continues."""
    from qwenlong.data.export import load_samples
    from qwenlong.evals.run import RunSettings, ask, score_run
    from qwenlong.llm import LLMError

    if concurrency < 1:
        raise InputError(f"--concurrency is {concurrency}; it must be at least 1")
    settings = RunSettings(
        mode=mode,  # type: ignore[arg-type]  (checked there, as the others are)
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        window=None if window == "0" else parse_length(window),
        keep=keep,  # type: ignore[arg-type]
        tokenizer=tokenizer or (_tokenizer_of(data) if base_url else model),
        chunk_tokens=parse_length(chunk_tokens),
        memory_tokens=parse_length(memory_tokens),
        plan_tokens=parse_length(plan_tokens),
        thinking_tokens=0 if thinking_tokens == "0" else parse_length(thinking_tokens),
        reading=reading,  # type: ignore[arg-type]
        quote_tokens=quote_tokens,
        repairs=repairs,
        fallback=fallback,  # type: ignore[arg-type]
    )
    console = Console(stderr=True)
    total = sum(1 for _ in load_samples(data, with_text=False)) * samples
    with lock_folder(out):
        try:
            with (
                _open_client(
                    model, base_url, api_key_env, concurrency, out, device, dtype
                ) as client,
                _progress(console) as progress,
            ):
                task = progress.add_task("answered", total=total)
                steps = progress.add_task("agent steps", total=None, visible=mode == "agent")
                done = ask(
                    data,
                    out,
                    client,
                    settings,
                    tick=lambda: progress.advance(task),
                    step_tick=lambda: progress.advance(steps),
                )
        except LLMError as error:
            raise InputError(
                f"the model failed: {error}. What was answered is kept; run the same command again"
            ) from None
        except KeyboardInterrupt:
            raise InputError(
                f"interrupted; run the same command again to continue in {out}"
            ) from None
        console.print(
            f"{done.asked} answered, {done.known_before} known before, {done.refused} refused"
        )
        with _judge(judge_url, judge_model, out) as judge:
            results = score_run(data, out, judge=judge)
        _finish(console, out, results)


@app.command("score")
def score(
    data: Data,
    run_folder: Run,
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
) -> None:
    """Score the responses of a run again, with a judge or without; no question is asked again."""
    from qwenlong.evals.run import read_run, score_run

    read_run(run_folder)  # no folder is made where there is no run
    with lock_folder(run_folder), _judge(judge_url, judge_model, run_folder) as judge:
        results = score_run(data, run_folder, judge=judge)
        _finish(Console(stderr=True), run_folder, results)


@app.command("compare")
def compare(
    first: Run,
    second: Run,
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")],
) -> None:
    """Two runs over the same questions: both means, and the difference with its interval."""
    from qwenlong.evals import report
    from qwenlong.evals.run import read_results

    results = [read_results(folder) for folder in (first, second)]
    names = (first.name, second.name)
    if first.name == second.name:
        names = (str(first), str(second))
    try:
        table = report.comparison_markdown(names, report.compare(*results))
    except ValueError as error:
        raise InputError(f"{error}") from None
    runs = {name: report.summarise(rows) for name, rows in zip(names, results, strict=True)}
    with lock_folder(out):
        with atomic_write(out / "comparison.md") as file:
            file.write(f"{table}\n\n{report.METHOD}; of the difference: both combined.\n")
        report.draw(runs, out / "comparison.png")
    _show(table)


def _show(table: str) -> None:
    """On standard output, whole: a narrow terminal breaks lines and shortens no name."""
    Console().print(table, markup=False, highlight=False, soft_wrap=True)


def _finish(console: Console, out: Path, results: list[EvalResult]) -> None:
    from qwenlong.evals.report import as_markdown, summarise, write_report
    from qwenlong.evals.run import read_run

    described = read_run(out)
    title = f"{Path(described['model']).name}, {described['mode']}"
    if described["mode"] == "full" and described["window"]:
        title += f", window {described['window']:,} ({described['keep']})"
    files = write_report(out, results, title)
    _show(as_markdown(summarise(results)))
    open_verdicts = sum((r.model_extra or {}).get("judge") == "error" for r in results)
    if open_verdicts:
        console.print(f"{open_verdicts} verdicts of the judge are missing; `score` asks again")
    console.print(", ".join(str(file) for file in files))


def _tokenizer_of(data: Path) -> str:
    """The tokenizer that the set was made with."""
    import json

    try:
        return json.loads((data / "summary.json").read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{data} does not say its tokenizer; give --tokenizer") from None


def _open_client(
    model: str,
    base_url: str,
    api_key_env: str,
    concurrency: int,
    out: Path,
    device: str,
    dtype: str,
) -> Client:
    options = {"cache": out / "calls", "max_concurrency": concurrency}
    if base_url:
        from qwenlong.llm import ChatClient

        return ChatClient(base_url, model=model, api_key=os.environ.get(api_key_env), **options)
    from qwenlong.llm import EmbeddedClient
    from qwenlong.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer in {model} has no chat template; take an instruct model")
    network = load_causal_lm(model, device=device, dtype=dtype).model
    return EmbeddedClient(network, tokenizer, name=model, batch_size=concurrency, **options)


@contextlib.contextmanager
def _judge(url: str, model: str, out: Path) -> Iterator[Judge | None]:
    if not url and not model:
        yield None
        return
    if not (url and model):
        raise InputError("a judge needs --judge-url and --judge-model")
    from qwenlong.llm import ChatClient
    from qwenlong.rewards import Judge

    with ChatClient(url, model=model, api_key=os.environ.get("JUDGE_API_KEY")) as client:
        yield Judge(client, cache=out / "judge")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
