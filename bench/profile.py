"""``--profile torch`` and ``--profile ncu``: where the time of one provider goes."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

import bench.cases  # noqa: F401  (fills the registry)
from bench import timing
from bench.registry import Outputs, Point, Unavailable, build

NVTX_RANGE = (
    "bench_profile"  # the range that the ncu filter names; each op carries its own inside it
)
WARM_UP_CALLS = 3
TOP_KERNELS = 15


def _providers(
    points: Sequence[Point], device: str, impls: Sequence[str], console: Console
) -> Iterator[tuple[Point, str, Callable[[], Outputs]]]:
    """Warmed-up providers, ours where no pattern is given; those that cannot run are printed with
    the reason.
    """
    for point in points:
        try:
            problem = build(point, device)
        except Unavailable as error:
            console.print(f"[yellow]absent[/] {point}: {escape(str(error))}", highlight=False)
            continue
        for name, call in problem.impls.items():
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in impls or ("ours-*",)):
                continue
            try:
                for _ in range(WARM_UP_CALLS):
                    call()
            except RuntimeError as error:
                console.print(
                    f"[yellow]absent[/] {point} {name}: {escape(str(error))}", highlight=False
                )
                continue
            yield point, name, call


def profile_torch(
    points: Sequence[Point], device: str, impls: Sequence[str], folder: Path, console: Console
) -> list[Path]:
    """Write one Chrome trace per provider and print its longest kernels (operators on the CPU)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    clock = timing.clock_for(device)
    written = []
    for point, name, call in _providers(points, device, impls, console):
        clock.round([(name, call)])
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function(f"bench.{point.op}.{point.case}.{name}"):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
        shape = point.shape_text.replace(";", "-").replace("=", "")
        path = folder / f"{point.op}-{point.case}-{shape}-{point.dtype}-{name}.json"
        profile.export_chrome_trace(str(path))
        written.append(path)
        console.print(f"{point} [bold]{name}[/]", highlight=False)
        key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        console.print(
            profile.key_averages().table(sort_by=key, row_limit=TOP_KERNELS),
            markup=False,
            soft_wrap=True,
        )
        console.print(f"trace: {path}\n", highlight=False)
    return written


def ncu_command(ncu: str, report: Path, arguments: Sequence[str]) -> list[str]:
    """The command that profiles ``python -m bench <arguments>`` inside ``NVTX_RANGE`` and nothing
    else.
    """
    return [
        *(ncu, "--set", "full", "--target-processes", "application-only"),
        # the slash marks a push-pop range; inputs and warm-up lie outside it
        *("--nvtx", "--nvtx-include", f"{NVTX_RANGE}/"),
        *("--force-overwrite", "--export", str(report)),
        *(sys.executable, "-m", "bench", *arguments),
    ]


def profile_ncu(report: Path, arguments: Sequence[str], console: Console) -> int:
    """Run ``python -m bench <arguments>`` again under Nsight Compute; its exit status."""
    ncu = shutil.which("ncu")
    if ncu is None:
        console.print(
            "--profile ncu needs Nsight Compute: put ncu on PATH (it comes with the CUDA toolkit)"
        )
        return 2
    report.parent.mkdir(parents=True, exist_ok=True)
    command = ncu_command(ncu, report, arguments)
    console.print(" ".join(command), highlight=False, soft_wrap=True)
    status = subprocess.run(command).returncode
    if status == 0:
        console.print(f"report: {report}.ncu-rep", highlight=False)
    return status


def run_in_range(
    points: Sequence[Point], device: str, impls: Sequence[str], console: Console
) -> None:
    """What runs under Nsight Compute: every provider once, inside ``NVTX_RANGE``."""
    for _point, _name, call in _providers(points, device, impls, console):
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_push(NVTX_RANGE)
        call()
        torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
