"""A model in this process that answers many questions at a time."""

from __future__ import annotations

import asyncio

from qwenlong.llm import EmbeddedClient

GATHER_SECONDS = 0.05


class BatchedClient(EmbeddedClient):
    """``EmbeddedClient`` that lets a batch fill up before it starts.

    Agents that read in step ask again as soon as a batch ends, one after the other. Without a pause
    the first of them would be a batch of its own, and the rest would wait for it.
    """

    async def _work(self) -> None:
        known = 0
        while known < len(self._waiting) < self._batch_size:
            known = len(self._waiting)
            await asyncio.sleep(GATHER_SECONDS)
        await super()._work()
