"""The registered rewards. Most look at the stated answer, or where none is stated at the text.

Of a text that states no answer only the last ``WINDOW`` characters count, and of a stated answer
the first: a reply that copies its documents would contain every gold. A gold longer than half of
that widens the window to twice its length.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from qwenlong.rewards import numbers, text
from qwenlong.rewards.extract import clean_answer, extract_answer, extract_choice
from qwenlong.rewards.registry import Graded, register_reward
from qwenlong.types import Sample

WINDOW = 1_000  # characters


def stated_or_end(sample: Sample, final: str) -> str:
    """The stated answer, or the end of the text; no longer than the window."""
    window = max(WINDOW, 2 * max(len(gold) for gold in sample.answers))
    stated = extract_answer(final)
    return stated[:window] if stated is not None else final.strip()[-window:]


def _register_text(name: str, scorer: Callable[[str, str], float], *, judge: bool) -> None:
    """Register ``scorer(prediction, gold)``; of several golds the best counts."""

    def rule(sample: Sample, final: str) -> Graded:
        answer = stated_or_end(sample, final)
        return Graded(max(float(scorer(answer, gold)) for gold in sample.answers), answer)

    register_reward(name, judge=judge)(rule)


_register_text("exact_match", text.exact_match, judge=True)
_register_text("sub_em", text.sub_em, judge=True)
_register_text("sub_em_loose", text.sub_em_loose, judge=True)
_register_text("cover", text.cover_match, judge=True)
_register_text("token_f1", text.token_f1, judge=False)
_register_text("needle", text.sequence_ratio, judge=False)


@register_reward("needle_recall")
def _needle_recall(sample: Sample, final: str) -> Graded:
    """Every answer is a needle; the fraction of them that the end of the text names."""
    window = max(WINDOW, 2 * sum(len(gold) for gold in sample.answers))
    end = final.strip()[-window:]  # a list may take many lines after "the answer is"
    return Graded(text.needle_recall(end, sample.answers), end)


@register_reward("mrcr")
def _mrcr(sample: Sample, final: str) -> Graded:
    """The sample's own field ``answer_prefix`` is the string that the reply must start with."""
    prefix = (sample.model_extra or {}).get("answer_prefix")
    if not isinstance(prefix, str):
        raise ValueError(
            f"reward 'mrcr': sample {sample.id!r} needs a string field 'answer_prefix'; '' if the "
            "reply needs no prefix"
        )
    grades = [text.mrcr_grade(final, gold, prefix) for gold in sample.answers]
    return Graded(max(grades), final)


@register_reward("multiple_choice")
def _multiple_choice(sample: Sample, final: str) -> Graded:
    choices = sample.choices or []
    letter = extract_choice(final, choices)
    golds = {gold_letter(gold, choices) for gold in sample.answers}
    return Graded(float(letter is not None and letter in golds), letter)


def gold_letter(gold: str, choices: list[str]) -> str | None:
    """The letter of a gold that is a letter, with or without brackets, or the text of an option."""
    letter = clean_answer(gold)
    if len(letter) == 1 and "A" <= letter.upper() < chr(ord("A") + len(choices)):
        return letter.upper()
    same = [i for i, choice in enumerate(choices) if choice.strip() == gold.strip()]
    return chr(ord("A") + same[0]) if len(same) == 1 else None


@register_reward("numeric", judge=True)
def _numeric(sample: Sample, final: str) -> Graded:
    """``sample.tolerance`` is relative to the gold; None means 0.15 %."""
    tolerance = numbers.DEFAULT_TOLERANCE
    if sample.tolerance is not None:
        tolerance = Fraction(str(sample.tolerance))
    return _graded_number(
        sample, final, lambda number, gold: numbers.numbers_match(number, gold, tolerance)
    )


@register_reward("docmath", judge=True)
def _docmath(sample: Sample, final: str) -> Graded:
    return _graded_number(sample, final, numbers.docmath_match)


def _graded_number(
    sample: Sample, final: str, match: Callable[[numbers.Number, numbers.Number], bool]
) -> Graded:
    answer = extract_answer(final)
    if answer is None:
        answer = final.strip().rsplit("\n", 1)[-1].strip()
    answer = answer[:WINDOW]
    number = numbers.parse_number(answer, unit=sample.unit or "")
    for gold in sample.answers:
        gold_number = numbers.parse_gold(gold, sample.unit)
        if gold_number is None:
            is_right = text.exact_match(answer, gold)  # a gold such as "none" or "not given"
        else:
            is_right = number is not None and match(number, gold_number)
        if is_right:
            return Graded(1.0, answer)
    return Graded(0.0, answer)


@register_reward("judge", judge=True)
def _judge_only(sample: Sample, final: str) -> Graded:
    """No rule: the judge alone decides."""
    return Graded(0.0, stated_or_end(sample, final))
