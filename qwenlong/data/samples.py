"""What the routes share when they write a sample: its id, its answer format, a check for leaks."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from qwenlong.prompts import TEXT_INSTRUCTIONS

PROSE_KINDS = frozenset({"text", "markdown", "html", "pdf"})  # of ``SourceDocument.kind``
NUMBER_INSTRUCTIONS = "Give the number in digits. " + TEXT_INSTRUCTIONS


def sample_id(route: str, content: Any) -> str:
    """``route`` and the start of the sha256 of ``content`` as canonical JSON, 24 characters."""
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"{route}-{hashlib.sha256(canonical.encode()).hexdigest()}"[:24]


def contains_term(text: str, term: str) -> bool:
    """Whether ``term`` stands in ``text`` as words of its own, or as the head of a dotted name."""
    if term.casefold() not in text.casefold():
        return False
    pattern = rf"(?<![\w.]){re.escape(term)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None
