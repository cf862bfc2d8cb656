"""Client of any OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers, hosted ones."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from qwenlong.llm.base import Client
from qwenlong.llm.records import Completion, Request, RequestRefused, TransientError

_RETRY_STATUS = frozenset({408, 409, 425, 429})  # and every 5xx


class ChatClient(Client):
    """Chat and completions over HTTP, through the ``openai`` package.

    Repeated, as ``retry`` says: connection refused or lost, time-outs, 408, 409, 425, 429, 5xx, a
    body or stream that ends early, a body that is not JSON or holds no answer. Everything else the
    server says is ``RequestRefused``.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``.
        model: the name that the server gives the model.
        api_key: default ``OPENAI_API_KEY`` of the environment, or none. Never stored or printed.
        timeout: seconds without a byte from the server: without ``stream``, the whole answer.
        deadline: seconds for one attempt as a whole; None sets no limit.
        stream: read tokens as they come, so that ``timeout`` notices a stall in a long answer.
        **options: of ``Client``.
    """

    _has_n = True

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        deadline: float | None = None,
        stream: bool = False,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        import openai  # here, so that the other clients need no such package

        self.base_url = base_url
        self._openai = openai
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._timeout = openai.Timeout(timeout, connect=connect_timeout)
        self._deadline = deadline
        self._stream = stream
        self._http: Any = None

    async def _attempt(self, request: Request, n: int) -> list[Completion]:
        openai = self._openai
        if self._http is None:
            self._http = openai.AsyncOpenAI(
                api_key=self._api_key,
                base_url=self.base_url,
                timeout=self._timeout,
                max_retries=0,  # retries are Client's, where they are counted
            )
        try:
            reply = await asyncio.wait_for(self._post(request, n), self._deadline)
        except openai.APITimeoutError as error:
            raise TransientError("timeout", f"no byte within {self._timeout.read} s") from error
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise TransientError("timeout", f"not done within {self._deadline} s") from error
        except openai.APIStatusError as error:
            raise _status_error(error) from error
        except UnicodeEncodeError as error:
            raise RequestRefused(
                "the request holds half a surrogate pair, which no server can be sent; replace it "
                "with text.encode('utf-8', 'replace').decode()"
            ) from error
        except openai.APIConnectionError as error:
            raise TransientError("connection", _cause(error)) from error
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TransientError("malformed reply", str(error)[:200]) from error
        except Exception as error:
            # The HTTP library's own errors (a body cut off, a stalled stream) reach us unwrapped.
            if not type(error).__module__.startswith(("httpx", "httpcore", "h11", "anyio", "ssl")):
                raise
            is_timeout = "Timeout" in type(error).__name__
            kind = "timeout" if is_timeout else "connection"
            raise TransientError(kind, _cause(error)) from error
        try:
            return _completions(reply, n)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a field of no use
            raise TransientError("malformed reply", f"{error} in {str(reply)[:100]!r}") from error

    async def _post(self, request: Request, n: int) -> Any:
        """The reply as a dict; whatever else the server sent, as it is."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if n > 1:
            body["n"] = n
        if sampling.max_tokens is not None:
            body["max_tokens"] = sampling.max_tokens
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed + request.sample_index
        if request.messages is not None:
            create = self._http.chat.completions.create
            body["messages"] = [dict(m) for m in request.messages]
            if sampling.logprobs:
                body["logprobs"] = True
        else:
            create = self._http.completions.create
            is_text = isinstance(request.prompt, str)
            body["prompt"] = request.prompt if is_text else list(request.prompt)
            if sampling.logprobs:
                body["logprobs"] = 0
        if sampling.extra_body:
            body["extra_body"] = dict(sampling.extra_body)
        if not self._stream:
            return _as_dict(await create(**body))
        stream = await create(**body, stream=True, stream_options={"include_usage": True})
        try:
            return await _joined(stream)
        finally:
            await stream.close()

    async def _shut(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None


def _as_dict(reply: Any) -> Any:
    # A body of another content type comes back as a string.
    return reply.model_dump(warnings=False) if hasattr(reply, "model_dump") else reply


async def _joined(stream: Any) -> dict[str, Any]:
    """The chunks of a stream put together to the reply that would have come in one piece."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    async for chunk in stream:
        chunk = _as_dict(chunk)
        try:
            usage = chunk.get("usage") or usage
            for part in chunk.get("choices") or ():
                _join(choices, part)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a field of no use
            raise TransientError(
                "malformed reply", f"a stream chunk is {str(chunk)[:100]!r}"
            ) from error
    joined = [
        {
            "text": whole["text"],
            "reasoning": whole["reasoning"] or None,
            "finish_reason": whole["finish_reason"],
            "logprobs": {"token_logprobs": whole["logprobs"]} if whole["logprobs"] else None,
            "token_ids": whole["ids"] or None,
        }
        for _, whole in sorted(choices.items())
    ]
    return {"choices": joined, "usage": usage}


def _join(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> None:
    whole = choices.setdefault(
        part.get("index") or 0,
        {"text": "", "reasoning": "", "finish_reason": None, "logprobs": [], "ids": []},
    )
    delta = part.get("delta") or {}
    whole["text"] += delta.get("content") or part.get("text") or ""
    whole["reasoning"] += delta.get("reasoning_content") or delta.get("reasoning") or ""
    whole["finish_reason"] = part.get("finish_reason") or whole["finish_reason"]
    whole["logprobs"] += _logprobs(part) or ()
    whole["ids"] += part.get("token_ids") or ()


def _completions(reply: Any, n: int) -> list[Completion]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
        raise TransientError("malformed reply", f"no choices in {str(reply)[:100]!r}")
    if len(choices) != n:
        # Asking again does not help: transformers' server, for one, ignores n.
        if 0 < len(choices) < n:
            raise RequestRefused(
                f"asked for n = {n} completions and got {len(choices)}: this server ignores n; set "
                "a seed, which sends every sample on its own"
            )
        raise TransientError("malformed reply", f"{len(choices)} choices for n = {n}")
    usage = reply.get("usage") or {}
    prompt_tokens = int(usage.get("prompt_tokens") or 0)
    per_choice, extra = divmod(int(usage.get("completion_tokens") or 0), n)
    completions = []
    for i, choice in enumerate(choices):
        message = choice.get("message") or {}
        text = message.get("content") if "message" in choice else choice.get("text")
        reasoning = (
            choice.get("reasoning") or message.get("reasoning_content") or message.get("reasoning")
        )
        finish = choice.get("finish_reason")
        if not isinstance(text, str | None) or finish in (None, "abort"):
            raise TransientError("cut off", f"choice {i} ended with finish_reason {finish!r}")
        logprobs, ids = _logprobs(choice), choice.get("token_ids")
        known = ids or logprobs
        completions.append(
            Completion(
                text=text or "",
                finish_reason=str(finish),
                prompt_tokens=prompt_tokens,
                completion_tokens=len(known) if known else per_choice + (i < extra),
                reasoning=reasoning,
                logprobs=tuple(logprobs) if logprobs is not None else None,
                token_ids=tuple(ids) if ids is not None else None,
            )
        )
    return completions


def _logprobs(choice: Mapping[str, Any]) -> list[float] | None:
    """Of the sampled tokens, from the chat form or the completions form."""
    found = choice.get("logprobs")
    if not found:
        return None
    if found.get("content") is not None:
        return [float(token["logprob"]) for token in found["content"]]
    listed = found.get("token_logprobs")
    return None if listed is None else [float(value) for value in listed]


def _status_error(error: Any) -> TransientError | RequestRefused:
    status = error.status_code
    detail = " ".join(str(error.message).split())[:300]
    # An exhausted quota is answered with 429 too, and waiting does not refill it.
    is_quota = status == 429 and error.code == "insufficient_quota"
    if not is_quota and (status >= 500 or status in _RETRY_STATUS):
        return TransientError(
            f"HTTP {status}", detail, retry_after=_retry_after(error.response.headers)
        )
    return RequestRefused(f"HTTP {status}: {detail}", status=status)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from ``Retry-After`` as a number or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _cause(error: BaseException) -> str:
    """The innermost reason: "Connection error." alone helps nobody."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
