"""The dashboard: what it draws of known metrics, and that it leaves a run alone."""

import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from qwenlong import train_plot
from qwenlong.metrics import MetricsLog
from qwenlong.train_plot import Dashboard, draw_dashboard, drop_phases, moving_mean


def write_run(folder, steps: int):
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(steps):
            row = {
                "reward": step / 50,
                "reward/needle": step / 40,
                "reward/multiple_choice": 0.5,
                "entropy": 0.2 + 0.1 * math.sin(step / 4),
                "aepo/drops_negatives": step in (3, 4, 5, 9),
                "aepo/low": 0.15,
                "aepo/high": 0.28,
                "response_tokens": 30 + step,
                "live_fraction": 0.5,
                "truncated_fraction": 0.1,
                "tokens_per_s": 1000.0,
                "grad_norm": 1.0 if step != 2 else math.nan,
            }
            if step % 10 == 0:
                row |= {"eval/reward": step / 60, "eval/reward_ci": 0.05}
            log.log(step, row)
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_a_picture_of_any_run(tmp_path, steps):
    draw_dashboard(write_run(tmp_path, steps), tmp_path / "dashboard.png")
    height, width, _ = imread(tmp_path / "dashboard.png").shape
    assert width == 1100 and height > 200
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_only_panels_that_have_numbers(tmp_path, monkeypatch):
    drawn = []
    panels = [
        (lambda axes, rows, wanted=wanted: drawn.append(wanted), wanted)
        for _, wanted in train_plot._PANELS
    ]
    monkeypatch.setattr(train_plot, "_PANELS", panels)
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(0, {"reward/needle": 0.5, "entropy": math.nan, "tokens_per_s": 3.0})
    draw_dashboard(log.path, tmp_path / "dashboard.png")
    assert drawn == ["reward", "tokens_per_s"]


def test_lines_show_the_metrics(tmp_path):
    rows = train_plot.read_metrics(write_run(tmp_path, 12))
    axes = Figure().subplots()
    train_plot._reward(axes, rows)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["needle"] == pytest.approx([step / 40 for step in range(12)])
    assert lines["multiple_choice"] == [0.5] * 12
    assert {"all", "needle", "multiple_choice", "held out, 95 %"} <= set(
        axes.get_legend_handles_labels()[1]
    )
    axes = Figure().subplots()
    train_plot._entropy(axes, rows)
    shaded = [patch.get_bbox().intervalx.tolist() for patch in axes.patches]
    assert shaded == [[2.5, 5.5], [8.5, 9.5]]


def test_phases_and_means():
    rows = [{"step": s, "aepo/drops_negatives": d} for s, d in enumerate([1, 1, 0, None, 1])]
    assert drop_phases(rows) == [(0, 1), (4, 4)]
    assert drop_phases([{"step": 0}]) == []
    assert moving_mean([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]
    assert moving_mean([]) == []


def test_updates_are_rare_and_the_last_has_everything(monkeypatch):
    clock, drawn = [0.0], []

    def draw(metrics_path, out_png):
        drawn.append((metrics_path, out_png, clock[0]))
        clock[0] += 0.2

    monkeypatch.setattr(train_plot, "draw_dashboard", draw)
    monkeypatch.setattr(train_plot.time, "monotonic", lambda: clock[0])
    dashboard = Dashboard("metrics", "picture")
    for seconds in (0.0, 5.0, 10.1, 10.3, 20.0, 25.0):
        clock[0] = max(clock[0], seconds)
        dashboard.update()
        dashboard._thread.join()
    # Each takes 0.2 s, and the next is due 50 * 0.2 s after its end.
    assert [round(at, 1) for *_, at in drawn] == [0.0, 10.3, 25.0]
    dashboard.close()
    assert [row[:2] for row in drawn] == [("metrics", "picture")] * 4


def test_a_picture_that_fails_does_not_stop_the_run(tmp_path):
    dashboard = Dashboard(tmp_path / "nowhere.jsonl", tmp_path / "dashboard.png")
    dashboard.update()
    dashboard.close()
    assert "does not exist" in dashboard.problem
    write_run(tmp_path, 3).rename(tmp_path / "nowhere.jsonl")
    dashboard.close()
    assert dashboard.problem is None and (tmp_path / "dashboard.png").exists()
