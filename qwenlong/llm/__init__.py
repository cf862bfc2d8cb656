"""The one model client: any OpenAI-compatible server, a scripted model, an embedded one.

client = ChatClient("http://127.0.0.1:8000/v1", model="qwen", cache="calls")
client.generate(Request.chat([{"role": "user", "content": "Hello"}], max_tokens=20)).text
"""

from qwenlong.llm.base import Client, Totals
from qwenlong.llm.cache import CallCache
from qwenlong.llm.embedded import EmbeddedClient
from qwenlong.llm.limits import RetryPolicy, VirtualTime, WallTime
from qwenlong.llm.openai_client import ChatClient
from qwenlong.llm.records import (
    Completion,
    LLMError,
    Request,
    RequestRefused,
    Sampling,
    ServerUnavailable,
    TransientError,
)
from qwenlong.llm.scripted import ScriptedClient
