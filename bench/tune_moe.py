"""Sweep the tiles of the expert layer's kernels on this machine, and print the table to commit.

Every kernel is timed alone, at a size with many rows per expert and at one with few. Candidates are
compiled beforehand by several processes into Triton's cache; one that does not compile, launch or
agree bit for bit with the present configuration is listed with the reason.

    python -m bench.tune_moe                  # all kernels, Qwen3-30B-A3B's layer
    python -m bench.tune_moe dw_down --tokens 32768
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.tune import configured, median_ms
from qlkernels.grouped_gemm import RoutedRows, configs, launch
from qlkernels.grouped_gemm.configs import Tiles
from qlkernels.moe_routing import build_expert_index

GATE_UP = [  # block_m, block_n, block_k, group_m, num_warps, num_stages, per_sm
    *(Tiles(128, 128, 64, group, 8, 4) for group in (4, 8, 16, 32)),
    Tiles(128, 128, 64, 8, 8, 3), Tiles(256, 64, 64, 8, 8, 4),
    Tiles(128, 64, 64, 8, 8, 3, 2), Tiles(128, 64, 64, 8, 4, 3, 2),
    Tiles(64, 128, 64, 8, 4, 4), Tiles(64, 128, 64, 8, 4, 3), Tiles(64, 64, 64, 8, 4, 4, 2),
]  # fmt: skip
PRODUCT = [
    *(Tiles(128, 256, 64, group, 8, 4) for group in (4, 8, 16, 32)),
    Tiles(128, 256, 64, 8, 8, 3), Tiles(256, 128, 64, 8, 8, 4), Tiles(256, 128, 64, 8, 8, 3),
    Tiles(128, 128, 64, 8, 8, 4), Tiles(128, 128, 64, 8, 8, 3, 2), Tiles(128, 128, 64, 8, 4, 3, 2),
    Tiles(128, 128, 64, 16, 8, 3, 2), Tiles(64, 256, 64, 8, 4, 4), Tiles(64, 128, 64, 8, 4, 4, 2),
]  # fmt: skip
SWIGLU_BACKWARD = [
    *(Tiles(128, 128, 64, group, 8, 3, 2) for group in (4, 8, 16)),
    Tiles(128, 128, 64, 8, 8, 4), Tiles(128, 128, 64, 8, 4, 3, 2), Tiles(256, 128, 64, 8, 8, 3),
    Tiles(128, 256, 64, 8, 8, 3), Tiles(128, 64, 64, 8, 8, 3, 2), Tiles(64, 128, 64, 8, 4, 4),
    Tiles(64, 128, 64, 8, 4, 3, 2),
]  # fmt: skip
DW = [
    *(Tiles(128, 256, 64, group, 8, 7) for group in (4, 8)), Tiles(128, 256, 64, 8, 8, 5),
    *(Tiles(256, 128, 64, group, 8, 7) for group in (4, 8)), Tiles(256, 128, 64, 8, 8, 5),
    Tiles(128, 128, 64, 8, 8, 5, 2), Tiles(128, 128, 64, 8, 4, 5, 2),
]  # fmt: skip


@dataclass
class Layer:
    """Operands of every kernel; the gradient's are random too, their values do not matter."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    top_k: int
    dtype: torch.dtype
    device: str

    def __post_init__(self):
        g = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            return x.normal_(generator=g).mul_(shape[-1] ** -0.5)

        T, H, I, E, M = self.T, self.H, self.I, self.E, self.T * self.top_k  # noqa: E741
        scores = torch.rand(T, E, generator=g, device=self.device)
        ids = scores.topk(self.top_k, dim=1).indices.int()
        self.rows = RoutedRows(ids, *build_expert_index(ids, E))
        self.weights = torch.rand(T, self.top_k, generator=g, device=self.device)
        self.x, self.w_gate_up, self.w_down = normal(T, H), normal(E, 2 * I, H), normal(E, H, I)
        self.a, self.h, self.y, self.dh = (normal(M, n) for n in (I, 2 * I, H, 2 * I))
        self.dw_gate_up, self.dw_down = (torch.empty_like(w) for w in (self.w_gate_up, self.w_down))
        self.chunk = (0, T)

    def calls(self) -> dict[str, tuple[dict, Sequence[Tiles], dict[str, tuple[Callable, int]]]]:
        """Kernel -> (table, candidates, {label: (call that returns a result, FLOPs)})."""
        flops = 2 * self.T * self.top_k * self.H * self.I
        x, rows, chunk = self.x, self.rows, self.chunk

        def gate_up(a, h, buffer=None):
            launch.gate_up(x, self.w_gate_up, rows, chunk, a, h, buffer)
            return a if h is None else h

        def product(source, w, is_transposed):
            launch.product(source, w, rows, chunk, self.y, is_transposed=is_transposed)
            return self.y

        def backward():
            shares = launch.swiglu_backward(
                x, self.w_down, self.h, self.weights, rows, self.dh, self.a
            )
            return torch.cat([shares.flatten(), self.dh[: self.T].flatten().float()])

        def dw(left, right, out, gather_left):
            launch.weight_gradient(
                left, right, rows, out, gather_left=gather_left, accumulate=False
            )
            return out

        return {
            "gate_up": (configs.GATE_UP_CONFIG, GATE_UP, {
                "score": (lambda: gate_up(self.a, None), 2 * flops),
                "train": (lambda: gate_up(self.a, self.h), 2 * flops),
            }),
            "gate_up_copied": (configs.GATE_UP_CONFIG, GATE_UP[:6], {
                "score": (lambda: gate_up(self.a, None, self.y), 2 * flops),
                "train": (lambda: gate_up(self.a, self.h, self.y), 2 * flops),
            }),
            "down": (configs.DOWN_CONFIG, PRODUCT, {
                "": (lambda: product(self.a, self.w_down, False), flops),
            }),
            "dx": (configs.DX_CONFIG, PRODUCT, {
                "": (lambda: product(self.dh, self.w_gate_up, True), 2 * flops),
            }),
            "swiglu_backward": (configs.SWIGLU_BACKWARD_CONFIG, SWIGLU_BACKWARD, {
                "": (backward, flops),
            }),
            "dw_down": (configs.DW_DOWN_CONFIG, DW, {
                "": (lambda: dw(x, self.a, self.dw_down, True), flops),
            }),
            "dw_gate_up": (configs.DW_GATE_UP_CONFIG, DW, {
                "": (lambda: dw(self.dh, x, self.dw_gate_up, False), 2 * flops),
            }),
        }  # fmt: skip


KERNELS = ("gate_up", "gate_up_copied", "down", "dx", "swiglu_backward", "dw_down", "dw_gate_up")


def key_of(layer: Layer) -> tuple[str, int, str]:
    path = configs.path_of(layer.x, layer.w_gate_up)
    size = "few" if layer.T * layer.top_k <= configs.FEW_ROWS * layer.E else "many"
    return path, layer.x.element_size(), size


def sweep(
    layer: Layer, kernel: str, candidates: Sequence[Tiles] | None = None, repeats: int = 10
) -> list[tuple[Tiles, dict[str, float] | str]]:
    """``(tiles, {label: milliseconds} | reason)`` of a kernel, least total first, refusals last."""
    table, listed, calls = layer.calls()[kernel]
    key = key_of(layer)
    copies = configs.GATHER_BY_COPY
    found = []
    with configured(copies, key[0], kernel == "gate_up_copied"):
        want = {label: call().clone() for label, (call, _) in calls.items()}
        for tiles in dict.fromkeys([table[key], *(candidates or listed)]):
            with configured(table, key, tiles):
                try:
                    if any(not torch.equal(c(), want[label]) for label, (c, _) in calls.items()):
                        found.append((tiles, "other bits than the present configuration"))
                        continue
                    ms = {label: median_ms(c, repeats) for label, (c, _) in calls.items()}
                    found.append((tiles, ms))
                except Exception as error:  # it may fail in any layer of the compiler
                    first = (str(error).splitlines() or [""])[0]
                    found.append((tiles, f"{type(error).__name__}: {first}"))
    timed = [row for row in found if not isinstance(row[1], str)]
    refused = [row for row in found if isinstance(row[1], str)]
    return sorted(timed, key=lambda row: sum(row[1].values())) + refused


def _compile_some(shape: tuple[int, ...], kernels: Sequence[str], part: int, parts: int) -> None:
    """Launch every ``parts``-th candidate once on a few tokens, so that it is in the cache."""
    layer = Layer(256, *shape, torch.bfloat16, "cuda")
    work = []
    for kernel in kernels:
        table, candidates, calls = layer.calls()[kernel]
        work += [(kernel, table, t, c) for t in candidates for c, _ in calls.values()]
    path, size, rows = key_of(layer)
    for kernel, table, tiles, call in work[part::parts]:
        with (
            configured(configs.GATHER_BY_COPY, path, kernel == "gate_up_copied"),
            configured(table, (path, size, rows), tiles),
        ):
            try:
                call()
                torch.cuda.synchronize()
            except Exception:  # the sweep says why
                continue


def main(
    kernels: Annotated[list[str] | None, typer.Argument(help=", ".join(KERNELS))] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to tune at.")] = "32768,4096,1024",
    hidden: int = 2048,
    intermediate: int = 768,
    experts: int = 128,
    top_k: int = 8,
    repeats: int = 8,
) -> None:
    """Sweep the tiles of some kernels (all by default) on this machine's GPU."""
    if not torch.cuda.is_available():
        typer.echo("bench.tune_moe: needs a CUDA device", err=True)
        raise typer.Exit(2)
    chosen = kernels or list(KERNELS)
    unknown = [name for name in chosen if name not in KERNELS]
    if unknown:
        raise typer.BadParameter(f"unknown kernel {unknown[0]!r}; choose from {', '.join(KERNELS)}")
    console = Console(width=160)
    shape = (hidden, intermediate, experts, top_k)
    began = time.perf_counter()
    parts = max(1, min(8, (os.cpu_count() or 1) - 1))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_compile_some, args=(shape, chosen, part, parts))
        for part in range(parts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    console.print(f"compiled by {parts} processes in {time.perf_counter() - began:.0f} s")
    best: list[str] = []
    for T in (int(t) for t in tokens.split(",")):
        layer = Layer(T, *shape, torch.bfloat16, "cuda")
        for kernel in chosen:
            present = layer.calls()[kernel][0][key_of(layer)]
            rows = sweep(layer, kernel, repeats=repeats)
            console.print(_table(layer, kernel, rows, present))
            if not isinstance(rows[0][1], str):
                best.append(f"T={T} {kernel} {key_of(layer)}: {rows[0][0]}")
        del layer
        torch.cuda.empty_cache()
    console.print("\n".join(["fastest:", *best]), markup=False)
    console.print(f"{time.perf_counter() - began:.0f} s in all")


def _table(layer: Layer, kernel: str, rows: list, present: Tiles) -> Table:
    calls = layer.calls()[kernel][2]
    columns = Table("tiles", *(f"{label} ms (TFLOP/s)" for label in calls))
    columns.title = f"{kernel} T={layer.T} {key_of(layer)}"
    for tiles, result in rows:
        name = f"{tuple(tiles)}{' present' if tiles == present else ''}"
        if isinstance(result, str):
            columns.add_row(name, result[:90])
            continue
        rates = (f"{ms:.3f} ({calls[k][1] / ms / 1e9:.0f})" for k, ms in result.items())
        columns.add_row(name, *rates)
    return columns


if __name__ == "__main__":
    typer.run(main)
