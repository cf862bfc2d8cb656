"""One question read through a long text, as a state machine: no model, no clock, no files inside.

    phase "split"    the query in, problem and instructions out (only with split="model")
    phase "read"     (memory, plan) and a chunk in, (memory, plan) out; K times
    phase "answer"   memory, problem and instructions in, answer out
    phase "done"

The caller sends ``request(chunk)`` to a model and hands what it says to ``receive``. A reply that
cannot be used is asked for again, ``repairs`` times; then the step ends with what was known before
it. Everything out of the ordinary is an event of the step, named in ``EVENTS``.

arXiv 2512.12967, section 2.3 and appendix D. The paper leaves open what a first memory, a malformed
reply, a memory beyond its limit and an end of reading before the end of the text do: the rules here
are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qwenlong import prompts
from qwenlong.llm import Completion, Request, Sampling
from qwenlong.memory_agent.query import parse_split, split_by_rule
from qwenlong.memory_agent.quotes import keep_best, quotes_of
from qwenlong.memory_agent.replies import (
    as_memory,
    parse_update,
    says_stop,
    without_state_tags,
    without_thinking,
)
from qwenlong.memory_agent.text import Chunk, count_tokens, cut_at

Phase = Literal["split", "read", "answer", "done"]

EVENTS = {
    "thinking": "the reply began with thinking, which was cut away",
    "only_thinking": "the thinking never ended; asked again",
    "no_memory": "the reply has no <memory>; asked again",
    "empty_memory": "an empty memory in place of one with content; asked again",
    "kept_memory": "no usable reply: the step ended with the memory before it",
    "took_reply": "no usable reply: the whole text became the memory (fallback='take')",
    "unclosed_memory": "the memory has no end tag; taken as far as it goes",
    "cut_off": "the reply reached its limit of tokens",
    "long_memory": "the memory was longer than memory_tokens; asked again, then cut at a sentence",
    "long_plan": "the plan was longer than plan_tokens; cut at a sentence",
    "tags_in_memory": "the memory quoted tags of the prompt, which were removed",
    "tags_in_section": "the text holds tags of the prompt's state, shown with other brackets",
    "no_plan": "the reply has no plan; the next step begins without one",
    "stop": "the plan says STOP; with early_stop and a memory, reading ended",
    "no_quote": "nothing of the reply stands in the section (reading='quotes')",
    "dropped_quotes": "the quotes were longer than memory_tokens; the least fitting were dropped",
    "no_split": "the model gave no problem; the query was split by rule",
    "no_answer": "the last reply is empty after its thinking; asked again",
}
_TAG_TOKENS = 64  # of a reply, beside memory and plan
_TEMPLATE_TOKENS = 700  # of the prompt of a step without its fields: an upper bound, tested
_WORDS_PER_TOKEN = 0.7  # of English, for a model that is told its limit
_SAMPLES_APART = 1_000  # sample indices of one sample; repairs take the next


@dataclass(frozen=True)
class AgentConfig:
    """How a text is read. Sizes are tokens; the defaults of the first two are the paper's."""

    chunk_tokens: int = 32_768
    memory_tokens: int = 15_360
    plan_tokens: int = 1_024
    answer_tokens: int = 4_096
    thinking_tokens: int = 0  # room for thinking, added to the limit of every reply
    # "rewrite": the paper's. "quotes": the memory is the sentences that a reply repeats of its
    # section, each section is read on its own and there is no plan; for small models
    reading: Literal["rewrite", "quotes"] = "rewrite"
    quote_tokens: int = 256  # of a reply with reading="quotes"
    snap: float = 0.125  # share of a chunk that may be given up to end at a sentence
    order: Literal["paper", "chunk_first"] = "paper"
    split: Literal["rule", "model", "none"] = "rule"  # where no instructions are given
    repairs: int = 1  # times that an unusable reply is asked for again
    fallback: Literal["keep", "take"] = "keep"
    early_stop: bool = False
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Sampling(temperature=self.temperature, top_p=self.top_p)  # raises for what it refuses
        for name, least in (
            ("chunk_tokens", 16),
            ("memory_tokens", 1),
            ("plan_tokens", 1),
            ("answer_tokens", 1),
            ("quote_tokens", 1),
            ("thinking_tokens", 0),
            ("repairs", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"AgentConfig: {name} is {getattr(self, name)}; it must be at least {least}"
                )
        if self.repairs >= _SAMPLES_APART:
            raise ValueError(f"AgentConfig: repairs is {self.repairs}; below {_SAMPLES_APART}")
        if not 0 <= self.snap <= 0.5:
            raise ValueError(f"AgentConfig: snap is {self.snap}; it must be in [0, 0.5]")
        for name, choices in (
            ("reading", ("rewrite", "quotes")),
            ("order", ("paper", "chunk_first")),
            ("split", ("rule", "model", "none")),
            ("fallback", ("keep", "take")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"AgentConfig: {name} is {getattr(self, name)!r}; choose one of {choices}"
                )

    @property
    def update_tokens(self) -> int:
        """The limit of a reading step's reply."""
        if self.reading == "quotes":
            return self.quote_tokens + self.thinking_tokens
        return self.memory_tokens + self.plan_tokens + _TAG_TOKENS + self.thinking_tokens

    def context_tokens(self, question_tokens: int) -> int:
        """What a model must be able to read and write in one step, at most."""
        if self.reading == "quotes":
            answer = self.memory_tokens + self.answer_tokens + self.thinking_tokens
            step = max(self.chunk_tokens + self.update_tokens, answer)
            return question_tokens + step + _TEMPLATE_TOKENS
        before = question_tokens + self.memory_tokens + self.plan_tokens + self.chunk_tokens
        return before + self.update_tokens + _TEMPLATE_TOKENS

    def calls(self, chunks: int, *, is_split: bool = True) -> int:
        """Model calls for a text of ``chunks`` chunks, when every reply is usable.

        ``is_split`` is False where the instructions come with the question.
        """
        return chunks + 1 + (self.split == "model" and is_split)


@dataclass(frozen=True)
class Step:
    """What one phase ended with: a row of the trace."""

    kind: Literal["split", "read", "answer"]
    index: int  # of the chunk; -1 for split and answer
    start: int = 0  # bytes of the chunk in the text
    end: int = 0
    chunk_tokens: int = 0
    memory: str = ""
    plan: str = ""
    memory_tokens: int = 0
    text: str = ""  # the answer; of a split, the problem
    instructions: str = ""  # of a split
    events: tuple[str, ...] = ()
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "events": list(self.events)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Step:
        return cls(**{**row, "events": tuple(row["events"])})


class MemoryAgent:
    """One question on its way through a text.

    Args:
        config: sizes and rules.
        tokenizer: of ``token_ends``; counts and cuts memories and plans.
        question: with its rules about form, unless ``instructions`` are given.
        instructions: answer format; None splits the question as ``config.split`` says.
        sample_index: tells samples of one question apart, for seeds and for a cache.

    ``phase``, ``chunks_read``, ``memory``, ``plan``, ``problem``, ``instructions`` and ``answer``
    may be read at any time.
    """

    def __init__(
        self,
        config: AgentConfig,
        tokenizer: Any,
        question: str,
        *,
        instructions: str | None = None,
        sample_index: int = 0,
    ):
        if not question.strip():
            raise ValueError("MemoryAgent: the question is empty")
        self.config = config
        self._tokenizer = tokenizer
        self._query = question
        self._sample_index = sample_index
        self.phase: Phase = "read"
        self.problem, self.instructions = question.strip(), instructions or ""
        if instructions is None and config.split == "rule":
            self.problem, self.instructions = split_by_rule(question)
        elif instructions is None and config.split == "model":
            self.phase = "split"
        self.chunks_read = 0
        self.memory = self.plan = self.answer = ""
        self._chunk: Chunk | None = None
        self._begin()

    def _begin(self) -> None:
        self._attempt = self._prompt_tokens = self._completion_tokens = 0
        self._events: list[str] = []
        self._was_long = False  # the last reply's memory
        self._long: tuple[str, str] | None = None  # memory as cut, and plan, of such a reply

    # --- asking --------------------------------------------------------------

    def messages(self, chunk: Chunk | None = None) -> list[prompts.Message]:
        """The prompt of this phase; ``chunk`` is the next one in phase ``"read"``, else None."""
        if self.phase == "done" or (self.phase == "read") != (chunk is not None):
            raise ValueError(
                f"MemoryAgent: phase {self.phase!r} and chunk {chunk and chunk.index}; a chunk is "
                "read in phase 'read' alone"
            )
        if chunk is not None and chunk.index != self.chunks_read:
            raise ValueError(
                f"MemoryAgent: chunk {chunk.index} does not follow {self.chunks_read} chunks"
            )
        self._chunk = chunk
        if self.phase == "split":
            asked = prompts.agent_decompose(self._query)
        elif self.phase == "read":
            section = without_state_tags(chunk.text)
            if section != chunk.text and "tags_in_section" not in self._events:
                self._events.append("tags_in_section")
            if self.config.reading == "quotes":
                asked = prompts.agent_quote(self.problem, section)
            else:
                asked = prompts.agent_update(
                    self.problem, self.memory, self.plan, section, order=self.config.order
                )
        else:
            asked = prompts.agent_final(self.problem, self.instructions, self.memory)
        if not self._attempt:
            return asked
        if self._was_long:
            words = max(1, int(_WORDS_PER_TOKEN * self.config.memory_tokens))
            return prompts.agent_again(asked, "long", words=str(words))
        return prompts.agent_again(asked, self.phase)

    @property
    def max_tokens(self) -> int:
        """The limit of the next reply."""
        if self.phase == "read":
            return self.config.update_tokens
        if self.phase == "answer":
            return self.config.answer_tokens + self.config.thinking_tokens
        return count_tokens(self._tokenizer, self._query) * 2 + 256 + self.config.thinking_tokens

    def request(self, chunk: Chunk | None = None) -> Request:
        """``messages`` with the sampling of the config."""
        config = self.config
        return Request(
            messages=tuple(self.messages(chunk)),
            sampling=Sampling(
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=self.max_tokens,
                seed=config.seed,
                extra_body=config.extra_body,
            ),
            sample_index=self._sample_index * _SAMPLES_APART + self._attempt,
        )

    # --- hearing -------------------------------------------------------------

    def receive(self, completion: Completion) -> Step | None:
        """Take a reply. None: it cannot be used, ask ``request`` again; else the step is over."""
        self._prompt_tokens += completion.prompt_tokens
        self._completion_tokens += completion.completion_tokens
        if completion.reasoning:
            self._events.append("thinking")
        if completion.finish_reason == "length":
            self._events.append("cut_off")
        read = self._hear_quotes if self.config.reading == "quotes" else self._hear_update
        hear = {"split": self._hear_split, "read": read, "answer": self._hear_answer}
        step = hear[self.phase](completion.text)
        if step is None:
            self._attempt += 1
            return None
        self.replay(step)
        return step

    def finish_reading(self) -> None:
        """The text is at its end."""
        if self.phase != "read":
            raise ValueError(f"MemoryAgent: phase is {self.phase!r}; reading ends in phase 'read'")
        self.phase = "answer"

    def replay(self, step: Step) -> None:
        """Go where ``step`` led, which was answered before."""
        if step.kind != self.phase and not (step.kind == "answer" and self.phase == "read"):
            raise ValueError(f"MemoryAgent: a step {step.kind!r} in phase {self.phase!r}")
        if step.kind == "split":
            self.problem, self.instructions, self.phase = step.text, step.instructions, "read"
        elif step.kind == "read":
            self.memory, self.plan, self.chunks_read = step.memory, step.plan, step.index + 1
            # An empty memory answers nothing: reading goes on.
            if self.config.early_stop and "stop" in step.events and step.memory:
                self.phase = "answer"
        else:
            self.answer, self.phase = step.text, "done"
        self._begin()

    def _step(self, **fields: Any) -> Step:
        return Step(
            kind=self.phase,
            events=tuple(self._events),
            calls=self._attempt + 1,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            **fields,
        )

    @property
    def _may_repeat(self) -> bool:
        return self._attempt < self.config.repairs

    def _note_thinking(self, text: str) -> None:
        visible = without_thinking(text)
        self._events += ["thinking"] * visible.thought + ["only_thinking"] * visible.is_open

    def _hear_split(self, text: str) -> Step | None:
        self._note_thinking(text)
        query = parse_split(text)
        if query is None:
            self._events.append("no_split")
            if self._may_repeat:
                return None
            query = split_by_rule(self._query)
        return self._step(index=-1, text=query.problem, instructions=query.instructions)

    def _hear_update(self, text: str) -> Step | None:
        update, before = parse_update(text), len(self._events)
        self._events += update.events
        memory, plan = update.memory, update.plan
        if memory == "" and self.memory:
            self._events.append("empty_memory")
            memory = None
        if memory is None:
            if self._may_repeat:
                self._was_long = False
                return None
            memory, plan = self._long or (self.memory, plan or self.plan)
            # An empty <memory></memory> is no text to take.
            is_text = "no_memory" in update.events and bool(as_memory(update.visible))
            if self.config.fallback == "take" and self._long is None and is_text:
                memory = as_memory(update.visible)
                self._events.append("took_reply")
            if "took_reply" not in self._events and self._long is None:
                self._events.append("kept_memory")
        self._was_long = False
        memory, memory_tokens = self._cut("long_memory", memory, self.config.memory_tokens)
        if "long_memory" in self._events[before:] and self._may_repeat:
            # Cutting loses what was learnt last, so the model is asked to choose first.
            self._was_long, self._long = True, (memory, plan)
            return None
        plan, _ = self._cut("long_plan", plan, self.config.plan_tokens)
        if says_stop(plan) and "kept_memory" not in self._events:
            self._events.append("stop")
        return self._read_step(memory, plan, memory_tokens)

    def _hear_quotes(self, text: str) -> Step:
        self._note_thinking(text)
        known = self.memory.splitlines()
        section = without_state_tags(self._chunk.text)
        new = quotes_of(without_thinking(text).text, section)
        if not new:
            self._events.append("no_quote")

        def fits(quotes: list[str]) -> bool:
            return self._tokens("\n".join(quotes)) <= self.config.memory_tokens

        quotes = [*known, *(quote for quote in new if quote not in known)]
        kept = keep_best(quotes, self.problem, fits)
        if len(kept) < len(quotes):
            self._events.append("dropped_quotes")
        memory = "\n".join(kept)
        return self._read_step(memory, "", self._tokens(memory))

    def _tokens(self, text: str) -> int:
        return count_tokens(self._tokenizer, text) if text else 0

    def _read_step(self, memory: str, plan: str, memory_tokens: int) -> Step:
        chunk = self._chunk
        return self._step(
            index=chunk.index,
            start=chunk.start,
            end=chunk.end,
            chunk_tokens=chunk.tokens,
            memory=memory,
            plan=plan,
            memory_tokens=memory_tokens,
        )

    def _hear_answer(self, text: str) -> Step | None:
        self._note_thinking(text)
        answer = without_thinking(text).text
        if not answer:
            self._events.append("no_answer")
            if self._may_repeat:
                return None
        return self._step(index=-1, memory=self.memory, text=answer)

    def _cut(self, event: str, text: str, max_tokens: int) -> tuple[str, int]:
        """``text`` of at most ``max_tokens``, from its beginning, and its tokens."""
        if not text:
            return "", 0
        end, tokens = cut_at(self._tokenizer, text, max_tokens, max_tokens // 8)
        if end < len(text):
            self._events.append(event)
            text = text[:end].rstrip()
            tokens = count_tokens(self._tokenizer, text)
        return text, tokens
