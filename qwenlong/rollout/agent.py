"""Trajectories of the memory agent for training: K updates of memory and plan, then an answer.

Every turn is a conversation of its own: its prompt holds the memory that the turn before it wrote.
The reward is that of the answer and belongs to the trajectory, so that every turn is trained with
the advantage of the whole (arXiv 2512.12967, section 2.3):

    A_i = (R(tau_i) - mean of the group) / std, computed per trajectory, then given to every token
    of every turn; the loss divides by all generated tokens of the group

Nothing is asked twice in training (``repairs`` is 0): a reply without a memory keeps the old one,
and whatever the policy wrote is a turn.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwenlong import prompts
from qwenlong.llm import Completion
from qwenlong.memory_agent import (
    AgentConfig,
    AgentResult,
    ChunkStream,
    MemoryAgent,
    TextSource,
    chat_ids,
)
from qwenlong.memory_agent.machine import Step
from qwenlong.rollout import Rollouts
from qwenlong.types import Sample, Trajectory, Turn


def trajectory_of(
    result: AgentResult,
    *,
    sample_id: str,
    group_id: str | None = None,
    rollout_index: int = 0,
    policy_step: int = 0,
) -> Trajectory:
    """The model calls of one question, K + 1 without repairs, as a trajectory without a reward.

    ``group_id`` defaults to ``sample_id``. The field ``agent`` of the trajectory holds the number
    of chunks and the counts of events.

    Raises:
        ValueError: the result was made without ``record_turns``, or goes on from earlier steps,
            whose turns are not in it.
    """
    if len(result.turns) != result.calls:
        raise ValueError(
            f"trajectory_of: {len(result.turns)} turns of {result.calls} calls are there; run the "
            "whole question with run_agent(..., record_turns=True)"
        )
    return Trajectory(
        sample_id=sample_id,
        group_id=sample_id if group_id is None else group_id,
        rollout_index=rollout_index,
        policy_step=policy_step,
        turns=list(result.turns),
        agent={"chunks": result.chunks, "events": dict(result.events)},
    )


@dataclass
class _Run:
    """One trajectory that is being written."""

    sample: Sample
    index: int
    agent: MemoryAgent
    stream: ChunkStream
    turns: list[Turn] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class AgentRollouts:
    """Samples groups of agent trajectories from any ``Rollouts``.

    One round asks for the next turn of every trajectory at once; documents of different lengths
    are in different phases then, and a round has at most two calls, for updates and for answers,
    which have limits of their own. With ``order="chunk_first"`` the trajectories of a group share
    the chunk as a prefix at every turn, which ``EmbeddedRollouts`` and a server with a prefix cache
    read once.

    Args:
        rollouts: gives token ids.
        tokenizer: the policy's, a fast one.
        config: sizes and order of the prompt; ``repairs`` is taken as 0, and sampling is that of
            ``generate``.
    """

    def __init__(self, rollouts: Rollouts, tokenizer: Any, config: AgentConfig):
        self._rollouts, self._tokenizer = rollouts, tokenizer
        self._config = replace(config, repairs=0)

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        group_size: int,
        temperature: float,
        seed: int,
        policy_step: int = 0,
        resolve: Callable[[str], str] | None = None,
    ) -> list[Trajectory]:
        """``group_size`` trajectories of each sample, in order, without rewards.

        Args:
            samples: a group is the sample's id.
            group_size: G.
            temperature: of the untruncated distribution that is sampled.
            seed: the same seed and weights give the same trajectories.
            policy_step: noted in the trajectories.
            resolve: text of a document that a sample refers to.
        """
        runs = [run for sample in samples for run in self._group(sample, group_size, resolve)]
        turn = 0
        while active := [run for run in runs if run.agent.phase != "done"]:
            asked: dict[int, list[tuple[_Run, list[int]]]] = {}
            for run in active:
                chunk = None
                if run.agent.phase == "read":
                    chunk = run.stream.get(run.agent.chunks_read)
                    if chunk is None:
                        run.agent.finish_reading()
                messages = run.agent.messages(chunk)
                ids = chat_ids(self._tokenizer, messages, self._config)
                asked.setdefault(run.agent.max_tokens, []).append((run, ids))
            for limit, batch in sorted(asked.items()):
                groups = self._rollouts.generate(
                    [ids for _, ids in batch],
                    group_size=1,
                    max_new_tokens=limit,
                    temperature=temperature,
                    seed=_seed_of(seed, turn, limit),
                )
                for (run, _), group in zip(batch, groups, strict=True):
                    self._hear(run, group[0])
            turn += 1
        return [
            Trajectory(
                sample_id=run.sample.id,
                group_id=run.sample.id,
                rollout_index=run.index,
                policy_step=policy_step,
                turns=run.turns,
                agent={
                    "chunks": run.agent.chunks_read,
                    "events": dict(Counter(e for step in run.steps for e in step.events)),
                },
            )
            for run in runs
        ]

    def _group(
        self, sample: Sample, group_size: int, resolve: Callable[[str], str] | None
    ) -> list[_Run]:
        seen = prompts.view(sample)
        question = prompts.question_with_choices(seen.question, seen.choices)
        config = self._config
        stream = ChunkStream(
            TextSource.from_sample(sample, resolve),
            self._tokenizer,
            config.chunk_tokens,
            snap=config.snap,
        )
        return [
            _Run(
                sample,
                index,
                MemoryAgent(config, self._tokenizer, question, instructions=seen.instructions),
                stream,
            )
            for index in range(group_size)
        ]

    def _hear(self, run: _Run, turn: Turn) -> None:
        text = self._tokenizer.decode(turn.response_ids, skip_special_tokens=True)
        step = run.agent.receive(
            Completion(
                text=text,
                finish_reason=turn.finish_reason,
                prompt_tokens=len(turn.prompt_ids),
                completion_tokens=len(turn.response_ids),
            )
        )
        run.turns.append(turn)
        run.steps.append(step)


def _seed_of(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
