"""What a training stage trains on: samples of its lengths, and hard ones of the stages before.

Stage k takes the samples with L_(k-1) < n <= L_k tokens of question and context, and draws again
from earlier ones by difficulty (arXiv 2505.17667, equations 9 and 10; arXiv 2512.12967, section
4.1):

    diff(x) = 1 / mean reward of a group of answers to x,  P(x is drawn next) proportional to diff

A sample that no answer solved has diff = infinity: it is drawn before any that was solved, which is
how the papers' zero-accuracy samples are carried over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from qwenlong.sampler import draw_key
from qwenlong.types import Sample, Trajectory

T = TypeVar("T")


def within_lengths(samples: Sequence[T], n_tokens: Sequence[int], above: int, up_to: int) -> list:
    """The samples with ``above < n <= up_to``, in their order.

    Args:
        samples: of any kind.
        n_tokens: prompt tokens of each, under the tokenizer of the policy.
        above: the input length of the stage before, 0 for the first stage.
        up_to: the input length of this stage.
    """
    if not 0 <= above < up_to:
        raise ValueError(f"within_lengths: needs 0 <= above < up_to, got {above} and {up_to}")
    return [s for s, n in zip(samples, n_tokens, strict=True) if above < n <= up_to]


def mean_rewards(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Mean reward by ``sample_id``. Rewards that are missing or whose source is ``"error"`` say
    nothing about the sample and are left out; a sample with no other has no entry.
    """
    values = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.reward is not None and trajectory.reward.source != "error":
            values[trajectory.sample_id].append(trajectory.reward.value)
    return {sample_id: math.fsum(v) / len(v) for sample_id, v in values.items()}


def difficulty(mean_reward: float) -> float:
    """``1 / mean_reward``; infinity where nothing was solved."""
    if not 0 <= mean_reward < math.inf:
        raise ValueError(
            f"difficulty: the mean reward is {mean_reward}; it must be finite and at least 0"
        )
    return 1 / mean_reward if mean_reward > 0 else math.inf


def retrospective_sample(
    samples: Sequence[Sample], rewards: Sequence[float], n: int, seed: int
) -> list[Sample]:
    """Draw ``n`` samples without replacement, each draw proportional to difficulty.

    Unsolved samples come first; if there are more than ``n`` of them, they are drawn uniformly.

    Args:
        samples: of the earlier stages; ids must differ.
        rewards: mean reward of each, best measured at the next stage's lengths.
        n: at most ``len(samples)``.
        seed: the draw depends on it, the ids and the rewards, not on the order.

    Returns:
        The samples drawn, in the order they came.
    """
    if not 0 <= n <= len(samples):
        raise ValueError(
            f"retrospective_sample: n is {n}; there are {len(samples)} samples to draw from"
        )
    if len({sample.id for sample in samples}) < len(samples):
        raise ValueError("retrospective_sample: two samples have the same id")
    # The first n arrivals of clocks with rate diff: an exponential waiting time, divided by diff,
    # orders samples as successive weighted draws without replacement do.
    arrivals = []
    for index, (sample, reward) in enumerate(zip(samples, rewards, strict=True)):
        wait = -math.log(draw_key("retrospective", seed, sample.id))
        arrivals.append((wait / difficulty(reward), wait, index))
    return [samples[index] for index in sorted(index for *_, index in sorted(arrivals)[:n])]
