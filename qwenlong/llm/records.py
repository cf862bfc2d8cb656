"""What is asked, what comes back, and what can go wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Sampling:
    """How a model writes. ``extra_body`` goes to the server as it is (vLLM's ``top_k``, ...)."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None  # of the answer; None leaves the limit to the server
    stop: tuple[str, ...] = ()
    seed: int | None = None  # sample i of a request is drawn with seed + i
    logprobs: bool = False  # nats, of the sampled tokens
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"Sampling: temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p is {self.top_p}; it must be in (0, 1]")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"Sampling: max_tokens is {self.max_tokens}; it must be at least 1")
        if isinstance(self.stop, str):
            raise ValueError(f"Sampling: stop is the string {self.stop!r}; pass a tuple of strings")


@dataclass(frozen=True)
class Request:
    """One call: chat ``messages``, or a raw ``prompt`` (a string or token ids).

    ``sample_index`` tells samples of one request apart: the same request with the same index is the
    same call, and a cache answers it once.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Sampling = Sampling()
    sample_index: int = 0

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("Request needs exactly one of 'messages' and 'prompt'")

    @classmethod
    def chat(
        cls, messages: Sequence[Message], *, sample_index: int = 0, **sampling: Any
    ) -> Request:
        """``Request.chat(messages, temperature=0.7, max_tokens=100)``."""
        return cls(
            messages=tuple(messages), sampling=Sampling(**sampling), sample_index=sample_index
        )

    @classmethod
    def completion(
        cls, prompt: str | Sequence[int], *, sample_index: int = 0, **sampling: Any
    ) -> Request:
        """``Request.completion("Once upon", max_tokens=10)``; token ids are taken too."""
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        return cls(prompt=prompt, sampling=Sampling(**sampling), sample_index=sample_index)

    def key(self, model: str, namespace: str = "") -> str:
        """sha256 of the canonical JSON of the call; equal keys are the same call."""
        content = {"model": model, "namespace": namespace, **asdict(self)}
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Completion:
    """One answer. ``text`` and ``reasoning`` are valid UTF-8: half a surrogate pair, which a JSON
    reply can hold and no file or later request can, shows as a question mark.
    """

    text: str
    finish_reason: str  # "stop", "length", or what the server says
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str | None = None  # thinking text that the server split off
    logprobs: tuple[float, ...] | None = None  # nats, one per token of the answer
    token_ids: tuple[int, ...] | None = None  # where the server returns them
    cached: bool = False

    def __post_init__(self) -> None:
        for name in ("text", "reasoning"):
            text = getattr(self, name)
            if text is not None and not text.isascii():
                object.__setattr__(self, name, text.encode("utf-8", "replace").decode())

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        del row["cached"]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Completion:
        row = dict(row)
        for name in ("logprobs", "token_ids"):
            if row.get(name) is not None:
                row[name] = tuple(row[name])
        return cls(**row, cached=True)


class LLMError(RuntimeError):
    """Any failure of a model call."""


class TransientError(LLMError):
    """One attempt failed in a way that the next may not. ``kind`` is counted."""

    def __init__(self, kind: str, detail: str = "", *, retry_after: float | None = None):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.retry_after = retry_after  # seconds, asked for by the server


class RequestRefused(LLMError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


class ServerUnavailable(LLMError):
    """No answer within the retry budget."""
