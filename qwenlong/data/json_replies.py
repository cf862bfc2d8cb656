"""Reading JSON out of what a model wrote."""

from __future__ import annotations

import json
import re
from typing import Any

import json_repair

from qwenlong.rewards.extract import final_text

_MAX_CHARS = 1_000_000
# Repair takes time that grows with the square of a hostile reply's length, and it recurses.
_MAX_REPAIRED_CHARS = 20_000
_MAX_DEPTH = 40


def parse_json(text: str, kind: type[dict] | type[list] = dict) -> Any:
    """The JSON object (or list) of a reply; fences, prose around it and small mistakes are allowed.

    Thinking up to ``</think>`` does not count. Of a reply that is cut short, what is complete
    enough to be repaired counts.

    Raises:
        ValueError: there is no such JSON.
    """
    text = final_text(text[-_MAX_CHARS:])
    fence = re.search(r"```(?:json)?\s*(.+?)```", text, re.DOTALL | re.IGNORECASE)
    text = fence.group(1) if fence else text
    opening, closing = ("{", "}") if kind is dict else ("[", "]")
    start = text.find(opening)
    if start < 0:
        raise ValueError(f"the reply holds no JSON {kind.__name__}")
    end = text.rfind(closing) + 1
    value = _loaded(text[start : end if end > start else len(text)])
    if not isinstance(value, kind):
        raise ValueError(f"the reply holds no JSON {kind.__name__}")
    return value


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        pass  # repaired below
    depth = deepest = 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        deepest = max(deepest, depth)
    if len(text) > _MAX_REPAIRED_CHARS or deepest > _MAX_DEPTH:
        return None
    try:
        return json_repair.loads(text)
    except (ValueError, RecursionError):
        return None


def text_field(value: dict[str, Any], name: str, *, most: int = 4_000) -> str:
    """A field that must be a text, white space folded at its ends.

    Raises:
        ValueError: it is missing, empty, no text or longer than ``most`` characters.
    """
    text = value.get(name)
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the reply has no {name!r}")
    if len(text) > most:
        raise ValueError(f"{name!r} of the reply has {len(text)} characters, more than {most}")
    return text.strip()
