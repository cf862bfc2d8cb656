"""What a reply repeats of a section, as whole sentences of the section.

A model too small to rewrite a memory still copies: here it is only asked to copy, and what it wrote
counts as far as it stands in the section. A number that it garbles comes from the section; what it
makes up stands nowhere.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator

from qwenlong.data.documents import split_sentences

LEAST_WORDS = 6  # that reply and section share, one after the other
_MOST_PLACES = 3  # in a section of so many words in a row: more, and they are a phrase
_MOST_CHARACTERS = 600  # of a sentence; of a longer one, code or a table, the line is quoted
_WORD = re.compile(r"\w+")


def quotes_of(reply: str, section: str) -> list[str]:
    """The sentences (or lines) of ``section`` that share ``LEAST_WORDS`` words in a row with
    ``reply``, in the section's order, each once. Case and punctuation do not count.
    """
    wanted = [m.group().casefold() for m in _WORD.finditer(reply)]
    runs = {tuple(wanted[i : i + LEAST_WORDS]) for i in range(len(wanted) - LEAST_WORDS + 1)}
    if not runs:
        return []
    found = list(_WORD.finditer(section))
    words = [m.group().casefold() for m in found]
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in range(len(words) - LEAST_WORDS + 1):
        run = tuple(words[i : i + LEAST_WORDS])
        if run in runs:
            places[run].append(i)
    firsts = {i for at in places.values() if len(at) <= _MOST_PLACES for i in at}
    # a run may go on into the next sentence: its middle says where it belongs
    middles = sorted(found[i + LEAST_WORDS // 2].start() for i in firsts)
    quotes: dict[str, None] = {}
    for start, end in _pieces(section):
        i = bisect_left(middles, start)
        if i < len(middles) and middles[i] < end:
            quotes[" ".join(section[start:end].split())] = None
    return list(quotes)


def _pieces(section: str) -> Iterator[tuple[int, int]]:
    for start, end in split_sentences(section):
        if end - start <= _MOST_CHARACTERS:
            yield start, end
            continue
        for line in re.finditer(r"[^\n]+", section[start:end]):
            yield start + line.start(), start + line.end()


def keep_best(quotes: list[str], problem: str, fits: Callable[[list[str]], bool]) -> list[str]:
    """As many quotes as ``fits`` takes: first goes what shares the fewest words with ``problem``,
    of equals the latest.
    """
    asked = {m.group().casefold() for m in _WORD.finditer(problem)}

    def shared(i: int) -> tuple[int, int]:
        return len(asked & {m.group().casefold() for m in _WORD.finditer(quotes[i])}), -i

    kept = list(range(len(quotes)))
    while kept and not fits([quotes[i] for i in kept]):
        kept.remove(min(kept, key=shared))
    return [quotes[i] for i in kept]
