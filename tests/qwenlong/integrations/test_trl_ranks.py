"""Task advantages, AEPO and shared prefixes with a group that lies on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from qwenlong.advantages import group_advantages  # noqa: E402

HERE = Path(__file__).parent
GROUP = 4


def two_ranks(out: Path, *arguments: str) -> list[dict]:
    """What each rank of ``trl_worker.py`` saw."""
    out.mkdir(exist_ok=True)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "trl_worker.py"), str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.real
def test_one_pass_on_two_ranks(tmp_path):
    """The gradients come from the output of the wrapped model: DDP reduces them as ever."""
    scores = two_ranks(tmp_path / "scores")
    one_pass = two_ranks(tmp_path / "one_pass", "one_pass")
    assert one_pass[0]["weights"] == pytest.approx(one_pass[1]["weights"], rel=1e-12)
    for found, want in zip(one_pass, scores, strict=True):
        assert found["losses"] == pytest.approx(want["losses"], abs=1e-5)
        assert found["weights"] == pytest.approx(want["weights"], rel=1e-6)
        assert found["entropy"] == pytest.approx(want["entropy"], abs=1e-5)
        assert abs(want["weights"] / want["first_weights"] - 1) > 1e-4


@pytest.mark.real
def test_two_ranks(tmp_path):
    one, two = two_ranks(tmp_path)
    assert one["entropy"] == two["entropy"] > 1.0
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-12)
    assert one["dropping"] == [0.0, 1.0]
    for step, (a, b) in enumerate(zip(one["seen"], two["seen"], strict=True)):
        prompts, tasks = a["prompts"] + b["prompts"], a["tasks"] + b["tasks"]
        assert prompts[GROUP] == prompts[2 * GROUP - 1] and len(set(prompts)) == 3
        assert sorted(tasks[::GROUP]) in (["needle", "needle", "sums"], ["needle", "sums", "sums"])
        rewards = torch.tensor(a["rewards"][-3 * GROUP :])
        groups = [i // GROUP for i in range(3 * GROUP)]
        want = group_advantages(rewards, groups, task_ids=tasks, scale="task")
        assert want.abs().max() > 0.1
        assert a["everyone"][-3 * GROUP :] == pytest.approx(want.tolist(), abs=1e-6)
        if step == 1:  # AEPO drops: the first step measured about 4 nats
            want = want.clamp_min(0)
        assert a["advantages"] + b["advantages"] == pytest.approx(want.tolist(), abs=1e-6)
