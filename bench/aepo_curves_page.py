"""Picture and page of ``bench.aepo_curves``, from its results file alone.

    python -m bench.aepo_curves_page docs/aepo-curves.jsonl     writes the .png and .md beside it

What the page says of differences follows from 95 % intervals over held-out passages
(``qwenlong.evals.statistics``), in which a passage counts once with all its questions and seeds.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenlong.evals.statistics import Difference, Estimate, difference, estimate
from qwenlong.storage import atomic_write, read_jsonl
from qwenlong.train_plot import drop_phases

COLORS = {"grpo": "#1b6ca8", "task": "#4f8f46", "task+aepo": "#b8532a"}
SHADE = "#f2c9a1"
LAST_STEPS = 4  # that the tables call the end of a run

Row = Mapping[str, Any]
Held = Mapping[str, Mapping[str, Sequence[float]]]  # task: passage: rewards


def _parts(rows: Sequence[Row]) -> tuple[Row, Row, dict[str, list[Row]]]:
    """The setting, the calibration, and the runs of each arm in the order of ``COLORS``."""
    setup = next(row for row in rows if row["kind"] == "setup")
    calibration = next(row for row in rows if row.get("arm") == "calibration")
    return setup, calibration, {arm: [r for r in rows if r.get("arm") == arm] for arm in COLORS}


def _passages(held: Sequence[Held], task: str | None) -> dict[str, list[float]]:
    """Rewards by passage over several runs; ``task`` None is all tasks."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in held:
        for name, passages in run.items():
            if task in (None, name):
                for passage, rewards in passages.items():
                    found[passage] += rewards
    return dict(found)


def _estimate(held: Sequence[Held], task: str | None) -> Estimate:
    return estimate(list(_passages(held, task).values()))


def _difference(first: Sequence[Held], second: Sequence[Held], task: str | None) -> Difference:
    return difference(_passages(first, task), _passages(second, task))


# --- the picture -------------------------------------------------------------


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Rewards of each task while training and on held-out prompts; entropy of each arm.

    A thin line is a seed, a thick one the mean of the seeds. Steps that AEPO ran without negative
    advantages are shaded, once for each seed that did.
    """
    setup, calibration, arms = _parts(rows)
    tasks = sorted(setup["held_out"])
    columns = max(len(tasks) + 1, len(arms))
    figure = Figure(figsize=(4.1 * columns, 6.4), dpi=110, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, task in zip(grid[0], tasks, strict=False):
        for arm, runs in arms.items():
            _curves(axes, [run["reward"][task] for run in runs], COLORS[arm], arm)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"reward while training: {task}", loc="left", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    _bars(grid[0][len(tasks)], setup, arms, tasks)
    top = 1.05 * max(x for runs in arms.values() for run in runs for x in run["entropy"])
    for axes, (arm, runs) in zip(grid[1], arms.items(), strict=False):
        _shade(axes, runs)
        _curves(axes, [run["entropy"] for run in runs], COLORS[arm], "seeds' mean")
        if any(sum(run["drops"]) for run in runs):
            for name in ("low", "high"):
                axes.axhline(setup[name], color="#555555", lw=0.8, ls="--")
        elif arm == "task":
            entropy = calibration["entropy"]
            steps = range(1, len(entropy) + 1)
            axes.plot(steps, entropy, color="#222222", lw=1, ls=":", label="calibration")
        axes.set_ylim(0, top)
        axes.set_title(f"entropy, nats: {arm}", loc="left", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    for axes in (*grid[0][len(tasks) + 1 :], *grid[1][len(arms) :]):
        axes.set_axis_off()
    for axes in grid.flatten():
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    seeds = ", ".join(map(str, setup["seeds"]))
    figure.suptitle(
        f"{setup['model']} on {setup['device']}: {setup['steps']} steps of {setup['prompts']} "
        f"prompts, {setup['group_size']} answers each; seeds {seeds}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def _curves(axes: Axes, series: Sequence[Sequence[float | None]], color: str, label: str) -> None:
    for values in series:
        found = [(step, v) for step, v in enumerate(values, 1) if v is not None]
        axes.plot(*zip(*found, strict=True), color=color, lw=0.7, alpha=0.45)
    known = [[v for v in values if v is not None] for values in zip(*series, strict=True)]
    steps = [step for step, values in enumerate(known, 1) if values]
    means = [statistics.fmean(values) for values in known if values]
    axes.plot(steps, means, color=color, lw=2.2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=8)


def _shade(axes: Axes, runs: Sequence[Row]) -> None:
    label = "without negative advantages"
    for run in runs:
        steps = [{"step": n, "aepo/drops_negatives": d} for n, d in enumerate(run["drops"], 1)]
        for first, last in drop_phases(steps):
            width = (first - 0.5, last + 0.5)
            axes.axvspan(*width, color=SHADE, alpha=0.8 / len(runs), lw=0, label=label)
            label = None


def _bars(axes: Axes, setup: Row, arms: Mapping[str, Sequence[Row]], tasks: Sequence[str]) -> None:
    groups = {"before": ("#bbbbbb", [setup["held_out"]])}
    groups |= {arm: (COLORS[arm], [run["held_out"] for run in runs]) for arm, runs in arms.items()}
    width = 0.8 / len(groups)
    for i, (name, (color, held)) in enumerate(groups.items()):
        found = [_estimate(held, task) for task in tasks]
        axes.bar(
            [x + width * (i - (len(groups) - 1) / 2) for x in range(len(tasks))],
            [e.mean for e in found],
            width=0.9 * width,
            yerr=[[e.mean - e.low for e in found], [e.high - e.mean for e in found]],
            capsize=3,
            color=color,
            label=name,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.25)  # room for the legend above full reward
    axes.set_title("held-out reward, 95 %", loc="left", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


# --- the page ----------------------------------------------------------------


def page(rows: Sequence[Row], picture: str = "aepo-curves.png") -> str:
    """The page in Markdown; ``picture`` lies beside it."""
    setup, calibration, arms = _parts(rows)
    tasks = sorted(setup["held_out"])
    questions = sum(len(v) for p in setup["held_out"].values() for v in p.values())
    passages = len(_passages([setup["held_out"]], None))
    low_q, high_q = setup["quantiles"]
    seeds = ", ".join(map(str, setup["seeds"]))
    text = f"""# AEPO beside GRPO: curves

![Rewards and entropies of the arms]({picture})

`python -m bench.aepo_curves` trains `{setup["model"]}` by the recipe `{setup["recipe"]}`:
{setup["steps"]} steps of {setup["prompts"]} prompts with {setup["group_size"]} answers, learning \
rate {setup["learning_rate"]:g}, temperature {setup["temperature"]:g}, on
{setup["device"]}. The arms are `grpo` (advantages over the std of the group), `task` (over the \
std of the task in the batch) and
`task+aepo`. Seeds: {seeds}. The arms of a seed see the same prompts in the same order.

**Bounds.** A calibration, `task` with seed {setup["calibration_seed"]}, ran first. `low` and \
`high` are the quantiles {low_q:.3g} and {high_q:.3g} of the
entropies of its {len(calibration["entropy"])} steps: {setup["low"]} and {setup["high"]} nats.

**While training.** Mean over the seeds; the end is the last {LAST_STEPS} steps.

| arm | {" | ".join(f"{t}: all steps | end" for t in tasks)} | entropy at the end | \
steps without negatives, by seed |
|---|{"---|---|" * len(tasks)}---|---|
"""
    for arm, runs in arms.items():
        cells = [arm]
        for task in tasks:
            cells += [f"{_mean(runs, task, last):.3f}" for last in (setup["steps"], LAST_STEPS)]
        entropy = statistics.fmean(x for run in runs for x in run["entropy"][-LAST_STEPS:])
        drops = ", ".join(str(sum(run["drops"])) for run in runs)
        text += f"| {' | '.join([*cells, f'{entropy:.3f}', drops])} |\n"
    text += f"""
**Held out.** {questions} questions over {passages} passages that no run trained on, one answer \
each at the temperature of training;
mean and 95 % interval over passages, all seeds together.

| | {" | ".join(tasks)} | all |
|---|{"---|" * len(tasks)}---|
"""
    columns: list[str | None] = [*tasks, None]
    held = {arm: [run["held_out"] for run in runs] for arm, runs in arms.items()}
    for name, answers in {"before": [setup["held_out"]], **held}.items():
        text += f"| {name} | {' | '.join(_plain(_estimate(answers, t)) for t in columns)} |\n"
    pairs = list(combinations(reversed(held), 2))
    for first, second in pairs:
        cells = [_plain(_difference(held[first], held[second], task)) for task in columns]
        text += f"| {first} − {second} | {' | '.join(cells)} |\n"
    return text + "\n**What this shows.** " + "\n".join(_verdicts(setup, arms, held, pairs)) + "\n"


def _mean(runs: Sequence[Row], task: str, last: int) -> float:
    return statistics.fmean(x for run in runs for x in run["reward"][task][-last:] if x is not None)


def _plain(value: Estimate | Difference) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _verdicts(setup, arms, held, pairs) -> list[str]:
    """One sentence each: whether arms learn, whether both phases occurred, and each pair."""
    before = [setup["held_out"]]
    gains = {arm: _difference(answers, before, None) for arm, answers in held.items()}
    idle = [arm for arm, gain in gains.items() if gain.low <= 0]
    sentences = [
        f"Held-out reward rises by {min(g.mean for g in gains.values()):.2f} to "
        f"{max(g.mean for g in gains.values()):.2f}; "
        + (f"not clearly under {', '.join(idle)}." if idle else "all arms learn.")
    ]
    both = sum(0 < sum(run["drops"]) < len(run["drops"]) for run in arms["task+aepo"])
    sentences.append(
        f"AEPO ran steps of both kinds, with and without negative advantages, in {both} of "
        f"{len(arms['task+aepo'])} seeds."
    )
    for first, second in pairs:
        found = _difference(held[first], held[second], None)
        if found.low <= 0 <= found.high:
            verdict = "no difference that these questions can show"
        else:
            verdict = "better" if found.mean > 0 else "worse"
        sentences.append(f"`{first}` against `{second}`: {found.mean:+.3f}, {verdict}.")
    sentences.append(
        f"The intervals speak of these runs on other passages, not of other seeds: there are "
        f"{len(setup['seeds'])}, of one small model and {setup['steps']} steps."
    )
    return sentences


def main(results: str) -> None:
    """Write the picture and the page beside ``results``."""
    path = Path(results)
    rows = list(read_jsonl(path))
    draw(rows, path.with_suffix(".png"))
    with atomic_write(path.with_suffix(".md")) as file:
        file.write(page(rows, path.with_suffix(".png").name))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.aepo_curves_page RESULTS.jsonl")
    main(sys.argv[1])
