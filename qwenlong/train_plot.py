"""``dashboard.png``: how a run goes. ``python -m qwenlong.train_plot RUN/metrics.jsonl OUT.png``.

Panels: reward of each task, entropy with the steps that AEPO ran without negative advantages
shaded, response length, live fraction, tokens per second, gradient norm. A panel whose metrics a
run does not have is left out. Names are those of ``qwenlong.metrics``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenlong.metrics import read_metrics
from qwenlong.storage import atomic_write

_COLORS = ("#1b6ca8", "#b8532a", "#4f8f46", "#7b5ea7", "#8a6d1d", "#0f7c86", "#555555")
_SHADE = "#f2c9a1"
MOVING_STEPS = 10  # of the moving mean, once a run has twice as many
# A picture is drawn at most this often, as a multiple of the time it takes: 2 % of a run.
INTERVAL_PER_DRAW = 50.0

Rows = Sequence[dict[str, Any]]


def draw_dashboard(metrics_path: str | Path, out_png: str | Path) -> None:
    """Draw the rows of ``metrics.jsonl`` as one PNG, written atomically; no rows draw no panel."""
    rows = read_metrics(metrics_path)
    panels = [draw for draw, wanted in _PANELS if any(_has(row, wanted) for row in rows)]
    columns = 2
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(11, 0.6 + 2.6 * lines), dpi=100, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step", fontsize=8)
    last = f"step {rows[-1]['step']}" if rows else "no step yet"
    figure.suptitle(f"{Path(metrics_path).parent.name}: {last}", fontsize=10)
    with atomic_write(out_png, "wb") as file:
        figure.savefig(file, format="png")


class Dashboard:
    """Redraws the picture beside a run: in a thread, and rarely enough to cost at most 2 %.

    A picture that cannot be drawn does not stop a run: ``problem`` has the reason of the last one.
    """

    def __init__(self, metrics_path: str | Path, out_png: str | Path):
        self._paths = (metrics_path, out_png)
        self._thread: threading.Thread | None = None
        self._not_before = 0.0  # of the monotonic clock, seconds
        self.problem: str | None = None

    def update(self) -> None:
        """Have the picture drawn if it is time; returns at once."""
        is_drawing = self._thread is not None and self._thread.is_alive()
        if not is_drawing and time.monotonic() >= self._not_before:
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()

    def _draw(self) -> None:
        started = time.monotonic()
        try:
            draw_dashboard(*self._paths)
            self.problem = None
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
        ended = time.monotonic()
        self._not_before = ended + INTERVAL_PER_DRAW * (ended - started)

    def close(self) -> None:
        """Draw the picture a last time, with all rows, and wait for it."""
        if self._thread is not None:
            self._thread.join()
        self._draw()


# --- panels ------------------------------------------------------------------


def _has(row: dict[str, Any], wanted: str) -> bool:
    """Whether the row has a number under the name ``wanted``, or under it and a slash."""
    return any(
        (name == wanted or name.startswith(wanted + "/")) and value is not None
        for name, value in row.items()
    )


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [float(value) for _, value in found]


def _line(axes: Axes, rows: Rows, name: str, label: str, color: str) -> None:
    """The values of each step; over a long run faint, with their moving mean on top."""
    steps, values = _series(rows, name)
    if not steps:
        return
    is_long = len(values) >= 2 * MOVING_STEPS
    marker = "." if len(values) < 3 else None
    axes.plot(
        steps,
        values,
        color=color,
        lw=0.8 if is_long else 1.4,
        alpha=0.35 if is_long else 1.0,
        marker=marker,
        label=None if is_long else label,
    )
    if is_long:
        axes.plot(steps, moving_mean(values), color=color, lw=1.6, label=label)


def moving_mean(values: Sequence[float], width: int = MOVING_STEPS) -> list[float]:
    """Mean of each value and the ``width - 1`` before it; of fewer at the beginning."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


def _reward(axes: Axes, rows: Rows) -> None:
    names = sorted({n for row in rows for n in row if n.startswith("reward/")})
    if len(names) != 1:
        _line(axes, rows, "reward", "all", "#222222")
    for i, name in enumerate(names):
        _line(axes, rows, name, name.removeprefix("reward/"), _COLORS[i % len(_COLORS)])
    steps, values = _series(rows, "eval/reward")
    if steps:
        width = {row["step"]: row.get("eval/reward_ci") or 0.0 for row in rows}
        axes.errorbar(
            steps,
            values,
            yerr=[width[step] for step in steps],
            fmt="o",
            ms=4,
            capsize=3,
            color="#222222",
            label="held out, 95 %",
        )
    _finish(axes, "reward")


def drop_phases(rows: Rows) -> list[tuple[int, int]]:
    """First and last step of each run of steps that dropped negative advantages."""
    phases: list[tuple[int, int]] = []
    was_dropping = False
    for row in rows:
        is_dropping = bool(row.get("aepo/drops_negatives"))
        if is_dropping and was_dropping:
            phases[-1] = (phases[-1][0], row["step"])
        elif is_dropping:
            phases.append((row["step"], row["step"]))
        was_dropping = is_dropping
    return phases


def _entropy(axes: Axes, rows: Rows) -> None:
    for i, (first, last) in enumerate(drop_phases(rows)):
        label = "without negative advantages" if i == 0 else None
        axes.axvspan(first - 0.5, last + 0.5, color=_SHADE, lw=0, label=label)
    _line(axes, rows, "entropy", "batch", _COLORS[0])
    for name in ("aepo/low", "aepo/high"):
        steps, values = _series(rows, name)
        if steps:
            axes.plot(steps, values, color="#666666", lw=0.8, ls="--", label=name)
    _finish(axes, "entropy, nats")


def _length(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "response_tokens", "mean", _COLORS[0])
    axes.set_ylim(bottom=0)
    _finish(axes, "response length, tokens")


def _fractions(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "live_fraction", "live groups", _COLORS[0])
    _line(axes, rows, "truncated_fraction", "truncated answers", _COLORS[1])
    axes.set_ylim(-0.03, 1.03)
    _finish(axes, "fraction")


def _speed(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "tokens_per_s", "all", _COLORS[0])
    axes.set_ylim(bottom=0)
    _finish(axes, "tokens per second")


def _gradient(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "grad_norm", "before clipping", _COLORS[0])
    _finish(axes, "gradient norm")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=7, frameon=False)


_PANELS: tuple[tuple[Callable[[Axes, Rows], None], str], ...] = (
    (_reward, "reward"),
    (_entropy, "entropy"),
    (_length, "response_tokens"),
    (_fractions, "live_fraction"),
    (_speed, "tokens_per_s"),
    (_gradient, "grad_norm"),
)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m qwenlong.train_plot METRICS.jsonl OUT.png")
    draw_dashboard(sys.argv[1], sys.argv[2])
    print(sys.argv[2])
