"""What the generators share: one sample from a context, seeds, depths, names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwenlong.evals.haystack import Context, Haystack, Page
from qwenlong.prompts import TEXT_INSTRUCTIONS
from qwenlong.types import Sample, TokenCount

LIST_INSTRUCTIONS = "Separate several answers with commas. " + TEXT_INSTRUCTIONS

_ADJECTIVES = (
    "amber ancient bitter brisk bronze calm careful cedar clever coastal copper crimson curious "
    "dusty eager early fabled faded fierce frosty gentle gilded golden hidden hollow humble icy "
    "ivory jagged jolly keen lively lonely lucky marble mellow misty modest narrow nimble noble "
    "olive pale patient polite quiet rapid restless rustic scarlet secret shady silent silver "
    "sleepy solemn spotted steady stormy sturdy sunny swift tidy timid velvet violet wandering "
    "weary wooden"
).split()
_NOUNS = (
    "anchor badger barrel basket beacon bridge buffalo candle canyon castle cellar chapel cliff "
    "compass cottage crane dolphin donkey dragon eagle falcon feather ferry forest fountain garden "
    "glacier goose hammer harbour hedgehog heron island jaguar kettle ladder lantern lark library "
    "lighthouse lizard magnet market meadow mill mirror monastery mountain oak observatory otter "
    "orchard owl palace panther pigeon pillar prairie quarry raven reservoir river saddle salmon "
    "sparrow spider squirrel stable stork summit temple tiger tower tunnel turtle valley violin "
    "walrus whistle windmill"
).split()


def sample_rng(seed: int, task: str, length: int, index: int) -> random.Random:
    """The generator of one sample: the same whatever else is made beside it."""
    return random.Random(f"{seed}/{task}/{length}/{index}")


def names(rng: random.Random, count: int) -> list[str]:
    """``count`` different names of two words ("amber anchor")."""
    pairs = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), count)
    return [f"{_ADJECTIVES[p // len(_NOUNS)]} {_NOUNS[p % len(_NOUNS)]}" for p in pairs]


def numbers(rng: random.Random, count: int) -> list[str]:
    """``count`` different numbers of seven digits."""
    return [str(n) for n in rng.sample(range(1_000_000, 10_000_000), count)]


def spread_depths(rng: random.Random, count: int) -> list[float]:
    """One depth in each of ``count`` equal parts of the context, in order."""
    return [(i + rng.random()) / count for i in range(count)]


def single_depth(seed: int, task: str, length: int, index: int, count: int) -> float:
    """The depth of sample ``index`` of ``count``: together they cover the context evenly."""
    order = list(range(count))
    random.Random(f"{seed}/{task}/{length}/depths").shuffle(order)
    return (order[index] + sample_rng(seed, task + "/depth", length, index).random()) / count


def states_any(words: Iterable[str]) -> Callable[[Page], bool]:
    """A ``refuses`` for ``compose``: pages that hold one of ``words``."""
    words = tuple(words)
    return lambda page: any(word in page.text for word in words)


def build(
    haystack: Haystack,
    context: Context,
    *,
    subtype: str,
    length: int,
    seed: int,
    index: int,
    question: str,
    answers: Sequence[str],
    derivation: dict[str, Any],
    task: str = "needle",
    answer_type: str = "needle",
    reward: str = "needle_recall",
    instructions: str = LIST_INSTRUCTIONS,
    **extra: Any,
) -> Sample:
    """The sample over ``context``; ``length`` (its target) and ``laps`` are extra fields."""
    return Sample(
        id=f"{subtype}-{length}-s{seed}-{index:04d}",
        task=task,
        subtype=subtype,
        split="eval",
        question=question,
        instructions=instructions,
        documents=context.documents,
        answers=list(answers),
        answer_type=answer_type,
        reward=reward,
        evidence=context.evidence,
        derivation={"kind": "template", **derivation},
        tokens=TokenCount(tokenizer=haystack.tokens.name, n=context.n_tokens),
        length=length,
        laps=context.laps,
        **extra,
    )
