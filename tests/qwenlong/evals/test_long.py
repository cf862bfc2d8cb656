"""Four million tokens: made, written, read in chunks and answered, in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwenlong.evals.dataset import TASKS

LENGTH = 4_000_000
MEMORY = 1_000_000_000  # bytes

_PROGRAM = """
import resource, sys
from qwenlong.evals.dataset import generate, write_dataset
from qwenlong.evals.haystack import Haystack
from qwenlong.evals.run import RunSettings, ask, score_run
from qwenlong.evals.texts import TokenCounter
from tests.qwenlong.evals.readers import PerfectReader

task, length, out, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
haystack = Haystack.load(TokenCounter("chars4"))
kept = []

def made():
    for sample in generate(haystack, tasks=[task], lengths=[length], count=1, seed=5):
        kept.append(sample)
        yield sample

write_dataset(out, made())
settings = RunSettings(mode=mode, max_tokens=1_000)
with PerfectReader(kept) as client:
    del kept[:], haystack
    done = ask(out, out + "/run", client, settings)
[result] = score_run(out, out + "/run")
# chunks of 32,768 tokens less what may be given up to end at a sentence, and the answer
chunks = result.tokens["calls"] - 1
assert mode == "full" or length / 32_768 <= chunks <= length / (32_768 * 0.875) + 1, chunks
assert result.score == 1.0, (result.extracted, result.score)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.real
@pytest.mark.parametrize(
    "task, mode", [*((task, "agent") for task in TASKS), ("needle_multikey", "full")]
)
def test_the_perfect_reader_answers_at_four_million_tokens(tmp_path, task, mode):
    """In a process of its own, whose memory is that of the task and the libraries alone."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, task, str(LENGTH), str(tmp_path / "data"), mode],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout.split()[-1]) < MEMORY
