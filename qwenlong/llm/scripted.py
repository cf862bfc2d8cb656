"""A model that is a Python function: for tests and for demonstrations without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qwenlong.llm.base import Client
from qwenlong.llm.records import Completion, Message, Request

Reply = Callable[[list[Message]], "str | Completion"]


class ScriptedClient(Client):
    """Answers with ``reply(messages)``; a prompt comes as one user message.

    Retries, limits, cache and accounting are those of every client.

    Args:
        reply: text, or a whole ``Completion``. An exception that it raises is the attempt's: raise
            ``TransientError`` to be asked again. To look at sampling or ``sample_index``, override
            ``answer`` instead.
        faults: one entry an attempt, in order: an exception to raise, or None to answer. After the
            last, every attempt is answered.
        count_tokens: tokens of a text; default the number of words.
        **options: of ``Client``; ``model`` defaults to ``"scripted"``.

    ``calls`` holds the request of every attempt that was answered.
    """

    def __init__(
        self,
        reply: Reply | None = None,
        *,
        faults: Iterable[Exception | None] = (),
        count_tokens: Callable[[str], int] = lambda text: len(text.split()),
        model: str = "scripted",
        **options: Any,
    ):
        super().__init__(model=model, **options)
        self._reply = reply
        self._faults = iter(faults)
        self._count_tokens = count_tokens
        self.calls: list[Request] = []

    def answer(self, request: Request) -> str | Completion:
        """What the model says to one request."""
        messages = request.messages
        if messages is None:
            messages = ({"role": "user", "content": request.prompt},)
        return self._reply([dict(message) for message in messages])

    async def _attempt(self, request: Request, n: int) -> list[Completion]:
        fault = next(self._faults, None)
        if fault is not None:
            raise fault
        self.calls.append(request)
        said = self.answer(request)
        if isinstance(said, Completion):
            return [said]
        shown = request.messages or ({"content": request.prompt},)
        return [
            Completion(
                text=said,
                finish_reason="stop",
                prompt_tokens=sum(self._count_tokens(str(m["content"])) for m in shown),
                completion_tokens=self._count_tokens(said),
            )
        ]
