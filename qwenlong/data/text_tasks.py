"""Multiple choice and reading questions by rule, from real prose and Python source.

Each rule looks at one document and yields items: a question, its answer, the characters that prove
it and, for multiple choice, wrong options of the same kind from the same document. A rule yields
only what the document settles: a name that occurs once, a literal bound once, a sentence that can
be told from all others. Wrong options are drawn so that counting how often the document names each
of them finds nothing. ``dialogue_samples`` (``dialogue_questions``) is the third route by rule.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qwenlong.data import code_questions, prose_questions
from qwenlong.data.dialogue_questions import dialogue_samples
from qwenlong.data.documents import SourceDocument, split_sentences
from qwenlong.data.python_facts import module_facts
from qwenlong.data.samples import (
    NUMBER_INSTRUCTIONS,
    OPTIONS,
    PROSE_KINDS,
    REWARDS,
    Item,
    contains_term,
    sample_id,
)
from qwenlong.prompts import CHOICE_INSTRUCTIONS, TEXT_INSTRUCTIONS, choice_letter
from qwenlong.rewards.text import normalize_answer
from qwenlong.types import Document, Evidence, Sample

__all__ = ["choice_samples", "dialogue_samples", "reading_samples"]

_MAX_DOCUMENT_CHARS = 400_000  # about 100K tokens: more leaves no room for anything else
_RANK_SPREAD = 2  # how far the places of a subtype's answers may be from equal shares
_SAME_ANSWER_SHARE = 0.15  # of the open questions of a subtype: more is soon guessed

Rule = Callable[[SourceDocument, Any, random.Random], Iterator[Item]]


def choice_samples(
    documents: Iterable[SourceDocument], *, seed: int, limit: int
) -> Iterator[Sample]:
    """Questions with four options, one right, its place uniform; task ``multiple_choice``.

    Deterministic in ``documents`` and ``seed``; at most ``limit`` samples, subtypes in turn.
    """
    yield from _samples(
        documents, seed, limit, "choice", code_questions.CHOICE_RULES, prose_questions.CHOICE_RULES
    )


def reading_samples(
    documents: Iterable[SourceDocument], *, seed: int, limit: int
) -> Iterator[Sample]:
    """Questions whose answer stands in the document; task ``reading_qa``.

    Deterministic in ``documents`` and ``seed``; at most ``limit`` samples, subtypes in turn.
    """
    yield from _samples(
        documents,
        seed,
        limit,
        "reading",
        code_questions.READING_RULES,
        prose_questions.READING_RULES,
    )


def _samples(
    documents: Iterable[SourceDocument],
    seed: int,
    limit: int,
    route: str,
    code: tuple[Rule, ...],
    prose: tuple[Rule, ...],
) -> Iterator[Sample]:
    rng = random.Random(f"{route} {seed}")
    titles = Counter()
    usable = []
    for document in documents:
        titles[document.title] += 1
        if document.title and len(document.text) <= _MAX_DOCUMENT_CHARS:
            usable.append(document)
    # A question names its document by the title.
    usable = [d for d in usable if titles[d.title] == 1]
    rng.shuffle(usable)
    per_document = max(8, 8 * limit // max(1, len(usable)))
    by_subtype: dict[str, list[tuple[SourceDocument, Item]]] = {}
    found = 0
    for document in usable:
        items = _document_items(
            document, random.Random(f"{route} {seed} {document.id}"), code, prose
        )
        for item in items[:per_document]:
            by_subtype.setdefault(item.subtype, []).append((document, item))
            found += 1
        if found >= 6 * limit + 200:
            break
    queues = [by_subtype[name] for name in sorted(by_subtype)]
    for queue in queues:
        rng.shuffle(queue)
    seen: set[str] = set()
    given: Counter[tuple[str, str]] = Counter()  # open answers of a subtype
    asked: Counter[str] = Counter()
    ranks: dict[str, Counter[int]] = {name: Counter() for name in by_subtype}
    made = 0
    while queues and made < limit:
        for queue in list(queues):
            sample = None
            while queue and sample is None:
                document, item = queue.pop()
                key = (item.subtype, normalize_answer(item.answer))
                most = max(2, _SAME_ANSWER_SHARE * (asked[item.subtype] + 1))
                is_usual = route == "reading" and given[key] + 1 > most
                if item.question not in seen and not is_usual:
                    sample = _sample(route, document, item, ranks[item.subtype], rng)
            if sample is None:
                queues.remove(queue)
                continue
            seen.add(item.question)
            given[key] += 1
            asked[item.subtype] += 1
            yield sample
            made += 1
            if made >= limit:
                return


def _document_items(
    document: SourceDocument,
    rng: random.Random,
    code: tuple[Rule, ...],
    prose: tuple[Rule, ...],
) -> list[Item]:
    """Items of every rule that fits the kind of document, subtypes mixed."""
    if document.kind == "python":
        content: Any = module_facts(document.text)
        rules = code
    elif document.kind in PROSE_KINDS:
        content = split_sentences(document.text)
        rules = prose
    else:
        return []
    if not content:
        return []
    lists = []
    for rule in rules:
        items = list(rule(document, content, rng))
        rng.shuffle(items)
        lists.append(items)
    mixed = []
    for i in range(max(map(len, lists), default=0)):
        mixed += [items[i] for items in lists if i < len(items)]
    return mixed


def _sample(
    route: str, document: SourceDocument, item: Item, ranks: Counter[int], rng: random.Random
) -> Sample | None:
    if not normalize_answer(item.answer) or contains_term(item.question, item.answer):
        return None
    choices = None
    answer = item.answer
    kind = "number" if item.is_number else "text"
    instructions = NUMBER_INSTRUCTIONS if item.is_number else TEXT_INSTRUCTIONS
    if route == "choice":
        choices = _wrong_options(document.text, item, ranks, rng)
        if choices is None:
            return None
        place = rng.randrange(OPTIONS)
        choices.insert(place, item.answer)
        answer, kind, instructions = choice_letter(place), "choice", CHOICE_INSTRUCTIONS
    return Sample(
        id=sample_id(route, [item.question, choices, answer, document.id]),
        task="multiple_choice" if route == "choice" else "reading_qa",
        subtype=item.subtype,
        split=document.split,
        question=item.question,
        instructions=instructions,
        choices=choices,
        documents=[Document(id=document.id, title=document.title, text=document.text)],
        answers=[answer],
        answer_type=kind,
        tolerance=0.0 if kind == "number" else None,
        reward=REWARDS[kind],
        evidence=[Evidence(doc=document.id, start=s.start, end=s.end) for s in item.spans],
        derivation={
            "kind": "template",
            "template": item.subtype,
            "document": document.id,
            "answer": item.answer,
            **item.parameters,
        },
    )


def _wrong_options(
    text: str, item: Item, ranks: Counter[int], rng: random.Random
) -> list[str] | None:
    """Three wrong options in random order, or None where there are none that balance the subtype.

    They are named as often as the answer, or else 0, 1, 2 or 3 of them less often and the others
    more often, in equal shares of the subtype, which ``ranks`` counts.
    """
    wrong = _distinct(item.wrong, item.answer)
    rng.shuffle(wrong)
    count = _count_in(text, item.answer)
    counts = {option: _count_in(text, option) for option in wrong}
    same = [option for option in wrong if counts[option] == count]
    if len(same) >= OPTIONS - 1:
        return same[: OPTIONS - 1]
    fewer = [option for option in wrong if counts[option] < count]
    more = [option for option in wrong if counts[option] > count]
    places = [k for k in range(OPTIONS) if len(fewer) >= k and len(more) >= OPTIONS - 1 - k]
    rng.shuffle(places)
    rank = min(places, key=ranks.__getitem__, default=None)
    if rank is None or ranks[rank] > min(ranks[k] for k in range(OPTIONS)) + _RANK_SPREAD:
        return None
    ranks[rank] += 1
    options = fewer[:rank] + more[: OPTIONS - 1 - rank]
    rng.shuffle(options)
    return options


def _count_in(text: str, option: str) -> int:
    """How often ``text`` names ``option``: as a word where it is one."""
    return _words(text)[option] if re.fullmatch(r"\w+", option) else text.count(option)


@functools.lru_cache(maxsize=16)
def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text))


def _distinct(texts: Iterable[str], answer: str) -> list[str]:
    """``texts`` that differ from ``answer`` and from each other in what a reader compares."""
    seen = {_folded(answer)}
    kept = []
    for text in texts:
        if _folded(text) not in seen:
            seen.add(_folded(text))
            kept.append(text)
    return kept


def _folded(text: str) -> str:
    """What makes two options the same to a reader: ``"0"`` and ``0`` are."""
    return " ".join(text.casefold().replace('"', "").replace("'", "").split())
