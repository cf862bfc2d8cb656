"""What a model wrote in a reading step, whatever its form: memory, plan, and what was wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from qwenlong import prompts

_OURS = re.compile(r"<\s*/?\s*(?:memory|plan|previous_memory|section|problem)\s*>", re.IGNORECASE)
# Of a section, the tags that hold the agent's state: forged ones would be copied into it.
_STATE_TAG = re.compile(r"<(\s*/?\s*(?:memory|plan|previous_memory)\s*)>", re.IGNORECASE)
_STOP = re.compile(
    r"^[\W_]*STOP\b(?!\s+(?:at|when|if|after|before|the|for|by|in)\b)", re.IGNORECASE
)


class Visible(NamedTuple):
    """A reply after its thinking."""

    text: str
    thought: bool  # thinking was cut away
    is_open: bool  # thinking began and never ended: nothing was said


def without_thinking(reply: str) -> Visible:
    """Text behind the last ``</think>``; all of it where nothing was thought.

    A chat template may open the thinking, so that the reply holds the closing tag alone.
    """
    before, mark, after = reply.rpartition("</think>")
    if mark:
        return Visible(after.strip(), True, False)
    if reply.lstrip().startswith("<think>"):
        return Visible("", True, True)
    return Visible(reply.strip(), False, False)


class Block(NamedTuple):
    text: str
    start: int
    end: int
    is_closed: bool


def last_block(text: str, tag: str) -> Block | None:
    """The last outermost ``<tag>...</tag>``; tags that it quotes inside belong to it.

    Without a complete one: from the first ``<tag>`` to the last ``</tag>`` behind it, or, not
    closed, to the next tag of ours or the end.
    """
    marks = list(re.finditer(rf"<\s*(/?)\s*{tag}\s*>", text, re.IGNORECASE))
    found, depth, opened = None, 0, None
    for mark in marks:
        if not mark.group(1):
            opened = mark if depth == 0 else opened
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                found = Block(text[opened.end() : mark.start()], opened.start(), mark.end(), True)
    if found is not None or opened is None:
        return found
    closing = [mark for mark in marks if mark.group(1) and mark.start() > opened.end()]
    if closing:
        last = closing[-1]
        return Block(text[opened.end() : last.start()], opened.start(), last.end(), True)
    others = "|".join(name for name in ("memory", "plan", "problem", "format") if name != tag)
    behind = re.compile(rf"<\s*/?\s*(?:{others})\s*>", re.IGNORECASE).search(text, opened.end())
    end = behind.start() if behind else len(text)
    return Block(text[opened.end() : end], opened.start(), end, False)


@dataclass
class Update:
    """A reading step's reply. ``memory`` is None where none was written."""

    memory: str | None
    plan: str
    events: list[str] = field(default_factory=list)
    visible: str = ""


def parse_update(reply: str) -> Update:
    """Memory and plan of a reply to ``prompts.agent_update``.

    Events: ``thinking`` (cut away), ``only_thinking`` (it never ended), ``no_memory`` (no block),
    ``unclosed_memory``, ``tags_in_memory`` (quoted tags, removed), ``no_plan``.
    """
    visible = without_thinking(reply)
    events = ["thinking"] if visible.thought else []
    if visible.is_open:
        return Update(None, "", [*events, "only_thinking"])
    text = visible.text
    memory, rest = last_block(text, "memory"), text
    if memory is not None:
        rest = text[memory.end :]
        if last_block(rest, "plan") is None:  # or written before the memory
            rest = text[: memory.start]
    plan = last_block(rest, "plan")
    if plan is None or not _cleaned(plan.text):
        events.append("no_plan")
    shown_plan = _cleaned(plan.text) if plan else ""
    if memory is None:
        return Update(None, shown_plan, [*events, "no_memory"], text)
    if not memory.is_closed:
        events.append("unclosed_memory")
    if _OURS.search(memory.text):
        events.append("tags_in_memory")
    return Update(_cleaned(memory.text), shown_plan, events, text)


def as_memory(visible: str) -> str:
    """A whole reply taken as a memory, without tags of ours."""
    return _cleaned(re.sub(r"^\s*Updated memory:", "", visible, flags=re.IGNORECASE))


def _cleaned(text: str) -> str:
    """Without tags of ours, which would close those of the next prompt, and placeholders."""
    text = _OURS.sub("", text).strip()
    return "" if text in (prompts.AGENT_NO_MEMORY, prompts.AGENT_NO_PLAN) else text


def without_state_tags(section: str) -> str:
    """A section whose ``<memory>``, ``<plan>`` and ``<previous_memory>`` tags have other brackets.

    A model that copies a section copies no tag then, so that a text cannot write the memory.
    """
    return _STATE_TAG.sub("\u2039\\1\u203a", section)


def says_stop(plan: str) -> bool:
    """Whether a plan begins with STOP, as the prompt asks for, and not "Stop at the chapter on"."""
    return bool(_STOP.match(plan))
