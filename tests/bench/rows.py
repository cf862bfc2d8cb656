"""Hand-made rows whose tables and plots can be worked out on paper."""

import dataclasses

from bench.results import Row

BASE = Row(
    run="r1", op="logprob_entropy", case="fwd", impl="ours-triton", peer_scope="",
    shape="T=1000;V=500;data=peaked", dtype="bf16", ms_p20=0.9, ms_p50=1.0, ms_p80=1.2,
    useful_flops=0, bytes=1_500_000_000, peak_mb=0.0, rel_err=3e-8, gpu="NVIDIA Test 9000",
    torch="2.11.0", triton="3.6.0", commit="abc1234", date="2026-01-02T03:04:05Z",
)  # fmt: skip


def row(**changes) -> Row:
    return dataclasses.replace(BASE, **changes)


def ceilings(run: str = "r1") -> list[Row]:
    """3 TB/s and 500 TFLOP/s in bf16."""
    common = dict(run=run, op="ceiling", impl="torch-2.11.0", rel_err=0.0, ms_p50=2.0)
    return [
        row(case="copy", shape="bytes=3000000000", bytes=6_000_000_000, **common),
        row(case="gemm", shape="M=1;N=1;K=1", bytes=1, useful_flops=10**12, **common),
    ]
