"""The page on evaluation says what the code does."""

import re
from pathlib import Path

from qwenlong.evals.dataset import TASKS
from qwenlong.evals.formats import FORMATS
from qwenlong.evals.run import MODES

PAGE = (Path(__file__).parents[3] / "docs" / "eval.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "eval.md", "exec"), {})


def test_every_task_format_and_mode_is_in_a_table():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [*TASKS, *FORMATS, *MODES[:1], "agent", "closed_book"]
