"""What the routes share when they write a sample: ids, answer formats, items, a check for leaks."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from qwenlong.data.python_facts import Span
from qwenlong.prompts import TEXT_INSTRUCTIONS

PROSE_KINDS = frozenset({"text", "markdown", "html", "pdf"})  # of ``SourceDocument.kind``
# Answer type -> name in ``qwenlong.rewards``.
REWARDS = {"choice": "multiple_choice", "number": "numeric", "text": "exact_match"}
OPTIONS = 4  # of a multiple choice question
EVAL_SHARE = 0.05  # of the samples, as of the documents (``qwenlong.types.split_of``)
NUMBER_INSTRUCTIONS = "Give the number in digits. " + TEXT_INSTRUCTIONS


@dataclass
class Item:
    """A question by rule about one document; ``wrong`` has candidates for the other options.

    ``parameters`` go into the programme of the sample: what a checker needs to repeat the rule.
    """

    subtype: str
    question: str
    answer: str
    spans: list[Span]
    parameters: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    is_number: bool = False


def sample_id(route: str, content: Any) -> str:
    """``route`` and the start of the sha256 of ``content`` as canonical JSON, 24 characters."""
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"{route}-{hashlib.sha256(canonical.encode()).hexdigest()}"[:24]


def contains_term(text: str, term: str) -> bool:
    """Whether ``term`` stands in ``text`` as whole words; a part of a dotted name is a word."""
    if term.casefold() not in text.casefold():
        return False
    pattern = rf"(?<!\w){re.escape(term)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None
