"""A small corpus and a route over it, whose answers a reader can check by hand."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenlong.data.documents import SourceDocument
from qwenlong.data.store import sha256
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
    pages = []
    for document in documents:
        start = document.text.find("The keeper named Warden")
        if start >= 0:
            end = document.text.index(".", start) + 1
            words = document.text[start:end].rstrip(".").split()
            pages.append((document, start, end, words[3], words[-1]))
    if len(pages) < keepers:
        return
    for _ in range(limit):
        chosen = rng.sample(pages, keepers)
        names = " and ".join(page[3] for page in chosen)
        question = f"Which codes, joined in this order, do {names} guard?"
        answer = "-".join(page[4] for page in chosen)
        yield Sample(
            id=f"toy-{sha256(question + answer)}"[:24],
            task="multihop_qa",
            subtype="multi_fact",
            split=chosen[0][0].split,
            question=question,
            instructions="Write the codes with hyphens between them.",
            documents=[Document(id=p[0].id, title=p[0].title, text=p[0].text) for p in chosen],
            answers=[answer],
            answer_type="text",
            reward="cover",
            evidence=[Evidence(doc=p[0].id, start=p[1], end=p[2]) for p in chosen],
            derivation={"kind": "template", "keepers": [p[3] for p in chosen]},
        )
