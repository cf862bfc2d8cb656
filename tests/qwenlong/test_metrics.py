"""Metrics on disk: whole rows, resumed runs, tensorboard."""

import json
import math
import time

import numpy as np
import pytest
import torch

from qwenlong.errors import InputError
from qwenlong.metrics import MetricsLog, read_metrics


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {
        name: [(e.step, round(e.value, 6)) for e in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def wait_for_the_next_second():
    """Event files are read in the order of their names: the second, then a number without zeros."""
    time.sleep(1 - time.time() % 1)


def test_rows_and_events(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(0, {"reward": 0.25, "reward/needle": torch.tensor(0.5), "phase": "all"})
        log.log(1, {"reward": np.float32(0.5), "loss": math.nan, "entropy": math.inf, "n": 3})
        log.log(2, {"reward": None, "aepo/drops_negatives": True})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 0, "reward": 0.25, "reward/needle": 0.5, "phase": "all"},
        {"step": 1, "reward": 0.5, "loss": None, "entropy": None, "n": 3},
        {"step": 2, "reward": None, "aepo/drops_negatives": True},
    ]
    assert events(tmp_path) == {
        "reward": [(0, 0.25), (1, 0.5)],
        "reward/needle": [(0, 0.5)],
        "n": [(1, 3.0)],
        "aepo/drops_negatives": [(2, 1.0)],
    }


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.log(step, {"reward": float(step)})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "rew')  # killed while it wrote
    wait_for_the_next_second()
    with MetricsLog(tmp_path) as log:
        log.log(3, {"reward": 30.0})
        log.log(4, {"reward": 40.0})
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [(r["step"], r["reward"]) for r in read_metrics(log.path)] == expected
    assert events(tmp_path)["reward"] == expected


def test_one_that_goes_on_keeps_everything(tmp_path):
    for start in (0, 2):
        with MetricsLog(tmp_path, tensorboard=False) as log:
            log.log(start, {"reward": 1.0})
            log.log(start + 1, {"reward": 2.0})
    assert [r["step"] for r in read_metrics(log.path)] == [0, 1, 2, 3]
    assert not (tmp_path / "tensorboard").exists()
    log.close()


def test_what_is_no_metric_is_refused(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(ValueError, match="'step'"):
            log.log(0, {"step": 3})
        with pytest.raises(TypeError, match="'sizes' is list"):
            log.log(0, {"sizes": [1, 2]})
    assert read_metrics(log.path) == []
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "nowhere.jsonl")
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="without a step"):
        read_metrics(tmp_path / "other.jsonl")
