"""A small corpus and a route over it, whose answers a reader can check by hand."""

import itertools
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenlong.data.documents import SourceDocument
from qwenlong.data.store import sha256
from qwenlong.llm import Client, RetryPolicy, ScriptedClient, TransientError
from qwenlong.types import Document, Evidence, Sample

WORDS = (
    "river stone lamp garden winter letter bridge market silver morning thread castle window paper "
    "forest engine salt candle harbour meadow copper music valley ladder orchard mirror"
).split()


def filler(rng: random.Random, sentences: int) -> str:
    return " ".join(
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(6, 14))).capitalize() + "."
        for _ in range(sentences)
    )


def toy_text(number: int, *, sentences: int = 12) -> str:
    """A page about one keeper, with one fact: the code that the keeper holds."""
    rng = random.Random(number)
    code = f"{number * 7919 % 1_000_003:06d}"
    fact = f"The keeper named Warden{number:05d} guards the code {code}."
    return f"{filler(rng, sentences // 2)} {fact} {filler(rng, sentences - sentences // 2)}\n"


def write_corpus(folder: Path, count: int, *, sentences: int = 12, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        text = toy_text(number, sentences=sentences)
        (folder / f"page-{number:05d}.txt").write_text(text, encoding="utf-8")
    return folder


def toy_samples(
    documents: Sequence[SourceDocument], *, seed: int, limit: int, keepers: int = 3
) -> Iterator[Sample]:
    """Questions for the codes of ``keepers`` wardens in a row: as many documents are needed."""
    rng = random.Random(seed)
    pages: dict[str, list] = {"train": [], "eval": []}
    for document in documents:
        start = document.text.find("The keeper named Warden")
        if start >= 0:
            end = document.text.index(".", start) + 1
            words = document.text[start:end].rstrip(".").split()
            pages[document.split].append((document, start, end, words[3], words[-1]))
    splits = [split for split in ("train", "eval") if len(pages[split]) >= keepers]
    for _ in range(limit if splits else 0):
        split = splits[-1] if rng.random() < 0.05 else splits[0]
        chosen = rng.sample(pages[split], keepers)
        names = " and ".join(page[3] for page in chosen)
        question = f"Which codes, joined in this order, do {names} guard?"
        answer = "-".join(page[4] for page in chosen)
        yield Sample(
            id=f"toy-{sha256(question + answer)}"[:24],
            task="multihop_qa",
            subtype="multi_fact",
            split=split,
            question=question,
            instructions="Write the codes with hyphens between them.",
            documents=[Document(id=p[0].id, title=p[0].title, text=p[0].text) for p in chosen],
            answers=[answer],
            answer_type="text",
            reward="cover",
            evidence=[Evidence(doc=p[0].id, start=p[1], end=p[2]) for p in chosen],
            derivation={"kind": "template", "keepers": [p[3] for p in chosen]},
        )


def choosy_samples(documents, *, seed: int, limit: int, dropped=None) -> Iterator[Sample]:
    """Counts every second page under one reason, and every page under one of its own."""
    for place, document in enumerate(documents):
        dropped[f"{document.title} is dull"] += 1
        if place % 2:
            dropped["the page is odd"] += 1
    yield from toy_samples(documents, seed=seed, limit=limit)


def slow_samples(documents: Sequence[SourceDocument], *, seed: int, limit: int) -> Iterator[Sample]:
    """Says who runs it, then takes its time."""
    Path(os.environ["TOY_PIDS"]).write_text(str(os.getpid()))
    time.sleep(60)
    yield from toy_samples(documents, seed=seed, limit=limit)


def asks_a_model(documents, *, seed: int, limit: int, client) -> Iterator[Sample]:
    yield from toy_samples(documents, seed=seed, limit=limit)


# --- models ------------------------------------------------------------------

FACT = re.compile(r"The keeper named (\w+) guards the code (\d+)")
DIES_AFTER = 10  # answers of a dying server


def _read(messages: list[dict]) -> str:
    """Answer from the documents in the prompt, and only from them."""
    prompt = messages[-1]["content"]
    codes = dict(FACT.findall(prompt))
    names = re.findall(r"Warden\d+", prompt.rsplit("Question:", 1)[1])
    if not all(name in codes for name in names):
        return "I cannot know that."
    return f"Therefore, the answer is ({'-'.join(codes[name] for name in names)})"


def reader(**options) -> Client:
    return ScriptedClient(_read, **options)


def babbler(**options) -> Client:
    """Answers that are empty, broken or about something else."""
    rng = random.Random(0)
    replies = ["", "Therefore, the answer is (", "{", "I am sorry", "\ufffd" * 50, "the " * 2000]
    return ScriptedClient(lambda messages: rng.choice(replies), **options)


def dying_server(**options) -> Client:
    """Answers ``DIES_AFTER`` times, then never."""
    faults = itertools.chain([None] * DIES_AFTER, itertools.repeat(TransientError("down")))
    return ScriptedClient(_read, faults=faults, retry=RetryPolicy(max_retries=0), **options)


def dead_server(**options) -> Client:
    faults = itertools.repeat(TransientError("down"))
    return ScriptedClient(_read, faults=faults, retry=RetryPolicy(max_retries=0), **options)


def extractor(**options) -> Client:
    """Reads the one fact of a page, as JSON."""

    def reply(messages: list[dict]) -> str:
        found = FACT.search(messages[-1]["content"])
        if found is None:
            return "There is no text."
        triple = {
            "subject": found[1],
            "relation": "guards the code",
            "object": found[2],
            "quote": found[0],
        }
        return json.dumps({"triples": [triple]})

    return ScriptedClient(reply, **options)


def extracted_samples(documents, *, seed: int, limit: int, extracted=()) -> Iterator[Sample]:
    """One question a triple."""
    by_id = {document.id: document for document in documents}
    for triple in list(extracted)[:limit]:
        document = by_id[triple.doc]
        yield Sample(
            id=f"fact-{triple.doc}",
            task="reading_qa",
            split=document.split,
            question=f"Which code does {triple.subject} guard?",
            documents=[Document(id=document.id, title=document.title, text=document.text)],
            answers=[triple.object],
            answer_type="text",
            reward="cover",
            evidence=[Evidence(doc=document.id, start=triple.start, end=triple.end)],
            derivation={"kind": "template", "subject": triple.subject},
        )
