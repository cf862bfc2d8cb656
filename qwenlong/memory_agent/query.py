"""A request split into the problem itself and the rules about how its answer is written.

The rules are held back until the answer is written, so that a demand for JSON does not disturb the
memory on the way there (arXiv 2512.12967, section 2.3).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qwenlong.data.documents import split_sentences
from qwenlong.memory_agent.replies import last_block, without_thinking

# Sentences about form. Each pattern must match at the beginning of a sentence, after a polite word.
_POLITE = r"(?:(?:please|then|finally|also|and|now|note that|important)\b[\s,:]*)*"
_THING = (
    r"(?:final\s+|short\s+)?(?:answers?|responses?|reply|replies|output|result|explanation|reasoning|"
    r"solution|sentences?|words?|letters?|json|xml|yaml|csv|markdown|table|list|number|format|"
    r"paragraphs?|bullets?|bullet\s+points)"
)
_FORM = re.compile(
    "^" + _POLITE + "(?:"
    r"(?:answer|respond|reply|write|give|return|output|print|format|state|present|put|wrap|express|"
    r"provide|end|finish|conclude|begin|start|structure|enclose|report|round|limit|keep)\b"
    r"[^.?!\n]{0,60}?\b(?:"
    r"(?:in|as|with|using|within|inside|by|to)\s+(?:\w+\s+){0,4}" + _THING + r"|"
    r"(?:only|exactly|just)\b|your\s+(?:\w+\s+)?" + _THING + r"|\\boxed|yes\s+or\s+no|"
    r"in\s+[A-Z][a-z]+\b|decimals?|significant)"
    r"|(?:do\s+not|don't|never|avoid|no)\s+(?:\w+\s+){0,3}?"
    r"(?:explain|explanations?|add|include|write|use|output|repeat|preamble|markdown|comments?)\b"
    r"|(?:the|your)\s+" + _THING + r"\s+(?:must|should|has\s+to|needs\s+to|shall|is\s+to)\b"
    r"|(?:output|answer|response)?\s*format\s*:"
    r"|use\s+(?:\w+\s+){0,3}?(?:format|json|schema|template|markdown|bullet\s+points)\b"
    r"|(?:in|with)\s+(?:at\s+most|no\s+more\s+than|exactly|one|a\s+single)\s+"
    r"(?:\w+\s+){0,2}(?:words?|sentences?|lines?|paragraphs?)\b"
    r"|exactly\s+one\s+option\b"
    ")",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


class Query(NamedTuple):
    """What is asked, and how the answer is to be written."""

    problem: str
    instructions: str


def split_by_rule(query: str) -> Query:
    """Sentences about form become the instructions, in order; all others stay the problem.

    A fenced block (a schema, an example) goes with the sentence before it. Where nothing would be
    left of the problem, the query is not split.
    """
    problem: list[str] = []
    rules: list[str] = []
    last_is_rule = False
    position = 0
    for fence in [*_FENCE.finditer(query), None]:
        text = query[position : fence.start() if fence else len(query)]
        for start, end in split_sentences(text):
            for line in text[start:end].split("\n"):
                if line.strip():
                    last_is_rule = bool(_FORM.match(line.strip()))
                    (rules if last_is_rule else problem).append(line.strip())
        if fence:
            (rules if last_is_rule else problem).append(fence.group())
            position = fence.end()
    if not rules or not problem:
        return Query(query.strip(), "")
    return Query("\n".join(problem), "\n".join(rules))


def parse_split(reply: str) -> Query | None:
    """The two parts that a model wrote for ``prompts.agent_decompose``; None without a problem."""
    visible = without_thinking(reply).text
    problem, form = (last_block(visible, tag) for tag in ("problem", "format"))
    if problem is None or not problem.text.strip():
        return None
    return Query(problem.text.strip(), form.text.strip() if form else "")
