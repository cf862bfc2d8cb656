"""The picture of a merge: the weight of each expert, tensor by tensor, over the layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import IO

from matplotlib.figure import Figure

from qwenlong.merge import TensorStats

_COLORS = ("#1b6ca8", "#b8532a", "#4f8f46", "#7b5ea7", "#8a6d1d", "#555555")
OUTSIDE = "outside the layers"
# The first that matches names the panel.
_KINDS = (
    ("norms", r"norm|layernorm"),
    ("attention", r"attn|attention"),
    ("router", r"(mlp|moe|feed_forward)\.(gate|router)\b"),
    ("experts", r"experts"),
    ("mlp", r"mlp|feed_forward"),
    ("other", r""),
)


def place(name: str) -> tuple[str, int]:
    """The panel of a tensor and its layer, the first number in its name; -1 outside the layers."""
    layer = re.search(r"(?:^|\.)(\d+)\.", name)
    if layer is None:
        return OUTSIDE, -1
    kind = next(kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE))
    return kind, int(layer[1])


def draw_weights(
    file: IO[bytes], tensors: Mapping[str, TensorStats], experts: Sequence[str], title: str
) -> None:
    """Write a PNG: a panel for each kind of tensor, a line for each expert.

    The line is the mean over the tensors of a layer, the band the range. Tensors whose weights are
    uniform for want of any difference are left out and counted in the title.
    """
    panels: dict[str, dict[int, list[tuple[str, list[float]]]]] = defaultdict(dict)
    for name, stats in tensors.items():
        if not stats.uniform:
            kind, layer = place(name)
            panels[kind].setdefault(layer, []).append((name, stats.weights))
    order = [kind for kind in (*(kind for kind, _ in _KINDS), OUTSIDE) if kind in panels]
    figure = Figure(figsize=(11, 1.2 + 2.1 * max(1, len(order))), dpi=110, layout="constrained")
    for axes, kind in zip(
        figure.subplots(max(1, len(order)), 1, squeeze=False)[:, 0], order, strict=False
    ):
        layers = dict(sorted(panels[kind].items()))
        if kind == OUTSIDE:
            _draw_named(axes, layers[-1], experts)
        else:
            _draw_layers(axes, layers, experts)
        count = sum(map(len, layers.values()))
        axes.set_title(f"{kind}: {count:,} tensors", loc="left", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("weight")
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    if order:
        lines, _ = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(
            lines, experts, loc="outside lower left", ncols=4, fontsize=8, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a folder's name may hold a $
    else:
        figure.axes[0].axis("off")
    still = sum(stats.uniform for stats in tensors.values())
    more = f"; {still:,} tensors without a difference are not drawn" if still else ""
    figure.suptitle(title + more, fontsize=11, x=0.01, ha="left", parse_math=False)
    figure.savefig(file, format="png")


def _draw_layers(axes, layers: dict, experts: Sequence[str]) -> None:
    for j, expert in enumerate(experts):
        columns = [[weights[j] for _, weights in tensors] for tensors in layers.values()]
        x, color = list(layers), _COLORS[j % len(_COLORS)]
        axes.fill_between(
            x, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15
        )
        mean = [sum(column) / len(column) for column in columns]
        axes.plot(x, mean, color=color, marker="o", markersize=3, linewidth=1.3, label=expert)
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)


def _draw_named(axes, tensors: Sequence[tuple[str, list[float]]], experts: Sequence[str]) -> None:
    for j, expert in enumerate(experts):
        values = [weights[j] for _, weights in tensors]
        color = _COLORS[j % len(_COLORS)]
        axes.plot(range(len(values)), values, "o", color=color, markersize=5, label=expert)
    axes.set_xticks(range(len(tensors)), [name for name, _ in tensors], fontsize=7)
    axes.margins(x=0.2)
