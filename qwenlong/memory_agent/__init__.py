"""The memory agent: a text of any length, read in chunks with an evolving memory and a plan.

    source = TextSource.from_files(["book.txt"])
    result = asyncio.run(run_agent(client, tokenizer, "Who built it?", source))
    result.answer, result.final_memory

``machine`` is the process without a model, ``text`` the chunks, ``replies`` and ``query`` read what
a model or a user wrote, ``run`` drives many questions at once.
"""

from qwenlong.memory_agent.machine import EVENTS, AgentConfig, MemoryAgent, Step
from qwenlong.memory_agent.query import Query, parse_split, split_by_rule
from qwenlong.memory_agent.replies import parse_update, says_stop, without_thinking
from qwenlong.memory_agent.run import (
    AgentResult,
    AgentTask,
    chat_ids,
    result_of,
    run_agent,
    run_agents,
)
from qwenlong.memory_agent.text import (
    CharacterTokenizer,
    Chunk,
    ChunkStream,
    TextSource,
    count_tokens,
    cut_at,
    token_ends,
)
