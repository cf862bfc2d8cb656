"""Means over questions with 95 % confidence intervals, and the difference of two runs.

The question is the unit: samples of one question are not independent, so each question counts once,
with the mean of its samples.

**One run: Wilson's score interval at the effective sample size.** With n question means of mean p
and variance s² (n - 1 in the denominator), n_eff = p (1 - p) / (s² / n), between 1 and the number
of all samples; where s² is 0, n_eff = n. One sample a question, scored 0 or 1, gives n_eff = n - 1,
Wilson's interval almost unchanged: it stays inside [0, 1] and is not empty at 0 or n right answers.
This is the rule of complex surveys (Korn and Graubard 1998) with Wilson's interval in the place of
Clopper and Pearson's.

**Two runs over the same questions: the two intervals combined** (Newcombe 1998, Statistics in
Medicine 17, 2635-2650, method 10; Zou and Donner 2008). With means p, q, their intervals (l, u) and
(m, v), and r the correlation of the question means over the questions (0 where one of them does not
vary), the difference p - q has the interval from

    p - q - sqrt((p - l)² - 2 r (p - l) (v - q) + (v - q)²)
    to p - q + sqrt((u - p)² - 2 r (u - p) (q - m) + (q - m)²),

which is not empty where all questions of both runs are wrong, as a bootstrap's would be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A mean in [0, 1] and its 95 % interval, over ``questions`` with ``samples`` in all."""

    mean: float
    low: float
    high: float
    questions: int
    samples: int


def estimate(scores: Sequence[Sequence[float]]) -> Estimate:
    """The mean of question means, and its interval.

    Args:
        scores: of each question, the scores of its samples, in [0, 1]; none is empty.
    """
    if not scores or any(not samples for samples in scores):
        raise ValueError("estimate: every question needs a score, and there must be one question")
    values = np.array([s for samples in scores for s in samples], dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # NaN fails as well
        raise ValueError("estimate: scores must lie in [0, 1]")
    means = np.array([np.mean(samples) for samples in scores])
    n, total = len(means), len(values)
    mean = float(means.mean())
    variance = float(means.var(ddof=1)) if n > 1 else 0.0
    spread = mean * (1.0 - mean)
    if n == 1:
        effective = 1.0
    elif variance <= 1e-12:
        effective = float(n)
    else:
        effective = min(max(spread / (variance / n), 1.0), float(total))
    low, high = wilson(mean, effective)
    return Estimate(mean, low, high, n, total)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of ``share`` out of ``n`` (> 0, need not be whole)."""
    centre = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low, high = (centre - half) / scale, (centre + half) / scale
    # Where nothing or everything is right the end is exact; rounding must not move it.
    return (0.0 if share == 0 else max(0.0, low)), (1.0 if share == 1 else min(1.0, high))


@dataclass(frozen=True)
class Difference:
    """Mean of ``first - second`` over the questions of both, and its 95 % interval."""

    mean: float
    low: float
    high: float
    questions: int


def difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> Difference:
    """The paired difference of two runs, by question id; questions of one run alone are left out.

    Raises:
        ValueError: they share no question.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("difference: the two runs share no question")
    one, two = (estimate([list(run[q]) for q in shared]) for run in (first, second))
    means = np.array([[np.mean(run[q]) for q in shared] for run in (first, second)])  # [2, n]
    varies = bool((means.std(axis=1) > 1e-9).all())
    r = float(np.corrcoef(means)[0, 1]) if varies else 0.0
    mean = one.mean - two.mean
    below = _combined(one.mean - one.low, two.high - two.mean, r)
    above = _combined(one.high - one.mean, two.mean - two.low, r)
    return Difference(mean, mean - below, mean + above, len(shared))


def _combined(a: float, b: float, r: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * r * a * b + b * b))
