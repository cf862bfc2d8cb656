"""Questions that need every part of the context: which words occur most often.

After RULER's aggregation tasks (arXiv 2404.06654). The context is lists of words of real text.
``common_words``: ten words occur four times as often as each of the others. ``frequent_words``: the
counts fall as a power of the rank, and the three most frequent words are asked for. The words asked
for are spread evenly, each of the others stands in one stretch, where it is more frequent than they
are: a small part of the context misleads. The counts are taken from the lists as written, and
a list in which the answer is not clear by a quarter is drawn again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from qwenlong.errors import InputError
from qwenlong.evals.haystack import Context, Haystack, header_tokens
from qwenlong.evals.samples import build, sample_rng
from qwenlong.types import Document, Sample

COMMON = 10
COMMON_FACTOR = 4  # how much more often a common word occurs than another
FREQUENT = 3
POWER = 1.0  # counts fall as rank ** -POWER
VOCABULARY = 1_000  # most words besides the common ones
STRETCH = 0.04  # of the context, in which a word that is not asked for stands
LIST_TOKENS = 2_000  # of one document
_GAP = 1.25  # between the last word asked for and the first one not
_WORD = re.compile(r"\b[a-z]{4,10}\b")
_MIN_WORDS = 120

_QUESTION = (
    "All documents together are one long list of words. Which {count} words occur most often in it?"
)


def vocabulary(haystack: Haystack) -> list[str]:
    """Frequent words of the haystack, of 4 to 10 letters, none of which is another's plural."""
    counts: Counter[str] = Counter()
    for page in haystack.pages[:400]:
        counts.update(_WORD.findall(page.text))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[: 3 * VOCABULARY]
    known = set(ordered)
    return [w for w in ordered if not (w.endswith("s") and w[:-1] in known)]


def common_words(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """The ``COMMON`` words that occur ``COMMON_FACTOR`` times as often as the rest."""

    def weights(n_words: int) -> list[float]:
        others = min(VOCABULARY, n_words // 2 - COMMON_FACTOR * COMMON)
        others = max(20, others)
        return [float(COMMON_FACTOR)] * COMMON + [1.0] * others

    return _samples(haystack, "common_words", COMMON, weights, length, count, seed)


def frequent_words(haystack: Haystack, *, length: int, count: int, seed: int) -> Iterator[Sample]:
    """The ``FREQUENT`` words at the head of a power law."""

    def weights(n_words: int) -> list[float]:
        ranks = range(1, min(VOCABULARY, max(20, n_words // 4)) + 1)
        return [rank**-POWER for rank in ranks]

    return _samples(haystack, "frequent_words", FREQUENT, weights, length, count, seed)


def _samples(
    haystack: Haystack,
    subtype: str,
    wanted: int,
    weights: Callable[[int], list[float]],
    length: int,
    count: int,
    seed: int,
) -> Iterator[Sample]:
    words = vocabulary(haystack)
    if len(words) < 100:
        raise InputError(f"{subtype}: the haystack has only {len(words)} different words")
    for index in range(count):
        rng = sample_rng(seed, subtype, length, index)
        for _ in range(20):
            context, top = _lists(haystack, rng, words, weights, length, wanted)
            ranked = top.most_common(wanted + 1)
            if len(ranked) > wanted and ranked[wanted - 1][1] >= _GAP * ranked[wanted][1]:
                break
        else:
            raise InputError(f"{subtype}: {length:,} tokens are too few for a clear answer")
        yield build(
            haystack,
            context,
            subtype=subtype,
            length=length,
            seed=seed,
            index=index,
            question=_QUESTION.format(count=wanted),
            answers=[word for word, _ in ranked[:wanted]],
            derivation={"counts": dict(ranked), "n_words": top.total()},
        )


def _lists(
    haystack: Haystack,
    rng: random.Random,
    words: Sequence[str],
    weights: Callable[[int], list[float]],
    length: int,
    wanted: int,
) -> tuple[Context, Counter[str]]:
    """Documents of word lists that fill ``length``, and the counts of the words in them.

    The first ``wanted`` words of ``weights`` are spread over the whole.
    """
    tokens = haystack.tokens
    per_word = tokens(" ".join(words[:VOCABULARY])) / min(len(words), VOCABULARY)
    n_words = int(length / per_word)
    if n_words < _MIN_WORDS:
        raise InputError(f"a context of {length:,} tokens is too short for a list of words")
    shares = weights(n_words)
    chosen = rng.sample(list(words), min(len(shares), len(words)))
    shares = shares[: len(chosen)]
    scale = n_words / sum(shares)
    places: list[tuple[float, str]] = []
    for number, (word, share) in enumerate(zip(chosen, shares, strict=True)):
        start, stretch = rng.random() * (1 - STRETCH), STRETCH
        if number < wanted:
            start, stretch = 0.0, 1.0
        for _ in range(max(1, round(scale * share))):
            places.append((start + stretch * rng.random(), word))
    sequence = [word for _, word in sorted(places)]
    documents: list[Document] = []
    counts: Counter[str] = Counter()
    n_tokens, at = 0, 0
    per_list = int(LIST_TOKENS / per_word)
    while at < len(sequence):
        title = f"Word list, part {len(documents) + 1}"
        header = header_tokens(tokens, len(documents) + 1, title)
        room = length - n_tokens - header
        text = tokens.head(" ".join(sequence[at : at + per_list]), room)
        if not text:
            break
        written = text.split()
        if written[-1] != sequence[at + len(written) - 1]:
            raise AssertionError("a word list was cut inside a word")
        counts.update(written)
        at += len(written)
        number = len(documents) + 1
        documents.append(Document(id=f"list-{number}", title=title, text=text))
        n_tokens += header + tokens(text)
    return Context(documents, [], n_tokens, 1), counts
