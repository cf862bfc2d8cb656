"""How often to ask: the retry policy and the rate limit. Both take their time from outside."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass


class WallTime:
    """Seconds as they pass."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class VirtualTime(WallTime):
    """Seconds that pass only by sleeping, at once: for tests. ``slept`` lists each sleep."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._now = 0.0

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now += seconds
        await asyncio.sleep(0)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter: attempt i waits ``base * 2**i`` seconds, less up to half.

    A server that says how long to wait (``Retry-After``) is obeyed, up to ``max_retry_after``.
    """

    max_retries: int = 6
    base: float = 0.5
    max_delay: float = 60.0
    max_retry_after: float = 300.0

    def delay(self, attempt: int, retry_after: float | None, rng: random.Random) -> float:
        """Seconds to wait after failed attempt ``attempt`` (from 0)."""
        backoff = min(self.base * 2**attempt, self.max_delay) * rng.uniform(0.5, 1.0)
        return max(backoff, min(retry_after or 0.0, self.max_retry_after))


class RateLimiter:
    """Requests and tokens per minute: two buckets, full at first, refilled continuously."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        time: WallTime,
    ):
        self._capacity = (requests_per_minute, tokens_per_minute)
        self._level = [requests_per_minute or 0.0, tokens_per_minute or 0.0]
        self._time = time
        self._filled_at = time.now()
        self._paused_until = float("-inf")
        self._turn = asyncio.Lock()  # first come, first served

    def pause(self, seconds: float) -> None:
        """Let nobody through for that long."""
        self._paused_until = max(self._paused_until, self._time.now() + seconds)

    async def acquire(self, tokens: float) -> None:
        """Wait for one request of about ``tokens`` tokens, at most a minute's worth."""
        async with self._turn:
            while (wait := self._wait(tokens)) > 0:
                await self._time.sleep(wait)
            for i, cost in enumerate((1.0, tokens)):
                if self._capacity[i] is not None:
                    self._level[i] -= min(cost, self._capacity[i])

    def _wait(self, tokens: float) -> float:
        now = self._time.now()
        wait = self._paused_until - now
        for i, cost in enumerate((1.0, tokens)):
            capacity = self._capacity[i]
            if capacity is not None:
                refill = (now - self._filled_at) * capacity / 60.0
                self._level[i] = min(capacity, self._level[i] + refill)
                wait = max(wait, (min(cost, capacity) - self._level[i]) * 60.0 / capacity)
        self._filled_at = now
        # A wait below a microsecond is rounding, and would sleep for ever in tiny steps.
        return wait if wait > 1e-6 else 0.0

    def correct(self, estimated: float, used: float) -> None:
        """Replace an estimate of tokens by what the server counted."""
        if self._capacity[1] is not None:
            self._level[1] = min(self._capacity[1], self._level[1] + estimated - used)
