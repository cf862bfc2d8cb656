"""Readers that are Python functions, a tokenizer of words, and texts with known answers."""

from __future__ import annotations

import asyncio
import hashlib
import re

import numpy as np

from qwenlong.llm import Completion, ScriptedClient


class WordTokenizer:
    """A token is a run of characters that are not white space."""

    def token_ends(self, text: str, max_tokens: int | None = None) -> np.ndarray:
        ends = []
        for match in re.finditer(r"\S+", text):
            if max_tokens is not None and len(ends) >= max_tokens:
                break
            ends.append(match.end())
        return np.array(ends, dtype=np.int64)


def part(prompt: str, tag: str) -> str:
    """The content of ``<tag>`` of a prompt, whatever its section holds."""
    if tag == "section":
        found = re.search(r"<section>\n(.*)\n</section>", prompt, re.DOTALL)
    else:
        if tag in ("memory", "plan") and "<previous_memory>" in prompt:
            prompt = prompt[: prompt.rfind("</previous_memory>")]
            prompt = prompt[prompt.rfind("<previous_memory>\n<memory>") :]
        found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)
    return found.group(1) if found else ""


def kind_of(prompt: str) -> str:
    if "<request>" in prompt:
        return "split"
    return "read" if "<section>" in prompt else "answer"


def update(memory: str, plan: str = "read on") -> str:
    return f"Updated memory:\n<memory>\n{memory}\n</memory>\n<plan>\n{plan}\n</plan>"


FACT = re.compile(r"The (\w+) of (\w+) is (\w+)\.")


def fact(attribute: str, thing: str, value: str) -> str:
    return f"The {attribute} of {thing} is {value}."


class PerfectReader:
    """Keeps every fact about things that the problem names, and about values found on the way.

    ``plan_stop`` says STOP when the chain is complete. Problems: "What is the A of the B of X?"
    (any depth), "How many times is the A of X given?", "List every A of X."
    """

    def __init__(self, plan_stop: bool = False):
        self.plan_stop = plan_stop

    def __call__(self, messages: list[dict]) -> str:
        prompt = messages[-1]["content"]
        problem = part(prompt, "problem")
        kind = kind_of(prompt)
        kept = FACT.findall(part(prompt, "memory"))
        if kind == "answer":
            return answer(problem, kept)
        kept += FACT.findall(part(prompt, "section"))
        attributes = set(re.findall(r"\b(?:the|every) (\w+) of\b", problem, re.IGNORECASE))
        kept = [f for f in kept if f[0] in attributes and (f[1] in problem or is_link(f, kept))]
        stop = self.plan_stop and answer(problem, kept) != "unknown"
        return update(" ".join(fact(*f) for f in kept), "STOP" if stop else "read on")


def is_link(found: tuple, kept: list[tuple]) -> bool:
    # A later hop may stand before the earlier one: anything of a needed attribute is kept, unless
    # it is a look-alike, which the texts mark by a name that ends with "ish".
    return not found[1].endswith("ish")


def answer(problem: str, facts: list[tuple]) -> str:
    counted = re.match(r"How many times is the (\w+) of (\w+) given", problem)
    if counted:
        return str(sum(f[:2] == counted.groups() for f in facts))
    listed = re.match(r"List every (\w+) of (\w+)", problem)
    if listed:
        return ", ".join(f[2] for f in facts if f[:2] == listed.groups()) or "unknown"
    thing = re.search(r"of (\w+)\?", problem).group(1)
    for attribute in reversed(re.findall(r"the (\w+) of", problem)):
        values = [f[2] for f in facts if f[:2] == (attribute, thing)]
        if not values:
            return "unknown"
        thing = values[-1]
    return thing


class SlowServer(ScriptedClient):
    """Answers after a time that depends on the request alone, as a server with many slots would.

    ``seconds`` per call, times 0.5 to 2 by a hash of the prompt; ``busy`` is the most at once.
    """

    def __init__(self, reply, seconds: float, **options):
        super().__init__(reply, **options)
        self.seconds = seconds
        self.now_busy = self.busy = 0

    async def _attempt(self, request, n):
        text = str(request.messages)
        share = hashlib.sha256(text.encode()).digest()[0] / 255
        self.now_busy += 1
        self.busy = max(self.busy, self.now_busy)
        try:
            await asyncio.sleep(self.seconds * (0.5 + 1.5 * share))
            return await super()._attempt(request, n)
        finally:
            self.now_busy -= 1


def said(text: str, finish_reason: str = "stop", **fields) -> Completion:
    return Completion(text=text, finish_reason=finish_reason, **fields)


def filler(words: int, seed: int = 0) -> str:
    """Sentences of exactly eight words."""
    rng = np.random.default_rng(seed)
    nouns = np.array("river stone lamp paper window garden engine bridge letter harbour".split())
    picked = nouns[rng.integers(0, len(nouns), size=(words // 8, 4))]
    return " ".join(f"A {a} by the {b} near {c} {d}." for a, b, c, d in picked)
