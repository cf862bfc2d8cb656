"""The correctness gate: a provider is timed only after its outputs were compared with fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Ours may err at most SLACK times as much as the baseline, plus FLOOR of the largest true value.
SLACK = 2.0
FLOOR = 1e-5
# Peers round where they like (bf16 logits, bf16 entropy, bf16 accumulation); their largest error is
# in the table, and only another function is refused, one off by a factor of 2 too: the norm of
# the error over that of the truth.
# Logits of 30 in bf16 are off by up to 0.06 each: of peaked rows that moves single entries of a
# gradient by as much as they are, and a ratio to the other side of a clip.
PEER_TOLERANCE = 0.4


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
    error_squares: float = 0.0  # sum of (actual - truth)^2
    truth_squares: float = 0.0

    def add(
        self, actual: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor | None = None
    ) -> None:
        if actual.shape != truth.shape:
            raise WrongResult(
                f"{self.name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
            )
        if truth.numel() == 0:
            return
        difference = actual.detach().double() - truth
        error = difference.abs().max()
        slip = torch.zeros(()) if baseline is None else (baseline.double() - truth).abs().max()
        if not math.isfinite(float(error)):
            raise WrongResult(f"{self.name} holds NaN or infinite values")
        self.error = max(self.error, float(error))
        self.error_squares += float(torch.linalg.vector_norm(difference)) ** 2
        self.truth_squares += float(torch.linalg.vector_norm(truth)) ** 2
        self.slip = max(self.slip, float(slip))
        self.scale = max(self.scale, float(truth.abs().max()))

    @property
    def relative(self) -> float:
        return self.error / max(self.scale, 1e-30)

    def judge(self, strict: bool) -> None:
        allowed = SLACK * self.slip + FLOOR * self.scale
        if strict and self.error > allowed:
            raise WrongResult(
                f"{self.name} is off by {self.error:.2e}, {allowed:.2e} is allowed "
                f"(largest true value {self.scale:.3g})"
            )
        error, truth = math.sqrt(self.error_squares), math.sqrt(self.truth_squares)
        if not strict and error > PEER_TOLERANCE * truth:
            raise WrongResult(
                f"{self.name} is another function: the norm of its error is {error:.2e}, "
                f"of the truth {truth:.2e}"
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
