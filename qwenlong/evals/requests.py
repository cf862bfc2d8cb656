"""The same request, made several times: which answer came when (after MRCR, arXiv 2409.12640).

A conversation in which a user asks for passages of texts by title, and an assistant quotes them;
the passages are real. One request is made ``repeats`` times and answered differently each time. The
reader must return one of those answers word for word, behind a given string (reward ``mrcr``:
difflib's ratio, 0 without the string). Other titles are asked for repeatedly too.
"""

from __future__ import annotations

import functools
import random
import string
from collections import defaultdict
from collections.abc import Iterator

from qwenlong.errors import InputError
from qwenlong.evals.haystack import Context, Haystack, header_tokens
from qwenlong.evals.samples import build, sample_rng, spread_depths
from qwenlong.types import Document, Evidence, Sample

REPEATS = 4
PASSAGE = (200, 500)  # characters
PART_TOKENS = 3_000  # of one document
PREFIX_LENGTH = 10

_REQUEST = "User: Quote a passage of {topic}.\n\nAssistant: "
_TURN_GAP = "\n\n"
_QUESTION = (
    "In the conversation the user asks several times for a passage of {topic}. Return the {which} "
    "of those passages ({number} of {repeats} in the order of the conversation), word for word."
)
_INSTRUCTIONS = (
    "Begin your response with {prefix} and let the passage follow at once. Write nothing else."
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def repeated_requests(
    haystack: Haystack, *, length: int, count: int, seed: int, repeats: int = REPEATS
) -> Iterator[Sample]:
    """Conversations of ``length`` tokens in which one request is made ``repeats`` times."""
    if not 2 <= repeats <= len(_ORDINALS):
        raise ValueError(f"repeated_requests: repeats is {repeats}, expected 2 to {len(_ORDINALS)}")
    passages = passages_by_topic(haystack)
    asked_topics = [topic for topic, found in passages.items() if len(found) >= repeats]
    if not asked_topics:
        raise InputError(f"the haystack has no text with {repeats} passages; take longer texts")
    for index in range(count):
        rng = sample_rng(seed, "repeated_requests", length, index)
        topic = rng.choice(asked_topics)
        answers = rng.sample(passages[topic], repeats)
        context = _conversation(haystack, rng, passages, topic, answers, length)
        which = rng.randrange(repeats)
        prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=PREFIX_LENGTH))
        yield build(
            haystack,
            context,
            subtype="repeated_requests",
            length=length,
            seed=seed,
            index=index,
            question=_QUESTION.format(
                topic=topic, which=_ORDINALS[which], number=which + 1, repeats=repeats
            ),
            instructions=_INSTRUCTIONS.format(prefix=prefix),
            answers=[prefix + answers[which]],
            answer_type="text",
            reward="mrcr",
            answer_prefix=prefix,
            derivation={"topic": topic, "which": which + 1, "repeats": repeats},
        )


@functools.lru_cache(maxsize=2)
def passages_by_topic(haystack: Haystack) -> dict[str, list[str]]:
    """Passages of whole lines, all different, by the title of the text that they are from."""
    low, high = PASSAGE
    found: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for page in haystack.pages:
        lines: list[str] = []
        size = 0
        for line in page.text.split("\n"):
            is_blank = not line.strip()
            if size + len(line) > high or (is_blank and size >= low):
                passage = "\n".join(lines).strip()
                if low <= len(passage) and passage not in seen:
                    seen.add(passage)
                    found[page.topic].append(passage)
                lines, size = [], 0
            is_turn = line.startswith(("User:", "Assistant:"))
            if not is_blank and not is_turn and len(line) <= high:
                lines.append(line)
                size += len(line) + 1
    return dict(found)


def _conversation(
    haystack: Haystack,
    rng: random.Random,
    passages: dict[str, list[str]],
    topic: str,
    answers: list[str],
    length: int,
) -> Context:
    """A conversation in documents of about ``PART_TOKENS``; the evidence is ``answers`` in it."""
    tokens = haystack.tokens
    asked = [_REQUEST.format(topic=topic) + answer for answer in answers]
    reserved = sum(tokens(turn + _TURN_GAP) + 1 for turn in asked)
    first_title = _title(1)
    if reserved + header_tokens(tokens, 1, first_title) > length:
        raise InputError(
            f"a context of {length:,} tokens is too short for {len(answers)} repeated requests"
        )
    depths = spread_depths(rng, len(asked))
    others = _other_turns(rng, passages, topic)
    documents: list[Document] = []
    spans: list[Evidence] = []
    spent, laps = 0, 1
    turns: list[str] = []  # of the part that is being written
    part_tokens, at = 0, 0

    def close() -> None:
        nonlocal spent, turns, part_tokens
        number = len(documents) + 1
        text = _TURN_GAP.join(turns)
        documents.append(Document(id=f"conversation-{number}", title=_title(number), text=text))
        spent += tokens(text) + header_tokens(tokens, number, _title(number))
        turns, part_tokens = [], 0

    while True:
        number = len(documents) + 1
        header = header_tokens(tokens, number, _title(number))
        room = length - spent - header - part_tokens - reserved
        is_due = at < len(asked) and depths[at] * length <= spent + part_tokens
        if is_due or (room <= PASSAGE[0] // 4 and at < len(asked)):
            turn = asked[at]
            start = len(_TURN_GAP.join([*turns, ""])) + len(turn) - len(answers[at])
            spans.append(
                Evidence(doc=f"conversation-{number}", start=start, end=start + len(answers[at]))
            )
            cost = tokens(turn + _TURN_GAP)
            reserved -= cost + 1
            at += 1
        else:
            laps, turn = next(others)
            cost = tokens(turn + _TURN_GAP)
            if cost > room:
                head, _, passage = turn.partition("Assistant: ")
                cut = tokens.head(passage, room - tokens(head + "Assistant: ") - 1)
                if len(cut) >= 20:
                    turns.append(f"{head}Assistant: {cut}")
                if turns:
                    close()
                return Context(documents, spans, spent, laps)
        turns.append(turn)
        part_tokens += cost
        if part_tokens >= PART_TOKENS:
            close()


def _title(number: int) -> str:
    return f"Conversation, part {number}"


def _other_turns(
    rng: random.Random, passages: dict[str, list[str]], topic: str
) -> Iterator[tuple[int, str]]:
    """``(lap, turn)`` on other topics without end; topics come up several times."""
    pool = [(name, text) for name, texts in passages.items() if name != topic for text in texts]
    if not pool:
        raise InputError("the haystack has one text only; repeated requests need several")
    lap = 0
    while True:
        lap += 1
        rng.shuffle(pool)
        for name, text in pool:
            yield lap, _REQUEST.format(topic=name) + text
