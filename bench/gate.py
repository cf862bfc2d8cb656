"""The correctness gate: a provider is timed only after its outputs were compared with fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Ours may err at most SLACK times as much as the baseline, plus FLOOR of the largest true value.
SLACK = 2.0
FLOOR = 1e-5
# Peers round where they like (bf16 logits, bf16 entropy, bf16 accumulation); their error is in the
# table, and only what no rounding explains is refused. Logits of 30 in bf16 are off by up to 0.06
# each, which moves the entropy of a peaked row by a sixth of the largest.
PEER_TOLERANCE = 5e-2
PEER_ENTROPY_TOLERANCE = 0.2


class WrongResult(AssertionError):
    """A provider's output is wrong; it gets no speed."""


@dataclass
class Comparison:
    """Error of one output, collected block by block, so that no fp64 copy of a large output has to
    exist.
    """

    name: str
    error: float = 0.0  # largest |actual - truth|
    slip: float = 0.0  # largest |baseline - truth|
    scale: float = 0.0  # largest |truth|

    def add(
        self, actual: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor | None = None
    ) -> None:
        if actual.shape != truth.shape:
            raise WrongResult(
                f"{self.name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
            )
        if truth.numel() == 0:
            return
        error = (actual.detach().double() - truth).abs().max()
        slip = torch.zeros(()) if baseline is None else (baseline.double() - truth).abs().max()
        if not math.isfinite(float(error)):
            raise WrongResult(f"{self.name} holds NaN or infinite values")
        self.error = max(self.error, float(error))
        self.slip = max(self.slip, float(slip))
        self.scale = max(self.scale, float(truth.abs().max()))

    @property
    def relative(self) -> float:
        return self.error / max(self.scale, 1e-30)

    def judge(self, strict: bool) -> None:
        peer = PEER_ENTROPY_TOLERANCE if self.name == "entropy" else PEER_TOLERANCE
        allowed = SLACK * self.slip + FLOOR * self.scale if strict else peer * self.scale
        if self.error > allowed:
            raise WrongResult(
                f"{self.name} is off by {self.error:.2e}, {allowed:.2e} is allowed "
                f"(largest true value {self.scale:.3g})"
            )


def require(outputs: dict, names: tuple[str, ...], complete: bool) -> list[str]:
    """The outputs to compare. A complete provider returns all of ``names``, any provider at least
    one of them.
    """
    present = [name for name in names if name in outputs]
    missing = [name for name in names if name not in outputs]
    if not present or (complete and missing):
        raise WrongResult(f"it does not return {', '.join(missing)}")
    return present
