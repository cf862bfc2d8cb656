"""The machine's own ceilings, measured in every run, and what they say about a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from bench.gate import Comparison, WrongResult
from bench.registry import Outputs, Problem, register
from bench.results import Row

_LM_HEAD = {"H": 2048, "V": 151_936}


@register(
    "ceiling",
    cuda=[
        {"case": "copy", "dtype": "bf16", "bytes": 2 << 30},
        {"case": "gemm", "dtype": "bf16", "M": 8192, "N": 8192, "K": 8192},
        {"case": "lm_head", "dtype": "bf16", "T": 8192, **_LM_HEAD, "gemm": "logits"},
        {"case": "lm_head", "dtype": "bf16", "T": 8192, **_LM_HEAD, "gemm": "dX"},
        {"case": "lm_head", "dtype": "bf16", "T": 8192, **_LM_HEAD, "gemm": "dW"},
    ],
    cpu=[
        {"case": "copy", "dtype": "fp32", "bytes": 256 << 20},
        {"case": "gemm", "dtype": "fp32", "M": 1024, "N": 1024, "K": 1024},
        {"case": "lm_head", "dtype": "fp32", "T": 256, "H": 576, "V": 49_152, "gemm": "logits"},
    ],
)
def _ceiling(device: str, case: str, dtype: torch.dtype, **shape) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        return out.normal_(generator=generator)

    name = f"torch-{torch.__version__}"
    if case == "copy":
        source = random(1, shape["bytes"] // dtype.itemsize)
        target = torch.empty_like(source)

        def check_copy(outputs: Outputs, _strict: bool, _complete: bool) -> float:
            if not torch.equal(outputs["target"], source):
                raise WrongResult("the copy differs from its source")
            return 0.0

        copy = {name: lambda: {"target": target.copy_(source)}}
        return Problem(copy, check_copy, bytes=2 * shape["bytes"], useful_flops=0)

    if case == "gemm":
        M, N, K = shape["M"], shape["N"], shape["K"]
    else:  # the three products of an lm head; M, N, K of each
        T, H, V = shape["T"], shape["H"], shape["V"]
        M, N, K = {"logits": (T, V, H), "dX": (T, H, V), "dW": (V, H, T)}[shape["gemm"]]
    # As an lm head stores them: the logits read W transposed, dX reads W as it is, dW reads dlogits
    # transposed
    gemm = shape.get("gemm", "logits")
    a = random(K, M).T if gemm == "dW" else random(M, K)
    b = random(N, K).T if gemm == "logits" else random(K, N)
    out = torch.empty(M, N, dtype=dtype, device=device)

    def check_gemm(outputs: Outputs, strict: bool, _complete: bool) -> float:
        found = Comparison("product")
        rows = torch.linspace(0, M - 1, min(M, 16), device=device).long()
        found.add(outputs["product"][rows], a[rows].double() @ b.double())
        found.judge(strict=False)
        return found.relative

    return Problem(
        {name: lambda: {"product": torch.mm(a, b, out=out)}},
        check_gemm,
        bytes=dtype.itemsize * (M * K + K * N + M * N),
        useful_flops=2 * M * N * K,
    )


@dataclass(frozen=True)
class Roof:
    """Best measured rates of one run. Empty where the run has no ceiling rows."""

    bytes_per_ms: float = 0.0
    flops_per_ms: dict[str, float] = field(default_factory=dict)  # dtype -> rate

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Roof:
        bandwidth, rates = 0.0, {}
        for row in rows:
            if row.op != "ceiling":
                continue
            if row.case == "copy":
                bandwidth = max(bandwidth, row.bytes / row.ms_p50)
            else:
                rates[row.dtype] = max(rates.get(row.dtype, 0.0), row.useful_flops / row.ms_p50)
        return cls(bandwidth, rates)

    def floor_ms(self, row: Row) -> float | None:
        """The larger of bytes over bandwidth and FLOPs over the GEMM rate; None where a rate is not
        measured.
        """
        rate = self.flops_per_ms.get(row.dtype, 0.0)
        if not self.bytes_per_ms or (row.useful_flops and not rate):
            return None
        return max(row.bytes / self.bytes_per_ms, row.useful_flops / rate if rate else 0.0)

    def percent(self, row: Row) -> float | None:
        """Floor over measured time, in percent."""
        floor = self.floor_ms(row)
        return None if floor is None else 100.0 * floor / row.ms_p50
