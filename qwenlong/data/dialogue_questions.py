"""Questions about simulated conversations: what was said when, what changed, how much in all.

Each question function looks at one thread of a conversation and gives a question whose answer
follows from the thread's statements alone, or None. The programme of a sample names the rule and
the statements, so that a replay of the transcript can repeat it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from qwenlong.data.dialogues import (
    ACTIVITIES,
    Dialogue,
    Said,
    Thread,
    quotable_sentences,
    simulate,
)
from qwenlong.data.documents import SourceDocument
from qwenlong.data.python_facts import Span
from qwenlong.data.samples import (
    EVAL_SHARE,
    NUMBER_INSTRUCTIONS,
    REWARDS,
    contains_term,
    sample_id,
)
from qwenlong.prompts import TEXT_INSTRUCTIONS
from qwenlong.types import Document, Evidence, Sample, Split

_ACTIVITY = {phrase: (unit, done, doing) for phrase, unit, done, doing, _, _ in ACTIVITIES}


@dataclass
class _Question:
    template: str
    text: str
    answer: str
    thread: Thread
    said: list[Said]  # the statements that the answer follows from
    spans: list[Span] = field(default_factory=list)  # beside them
    is_number: bool = False
    unit: str | None = None
    session: int | None = None


_Maker = Callable[[Dialogue, Thread, random.Random], "_Question | None"]


def dialogue_samples(
    documents: Iterable[SourceDocument],
    *,
    seed: int,
    limit: int,
    tokens: tuple[int, int] = (2_000, 120_000),
    per_dialogue: int = 6,
) -> Iterator[Sample]:
    """Questions about simulated conversations; task ``dialogue_memory``.

    Args:
        documents: prose that the people quote in their small talk; may be empty. A conversation
            quotes documents of its own split.
        tokens: shortest and longest conversation, at four characters a token; lengths between are
            drawn log-uniformly. A conversation grows by sessions.
        per_dialogue: most questions about one conversation.

    Deterministic in ``documents`` and ``seed``.
    """
    low, high = tokens
    if not 500 <= low <= high:
        raise ValueError(f"dialogue_samples: tokens is {tokens}, expected 500 <= low <= high")
    if per_dialogue < 1:
        raise ValueError(f"dialogue_samples: per_dialogue is {per_dialogue}, expected 1 or more")
    rng = random.Random(f"dialogue {seed}")
    by_split: dict[Split, list[SourceDocument]] = {"train": [], "eval": []}
    for document in documents:
        by_split[document.split].append(document)
    quotes = {split: quotable_sentences(some, rng) for split, some in by_split.items()}
    seen: set[str] = set()  # titles and questions
    made = 0
    while made < limit:
        length = math.exp(rng.uniform(math.log(low), math.log(high)))
        split: Split = "eval" if rng.random() < EVAL_SHARE else "train"
        dialogue = simulate(rng, int(4 * length), quotes[split], split)
        if dialogue.document.title in seen:
            continue
        seen.add(dialogue.document.title)
        for question in _questions(dialogue, rng, min(per_dialogue, limit - made), seen):
            made += 1
            yield _sample(dialogue, question)


def _questions(
    dialogue: Dialogue, rng: random.Random, count: int, seen: set[str]
) -> list[_Question]:
    """At most ``count`` questions of several templates, none of them ``seen``; they are added."""
    found: list[_Question] = []
    tries = [(m, t) for m in _ABOUT_ATTRIBUTES for t in dialogue.attributes]
    tries += [(m, t) for m in _ABOUT_ACTIVITIES for t in dialogue.activities]
    rng.shuffle(tries)
    per_template = -(-count // 4)
    made: dict[str, int] = {}
    for maker, thread in tries:
        if len(found) == count:
            break
        question = maker(dialogue, thread, rng)
        if question is None or question.text in seen:
            continue
        if contains_term(question.text, question.answer):
            continue
        if made.get(question.template, 0) < per_template:
            made[question.template] = made.get(question.template, 0) + 1
            seen.add(question.text)
            found.append(question)
    return found


def _sample(dialogue: Dialogue, question: _Question) -> Sample:
    document = dialogue.document
    spans = [*question.spans, *(s.span for s in question.said)]
    kind = "number" if question.is_number else "text"
    derivation = {
        "kind": "transcript",
        "template": question.template,
        "speaker": question.thread.owner,
        "topic": question.thread.topic,
        "session": question.session,
        "statements": [[s.session + 1, s.op, s.value.said] for s in question.said],
    }
    return Sample(
        id=sample_id("dialogue", [question.text, question.answer, document.id]),
        task="dialogue_memory",
        subtype=question.template,
        split=document.split,
        question=question.text,
        instructions=NUMBER_INSTRUCTIONS if question.is_number else TEXT_INSTRUCTIONS,
        documents=[Document(id=document.id, title=document.title, text=document.text)],
        answers=[question.answer],
        answer_type=kind,
        unit=question.unit,
        tolerance=0.0 if question.is_number else None,
        reward=REWARDS[kind],
        evidence=[Evidence(doc=document.id, start=s.start, end=s.end) for s in sorted(set(spans))],
        derivation=derivation,
    )


def _valued(
    template: str, text: str, thread: Thread, said: list[Said], answer: Said, **more
) -> _Question:
    """A question whose answer is the value of a statement."""
    value = answer.value
    unit = "euros" if value.said.endswith(" euros") else None
    return _Question(
        template, text, value.answer, thread, said, is_number=value.is_number, unit=unit, **more
    )


def _shown(said: Said) -> str:
    """The value in a question: an amount with its unit."""
    return said.value.said if said.value.said.endswith(" euros") else said.value.answer


# --- attributes --------------------------------------------------------------


def _said_on(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The value given in the session of a date."""
    said = rng.choice(thread.said)
    date = dialogue.dates[said.session]
    text = rng.choice(
        [
            f'What did {thread.owner} say about "my {thread.topic}" in the session of {date}: '
            "what was it to be from then on?",
            f"In the session of {date}, which value did {thread.owner} give for "
            f'"my {thread.topic}"? If a mistake was put right, give the right value.',
        ]
    )
    header = dialogue.headers[said.session]
    return _valued("said_on", text, thread, [said], said, spans=[header], session=said.session + 1)


def _latest(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The value after all changes and corrections."""
    if len(thread.said) < 2:
        return None
    text = rng.choice(
        [
            f'What did {thread.owner} give for "my {thread.topic}" in the end, after every change '
            "and correction?",
            f'Over the sessions {thread.owner} says more than one thing about "my {thread.topic}". '
            "What is it by the last word on it?",
        ]
    )
    return _valued("latest", text, thread, thread.said, thread.said[-1])


def _as_of(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The value that held after a session which does not speak of it."""
    places = [
        (i, after)
        for i, after in enumerate(thread.said[:-1])
        if thread.said[i + 1].session - after.session > 1
    ]
    if not places:
        return None
    index, current = rng.choice(places)
    session = rng.randrange(current.session + 1, thread.said[index + 1].session)
    text = (
        f"Go only by what had been said up to the end of the session of {dialogue.dates[session]}. "
        f'What had {thread.owner} last given for "my {thread.topic}" by then?'
    )
    header = dialogue.headers[session]
    return _valued(
        "as_of",
        text,
        thread,
        thread.said[: index + 1],
        current,
        spans=[header],
        session=session + 1,
    )


def _taken_back(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The value that was a mistake."""
    places = [i for i, said in enumerate(thread.said) if said.op == "correct"]
    if len(places) != 1:
        return None
    wrong, right = thread.said[places[0] - 1], thread.said[places[0]]
    text = rng.choice(
        [
            f'{thread.owner} once took back a statement about "my {thread.topic}" as a mistake. '
            "What had been said by mistake?",
            f'What did {thread.owner} give for "my {thread.topic}" before calling that very '
            "statement a mistake?",
        ]
    )
    return _valued("taken_back", text, thread, [wrong, right], wrong)


def _first_date(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The date of a statement, asked by its value."""
    said = rng.choice(thread.said)
    verb = {"set": "give", "change": "change", "correct": "correct"}[said.op]
    to = "as" if said.op == "set" else "to"
    text = (
        f'What is the date of the session in which {thread.owner} {verb}s "my {thread.topic}" '
        f"{to} {_shown(said)}? Write day, month and year as the session heading does."
    )
    return _Question(
        "date_of",
        text,
        dialogue.dates[said.session],
        thread,
        [said],
        [dialogue.headers[said.session]],
        session=said.session + 1,
    )


def _changes(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """How often a value changed, mistakes put right not counted."""
    count = sum(said.op == "change" for said in thread.said)
    if len(thread.said) < 3:
        return None
    text = (
        f'How many times did {thread.owner} announce a change of "my {thread.topic}" after first '
        "giving it? Corrections of a mistake do not count as changes."
    )
    return _Question("changes", text, str(count), thread, thread.said, is_number=True)


def _who(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """Whose value it was, where others gave values of their own for the same thing."""
    others = [t for t in dialogue.attributes if t.topic == thread.topic and t is not thread]
    if len(dialogue.people) < 3 or not others:
        return None
    said = rng.choice(thread.said)
    text = (
        f"One of the people in the conversations between {', '.join(dialogue.people[:-1])} and "
        f'{dialogue.people[-1]} gave {_shown(said)} for "my {thread.topic}". On which date '
        "was that said? Write day, month and year as the session heading does."
    )
    return _Question(
        "date_of_value",
        text,
        dialogue.dates[said.session],
        thread,
        [said],
        [dialogue.headers[said.session]],
        session=said.session + 1,
    )


# --- activities --------------------------------------------------------------


def _amounts(thread: Thread) -> dict[int, int]:
    """Session -> amount of each report, as corrected by the last word on it."""
    amounts: dict[int, int] = {}
    for said in thread.said:
        place = said.session if said.amends is None else said.amends
        amounts[place] = int(said.value.answer)
    return amounts


def _total(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The sum of all reports, corrections taken into account."""
    unit, done, _ = _ACTIVITY[thread.topic]
    text = rng.choice(
        [
            f"How many {unit} did {thread.owner} report having {done} in all the sessions "
            "together, corrections taken into account?",
            f"Add up all that {thread.owner} reported, with corrected amounts in place of the "
            f"first ones: how many {unit} has {thread.owner} {done} altogether?",
        ]
    )
    answer = str(sum(_amounts(thread).values()))
    return _Question("total", text, answer, thread, thread.said, is_number=True, unit=unit)


def _session_count(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """In how many sessions something was reported; a later correction is no report."""
    reports = [s for s in thread.said if s.op == "report"]
    if len(reports) < 3:
        return None
    doing = _ACTIVITY[thread.topic][2]
    text = (
        f"In how many different sessions did {thread.owner} report {doing}? A correction of an "
        "earlier report does not count."
    )
    return _Question("session_count", text, str(len(reports)), thread, reports, is_number=True)


def _most(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The date of the largest amount."""
    amounts = _amounts(thread)
    largest = max(amounts.values())
    places = [p for p, amount in amounts.items() if amount == largest]
    if len(amounts) < 3 or len(places) != 1:
        return None
    unit, done, _ = _ACTIVITY[thread.topic]
    text = (
        f"What is the date of the session in which {thread.owner} reported the largest number of "
        f"{unit} {done}, with later corrections of the amounts taken into account? Write day, "
        "month and year as the session heading does."
    )
    return _Question(
        "date_of_most",
        text,
        dialogue.dates[places[0]],
        thread,
        thread.said,
        [dialogue.headers[places[0]]],
        session=places[0] + 1,
    )


def _reported_on(dialogue: Dialogue, thread: Thread, rng: random.Random) -> _Question | None:
    """The amount of one report, as first given or as corrected."""
    report = rng.choice([s for s in thread.said if s.op == "report"])
    related = [s for s in thread.said if report.session in (s.session, s.amends)]
    related = [s for s in related if s is report or s.amends == report.session]
    unit, done, _ = _ACTIVITY[thread.topic]
    text = (
        f"How many {unit} had {thread.owner} really {done} by the report of the session of "
        f"{dialogue.dates[report.session]}, if a later correction of that report is heeded?"
    )
    return _Question(
        "reported_on",
        text,
        related[-1].value.answer,
        thread,
        related,
        [dialogue.headers[report.session]],
        is_number=True,
        unit=unit,
        session=report.session + 1,
    )


_ABOUT_ATTRIBUTES: tuple[_Maker, ...] = (
    _said_on,
    _latest,
    _as_of,
    _taken_back,
    _first_date,
    _changes,
    _who,
)
_ABOUT_ACTIVITIES: tuple[_Maker, ...] = (_total, _session_count, _most, _reported_on)
