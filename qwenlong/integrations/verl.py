"""Task-level advantages and AEPO in verl's trainers, switched on by its configuration.

    algorithm.adv_estimator: qwenlong_task
    trainer.v1.trainer_mode: qwenlong_sync      # or qwenlong_colocate_async, _separate_async
    trainer.v1.qwenlong: {task_field: data_source, aepo_low: 0.138, aepo_high: 0.248}

    advantages   (r - mean of the group) / (std of the task + eps)           arXiv 2512.12967, eq. 7
    AEPO         entropy of the batch above ``aepo_high``: negative advantages become 0, until it is
                 below ``aepo_low``                                          sec. 4.4

verl's loss functions and estimators receive neither entropies nor tasks, so the hook is the method
of its trainer that computes advantages. There the policy that is about to be trained has just
scored the batch for its old log-probabilities, with entropies: AEPO decides on the batch itself, at
no cost. ``qwenlong.integrations.verl_plugin`` makes the names known to verl.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from qwenlong.advantages import group_advantages
from qwenlong.aepo import EntropyController, EntropyMeter
from qwenlong.integrations.patches import Patch
from qwenlong.integrations.verl_kernels import patch_verl, require_verl
from qwenlong.integrations.verl_plugin import ESTIMATOR, MODES, PREFIX
from qwenlong.storage import write_json

require_verl()

__all__ = ["Patch", "VerlSettings", "patch_verl", "task_advantages", "trainers"]
STATE_FILE = "aepo_state.json"  # in a checkpoint
SECTION = "trainer.v1.qwenlong"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerlSettings:
    """The section ``trainer.v1.qwenlong`` of verl's configuration. AEPO is on where both bounds are
    given, in nats.
    """

    task_field: str = "data_source"  # column of the dataset with the task of each prompt
    task_eps: float = 1e-6  # added to the standard deviation of a task
    aepo_low: float | None = None
    aepo_high: float | None = None
    aepo_mode: str = "latch"
    aepo_drop: str = "negative"
    aepo_if_empty: str = "skip"
    aepo_entropy: str = "sequence_mean"
    # "scoring_pass": the batch itself; "previous_step": the batch before
    aepo_entropy_source: str = "scoring_pass"

    def __post_init__(self) -> None:
        if (self.aepo_low is None) != (self.aepo_high is None):
            raise ValueError(f"{SECTION}: give both aepo_low and aepo_high, or neither")
        self.controller()  # checks the other choices
        EntropyMeter(self.aepo_entropy)

    @classmethod
    def from_config(cls, config: Any) -> VerlSettings:
        """From verl's whole configuration, where the section may be missing."""
        given = dict(config.trainer.v1.get("qwenlong", None) or {})
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{SECTION}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}"
            )
        return cls(**given)

    def controller(self) -> EntropyController | None:
        """A new controller with these settings; None where AEPO is off."""
        if self.aepo_low is None:
            return None
        return EntropyController(
            low=self.aepo_low,
            high=self.aepo_high,
            mode=self.aepo_mode,
            drop=self.aepo_drop,
            if_empty=self.aepo_if_empty,
            entropy_source=self.aepo_entropy_source,
        )


# --- advantages --------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """What an estimator of verl is not told about the rows of its batch."""

    tasks: list  # one a row
    last: list[int | None]  # the row that ends this row's session; None for padding
    eps: float


_rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)


def task_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable],
    **_others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator ``qwenlong_task``: ``group_advantages`` with ``scale="task"``.

    The reward of a session with several outputs (an agent's turns) is that of its last one, whose
    advantage all of them get. Rows that verl adds to fill a batch up belong to no task and get 0.

    Args:
        token_level_rewards: ``(B, R)``; a row's reward is their sum.
        response_mask: ``(B, R)``, 1 for tokens that are trained on.
        index: ``[B]`` prompt of each row.

    Returns:
        Advantages and returns, ``(B, R)`` fp32 both and equal; 0 outside of the mask.

    Raises:
        RuntimeError: the trainer is not one of ours, so tasks are unknown.
    """
    rows = _rows.get()
    if rows is None:
        raise RuntimeError(
            f"algorithm.adv_estimator={ESTIMATOR} needs the task of each sample; set "
            f"trainer.v1.trainer_mode={PREFIX}sync (and trainer.use_v1=True)"
        )
    ends = [i for i, last in enumerate(rows.last) if last == i]
    of_ends = group_advantages(
        token_level_rewards.sum(dim=-1)[ends],
        [index[i] for i in ends],
        task_ids=[rows.tasks[i] for i in ends],
        scale="task",
        eps=rows.eps,
    )
    found = dict(zip(ends, of_ends.tolist(), strict=True))
    values = torch.tensor(
        [0.0 if last is None else found[last] for last in rows.last],
        device=response_mask.device,
    )
    advantages = torch.where(response_mask.bool(), values[:, None], 0.0)
    return advantages, advantages


def _session_ends(keys: Sequence[str], is_padding: Sequence[bool]) -> list[int | None]:
    """Row of the last output of each row's session; None for padding.

    Keys are ``{uid}_{session}_{output}``.
    """
    sessions = [key.rsplit("_", 1) for key in keys]
    ends: dict[str, tuple[int, int]] = {}
    for row, (session, output) in enumerate(sessions):
        ends[session] = max(ends.get(session, (-1, -1)), (int(output), row))
    return [
        None if padding else ends[session][1]
        for (session, _), padding in zip(sessions, is_padding, strict=True)
    ]


# --- trainers ----------------------------------------------------------------


class _Hooks:
    """Before a trainer of verl in the order of bases; see the module's first lines.

    Logged: ``aepo/entropy`` (nats), ``aepo/dropping`` (0 or 1) and ``aepo/dropped_fraction`` of the
    sequences. Dropped sequences count in the denominators of the loss, and its KL and entropy terms
    still see them.
    """

    verl_mode = ""  # verl's own name of the trainer

    def __init__(self, config: Any) -> None:
        self._settings = VerlSettings.from_config(config)
        self._controller = self._settings.controller()
        correction = config.algorithm.get("rollout_correction", None)
        if self._controller is not None and correction and correction.get("bypass_mode", False):
            raise ValueError(
                "AEPO needs the entropies that verl computes with old log-probabilities; set "
                "algorithm.rollout_correction.bypass_mode=False"
            )
        super().__init__(config)

    # verl compares the mode with its own names; the configuration keeps what the user wrote
    @property
    def trainer_mode(self) -> str:
        return self.verl_mode

    @trainer_mode.setter
    def trainer_mode(self, _value: str) -> None:
        pass

    def _compute_advantage(self, batch, metrics: dict):
        is_padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        ends, token = _session_ends(batch.keys, is_padding), None
        if self.config.algorithm.adv_estimator == ESTIMATOR:
            token = _rows.set(_Rows(self._tasks(batch), ends, self._settings.task_eps))
        try:
            batch = super()._compute_advantage(batch, metrics)
        finally:
            if token is not None:
                _rows.reset(token)
        if self._controller is not None:
            self._drop_sequences(batch, ends, metrics)
        return batch

    def _tasks(self, batch) -> list:
        import transfer_queue as tq

        name = self._settings.task_field
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", name]
        )
        if name not in data.keys():
            raise ValueError(
                f"{SECTION}.task_field: samples have no field {name!r}; "
                "name a column of the dataset"
            )
        tasks = data[name]
        tasks = tasks.tolist() if hasattr(tasks, "tolist") else list(tasks)
        if not all(isinstance(task, str | Integral) for task in tasks):
            raise ValueError(
                f"{SECTION}.task_field: {name!r} must hold a string or an integer for each sample"
            )
        return tasks

    def _drop_sequences(self, batch, ends: list[int | None], metrics: dict) -> None:
        """Set the advantages of sequences that AEPO drops to 0, where verl keeps them.

        A sequence is a session, with all its outputs.
        """
        import transfer_queue as tq
        from tensordict import TensorDict
        from verl.workers.utils.padding import response_to_nested

        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["advantages", "entropy", "response_mask"],
        )
        lengths = data["response_mask"]
        data = data.to_padded_tensor()
        mask, advantages = data["response_mask"].bool(), data["advantages"]
        first = mask.int().argmax(dim=1, keepdim=True)
        of_rows = torch.where(mask.any(dim=1), advantages.gather(1, first).squeeze(1), 0.0)
        if (mask & (advantages != of_rows[:, None])).any():
            raise ValueError(
                "AEPO drops whole sequences, but algorithm.adv_estimator="
                f"{self.config.algorithm.adv_estimator} gives a sequence several advantages; use "
                f"{ESTIMATOR} or grpo"
            )
        controller = self._controller
        meter = EntropyMeter(self._settings.aepo_entropy)
        session_of = [row if end is None else end for row, end in enumerate(ends)]
        meter.add(data["entropy"], mask, sequence_of=torch.tensor(session_of))
        entropy = meter.value().item()
        is_known = math.isfinite(entropy)  # NaN where no token is trained on
        if controller.entropy_source == "previous_step":
            dropping = controller.begin_step()
        else:
            dropping = controller.begin_step(entropy) if is_known else controller.dropping
        is_real = torch.tensor([end is not None for end in ends])
        dropped = torch.zeros_like(is_real)
        dropped[is_real] = ~controller.keep_sequences(of_rows[is_real])
        if is_known:
            controller.end_step(entropy)
            metrics["aepo/entropy"] = entropy
        metrics["aepo/dropping"] = float(dropping)
        last = [row for row, end in enumerate(ends) if row == end]
        metrics["aepo/dropped_fraction"] = dropped[last].float().mean().item()
        advantages = torch.where(dropped[:, None], 0.0, advantages)
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(
                {"advantages": response_to_nested(advantages, lengths)}, batch_size=len(batch)
            ),
        )

    # --- checkpoints -----------------------------------------------------------

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    def _save_checkpoint(self) -> None:
        if self._controller is not None:  # first: verl ends by naming the checkpoint complete
            folder = self._checkpoint_folder()
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / STATE_FILE, self._controller.state_dict())
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self._controller is None or self.global_steps == 0:
            return
        folder = self._checkpoint_folder()
        if self.config.trainer.resume_mode == "resume_path":
            folder = Path(self.config.trainer.resume_from_path)
        if (folder / STATE_FILE).is_file():
            self._controller.load_state_dict(json.loads((folder / STATE_FILE).read_text()))
        else:
            logger.warning("%s has no %s: AEPO begins anew", folder, STATE_FILE)


@cache
def trainers() -> dict[str, type]:
    """Our trainer for each mode of verl, by the names for ``trainer.v1.trainer_mode``."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    return {
        PREFIX + mode: type(f"Task{stock.__name__}", (_Hooks, stock), {"verl_mode": mode})
        for mode in MODES
        for stock in [get_trainer_cls(mode)]
    }
