"""Requests that come one after the other are one batch."""

import asyncio

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from qwenlong.evals.engine import BatchedClient  # noqa: E402
from qwenlong.llm import EmbeddedClient, Request  # noqa: E402
from tests.qwenlong.test_llm_embedded import make_tokenizer, parts  # noqa: E402, F401


def batches(parts, kind, count, batch_size):  # noqa: F811
    """Sizes of the batches, and the texts, of ``count`` requests that come 5 ms apart."""
    sizes = []

    class Watched(kind):
        def _generate(self, requests, prompts):
            sizes.append(len(requests))
            return super()._generate(requests, prompts)

    async def ask(client):
        tasks = []
        for i in range(count):
            request = Request.completion(f"w{i} w{i + 1}", max_tokens=12)
            tasks.append(asyncio.create_task(client.agenerate(request)))
            await asyncio.sleep(0.005)
        return [(await task).text for task in tasks]

    with Watched(*parts, name="tiny", batch_size=batch_size) as client:
        return sizes, asyncio.run(ask(client))


def test_a_batch_fills_up(parts):  # noqa: F811
    sizes, texts = batches(parts, BatchedClient, 6, 8)
    assert sizes == [6]
    apart, expected = batches(parts, EmbeddedClient, 6, 1)
    assert apart == [1] * 6 and texts == expected


def test_a_full_batch_does_not_wait(parts):  # noqa: F811
    sizes, _ = batches(parts, BatchedClient, 6, 2)
    assert sum(sizes) == 6 and max(sizes) == 2


def test_one_request_is_answered(parts):  # noqa: F811
    assert batches(parts, BatchedClient, 1, 8)[0] == [1]
