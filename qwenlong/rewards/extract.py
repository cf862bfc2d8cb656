"""Where the answer of a response is: after the thinking, after an answer sentence, or in a box."""

from __future__ import annotations

import re

# A response is cut to its last characters before any pattern runs, so that no input is too long.
MAX_RESPONSE_CHARS = 100_000
MAX_ANSWER_CHARS = 20_000

THINK_END = "</think>"

MAX_BRACKETS = 8  # enclosing brackets that are taken off, and boxes that are tried
# "I hope this answer is helpful" states nothing: an article or an adjective must stand before the
# word, or a line begin with it.
_ANSWER_IS = re.compile(
    r"(?:\b(?:the|my|our|final|correct|right|best|short)[ \t]+|(?:^|[\n*_#>])[ \t]*)"
    r"answer(?:[ \t]+to\b[^.:\n]{0,80}?)?[*_ \t]*(?:\bis\b|:)[* \t:]*"
    r"|答案\s*(?:是|为|[:：])\s*[:：]?",
    re.IGNORECASE,
)
_BOXED = "\\boxed"
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


def final_text(response: str, *, require_think_end: bool = False) -> str:
    """What a response says after its thinking.

    Text up to the last ``</think>`` is thinking. A response that opens with ``<think>`` and never
    closes it has not answered: the result is empty. With ``require_think_end`` a response without
    ``</think>`` is empty too, as QwenLong-L1's released rewards have it.
    """
    before, mark, after = response.rpartition(THINK_END)
    if mark:
        return after.strip()[-MAX_RESPONSE_CHARS:]
    if require_think_end or response.lstrip().startswith("<think>"):
        return ""
    return response[-MAX_RESPONSE_CHARS:]


def extract_answer(text: str) -> str | None:
    """The answer that ``text`` states last, or None when it states none.

    ``Therefore, the answer is (X)``, ``the answer is X``, ``answer: X``, ``The correct answer is
    (X)`` and ``\\boxed{X}`` count; of several, the last. The answer runs to the end of its line (or
    is the next line that is not empty), without brackets around the whole, Markdown emphasis,
    quotes and a final full stop.
    """
    position, answer = -1, None
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        stated = _until_line_end(text, match.end())
        if stated:
            position, answer = match.start(), stated
            break
    boxed_at = len(text)
    for _ in range(MAX_BRACKETS):
        boxed_at = text.rfind(_BOXED, 0, boxed_at)
        if boxed_at <= position:
            break
        boxed = _braced(text, boxed_at + len(_BOXED))
        if boxed is not None and clean_answer(boxed):
            return clean_answer(boxed)
    return answer


def _until_line_end(text: str, start: int) -> str:
    rest = text[start : start + MAX_ANSWER_CHARS].lstrip()
    line = rest.split("\n", 1)[0]
    if line.startswith("("):
        inner_end = _closing(line, 0, "(", ")")
        after = line[inner_end + 1 :] if inner_end > 0 else ""
        # "(Paris). The text says so" is the bracket; "(a) Paris" and "(2) or (4)" are the line.
        if inner_end > 0 and re.match(r"[\"'*_.!\s]*$|[\"'*_]*[.!]\s", after):
            line = line[1:inner_end]
    boxed_at = line.find(_BOXED)
    if boxed_at >= 0:
        boxed = _braced(rest, boxed_at + len(_BOXED))
        if boxed is not None:
            line = boxed
    return clean_answer(line)


def _closing(text: str, start: int, opening: str, closing: str) -> int:
    """Index of the bracket that closes the one at ``start``, or -1."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == opening:
            depth += 1
        elif text[index] == closing:
            depth -= 1
            if depth == 0:
                return index
    return -1


def _braced(text: str, start: int) -> str | None:
    """Content of the braces that open at ``start``, or None when they do not open or close."""
    text = text[start : start + MAX_ANSWER_CHARS]
    opening = len(text) - len(text.lstrip())
    if text[opening : opening + 1] != "{":
        return None
    end = _closing(text, opening, "{", "}")
    return text[opening + 1 : end] if end > 0 else None


def clean_answer(text: str) -> str:
    """Without LaTeX text commands, emphasis, quotes, enclosing brackets and the final full stop."""
    text = _TEXT_COMMAND.sub(r"\1", text[:MAX_ANSWER_CHARS])
    for _ in range(MAX_BRACKETS):
        before = text
        text = text.strip().strip('*`"“”').strip()
        if text.startswith("$") and text.endswith("$") and len(text) > 1:
            text = text[1:-1]
        text = text.removesuffix("。")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opening, closing in ("()", "[]"):
            if text.startswith(opening) and _closing(text, 0, opening, closing) == len(text) - 1:
                text = text[1:-1]
        if text == before:
            break
    return text


def extract_choice(text: str, choices: list[str]) -> str | None:
    """The option letter that ``text`` states, or None.

    Looked for in the stated answer (``extract_answer``), then in the whole text: the text of
    exactly one option, else a letter at its start. Letters run from ``A`` to the number of
    ``choices``. A letter that could be a word ("the answer is a matter of taste") and a choice
    between letters ("(A) or (B)") are no answer.
    """
    if not 1 <= len(choices) <= 26:
        raise ValueError(f"extract_choice: {len(choices)} choices; there must be 1 to 26")
    text = text.replace("*", "")
    stated = extract_answer(text)
    for candidate, is_stated in ((stated, True), (clean_answer(text), False)):
        if candidate is None:
            continue
        wanted = _folded(candidate)
        same = [i for i, choice in enumerate(choices) if _folded(choice) == wanted]
        if len(same) == 1 and len(wanted) > 1:  # one character is a letter first
            return chr(ord("A") + same[0])
        letter = _leading_letter(candidate, len(choices), is_stated=is_stated)
        if letter is not None:
            return letter
    return None


def _leading_letter(text: str, count: int, *, is_stated: bool) -> str | None:
    letters = f"[A-{chr(ord('A') + count - 1)}]"
    match = re.match(
        rf"(?:option|choice)?\s*\(({letters})\)|(?:option|choice)\s+({letters})\b"
        rf"|({letters})(?:$|[.:),;]|\s+[-–—(=])",
        text,
        re.IGNORECASE,
    )
    if match is None and is_stated:
        # An upper-case letter and more words; "A" and "I" may be words themselves.
        match = re.match(
            rf"(?![AI])({letters})\b(?!['’-])|(?={letters})([AI])\s+(?:because|since|as)\b", text
        )
    if match is None:
        return None
    other = rf"[\s.:),;]*(?:\b(?:or|and)\b|[/,&])[\s(]*{letters}\b"
    if re.match(other, text[match.end(match.lastindex) :], re.IGNORECASE):
        return None
    return next(group for group in match.groups() if group).upper()


def _folded(text: str) -> str:
    return " ".join(clean_answer(text.replace("*", "")).casefold().split())
