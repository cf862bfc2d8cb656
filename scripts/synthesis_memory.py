"""Measure the peak memory of the synthesis pipeline against the size of its corpus, and draw it.

    python scripts/synthesis_memory.py --counts 1000 10000 50000 100000

Each size runs in a process of its own over a generated JSON lines corpus, all stages, one worker.
Writes docs/synthesis-memory.json and docs/synthesis-memory.png.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VOCABULARY = 20_000


def corpus_rows(count: int) -> Iterator[dict]:
    """Documents of 40 to 360 words; every tenth repeats an earlier one in all but a few words."""
    rng = random.Random(0)
    earlier: list[str] = []
    for number in range(count):
        if number % 10 == 9:
            words = list(earlier)
            for place in rng.sample(range(len(words)), len(words) // 60):
                words[place] = f"w{rng.randrange(VOCABULARY)}"
        else:
            words = [f"w{rng.randrange(VOCABULARY)}" for _ in range(rng.randint(40, 360))]
            earlier = words
        fact = f"The keeper named Warden{number:07d} guards the code {number * 7919:09d}."
        yield {"title": f"page {number}", "text": f"{' '.join(words)}. {fact}"}


def measure(count: int, folder: Path) -> dict:
    """Run the pipeline over ``count`` documents in this process; its peak memory and its time."""
    sys.path.insert(0, str(ROOT / "tests" / "qwenlong" / "data"))
    from qwenlong.data.pipeline import run_pipeline
    from qwenlong.data.recipe import ExtendConfig, Recipe, RouteConfig, SourceConfig
    from qwenlong.storage import write_jsonl

    write_jsonl(folder / "corpus.jsonl", corpus_rows(count))
    recipe = Recipe(
        name="memory",
        sources=[SourceConfig(name="pages", kind="jsonl", path=str(folder / "corpus.jsonl"))],
        routes=[RouteConfig(route="toy_route:toy_samples", limit=200)],
        extend=ExtendConfig(lengths={8192: 1, 32768: 1}),
    )
    started = time.monotonic()
    summary = run_pipeline(recipe, folder / "out")
    return {
        "documents": count,
        "corpus_mb": round((folder / "corpus.jsonl").stat().st_size / 1e6, 1),
        "kept": summary["documents"]["kept"],
        "duplicates": summary["documents"]["duplicates"],
        "samples": summary["samples"]["exported"],
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = [row["documents"] for row in rows]
    axes.plot(counts, [row["peak_mb"] for row in rows], "o-", label="peak memory of the run")
    axes.plot(counts, [row["corpus_mb"] for row in rows], "s--", label="size of the corpus")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("documents")
    axes.set_ylabel("MB")
    axes.set_title("Synthesis over a generated corpus, all stages, one worker")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 30_000, 100_000])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--one", type=int, help="measure this size here and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.one, Path(folder))))
        return
    rows = []
    for count in arguments.counts:
        command = [sys.executable, __file__, "--one", str(count)]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    path = arguments.out / "synthesis-memory.json"
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    draw(rows, arguments.out / "synthesis-memory.png")


if __name__ == "__main__":
    main()
