"""Time every candidate configuration of a kernel and print the table: ``python -m bench.tune``.

Users never autotune: the configurations are constants beside the kernels, and this is how they are
chosen. A candidate whose scores differ from those of the present configuration is refused, one that
does not compile or launch is listed with the reason.

    python -m bench.tune linear_fold --tokens 8192 --hidden 2048 --vocab 151936
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from qlkernels import linear_logprob, linear_policy_loss, logprob_entropy
from qlkernels._target import compute_capability, is_interpreting

# the package rebinds the names of these modules to their functions
linear_kernels = sys.modules["qlkernels.linear_logprob.kernels"]
linear_policy_kernels = sys.modules["qlkernels.linear_policy_loss.kernels"]
logprob_kernels = sys.modules["qlkernels.logprob_entropy.kernels"]

GEMM = [  # BLOCK_T, BLOCK_V, BLOCK_H, GROUP_T, num_warps, num_stages
    (block_t, block_v, block_h, group, warps, stages)
    for (block_t, block_v, warps), block_h, group, stages in itertools.product(
        [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4)], [64], [4, 8, 16], [3, 4]
    )
]
ROW = [(block, warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16)]


@contextmanager
def configured(table: object, key: object, value: object) -> Iterator[None]:
    """``table[key]`` (a dict) or ``table.key`` (a module) is ``value`` inside the block."""
    is_dict = isinstance(table, dict)
    before = table[key] if is_dict else getattr(table, key)

    def put(x):
        if is_dict:
            table[key] = x
        else:
            setattr(table, key, x)

    put(value)
    try:
        yield
    finally:
        put(before)


def _path() -> str:
    if is_interpreting():
        return "interpreter"
    capability = compute_capability()
    return "pointer" if capability < 90 else "tma-sm90" if capability < 100 else "tma-sm100"


def target(name: str, tokens: int, hidden: int, vocab: int, device: str, dtype: torch.dtype):
    """(table, key, candidates, call) of a kernel; ``call`` returns tensors to compare."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(vocab, (tokens,), generator=g).to(device)
    upstream = torch.randn(tokens, generator=g).to(device)
    key = (_path(), torch.empty(0, dtype=dtype).element_size())
    if name.startswith("logprob_entropy"):
        logits = torch.randn(tokens, vocab, dtype=dtype, device=device).requires_grad_()
        if name == "logprob_entropy_fwd":
            call = lambda: logprob_entropy(logits.detach(), y, impl="triton")  # noqa: E731
            return logprob_kernels, "FWD_CONFIG", ROW, call
        scores = logprob_entropy(logits, y, impl="triton")

        def backward():
            return torch.autograd.grad(scores.logprobs, logits, upstream, retain_graph=True)

        return logprob_kernels, "BWD_CONFIG", ROW, backward
    x = torch.randn(tokens, hidden, generator=g).to(device, dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(device, dtype).requires_grad_()
    if name == "linear_fold":
        call = lambda: linear_logprob(x.detach(), w.detach(), y, impl="triton")  # noqa: E731
        return linear_kernels.FOLD_CONFIG, key, GEMM, call
    if name == "linear_dlogits":
        scores = linear_logprob(x, w, y, impl="triton")

        def backward():
            return torch.autograd.grad(scores.logprobs, (x, w), upstream, retain_graph=True)

        return linear_kernels.dlogits_config(vocab, False, False), key, GEMM, backward
    if name == "linear_exp":
        mask = torch.ones(tokens, dtype=torch.bool, device=device)
        cu_seqlens = torch.tensor([0, tokens], device=device)

        def one_pass():
            return linear_policy_loss(
                x, w, y, None, upstream, mask, cu_seqlens=cu_seqlens, impl="triton"
            ).scores

        return linear_policy_kernels.EXP_CONFIG, key, GEMM, one_pass
    raise typer.BadParameter(f"unknown kernel {name!r}; choose from {', '.join(NAMES)}")


NAMES = [
    "logprob_entropy_fwd", "logprob_entropy_bwd", "linear_fold", "linear_dlogits", "linear_exp",
]  # fmt: skip


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median over calls after two for warming up; CUDA events on a GPU."""
    for _ in range(2):
        call()
    samples = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - began))
    return statistics.median(samples)


def sweep(table, key, candidates: Sequence[tuple], call, repeats: int) -> list[tuple]:
    """``(config, milliseconds | reason)``, fastest first, refusals last."""
    present = table[key] if isinstance(table, dict) else getattr(table, key)
    want = [t.detach().clone() for t in call()]
    found = []
    for config in dict.fromkeys([present, *candidates]):
        with configured(table, key, config):
            try:
                got = call()
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a.detach(), b, rtol=2e-2, atol=1e-3)
                found.append((config, median_ms(call, repeats)))
            except AssertionError:
                found.append((config, "wrong"))
            except Exception as error:  # a configuration may fail in any layer of the compiler
                found.append((config, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    return sorted(found, key=lambda row: (isinstance(row[1], str), row[1]))


def main(
    kernels: Annotated[list[str] | None, typer.Argument(help="; ".join(NAMES))] = None,
    tokens: int = 8192,
    hidden: int = 2048,
    vocab: int = 151_936,
    repeats: int = 10,
) -> None:
    """Sweep the configurations of some kernels (all by default) on this machine's GPU."""
    if not torch.cuda.is_available():
        typer.echo("bench.tune: needs a CUDA device", err=True)
        raise typer.Exit(2)
    console = Console()
    for name in kernels or NAMES:
        columns = Table("config", "ms", title=f"{name} T={tokens} H={hidden} V={vocab}")
        rows = sweep(*target(name, tokens, hidden, vocab, "cuda", torch.bfloat16), repeats)
        for config, result in rows:
            text = result if isinstance(result, str) else f"{result:.3f}"
            columns.add_row(str(config), text[:100])
        console.print(columns)


if __name__ == "__main__":
    typer.run(main)
