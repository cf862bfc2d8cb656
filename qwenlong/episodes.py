"""From samples to trajectories: what the policy is asked, and in how many turns.

An episode function takes the environment, the samples of a step and a seed, and returns
``group_size`` trajectories of each sample, in order. ``@register_episodes(name)`` makes it a choice
of ``rollout.episodes``. All turns of a trajectory are trained on, with the advantage of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlong import prompts
from qwenlong.config import RolloutSettings
from qwenlong.memory_agent import AgentConfig
from qwenlong.rewards import Judge, score_many
from qwenlong.rollout import Rollouts
from qwenlong.rollout.agent import AgentRollouts
from qwenlong.types import Sample, Trajectory, Turn


@dataclass
class Environment:
    """Where the policy acts: who samples its answers, and how text becomes tokens and back."""

    rollouts: Rollouts
    tokenizer: Any
    settings: RolloutSettings
    group_size: int
    resolve: Callable[[str], str] | None = None  # text of a document that a sample refers to
    judge: Judge | None = None
    require_think_end: bool = False

    def text(self, turn: Turn) -> str:
        return self.tokenizer.decode(turn.response_ids, skip_special_tokens=True)

    def close(self) -> None:
        self.rollouts.close()
        if self.judge is not None:
            self.judge.client.close()


Episodes = Callable[[Environment, Sequence[Sample], int, int], list[Trajectory]]
EPISODES: dict[str, Episodes] = {}


def register_episodes(name: str) -> Callable[[Episodes], Episodes]:
    """Register ``episodes(environment, samples, seed, policy_step) -> trajectories``."""

    def register(function: Episodes) -> Episodes:
        if name in EPISODES:
            raise ValueError(f"register_episodes: {name!r} is registered already")
        EPISODES[name] = function
        return function

    return register


def seed_of(*parts: object) -> int:
    """A 63-bit seed that follows from ``parts`` on every platform."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_ids(tokenizer: Any, messages: list[prompts.Message]) -> list[int]:
    """Token ids of chat messages; their bare text where the tokenizer has no chat template."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n\n".join(m["content"] for m in messages) + "\n")["input_ids"]


def with_rewards(
    environment: Environment, samples: Sequence[Sample], trajectories: Sequence[Trajectory]
) -> list[Trajectory]:
    """The trajectories with the reward of their last turn (arXiv 2512.12967, section 2.3)."""
    by_id = {sample.id: sample for sample in samples}
    pairs = [(by_id[t.sample_id], environment.text(t.turns[-1])) for t in trajectories]
    scores = score_many(
        pairs, judge=environment.judge, require_think_end=environment.require_think_end
    )
    return [
        t.model_copy(update={"reward": score})
        for t, score in zip(trajectories, scores, strict=True)
    ]


# --- episodes ----------------------------------------------------------------


@register_episodes("full")
def full_context(
    environment: Environment, samples: Sequence[Sample], seed: int, policy_step: int
) -> list[Trajectory]:
    """One turn: all documents, the question, an answer."""
    asked = [
        prompt_ids(environment.tokenizer, prompts.render(sample, resolve=environment.resolve))
        for sample in samples
    ]
    groups = environment.rollouts.generate(
        asked,
        group_size=environment.group_size,
        max_new_tokens=environment.settings.max_new_tokens,
        temperature=environment.settings.temperature,
        seed=seed,
    )
    return [
        Trajectory(
            sample_id=sample.id,
            group_id=sample.id,
            rollout_index=index,
            policy_step=policy_step,
            turns=[turn],
        )
        for sample, group in zip(samples, groups, strict=True)
        for index, turn in enumerate(group)
    ]


@register_episodes("memory_agent")
def memory_agent(
    environment: Environment, samples: Sequence[Sample], seed: int, policy_step: int
) -> list[Trajectory]:
    """K + 1 turns: the documents in chunks, each with an update of the memory, then an answer."""
    agent = environment.settings.agent
    config = AgentConfig(**agent.model_dump(), answer_tokens=environment.settings.max_new_tokens)
    rollouts = AgentRollouts(environment.rollouts, environment.tokenizer, config)
    return rollouts.generate(
        samples,
        group_size=environment.group_size,
        temperature=environment.settings.temperature,
        seed=seed,
        policy_step=policy_step,
        resolve=environment.resolve,
    )
