"""Every example runs as the page says, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    named = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text())
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(named)


def test_swap_the_head(tmp_path):
    out = run("swap_the_head.py", cache=tmp_path)
    losses = re.findall(r"loss (\S+), gradient norm ([\d.]+)", out)
    assert len(losses) == 3
    for loss, norm in losses[1:]:
        assert float(loss) == pytest.approx(float(losses[0][0]), abs=2e-5)
        assert float(norm) == pytest.approx(float(losses[0][1]), abs=2e-5)


def test_score_group(tmp_path):
    out = run("score_group.py", cache=tmp_path)
    pairs = re.findall(r"log-probability (\S+), in its full sequence (\S+)", out)
    assert len(pairs) == 8
    assert all(float(a) == pytest.approx(float(b), abs=2e-3) for a, b in pairs)
    assert "559 rows" in out and "3352 rows" in out  # 399 + 8 * 20, and 8 * 419


def test_trl_aepo(tmp_path):
    pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")
    out = run("trl_aepo.py", "--steps", "3", "--out", str(tmp_path / "out"), cache=tmp_path)
    steps = re.findall(r"step (\d): entropy ([\d.]+) nats, dropped (\d+)%", out)
    assert [int(step) for step, *_ in steps] == [1, 2, 3]
    # a random model is far above 0.248 nats: dropping begins with the second step
    assert int(steps[0][2]) == 0 and all(float(entropy) > 1 for _, entropy, _ in steps)


def test_the_page_on_integrations():
    """Its Python runs in order, but for Liger's kernels, which need a GPU; its tables are true."""
    from qlkernels import hf

    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(first, "integrations.md", "exec"), names)
    assert "apply_liger_kernel_to_qwen3(" in second
    for part in hf.PARTS:
        [families] = re.findall(rf"^\| `{part}` \|.*\| (.*) \|$", page, re.MULTILINE)
        assert families.split(", ") == [f for f, parts in hf.supported().items() if part in parts]


def test_the_page_names_every_option_of_the_trainer():
    pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")
    from dataclasses import fields

    from trl import GRPOConfig

    from qwenlong.integrations.trl import AEPOGRPOConfig

    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    ours = {f.name for f in fields(AEPOGRPOConfig)} - {f.name for f in fields(GRPOConfig)}
    assert not {name for name in ours if f"`{name}" not in page}
