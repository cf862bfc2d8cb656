"""Heads on weights, or sequences, that two processes share, against transformers' own loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

WORKER = Path(__file__).with_name("sharded_worker.py")


def run(what: str, folder: Path) -> dict:
    out = folder / f"{what}.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(WORKER), what, str(out)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=WORKER.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.real
@pytest.mark.parametrize(
    "engine, head, ways",
    [
        ("zero3", "split", ["apply", "trl"]),
        ("zero3", "tied", ["apply", "trl"]),
        ("fsdp2", "split", ["apply"]),
        ("fsdp2", "tied", ["apply"]),
        ("ulysses", "split", ["apply"]),
    ],
)
def test_the_same_losses_and_weights(engine, head, ways, tmp_path):
    """SGD, so that a gradient of the wrong scale shows in the weights."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed", reason="pip install 'qlkernels[deepspeed]'")
    want = run(f"{engine}-{head}-untouched", tmp_path)
    assert want["losses"][0] > 4 and len(want["weights"]) > 20
    assert ("lm_head.weight" in want["weights"]) == (head == "split")
    for how in ways:
        found = run(f"{engine}-{head}-{how}", tmp_path)
        assert found["losses"] == pytest.approx(want["losses"], rel=2e-6)
        assert found["weights"] == pytest.approx(want["weights"], rel=2e-6)


@pytest.mark.real
def test_engines_agree(tmp_path):
    """The same data on the same weights: what two ways of splitting have in common."""
    pytest.importorskip("deepspeed", reason="pip install 'qlkernels[deepspeed]'")
    one, two = run("zero3-split-apply", tmp_path), run("fsdp2-split-apply", tmp_path)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-5)
