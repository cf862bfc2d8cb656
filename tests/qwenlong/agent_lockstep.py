"""The baseline of the speed tests: all questions take a step, then all wait for the slowest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from qwenlong.llm import Client
from qwenlong.memory_agent import AgentConfig, AgentTask, ChunkStream, MemoryAgent


async def run_lockstep(
    client: Client, tokenizer: Any, tasks: Sequence[AgentTask], config: AgentConfig
) -> dict[str, str]:
    """Answers by task id. Answers are written together too, after the longest text is read."""
    agents = {
        task.id: MemoryAgent(config, tokenizer, task.question, instructions=task.instructions)
        for task in tasks
    }
    streams = {
        task.id: ChunkStream(task.source, tokenizer, config.chunk_tokens, snap=config.snap)
        for task in tasks
    }

    async def step(name: str, chunk: Any) -> None:
        while agents[name].receive(await client.agenerate(agents[name].request(chunk))) is None:
            pass

    index = 0
    while True:
        chunks = {name: stream.get(index) for name, stream in streams.items()}
        asked = [step(name, chunk) for name, chunk in chunks.items() if chunk is not None]
        if not asked:
            break
        await asyncio.gather(*asked)
        index += 1
    for agent in agents.values():
        agent.finish_reading()
    await asyncio.gather(*(step(name, None) for name in agents))
    return {name: agent.answer for name, agent in agents.items()}
