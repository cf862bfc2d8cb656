"""Rewards by name: ``score(sample, response)`` runs the rule, then the judge where the rule fails.

The reward is ``max(rule, judge)`` (arXiv 2512.12967, section 5.1; arXiv 2505.17667, eq. 14). A rule
is a function ``(sample, text) -> Graded``; ``@register_reward(name)`` makes it known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlong.rewards.extract import final_text
from qwenlong.types import Reward, Sample

if TYPE_CHECKING:
    from qwenlong.rewards.judge import Judge


@dataclass(frozen=True)
class Graded:
    """What a rule says: a value in [0, 1] and the answer that it looked at."""

    value: float
    extracted: str | None


class Score(Reward):
    """A reward with the answer it is for. ``skipped`` marks one that a failed judge left open."""

    extracted: str | None = None
    scorer: str
    skipped: bool = False


Rule = Callable[[Sample, str], Graded]


@dataclass(frozen=True)
class _Entry:
    rule: Rule
    judge: bool


_REWARDS: dict[str, _Entry] = {}


def register_reward(name: str, *, judge: bool = False) -> Callable[[Rule], Rule]:
    """Register ``rule(sample, text) -> Graded`` under ``name``.

    ``text`` is the response after its thinking, never empty. With ``judge`` a response that the
    rule gives less than 1 may go to a judge, which sees ``Graded.extracted``.
    """

    def register(rule: Rule) -> Rule:
        if name in _REWARDS:
            raise ValueError(f"register_reward: {name!r} is registered already")
        _REWARDS[name] = _Entry(rule, judge)
        return rule

    return register


def reward_names() -> list[str]:
    return sorted(_REWARDS)


def _entry(name: str) -> _Entry:
    if name not in _REWARDS:
        raise ValueError(f"score: unknown reward {name!r}; choose one of {reward_names()}")
    return _REWARDS[name]


def grade(sample: Sample, response: str, *, require_think_end: bool = False) -> Score:
    """The rule's word alone, no judge. A response without a final text scores 0."""
    entry = _entry(sample.reward)
    final = final_text(response, require_think_end=require_think_end)
    graded = entry.rule(sample, final) if final.strip() else Graded(0.0, None)
    return Score(
        value=float(graded.value),
        source="rule",
        scorer=sample.reward,
        extracted=graded.extracted,
    )


def score(
    sample: Sample,
    response: str,
    *,
    judge: Judge | None = None,
    require_think_end: bool = False,
) -> Score:
    """Reward of one response: the rule first, the judge only where the rule gives less than 1.

    Args:
        sample: its ``reward`` names the rule, its ``answers`` are the golds (the best one counts).
        response: the whole generated text. Thinking up to the last ``</think>`` is cut away.
        judge: asked if the reward takes a judge; None leaves the rule's word.
        require_think_end: a response without ``</think>`` scores 0.
    """
    return score_many([(sample, response)], judge=judge, require_think_end=require_think_end)[0]


def score_many(
    items: Iterable[tuple[Sample, str]],
    *,
    judge: Judge | None = None,
    require_think_end: bool = False,
) -> list[Score]:
    """``score`` of each pair, in order; the judge calls run at the same time."""
    items = list(items)
    scores = [grade(s, r, require_think_end=require_think_end) for s, r in items]
    if judge is None:
        return scores
    open_at = [
        i
        for i, (sample, _) in enumerate(items)
        if scores[i].value < 1.0 and scores[i].extracted and _entry(sample.reward).judge
    ]
    verdicts = judge.verdicts(
        [(items[i][0].question, scores[i].extracted, items[i][0].answers) for i in open_at]
    )
    for i, verdict in zip(open_at, verdicts, strict=True):
        value = scores[i].value
        if verdict.is_same is None:
            update = {"source": "error", "skipped": judge.on_failure == "skip"}
        else:
            update = {"source": "judge", "value": max(value, float(verdict.is_same))}
        scores[i] = scores[i].model_copy(update=update)
    return scores
