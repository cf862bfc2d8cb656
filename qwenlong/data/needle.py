"""Retrieval from real text: facts planted in passages of documents, and questions about them.

A passage is a run of whole sentences of one document. ``questions`` sentences such as "The access
code of the amber vault is 48213." are planted between its sentences, each about another name, and
each is asked for. All questions of a passage have the passage, word for word, before them, so that
their prompts share everything but the end. A passage is on the side of its document: no document is
trained and evaluated on. Recipes name the task ``needle``.

Two forms of a question, whose rewards have different scales:

    value      task ``reading_qa``: what the value is; reward 0 or 1, whether the answer names it
    sentence   task ``needle``: the planted sentence, word for word; dense reward in [0, 1], the
               similarity of the answer and the sentence
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from qwenlong.data.documents import SourceDocument, count_tokens, split_sentences, text_id
from qwenlong.data.loaders import builtin_loader
from qwenlong.data.samples import sample_id
from qwenlong.errors import InputError
from qwenlong.prompts import fill
from qwenlong.types import Document, Evidence, Sample, Split, split_of

INSTRUCTIONS = "Answer with one short sentence."
# name: task, type of the answer, reward, question
FORMS = {
    "value": (
        "reading_qa",
        "text",
        "cover",
        "What is the {attribute} of the {name} {thing}?",
    ),
    "sentence": (
        "needle",
        "needle",
        "needle",
        "Repeat the sentence of the document that tells the {attribute} of the {name} {thing}.",
    ),
}
# what has a value, and what the value is called
THINGS = (
    ("vault", "access code"),
    ("engine", "serial number"),
    ("parcel", "tracking number"),
    ("account", "customer number"),
    ("station", "call number"),
    ("ticket", "booking number"),
)
NAMES = tuple(
    """amber anchor arrow autumn badger bamboo barley basalt beacon birch bison bronze candle canyon
    cedar cherry clover cobalt comet copper coral cotton crystal cypress desert dolphin ember falcon
    feather fern forest garnet ginger glacier granite harbour hazel heron honey indigo iris island
    ivory jasmine juniper lantern lemon lilac lotus magnet maple marble meadow mint mirror nickel
    olive onyx opal orchid otter paper pearl pepper pine planet plum poplar prairie quartz quiver
    raven ribbon river robin saffron salmon sequoia shadow silver sparrow spruce summit swallow
    tempest thistle thunder tiger timber tulip tundra velvet violet walnut willow winter wolf
    zephyr""".split()
)
VALUES = (10_000, 100_000)  # [first, end): five digits


def needle_samples(
    count: int | None,
    seed: int,
    *,
    split: Split = "train",
    forms: Sequence[str] = ("value",),
    questions: int = 10,
    document_tokens: int = 1024,
    tokenizer: str = "chars4",
    source: str = "python-topics",
    eval_fraction: float = 0.2,
) -> list[Sample]:
    """Samples of one side, passage by passage; equal arguments give equal samples.

    Passages come in an order that the seed draws; when all have been used they come again with
    other facts.

    Args:
        count: of samples; None takes every passage once.
        forms: of ``FORMS``; where there are several they take turns, question by question.
        questions: of one passage, and facts that are planted in it.
        document_tokens: of a passage before anything is planted, at least.
        tokenizer: that counts them, as in ``count_tokens``.
        source: a builtin loader of documents, or ``module:function``.
        eval_fraction: of the documents, held out.

    Raises:
        InputError: a setting is out of range, or no document of that side is long enough.
    """
    _check(count, forms, questions, document_tokens, eval_fraction)
    documents = [
        document
        for document in builtin_loader(source)()
        if split_of(document.text, eval_fraction=eval_fraction) == split
    ]
    passages = list(cut_passages(documents, document_tokens, tokenizer))
    if not passages:
        raise InputError(
            f"needle: no {split} document of {source} has {document_tokens} tokens; lower "
            "document_tokens or change eval_fraction."
        )
    if count is None:
        count = questions * len(passages)
    samples: list[Sample] = []
    for turn in range(-(-count // (questions * len(passages)))):
        rng = random.Random(f"needle {seed} {split} {turn}")
        for title, passage in rng.sample(passages, len(passages)):
            if len(samples) >= count:
                break
            samples += _plant(title, passage, rng, questions, forms, split)
    return samples[:count]


def _check(
    count: int | None,
    forms: Sequence[str],
    questions: int,
    document_tokens: int,
    eval_fraction: float,
) -> None:
    if (count is not None and count < 1) or document_tokens < 1:
        raise InputError(
            f"needle: count is {count} and document_tokens {document_tokens}; both must be at "
            "least 1."
        )
    if not 1 <= questions <= len(NAMES):
        raise InputError(f"needle: questions is {questions}; a passage takes 1 to {len(NAMES)}.")
    if not forms or any(form not in FORMS for form in forms):
        raise InputError(f"needle: forms is {list(forms)}; choose from {', '.join(FORMS)}.")
    if not 0 < eval_fraction < 1:
        raise InputError(f"needle: eval_fraction is {eval_fraction}; it must be between 0 and 1.")


def cut_passages(
    documents: Iterable[SourceDocument], document_tokens: int, tokenizer: str = "chars4"
) -> Iterator[tuple[str, str]]:
    """``(title, passage)``: whole sentences in a row, just enough for ``document_tokens``.

    Passages of a document do not overlap; what is left at its end is dropped.
    """
    for document in documents:
        begin = None
        for start, end in split_sentences(document.text):
            if begin is None:
                begin = start
            # A token has at least one character: most prefixes need no counting.
            long_enough = end - begin >= document_tokens
            if long_enough and count_tokens(document.text[begin:end], tokenizer) >= document_tokens:
                yield document.title, document.text[begin:end]
                begin = None


def _plant(
    title: str,
    passage: str,
    rng: random.Random,
    questions: int,
    forms: Sequence[str],
    split: Split,
) -> list[Sample]:
    """The samples of one passage: a fact for each question, planted between sentences."""
    names = rng.sample(NAMES, questions)
    things = [rng.choice(THINGS) for _ in names]
    taken = {int(digits) for digits in re.findall(r"(?=(\d{5}))", passage)}
    drawn = rng.sample(range(*VALUES), questions + len(taken))
    values = [str(value) for value in drawn if value not in taken][:questions]
    facts = [
        f"The {attribute} of the {name} {thing} is {value}."
        for name, (thing, attribute), value in zip(names, things, values, strict=True)
    ]
    text, spans = _insert(passage, facts, rng)
    document = Document(id=text_id(text), title=title, text=text)
    samples = []
    for i, (name, (thing, attribute), value) in enumerate(zip(names, things, values, strict=True)):
        form = forms[i % len(forms)]
        task, answer_type, reward, question = FORMS[form]
        made = {"name": name, "thing": thing, "attribute": attribute}
        samples.append(
            Sample(
                id=sample_id("needle", [document.id, form, name]),
                task=task,
                subtype=f"planted_{form}",
                split=split,
                question=fill(question, **made),
                instructions=INSTRUCTIONS,
                documents=[document],
                answers=[value if form == "value" else facts[i]],
                answer_type=answer_type,
                reward=reward,
                evidence=[Evidence(doc=document.id, start=spans[i][0], end=spans[i][1])],
                derivation={"kind": "template", **made, "value": value},
            )
        )
    return samples


def _insert(
    passage: str, facts: Sequence[str], rng: random.Random
) -> tuple[str, list[tuple[int, int]]]:
    """The passage with every fact after one of its sentences, and where each fact stands."""
    ends = [end for _, end in split_sentences(passage)]
    has_room = len(ends) >= len(facts)  # else some facts are neighbours
    places = sorted(rng.sample(ends, len(facts)) if has_room else rng.choices(ends, k=len(facts)))
    text, done, spans = "", 0, []
    for place, fact in zip(places, facts, strict=True):
        text += passage[done:place] + " "
        spans.append((len(text), len(text) + len(fact)))
        text += fact
        done = place
    return text + passage[done:], spans
