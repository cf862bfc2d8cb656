"""Heads on weights that ZeRO-3 has split over two processes, against transformers' own loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="pip install deepspeed")
pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

WORKER = Path(__file__).with_name("zero3_worker.py")


def run(how: str, folder: Path) -> dict:
    out = folder / f"{how}.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(WORKER), how, str(out)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=WORKER.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.real
@pytest.mark.parametrize("head", ["split", "tied"])
def test_heads_and_losses_under_zero3(head, tmp_path):
    """SGD, so that a gradient of the wrong scale would show in the weights."""
    want = run(f"{head}-untouched", tmp_path)
    assert want["losses"][0] > 4 and len(want["weights"]) > 20
    assert ("lm_head.weight" in want["weights"]) == (head == "split")
    for how in ("apply", "trl"):
        found = run(f"{head}-{how}", tmp_path)
        assert found["losses"] == pytest.approx(want["losses"], rel=1e-6)
        assert found["weights"] == pytest.approx(want["weights"], rel=1e-6)
