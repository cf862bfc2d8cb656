"""Advantages by name: what ``loss.advantage`` of a recipe chooses from.

A rule takes the rewards of a step, one a trajectory, with the group (prompt) and the task of each,
and returns one advantage a trajectory. Every turn of a trajectory gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from qwenlong.advantages import group_advantages

# (rewards [N], group_ids [N], task_ids [N], process_group) -> [N]
AdvantageRule = Callable[
    [torch.Tensor, Sequence[str], Sequence[str], "dist.ProcessGroup | None"], torch.Tensor
]
ADVANTAGES: dict[str, AdvantageRule] = {}


def register_advantage(name: str) -> Callable[[AdvantageRule], AdvantageRule]:
    """Register ``rule(rewards, group_ids, task_ids, process_group) -> advantages``.

    The arguments are those of this rank; ``process_group`` reaches the others, None if there are
    none.
    """

    def register(rule: AdvantageRule) -> AdvantageRule:
        if name in ADVANTAGES:
            raise ValueError(f"register_advantage: {name!r} is registered already")
        ADVANTAGES[name] = rule
        return rule

    return register


def _scaled(rewards, group_ids, task_ids, process_group, *, scale: str, baseline: str = "group"):
    return group_advantages(
        rewards,
        group_ids,
        task_ids=task_ids if scale == "task" else None,
        baseline=baseline,
        scale=scale,
        process_group=process_group,
    )


register_advantage("task")(partial(_scaled, scale="task"))  # arXiv 2512.12967, eq. 7
register_advantage("group")(partial(_scaled, scale="group"))  # eq. 3, GRPO
register_advantage("batch")(partial(_scaled, scale="batch"))
register_advantage("mean_only")(partial(_scaled, scale="none"))
register_advantage("leave_one_out")(partial(_scaled, scale="none", baseline="leave_one_out"))
