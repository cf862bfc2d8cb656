"""What every model client shares: cache, retries, limits, accounting, many calls at once.

All work of a client runs on one event loop in a thread of its own, so that the same client serves
synchronous code, any event loop, and several threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwenlong.llm.cache import CallCache
from qwenlong.llm.limits import RateLimiter, RetryPolicy, WallTime
from qwenlong.llm.records import (
    Completion,
    Request,
    RequestRefused,
    ServerUnavailable,
    TransientError,
)

OnError = Literal["raise", "yield"]


@dataclass
class Totals:
    """What a client has done. Tokens are those the server reported; cached answers cost none."""

    answers: int = 0  # completions that a server gave
    cached: int = 0  # completions that the cache gave
    attempts: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # failed attempts by kind
    prompt_tokens: int = 0
    completion_tokens: int = 0
    saved_prompt_tokens: int = 0  # of cached answers
    saved_completion_tokens: int = 0


class Client:
    """Base of the clients. A subclass answers ``_attempt``.

    Args:
        model: name that the server knows, and part of every cache key.
        cache: a ``CallCache`` or its directory; None asks every time.
        namespace: further part of the cache key. Change it when ``model`` means other weights.
        retry: how failed attempts are repeated.
        max_concurrency: attempts that run at the same time.
        requests_per_minute, tokens_per_minute: limits of the server; None is no limit. Tokens are
            estimated before a call (a quarter of the characters, plus ``max_tokens``) and corrected
            after it.
        prices: USD for a million prompt tokens and a million completion tokens, for ``report``.
        time: ``VirtualTime()`` makes every wait immediate, for tests.
    """

    _has_n = False  # whether one attempt can give several completions

    def __init__(
        self,
        *,
        model: str,
        cache: CallCache | str | Path | None = None,
        namespace: str = "",
        retry: RetryPolicy | None = None,
        max_concurrency: int = 16,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        prices: tuple[float, float] | None = None,
        time: WallTime | None = None,
    ):
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}; it must be at least 1")
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        for name, limit in limits.items():
            if limit is not None and not limit >= 1:
                raise ValueError(f"{name} is {limit}; it must be at least 1, or None for no limit")
        self.model, self.namespace = model, namespace
        self.cache = CallCache(cache) if isinstance(cache, (str, Path)) else cache
        self.retry = retry or RetryPolicy()
        self.max_concurrency = max_concurrency
        self.prices = prices
        self.totals = Totals()
        self._limits = (requests_per_minute, tokens_per_minute)
        self._time = time or WallTime()
        self._jitter = random.Random()
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()

    # --- asking --------------------------------------------------------------

    def generate(self, request: Request) -> Completion:
        """One completion. Raises ``RequestRefused`` or ``ServerUnavailable``."""
        return self._submit(self._one(request)).result()

    async def agenerate(self, request: Request) -> Completion:
        """``generate`` for asynchronous code, from any event loop."""
        return await asyncio.wrap_future(self._submit(self._one(request)))

    def sample(self, request: Request, n: int) -> list[Completion]:
        """``n`` completions, with sample indices ``request.sample_index`` and on."""
        return self._submit(self._samples(request, n)).result()

    async def generate_many(
        self,
        requests: Iterable[Request],
        *,
        in_flight: int | None = None,
        on_error: OnError = "raise",
    ) -> AsyncIterator[tuple[int, Completion | RequestRefused]]:
        """``(index, completion)`` as they are answered, without waiting for slower ones.

        ``requests`` is read only as far as ``in_flight`` (default ``2 * max_concurrency``) allows.
        A refused request raises, or with ``on_error="yield"`` comes back in place of a completion.
        An unavailable server always raises; calls that still run are cancelled then.
        """
        pending: dict[asyncio.Future, int] = {}
        numbered = enumerate(requests)
        limit = in_flight or 2 * self.max_concurrency
        try:
            while True:
                while len(pending) < limit and (item := next(numbered, None)) is not None:
                    pending[asyncio.wrap_future(self._submit(self._one(item[1])))] = item[0]
                if not pending:
                    return
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in _errors_last(done, pending):
                    yield pending.pop(future), _outcome(future, on_error)
        finally:
            for future in pending:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # marks it as seen: the first error is the one to raise

    def iter_many(
        self,
        requests: Iterable[Request],
        *,
        in_flight: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[tuple[int, Completion | RequestRefused]]:
        """``generate_many`` for synchronous code."""
        pending: dict[concurrent.futures.Future, int] = {}
        numbered = enumerate(requests)
        limit = in_flight or 2 * self.max_concurrency
        try:
            while True:
                while len(pending) < limit and (item := next(numbered, None)) is not None:
                    pending[self._submit(self._one(item[1]))] = item[0]
                if not pending:
                    return
                done, _ = concurrent.futures.wait(
                    pending, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in _errors_last(done, pending):
                    yield pending.pop(future), _outcome(future, on_error)
        finally:
            for future in pending:
                future.cancel()

    # --- one call ------------------------------------------------------------

    async def _attempt(self, request: Request, n: int) -> list[Completion]:
        """``n`` completions. Raises ``TransientError`` or ``RequestRefused``."""
        raise TypeError(f"{type(self).__name__} does not define _attempt")

    async def _one(self, request: Request) -> Completion:
        return (await self._samples(request, 1))[0]

    async def _samples(self, request: Request, n: int) -> list[Completion]:
        if n < 1:
            raise ValueError(f"sample: n is {n}; it must be at least 1")
        requests = [replace(request, sample_index=request.sample_index + i) for i in range(n)]
        # One attempt gives all, unless every sample has a seed of its own. vLLM refuses n > 1
        # without a temperature.
        sampling = request.sampling
        is_joint = self._has_n and sampling.seed is None and sampling.temperature > 0
        if self.cache is None:
            if is_joint:
                return await self._with_retries(request, n)
            parts = await _all_finished(self._with_retries(r, 1) for r in requests)
            return [part[0] for part in parts]
        keys = [r.key(self.model, self.namespace) for r in requests]
        answers: dict[str, Completion] = {}
        while len(answers) < n:
            mine: dict[str, Request] = {}
            others: list[asyncio.Future[None]] = []
            for key, one in zip(keys, requests, strict=True):
                if key in answers:
                    continue
                row = self.cache.get(key)
                if row is not None:
                    answers[key] = Completion.from_json(row)
                    self.totals.cached += 1
                    self.totals.saved_prompt_tokens += answers[key].prompt_tokens
                    self.totals.saved_completion_tokens += answers[key].completion_tokens
                elif key in self._in_flight:
                    others.append(self._in_flight[key])
                else:
                    # Claimed before the first await: whoever comes next waits for this one.
                    mine[key] = one
                    self._in_flight[key] = asyncio.get_running_loop().create_future()
            batches = [mine] if mine and is_joint else [{k: r} for k, r in mine.items()]
            try:
                for part in await _all_finished(self._ask_and_keep(b) for b in batches):
                    answers.update(part)
            finally:
                for key in mine:  # failed or cancelled: those who waited ask for themselves
                    self._release(key)
            for future in others:
                await asyncio.shield(future)
        return [answers[key] for key in keys]

    async def _ask_and_keep(self, batch: dict[str, Request]) -> dict[str, Completion]:
        completions = await self._with_retries(next(iter(batch.values())), len(batch))
        answers = dict(zip(batch, completions, strict=True))
        for key, completion in answers.items():
            self.cache.put(key, completion.to_json())
            self._release(key)
        return answers

    def _release(self, key: str) -> None:
        future = self._in_flight.pop(key, None)
        if future is not None:
            future.set_result(None)

    async def _with_retries(self, request: Request, n: int) -> list[Completion]:
        started = self._time.now()
        estimate = _estimated_tokens(request, n)
        for attempt in range(self.retry.max_retries + 1):
            async with self._slots:
                await self._limiter.acquire(estimate)
                self.totals.attempts += 1
                try:
                    completions = await self._attempt(request, n)
                except TransientError as error:
                    failure = error
                else:
                    used = self._count(completions)
                    self._limiter.correct(estimate, used)
                    return completions
            self.totals.failures[failure.kind] += 1
            if failure.retry_after:
                self._limiter.pause(min(failure.retry_after, self.retry.max_retry_after))
            if attempt < self.retry.max_retries:
                await self._time.sleep(self.retry.delay(attempt, failure.retry_after, self._jitter))
        kept = f"; {len(self.cache)} answers are in {self.cache.directory}" if self.cache else ""
        raise ServerUnavailable(
            f"{self.model}: no answer after {self.retry.max_retries + 1} attempts over "
            f"{self._time.now() - started:.0f} s, the last one failed with {failure}{kept}"
        ) from failure

    def _count(self, completions: list[Completion]) -> int:
        prompt = completions[0].prompt_tokens  # one prompt for all completions of an attempt
        written = sum(c.completion_tokens for c in completions)
        self.totals.answers += len(completions)
        self.totals.prompt_tokens += prompt
        self.totals.completion_tokens += written
        return prompt + written

    # --- reporting and life --------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Totals as plain JSON, with ``cost_usd`` and ``saved_usd`` where ``prices`` are given."""
        t = self.totals
        row: dict[str, Any] = {
            "model": self.model,
            "answers": t.answers,
            "cached": t.cached,
            "attempts": t.attempts,
            "failures": dict(t.failures),
            "prompt_tokens": t.prompt_tokens,
            "completion_tokens": t.completion_tokens,
            "saved_prompt_tokens": t.saved_prompt_tokens,
            "saved_completion_tokens": t.saved_completion_tokens,
        }
        if self.prices is not None:
            per_in, per_out = (price / 1e6 for price in self.prices)
            row["cost_usd"] = t.prompt_tokens * per_in + t.completion_tokens * per_out
            row["saved_usd"] = t.saved_prompt_tokens * per_in + t.saved_completion_tokens * per_out
        return row

    def _submit(self, coroutine: Coroutine) -> concurrent.futures.Future:
        with self._start_lock:  # to the end, so that a client that is closed cancels this call too
            if self._loop is None:
                self._start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _start(self) -> None:
        loop = asyncio.new_event_loop()

        async def prepare() -> None:
            self._slots = asyncio.Semaphore(self.max_concurrency)
            self._limiter = RateLimiter(*self._limits, self._time)

        self._thread = threading.Thread(target=loop.run_forever, name="qwenlong-llm", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(prepare(), loop).result()
        self._loop = loop

    async def _shut(self) -> None:
        """Release what ``_attempt`` holds open."""

    def close(self) -> None:
        """Stop the client: running calls are cancelled, the cache is synchronised to disk."""
        with self._start_lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
            asyncio.run_coroutine_threadsafe(self._shut(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def _all_finished(coroutines: Iterable[Coroutine]) -> list[Any]:
    """Results in order. An error is raised when all have ended: no answer is thrown away."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _errors_last(done: Iterable[Any], numbers: dict[Any, int]) -> list[Any]:
    """By number, failures last, so that an answer is handed over before an error ends it all."""
    return sorted(done, key=lambda future: (future.exception() is not None, numbers[future]))


def _outcome(future: Any, on_error: OnError) -> Completion | RequestRefused:
    try:
        return future.result()
    except RequestRefused as refused:
        if on_error == "raise":
            raise
        return refused


def _estimated_tokens(request: Request, n: int) -> float:
    if request.messages is not None:
        prompt = sum(len(str(m.get("content", ""))) for m in request.messages) / 4
    else:
        prompt = len(request.prompt) / (4 if isinstance(request.prompt, str) else 1)
    return prompt + n * (request.sampling.max_tokens or 0)
