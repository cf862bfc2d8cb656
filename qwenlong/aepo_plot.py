"""The controller on the entropy curve of the paper: ``python -m qwenlong.aepo_plot OUT.png``.

The series is Figure 11 of arXiv 2512.12967 (Qwen3-30B-A3B-Thinking, 203 steps), read from the
vector data of the figure to about 0.001 nats. Its colours say which steps ran without negative
gradients. The paper does not publish the bounds, so they are chosen here to agree with the colours
on as many steps as possible.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwenlong.aepo import EntropyController, replay
from qwenlong.storage import atomic_write

PUBLISHED_ENTROPY = tuple(
    int(x) / 10_000  # nats
    for x in """
1227 1250 1353 1371 1363 1321 1396 1235 1372 1380 1322 1441 1439 1462 1424 1463 1475 1522 1556 1438
1487 1529 1632 1529 1584 1564 1616 1707 1757 1718 1695 1705 1693 1706 1780 1852 1789 1668 1777 1861
1803 1865 1873 1819 1907 1851 1801 1899 1935 1856 2006 2071 1981 2060 2101 2182 2125 2120 2128 2121
2080 2005 2321 2314 2189 2164 2131 2100 2287 2170 2023 2235 2375 2265 2363 2288 2223 2448 2217 2476
2540 2306 2619 2421 2513 2534 2526 2675 2803 2604 2738 2651 2672 2466 2327 2251 2212 2100 1866 1541
1612 1435 1457 1384 1332 1396 1386 1414 1353 1330 1391 1370 1464 1460 1374 1409 1504 1408 1398 1446
1482 1542 1488 1467 1498 1609 1512 1574 1717 1677 1691 1752 1850 1808 1878 1818 1952 1943 2121 2070
2203 2271 2308 2399 2391 2504 2477 2381 2397 2165 2013 1869 1982 1655 1370 1316 1385 1227 1288 1334
1341 1374 1311 1394 1394 1450 1375 1322 1376 1325 1292 1357 1377 1398 1406 1353 1381 1465 1407 1453
1314 1323 1451 1406 1543 1470 1503 1506 1553 1591 1637 1696 1755 1901 1808 1797 2130 1774 1780 1506
1376 1379 1171
""".split()
)
# first and last step of each phase without negative gradients
MASKED_PHASES = ((90, 104), (145, 154), (195, 202))
PUBLISHED_DECISIONS = tuple(
    any(first <= step <= last for first, last in MASKED_PHASES)
    for step in range(len(PUBLISHED_ENTROPY))
)
# name, mode, source, low, high: the bounds that agree best, by grid search over 0.100 to 0.290
BEST_FITS = (
    ("latch, entropy of the step before", "latch", "previous_step", 0.138, 0.248),
    ("latch, entropy of the same step", "latch", "scoring_pass", 0.134, 0.248),
    ("band (published snippet)", "band", "scoring_pass", 0.262, 0.274),
    ("above-high, no memory", "above-high", "scoring_pass", 0.262, 0.262),
)


def agreement(mode: str, source: str, low: float, high: float) -> float:
    """Fraction of the published steps on which the controller decides as the figure shows."""
    controller = EntropyController(low=low, high=high, mode=mode, entropy_source=source)
    decisions = replay(controller, PUBLISHED_ENTROPY)
    hits = sum(a == b for a, b in zip(decisions, PUBLISHED_DECISIONS, strict=True))
    return hits / len(decisions)


def plot(path: str | Path) -> None:
    """Draw the series, the published phases and every controller's decisions; written
    atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5.2), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    _, _, _, low, high = BEST_FITS[0]
    steps = range(len(PUBLISHED_ENTROPY))
    for first, last in MASKED_PHASES:
        top.axvspan(first - 0.5, last + 0.5, color="#f2c9a1", lw=0)
    top.plot(steps, PUBLISHED_ENTROPY, color="#1f4e79", lw=1.2)
    for bound, name in ((high, "high"), (low, "low")):
        top.axhline(bound, color="#666666", lw=0.8, ls="--")
        label = f"{name}\n{bound:.3f}"
        top.annotate(
            label, (1.005, bound), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    top.set_ylabel("batch entropy, nats")
    top.set_title(
        "Published entropy (arXiv 2512.12967, Figure 11); shaded: run without negative gradients",
        fontsize=9,
    )
    rows = [("published run", PUBLISHED_DECISIONS, None)]
    for name, mode, source, fit_low, fit_high in BEST_FITS:
        controller = EntropyController(low=fit_low, high=fit_high, mode=mode, entropy_source=source)
        share = agreement(mode, source, fit_low, fit_high)
        rows.append((name, replay(controller, PUBLISHED_ENTROPY), share))
    for y, (_, decisions, share) in enumerate(rows):
        dropped = [step for step, drops in enumerate(decisions) if drops]
        color = "#d9822b" if share is None else "#1f4e79"
        bottom.broken_barh([(s - 0.5, 1) for s in dropped], (y - 0.35, 0.7), color=color, lw=0)
    labels = [n if share is None else f"{n}: {100 * share:.1f} %" for n, _, share in rows]
    bottom.set_yticks(range(len(rows)), labels, fontsize=8)
    bottom.invert_yaxis()
    bottom.set_xlim(-1, len(PUBLISHED_ENTROPY))
    bottom.set_xlabel("step (bars: negative advantages dropped; agreement with the published run)")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qwenlong.aepo_plot OUT.png")
    plot(sys.argv[1])
    print(sys.argv[1])
