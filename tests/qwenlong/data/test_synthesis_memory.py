"""Memory of the pipeline: bounded by fixed pools and caches, not by the size of the corpus."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def measured(count):
    script = ROOT / "scripts" / "synthesis_memory.py"
    finished = subprocess.run(
        [sys.executable, str(script), "--one", str(count)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.real
def test_a_hundred_thousand_documents():
    small, large = measured(20_000), measured(100_000)
    assert large["kept"] + sum(large["duplicates"].values()) == 100_000
    assert large["duplicates"]["near"] > 5_000
    assert large["samples"] >= 150
    # 80,000 more documents of 1.4 KB may add what the index holds of them, not their texts.
    assert large["peak_mb"] < small["peak_mb"] + 80
    assert large["peak_mb"] < 400


def test_the_published_curve_grows_far_slower_than_the_corpus():
    rows = json.loads((ROOT / "docs" / "synthesis-memory.json").read_text())
    assert rows[-1]["documents"] >= 100_000
    by_count = {row["documents"]: row for row in rows}
    start, end = by_count[10_000], rows[-1]
    growth = end["peak_mb"] - start["peak_mb"]
    assert growth < 0.7 * (end["corpus_mb"] - start["corpus_mb"])
    # Extended to a million documents along the last stretch.
    near = by_count[30_000]
    slope = (end["peak_mb"] - near["peak_mb"]) / (end["documents"] - near["documents"])
    assert end["peak_mb"] + slope * (1_000_000 - end["documents"]) < 2_000
