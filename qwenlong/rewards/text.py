"""Scorers that compare texts.

Normalisation is that of SQuAD (lower case, no ASCII punctuation, no English articles, single
spaces), widened to Unicode: NFKC, case folding, every punctuation mark. A text whose normal form is
empty matches nothing.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ASCII_PUNCTUATION = frozenset(string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normal form, widened to Unicode."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = (
        char
        for char in text
        if char not in _ASCII_PUNCTUATION and not unicodedata.category(char).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def exact_match(prediction: str, gold: str) -> bool:
    """Equal normal forms, not empty."""
    gold = normalize_answer(gold)
    return bool(gold) and normalize_answer(prediction) == gold


def sub_em(prediction: str, gold: str) -> bool:
    """The gold's normal form is a substring of the prediction's ("strict": one direction).

    A substring, not a word: gold ``art`` is found in ``party``. ``cover_match`` looks at words.
    """
    gold = normalize_answer(gold)
    return bool(gold) and gold in normalize_answer(prediction)


def sub_em_loose(prediction: str, gold: str) -> bool:
    """``sub_em`` in either direction: a part of the gold is enough."""
    gold, prediction = normalize_answer(gold), normalize_answer(prediction)
    return bool(gold) and bool(prediction) and (gold in prediction or prediction in gold)


def cover_match(prediction: str, gold: str) -> bool:
    """The gold's words are in the prediction, whole and in a row (cover exact match)."""
    gold = normalize_answer(gold)
    return bool(gold) and f" {gold} " in f" {normalize_answer(prediction)} "


def token_f1(prediction: str, gold: str) -> float:
    """SQuAD's F1 over the words of the normal forms, in [0, 1]."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def sequence_ratio(prediction: str, gold: str) -> float:
    """difflib's similarity of two strings, in [0, 1].

    A prediction beyond ``8 * len(gold) + 10,000`` characters, whose ratio is below 0.23 whatever it
    says, is compared by that many of its first characters; the rest counts as unmatched. Two empty
    strings have nothing in common here: 0.
    """
    if not prediction or not gold:
        return 0.0
    head = prediction[: 8 * len(gold) + 10_000]
    matcher = SequenceMatcher(None, head, gold)
    matched = sum(block.size for block in matcher.get_matching_blocks())
    return 2.0 * matched / (len(prediction) + len(gold))


def mrcr_grade(response: str, gold: str, prefix: str) -> float:
    """MRCR's grader: 0 unless ``response`` starts with ``prefix``, else the ratio without it.

    The prefix is removed from the gold too. An empty prefix asks for nothing.
    """
    if not response.startswith(prefix):
        return 0.0
    return sequence_ratio(response.removeprefix(prefix), gold.removeprefix(prefix))


def needle_recall(prediction: str, golds: list[str]) -> float:
    """Fraction of the distinct needles ``golds`` that stand in the prediction as whole words."""
    needles = {normalize_answer(gold) for gold in golds} - {""}
    found = sum(cover_match(prediction, needle) for needle in needles)
    return found / len(needles) if needles else 0.0
