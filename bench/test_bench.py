"""``pytest bench``: the registry as pytest-benchmark entries, smallest shape of each case.

``pytest bench --benchmark-save=NAME`` and ``--benchmark-compare`` compare two checkouts. Claims
come from ``python -m bench``, whose providers are interleaved.
"""

import functools

import pytest
import torch

import bench.cases  # noqa: F401  (fills the registry)
from bench import peers, timing
from bench.gate import WrongResult
from bench.registry import OPS, Problem, Unavailable, build, select
from bench.run import WARM_UP_CALLS, gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POINTS = {str(point): point for point in select(["all"], DEVICE, quick=True)}
ROUNDS = 10


@functools.lru_cache(maxsize=1)  # entries of one point follow each other
def _problem(point: str) -> Problem:
    return build(POINTS[point], DEVICE)


def _entries():
    for name, point in POINTS.items():
        backward = point.case.startswith("fwd_bwd")
        known = [
            peer.name
            for peer in peers.PEERS
            if peer.op == point.op and peer.why_absent(DEVICE, backward) is None
        ]
        impls = [*OPS[point.op].ours(DEVICE), *known]
        if point.op == "ceiling":
            impls = [f"torch-{torch.__version__}"]
        for impl in impls:
            label = f"{point.op}-{point.case}-{point.shape_text.replace(';', '-')}-{impl}"
            yield pytest.param(name, impl, id=label)


@pytest.mark.parametrize("point, impl", list(_entries()))
def test_speed(benchmark, point, impl):
    try:
        problem = _problem(point)
    except Unavailable as error:
        pytest.skip(str(error))
    if impl not in problem.impls:
        pytest.skip(problem.absent[impl])
    call = problem.impls[impl]
    try:
        rel_err = gate(problem, impl, call)
    except Unavailable as error:
        pytest.skip(str(error))
    except WrongResult as error:
        pytest.fail(f"{impl} is wrong, so it has no speed: {error}")
    clock = timing.clock_for(DEVICE)
    benchmark.group = point
    benchmark.extra_info.update(
        rel_err=rel_err, bytes=problem.bytes, useful_flops=problem.useful_flops
    )

    def finished(function):
        def run():
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    benchmark.pedantic(
        finished(call), setup=finished(clock.cool), rounds=ROUNDS, warmup_rounds=WARM_UP_CALLS
    )
