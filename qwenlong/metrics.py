"""What a run measured, step by step: ``metrics.jsonl`` and tensorboard, both resumable.

One row a step, flat. Names that the dashboard (``qwenlong.train_plot``) draws:

    reward, reward/TASK           mean of the step, all tasks and each
    eval/reward, eval/reward_ci   mean on held-out prompts, half width of its 95 % interval
    entropy                       of the batch, nats
    aepo/drops_negatives          1 on steps that dropped negative advantages, else 0
    aepo/low, aepo/high           bounds of the entropy, nats
    response_tokens               mean length of an answer
    truncated_fraction            answers that were cut
    live_fraction                 groups whose rewards differ, so that they teach something
    tokens_per_s                  tokens read and written, over the seconds of the step
    loss, grad_norm, learning_rate
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlong.errors import InputError
from qwenlong.storage import JsonlAppender, read_jsonl, write_jsonl

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends to ``folder/metrics.jsonl`` and to ``folder/tensorboard``.

    A step that was logged before is logged again after a resume: its old row and all later ones go.
    A row is whole or not there, whenever the process is killed.

    Args:
        folder: made if missing.
        tensorboard: also write event files, which needs the package tensorboard.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool = True):
        self.path = Path(folder) / METRICS_FILE
        self._events = Path(folder) / TENSORBOARD_FOLDER if tensorboard else None
        self._writer: Any = None
        if tensorboard:
            _summary_writer()  # a missing package is known before the first step, not after it
        self._file = JsonlAppender(self.path)
        self._last_step = max((row["step"] for row in read_metrics(self.path)), default=-1)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the row of ``step``: numbers, booleans, strings or None; a tensor of one element is
        a number. What is not finite becomes null.
        """
        if "step" in metrics:
            raise ValueError("MetricsLog.log: the metric 'step' is the row's own number")
        row = {"step": step, **{name: _plain(name, value) for name, value in metrics.items()}}
        if step <= self._last_step:
            self._rewind(step)
        self._file.append(row)
        self._last_step = step
        if self._events is not None:
            if self._writer is None:  # events of this step and later, of an earlier process, go
                self._writer = _summary_writer()(self._events, purge_step=step)
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def _rewind(self, step: int) -> None:
        self._file.close()
        write_jsonl(self.path, [row for row in read_jsonl(self.path) if row["step"] < step])
        self._file = JsonlAppender(self.path)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _plain(name: str, value: Any) -> int | float | str | bool | None:
    if hasattr(value, "item"):  # a tensor or an array of one element
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"MetricsLog.log: {name!r} is {type(value).__name__}; give a number or a text")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard is not installed: pip install 'qlkernels[train]', or turn it off"
        ) from None
    return SummaryWriter


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl`` in the order of their steps, one a step: of two, the later."""
    rows = {}
    try:
        for row in read_jsonl(path):
            rows[row["step"]] = row
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the metrics.jsonl of a run") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise InputError(f"{path} holds a row without a step; is it a metrics.jsonl?") from None
    return [rows[step] for step in sorted(rows)]
