"""What a training step reports: rows for reading, and the numbers of ``qwenlong.metrics``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from qwenlong.aepo import EntropyController
from qwenlong.episodes import Environment
from qwenlong.types import Sample, Trajectory

Metrics = dict[str, float]


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: Metrics = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"seconds/{name}"] = now - self._last
        self._last = now

    def metrics(self, rows: Sequence[dict[str, Any]]) -> Metrics:
        """Laps, and tokens read and written (a prompt counts for each of its answers) a second."""
        tokens = sum(row["prompt_tokens"] + row["response_tokens"] for row in rows)
        return {**self._laps, "tokens_per_s": tokens / (self._last - self._start)}


def trajectory_rows(
    environment: Environment,
    samples: Sequence[Sample],
    rolled: Sequence[Trajectory],
    trained: Sequence[Trajectory],
    advantages: torch.Tensor,
) -> list[dict[str, Any]]:
    """One JSON row a trajectory; the first ``rollout.saved_per_step`` with their texts."""
    task_of = {sample.id: sample.task for sample in samples}
    advantage_of = {id(t): a for t, a in zip(trained, advantages.tolist(), strict=True)}
    rows = []
    for index, t in enumerate(rolled):
        row = {
            "sample_id": t.sample_id,
            "task": task_of[t.sample_id],
            "rollout_index": t.rollout_index,
            "reward": t.reward.to_json(),
            "advantage": advantage_of.get(id(t)),  # None: the reward was left open
            "prompt_tokens": sum(len(turn.prompt_ids) for turn in t.turns),
            "response_tokens": sum(len(turn.response_ids) for turn in t.turns),
            "finish_reason": t.turns[-1].finish_reason,
        }
        if index < environment.settings.saved_per_step:
            row["responses"] = [environment.text(turn) for turn in t.turns]
        rows.append(row)
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> Metrics:
    """Means over the trajectories of a step; rewards are those that are known."""
    rewards: dict[str, list[float]] = {}
    groups: dict[str, set[float]] = {}
    known = [row for row in rows if row["advantage"] is not None]
    for row in known:
        rewards.setdefault(row["task"], []).append(row["reward"]["value"])
        groups.setdefault(row["sample_id"], set()).add(row["reward"]["value"])
    return {
        "reward": statistics.fmean(row["reward"]["value"] for row in known),
        **{f"reward/{task}": statistics.fmean(rewards[task]) for task in sorted(rewards)},
        "reward_errors": sum(row["reward"]["source"] == "error" for row in rows),
        "response_tokens": statistics.fmean(row["response_tokens"] for row in rows),
        "truncated_fraction": statistics.fmean(row["finish_reason"] == "length" for row in rows),
        "live_fraction": statistics.fmean(len(values) > 1 for values in groups.values()),
    }


def aepo_metrics(controller: EntropyController | None, kept: torch.Tensor) -> Metrics:
    """``kept``: trajectories that keep their gradient, and all of them."""
    if controller is None:
        return {}
    n_kept, n_all = kept.tolist()
    return {
        "aepo/drops_negatives": float(n_kept < n_all),
        "aepo/kept_fraction": n_kept / max(1, n_all),
        "aepo/low": controller.low,
        "aepo/high": controller.high,
    }
