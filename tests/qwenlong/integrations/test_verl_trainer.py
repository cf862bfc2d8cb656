"""verl's trainer with our hooks, on the CPU: see verl_runs.py for what is real and what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from qwenlong.advantages import group_advantages
from qwenlong.aepo import EntropyController, replay

pytest.importorskip("verl", reason="scripts/verl_env.sh makes an environment with verl")

WORKER = Path(__file__).with_name("verl_worker.py")
# Nats, digitised from arXiv 2512.12967, figure 11, steps 84 to 118: once up through the bounds and
# once down.
SERIES = [
    0.2513, 0.2534, 0.2526, 0.2675, 0.2803, 0.2604, 0.2738, 0.2651, 0.2672, 0.2466, 0.2327, 0.2251,
    0.2212, 0.2100, 0.1866, 0.1541, 0.1612, 0.1435, 0.1457, 0.1384, 0.1332, 0.1396, 0.1386, 0.1414,
    0.1353, 0.1330, 0.1391, 0.1370, 0.1464, 0.1460, 0.1374, 0.1409, 0.1504, 0.1408, 0.1398,
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("verl")
    (folder / "series.json").write_text(json.dumps(SERIES))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


def column(run: dict, name: str) -> list[float]:
    return [step[name] for step in run["logged"]]


def kept_rows(step: dict) -> list[int]:
    """Rows that end a session, without what verl filled the batch up with."""
    last = {}
    for row, key in enumerate(step["keys"]):
        session, output = key.rsplit("_", 1)
        if not step["padding"][row] and int(output) >= last.get(session, (-1, 0))[0]:
            last[session] = int(output), row
    return [row for _, row in last.values()]


def expected_advantages(step: dict) -> dict[str, float]:
    """By session, from the rewards of the answers alone."""
    rows = kept_rows(step)
    found = group_advantages(
        torch.tensor([sum(step["rm_scores"][row]) for row in rows]),
        [step["uid"][row] for row in rows],
        task_ids=[step["task"][row] for row in rows],
        scale="task",
    )
    return {step["keys"][r].rsplit("_", 1)[0]: a for r, a in zip(rows, found.tolist(), strict=True)}


def test_advantages_are_scaled_by_task(found):
    """The first step drops nothing. 17 outputs of 16 answers, filled up to 32 rows."""
    step = found["lagged"]["seen"][0]
    assert len(step["keys"]) == 32 and sum(step["padding"]) == 15
    want = expected_advantages(step)
    assert len(want) == 16 and {"needle", "sums", "one"} == set(step["task"])
    outputs = {}
    for key, padding, advantages, mask in zip(
        step["keys"], step["padding"], step["advantages"], step["response_mask"], strict=True
    ):
        session = key.rsplit("_", 1)[0]
        one = 0.0 if padding else want[session]
        assert advantages == pytest.approx([one * m for m in mask], abs=1e-6)
        outputs[session] = outputs.get(session, 0) + 1
    assert sorted(outputs.values())[-2:] == [1, 2]  # one answer came in two outputs


def test_aepo_drops_after_a_batch_of_high_entropy(found):
    run = found["lagged"]
    assert column(run, "aepo/dropping") == [0, 1, 1, 1]
    for i, step in enumerate(run["seen"]):
        real = [row for row, padding in enumerate(step["padding"]) if not padding]
        want = expected_advantages(step)
        for row in real:
            advantage = want[step["keys"][row].rsplit("_", 1)[0]]
            assert step["advantages"][row][0] == pytest.approx(
                max(advantage, 0) if i else advantage, abs=1e-6
            )
        dropped = sum(bool(i) and advantage < 0 for advantage in want.values())
        assert column(run, "aepo/dropped_fraction")[i] == pytest.approx(dropped / len(want))
        assert dropped > 0 or i == 0
        tokens: dict[str, list[float]] = {}  # entropies of a session, over all its outputs
        for row in real:
            entropies = zip(step["entropy"][row], step["response_mask"][row], strict=True)
            session = step["keys"][row].rsplit("_", 1)[0]
            tokens.setdefault(session, []).extend(h for h, is_in in entropies if is_in)
        found_entropy = fmean(fmean(values) for values in tokens.values() if values)
        assert column(run, "aepo/entropy")[i] == pytest.approx(found_entropy, rel=1e-6)
        assert found_entropy == pytest.approx(column(run, "actor/entropy")[i], abs=0.05)
    assert all(norm > 0 for norm in column(run, "actor/grad_norm"))


def test_aepo_decides_on_the_batch_itself(found):
    assert column(found["same_step"], "aepo/dropping") == [1]
    advantages = [a for row in found["same_step"]["seen"][0]["advantages"] for a in row]
    assert min(advantages) == 0 and max(advantages) > 0.5


def test_the_decision_survives_a_checkpoint(found):
    """With the entropy of the step before: a controller that begins anew drops nothing at step 3.
    Both halves of a run are the run: decisions, advantages, losses.
    """
    whole, halves = found["lagged"], (found["first_half"], found["second_half"])
    for name in ("aepo/dropping", "aepo/entropy", "actor/pg_loss", "actor/grad_norm"):
        assert sum((column(half, name) for half in halves), []) == pytest.approx(
            column(whole, name), rel=1e-5
        )
    assert len(found["second_half"]["logged"]) == 2
    steps, state = found["by_path"]
    assert steps == 2 and state["dropping"]
    assert state["last_entropy"] == column(whole, "aepo/entropy")[1]


def test_our_trainer_and_head_alone_change_nothing(found):
    """Against verl's own trainer and fused head, over three steps."""
    ours, theirs = found["ours"], found["verl"]
    assert ours["calls_of_our_op"] >= 6 and theirs["calls_of_our_op"] == 0
    for name in ("actor/entropy", "actor/pg_loss", "actor/grad_norm", "actor/ppo_kl"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-4, abs=1e-6)
    for a, b in zip(ours["seen"], theirs["seen"], strict=True):
        for name in ("advantages", "old_log_probs", "entropy"):
            flat = [[x for row in step[name] for x in row] for step in (a, b)]
            assert sorted(flat[0]) == pytest.approx(sorted(flat[1]), abs=1e-4)
    assert not any(name.startswith("aepo/") for name in ours["logged"][0])


@pytest.mark.parametrize("case", range(6))
def test_decisions_are_those_of_the_controller(found, case):
    run = found["decisions"][case]
    controller = EntropyController(
        low=0.138, high=0.248, mode=run["mode"], entropy_source=run["source"]
    )
    want = replay(controller, SERIES)
    assert run["dropping"] == want and len(set(want)) == 2
    for advantages, dropping in zip(run["advantages"], want, strict=True):
        positive = advantages[0]
        assert positive > 0.8
        assert advantages == pytest.approx([positive, -positive * (not dropping)] * 2, abs=1e-6)


def test_a_batch_without_a_token_changes_no_decision(found):
    """Masked entropies may be NaN."""
    after = found["nothing_to_train_on"]
    assert after["metrics"]["aepo/dropping"] == 1 and "aepo/entropy" not in after["metrics"]
    assert after["state"] == {"dropping": True, "last_entropy": pytest.approx(0.3)}


def test_a_process_of_ray_knows_the_trainer(found):
    """Through the entry point: verl's driver is such a process."""
    assert found["bases_in_ray"] == ["TaskPPOTrainerSync", "_Hooks", "PPOTrainerSync"]


def test_what_cannot_work_is_refused(found):
    assert "several advantages; use qwenlong_task or grpo" in found["several_advantages"]
    assert "no field 'kind'; name a column" in found["missing_task"]
