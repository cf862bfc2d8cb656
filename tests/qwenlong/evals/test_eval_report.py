"""The table and the plot of a run, and of two."""

import csv
import json

import pytest

from qwenlong.evals.report import (
    as_markdown,
    compare,
    comparison_markdown,
    draw,
    short_length,
    summarise,
    write_report,
)
from qwenlong.evals.statistics import wilson
from qwenlong.types import EvalResult


def result(kind, length, question, score, seed=0, **fields):
    row = {
        "sample_id": f"{kind}-{length}-{question}",
        "mode": "full",
        "seed": seed,
        "response": "x",
        "score": score,
        "scorer": "cover",
        "tokens": {"prompt": 100, "completion": 5, "calls": 1},
        "kind": kind,
        "length": length,
        "refused": None,
    }
    return EvalResult(**row | fields)


RESULTS = [
    *(result("needle", 4096, q, float(q < 3)) for q in range(4)),
    *(result("needle", 1 << 20, q, float(q < 1)) for q in range(4)),
    *(result("tables", 4096, q, s, seed) for q in range(2) for seed, s in enumerate((1.0, 0.0))),
    result("tables", 4096, 2, 0.0, truncated=True, refused="too long", tokens={}),
]


def test_rows_by_hand():
    rows = {(row.kind, row.length): row for row in summarise(RESULTS)}
    assert list(rows) == [
        ("needle", 4096),
        ("needle", 1 << 20),
        ("tables", 4096),
        ("all", None),
    ]
    needle = rows["needle", 4096]
    assert needle.score.mean == 0.75
    assert (needle.score.low, needle.score.high) == pytest.approx(wilson(0.75, 3))
    tables = rows["tables", 4096]
    assert (tables.score.questions, tables.score.samples) == (3, 5)
    assert tables.score.mean == pytest.approx(1 / 3)
    assert (tables.truncated, tables.refused) == (1, 1)
    assert tables.prompt_tokens == 80 and tables.calls == 0.8
    assert rows["all", None].score.mean == pytest.approx((3 + 1 + 1) / 11)


def test_one_group_has_no_total():
    assert [row.kind for row in summarise(RESULTS[:4])] == ["needle"]


def test_files_of_a_report(tmp_path):
    files = write_report(tmp_path, RESULTS, "A model, full")
    assert sorted(f.name for f in files) == ["plot.png", "summary.json", "table.csv", "table.md"]
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.startswith("A model, full\n\n| task |") and "Wilson" in text
    assert "| needle | 4K | 4 | 4 | 75.0 | " in text and "| needle | 1M | 4 | 4 | 25.0 | " in text
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == ["0.75", "0.25", "0.333333", "0.454545"]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["rows"][0]["low"] == pytest.approx(wilson(0.75, 3)[0], abs=1e-6)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("results", [RESULTS, RESULTS[:4], RESULTS[-1:]], ids=["3", "1", "one"])
def test_every_shape_of_run_is_drawn(tmp_path, results):
    rows = summarise([r.model_copy(update={"length": r.length}) for r in results])
    draw({"first": rows}, tmp_path / "one.png")
    draw({"first": rows, "second": rows}, tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert len((tmp_path / name).read_bytes()) > 5_000


def test_results_without_lengths_are_bars(tmp_path):
    rows = summarise([result("cover", None, q, 1.0) for q in range(3)])
    draw({"run": rows}, tmp_path / "plot.png")
    assert "| cover | - | 3 |" in as_markdown(rows)


@pytest.mark.parametrize(
    "length, shown",
    [(None, "-"), (4096, "4K"), (131072, "128K"), (1 << 22, "4M"), (5000, "5,000")],
)
def test_short_lengths(length, shown):
    assert short_length(length) == shown


def test_two_runs_are_compared_over_shared_questions():
    second = [r.model_copy(update={"score": 0.0}) for r in RESULTS[1:8]]
    rows = compare(RESULTS, second)
    assert [(row.kind, row.length) for row in rows] == [("needle", 4096), ("needle", 1 << 20)]
    assert rows[0].difference.questions == 3
    assert rows[0].difference.mean == pytest.approx(2 / 3) and rows[0].second.mean == 0
    assert rows[1].first.mean == 0.25
    table = comparison_markdown(("agent", "window"), rows)
    assert "| needle | 4K | 3 | 66.7 (" in table and "| agent | window |" in table
    with pytest.raises(ValueError, match="share no question"):
        compare(RESULTS[:2], RESULTS[4:])
