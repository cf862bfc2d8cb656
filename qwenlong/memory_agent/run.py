"""Many questions on their way through many texts, each at its own pace.

No question waits for another: a step begins as soon as the step before it of the same question has
ended and the client has a free slot. Questions about one text share its chunks, and the next chunk
is read and tokenized while the model writes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenlong.llm import Client, Completion, RequestRefused
from qwenlong.memory_agent.machine import AgentConfig, MemoryAgent, Step
from qwenlong.memory_agent.text import ChunkStream, TextSource, count_tokens
from qwenlong.types import Turn

OnStep = Callable[[str, Step], None]


@dataclass(frozen=True)
class AgentTask:
    """One question about one text. Tasks with the same ``source`` object share its chunks.

    ``instructions``: the answer format; None splits the question as the config says.
    """

    id: str
    question: str
    source: TextSource
    instructions: str | None = None
    sample_index: int = 0


@dataclass(frozen=True)
class AgentResult:
    """How a question was answered.

    ``tokens``: ``prompt`` and ``completion`` as the server counted them, ``document`` the tokens of
    the chunks that were read. ``stopped_early``: a plan said STOP before the end of the text.
    ``events`` counts those of ``EVENTS`` over all steps. ``turns`` are
    the model calls in order, where they were recorded.
    """

    answer: str
    final_memory: str
    trace: tuple[Step, ...]
    tokens: dict[str, int]
    calls: int
    events: Counter[str] = field(default_factory=Counter)
    stopped_early: bool = False
    turns: tuple[Turn, ...] = ()

    @property
    def chunks(self) -> int:
        return sum(step.kind == "read" for step in self.trace)


def result_of(
    steps: Sequence[Step], *, stopped_early: bool = False, turns: Sequence[Turn] = ()
) -> AgentResult:
    """Sum up the steps of one question, the last of which is its answer."""
    if not steps or steps[-1].kind != "answer":
        raise ValueError("result_of: the last step is no answer")
    return AgentResult(
        answer=steps[-1].text,
        final_memory=steps[-1].memory,
        trace=tuple(steps),
        tokens={
            "prompt": sum(step.prompt_tokens for step in steps),
            "completion": sum(step.completion_tokens for step in steps),
            "document": sum(step.chunk_tokens for step in steps),
        },
        calls=sum(step.calls for step in steps),
        events=Counter(event for step in steps for event in step.events),
        stopped_early=stopped_early,
        turns=tuple(turns),
    )


async def run_agent(
    client: Client,
    tokenizer: Any,
    question: str,
    source: TextSource | str | Sequence[str],
    config: AgentConfig | None = None,
    *,
    instructions: str | None = None,
    sample_index: int = 0,
    steps: Sequence[Step] = (),
    on_step: Callable[[Step], None] | None = None,
    record_turns: bool = False,
) -> AgentResult:
    """Answer one question about one text.

    Args:
        client: any model client.
        tokenizer: fast tokenizer of transformers, or ``CharacterTokenizer()``; cuts the text.
        question: what is asked.
        source: the text: a ``TextSource``, a string, or several documents as strings.
        config: sizes and rules.
        instructions: the answer format; None splits the question as ``config.split`` says.
        sample_index: several samples of one question have indices of their own.
        steps: of an interrupted run: nothing in them is asked again.
        on_step: called with each step when it ends, before the next is asked.
        record_turns: keep the token ids of every call for training. Needs the model's tokenizer
            and a client that returns token ids.

    Raises:
        RequestRefused, ServerUnavailable: from the client; ``steps`` goes on from there.
    """
    if isinstance(source, str):
        source = TextSource.from_text(source)
    elif not isinstance(source, TextSource):
        source = TextSource.from_documents([("", text) for text in source])
    task = AgentTask("", question, source, instructions, sample_index)
    config = config or AgentConfig()
    runner = _Runner(client, tokenizer, config, record_turns)
    return await runner.run(
        task, _stream(source, tokenizer, config), steps, lambda _, step: on_step and on_step(step)
    )


async def run_agents(
    client: Client,
    tokenizer: Any,
    tasks: Iterable[AgentTask],
    config: AgentConfig | None = None,
    *,
    in_flight: int | None = None,
    steps: Mapping[str, Sequence[Step]] | None = None,
    on_step: OnStep | None = None,
    record_turns: bool = False,
) -> AsyncIterator[tuple[str, AgentResult | RequestRefused]]:
    """``(id, result)`` of many questions, as they are answered.

    A question that the server refuses comes back as the ``RequestRefused``; the others go on. A
    server that does not answer at all ends everything: what was answered went to ``on_step``.

    Args:
        tasks: read only as far as ``in_flight`` allows.
        in_flight: questions that are being read at the same time; default twice the client's
            ``max_concurrency``, so that there is always one whose next step can begin.
        steps: of an interrupted run, by task id.
        on_step: called with the task's id and each step when it ends.

    The other arguments are those of ``run_agent``.
    """
    config = config or AgentConfig()
    limit = 2 * client.max_concurrency if in_flight is None else in_flight
    if limit < 1:
        raise ValueError(f"run_agents: in_flight is {in_flight}; it must be at least 1")
    known = steps or {}
    runner = _Runner(client, tokenizer, config, record_turns)
    streams: dict[TextSource, list[Any]] = {}  # source -> [stream, questions that read it]
    pending: dict[asyncio.Task[AgentResult], AgentTask] = {}
    waiting = iter(tasks)
    try:
        while True:
            while len(pending) < limit and (task := next(waiting, None)) is not None:
                done_before = known.get(task.id, ())
                entry = streams.setdefault(
                    task.source, [_stream(task.source, tokenizer, config), 0]
                )
                entry[1] += 1
                started = runner.run(task, entry[0], done_before, on_step or (lambda *_: None))
                pending[asyncio.create_task(started)] = task
            if not pending:
                return
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for finished in sorted(done, key=lambda one: one.exception() is not None):
                task = pending.pop(finished)
                streams[task.source][1] -= 1
                if not streams[task.source][1]:
                    del streams[task.source]
                try:
                    yield task.id, finished.result()
                except RequestRefused as refused:
                    yield task.id, refused
    finally:
        for one in pending:
            one.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _stream(source: TextSource, tokenizer: Any, config: AgentConfig) -> ChunkStream:
    return ChunkStream(source, tokenizer, config.chunk_tokens, snap=config.snap)


class _Runner:
    """Drives one machine after the other; holds what all of them share."""

    def __init__(self, client: Client, tokenizer: Any, config: AgentConfig, record_turns: bool):
        self._client, self._tokenizer, self._config = client, tokenizer, config
        self._record_turns = record_turns
        if record_turns and not hasattr(tokenizer, "chat_template"):
            raise ValueError("run_agent: record_turns needs the model's tokenizer, of transformers")

    async def run(
        self, task: AgentTask, stream: ChunkStream, before: Sequence[Step], on_step: OnStep
    ) -> AgentResult:
        agent = MemoryAgent(
            self._config,
            self._tokenizer,
            task.question,
            instructions=task.instructions,
            sample_index=task.sample_index,
        )
        steps, turns = list(before), []
        stream.know([step.end for step in before if step.kind == "read"])
        for step in before:
            agent.replay(step)
        while agent.phase != "done":
            chunk = None
            if agent.phase == "read":
                chunk = await stream.aget(agent.chunks_read)
                if chunk is None:
                    agent.finish_reading()
            while True:
                request = agent.request(chunk)
                completion = await self._ask(request, agent, task)
                if self._record_turns:
                    turns.append(self._turn(request.messages, completion))
                if (step := agent.receive(completion)) is not None:
                    break
            steps.append(step)
            on_step(task.id, step)
        read = max((step.end for step in steps), default=0)
        return result_of(steps, stopped_early=read < task.source.size, turns=turns)

    async def _ask(self, request: Any, agent: MemoryAgent, task: AgentTask) -> Completion:
        try:
            return await self._client.agenerate(request)
        except RequestRefused as refused:
            where = {"read": f"chunk {agent.chunks_read + 1}", "split": "the split of the question"}
            named = f"{task.id}: " if task.id else ""
            needed = self._config.context_tokens(
                count_tokens(self._tokenizer, agent.problem + agent.instructions)
            )
            raise RequestRefused(
                f"{named}{where.get(agent.phase, 'the answer')} was refused ({refused}); a step "
                f"may need a context of {needed} tokens, with less for smaller chunk_tokens, "
                "memory_tokens or plan_tokens",
                status=refused.status,
            ) from refused

    def _turn(self, messages: Sequence[Mapping[str, Any]], completion: Completion) -> Turn:
        if completion.token_ids is None:
            raise ValueError(
                "run_agent: record_turns needs the token ids of replies, which this server does "
                "not return; with vLLM set extra_body={'return_token_ids': True}"
            )
        return Turn(
            prompt_ids=chat_ids(self._tokenizer, messages, self._config),
            response_ids=list(completion.token_ids),
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
            finish_reason=completion.finish_reason,
        )


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], config: AgentConfig
) -> list[int]:
    """Token ids of a prompt as a server's chat template makes them; the bare text without one.

    ``config.extra_body["chat_template_kwargs"]`` reaches the template, as in a request.
    """
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(m["content"] for m in messages) + "\n")["input_ids"]
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=False,
        **config.extra_body.get("chat_template_kwargs", {}),
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]
