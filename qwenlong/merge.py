"""SCE: merge models that were trained from one base, tensor by tensor (arXiv 2408.07990).

Per tensor, with d_j = theta_j - theta_base for the experts j = 1 .. n:

    select     v = population variance of d over j, per element
               S = the int(select_topk * count(v > 0)) elements with the largest v
               (everything if select_topk = 1)
    calculate  w_j = mean over the tensor of (d_j on S, else 0)^2, normalised to sum 1
               (1 / n each if all of them are exactly 0)
    erase      s = sign of sum_j d_j per element, a sum of 0 counting as +
               m_j = 1 where sign(d_j) = s, else 0; a delta of exactly 0 never matches
    merge      theta = theta_base + sum_j w_j m_j d_j / sum_j w_j m_j
               (theta_base where no delta is left)

Two programmes of this formula are public, and for select_topk < 1 they differ in what S applies to:

    "authors"    S decides the weights alone; "erase" and "merge" see every delta.
    "mergekit"   S is applied to the deltas themselves, so that an element outside S returns to the
                 base, also one that every expert moved by the same amount (its variance is 0).

Arithmetic is fp32 whatever the storage dtype, sums over a tensor are fp64, the result is rounded
once. Ties in v go to the lower position. Neither the memory budget nor the number of threads
changes a bit of the result.

mergekit also takes uniform weights where the sum of the mean squares is below 1e-6. RL moves a
weight by some 1e-4 at most, a mean square below 1e-7, so with that threshold every tensor would get
uniform weights and "calculate" would do nothing. The rule here is for a sum of exactly 0, as in the
authors' programme. For the same reason the divisor sum_j w_j m_j has no lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

VARIANTS = ("authors", "mergekit")
# Sums of squares are taken over rows of this many elements, and blocks and windows hold whole rows,
# so that the order of summation does not depend on where a tensor is cut.
ROW = 4096
BLOCK = 1 << 18  # elements of the arithmetic at a time: its fp32 temporaries stay in the cache


class TensorStats(NamedTuple):
    """What happened to one tensor; counts are of its elements."""

    weights: list[float]  # [n], sum 1
    rms: list[float]  # [n], root mean square of the whole delta
    uniform: bool  # the weights are 1 / n because every selected delta is exactly 0
    selected: int
    conflicts: int  # two experts moved it in opposite directions
    unchanged: int  # no delta is left: the value of the base


class Merged(NamedTuple):
    tensor: torch.Tensor  # shape and dtype of the base
    stats: TensorStats


class DeltaSlices:
    """Base and deltas of one tensor, block by block in order, as often as it is iterated.

    Args:
        read: ``read(start, stop)`` gives the flat elements of the base and of each expert, in their
            storage dtype.
        numel: elements of the tensor.
        window: elements to read at a time; rounded down to whole rows, at least one. A tensor that
            fits into one window is read once and kept.
    """

    def __init__(self, read: Callable[[int, int], Sequence[torch.Tensor]], numel: int, window: int):
        self.numel = numel
        self._read = read
        self._window = max(ROW, window // ROW * ROW)
        self._kept = read(0, numel) if numel <= self._window else None

    def _windows(self) -> Iterator[Sequence[torch.Tensor]]:
        if self._kept is not None:
            yield self._kept
            return
        for start in range(0, self.numel, self._window):
            yield self._read(start, min(self.numel, start + self._window))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        for window in self._windows():
            for parts in zip(*(x.split(BLOCK) for x in window), strict=True):
                base, *experts = (part.float() for part in parts)
                yield base, [_delta(expert, base) for expert in experts]


def _delta(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    delta = expert - base
    if not math.isfinite(delta.sum().item()):  # equal infinities differ by 0, not by NaN
        delta = torch.where(expert == base, 0.0, delta)
    return delta


# --- select ------------------------------------------------------------------


class Threshold(NamedTuple):
    """The k largest of non-negative floats: those whose bits are above ``bits``, and the first
    ``ties`` of those that equal them. The bits of non-negative floats are ordered as they are.
    """

    bits: int
    ties: int
    selected: int


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    # Shifted by the first, so that equal deltas have a variance of exactly 0. Plain elementwise
    # sums: a reduction over the experts may round differently at a block's end.
    shifted = [delta - deltas[0] for delta in deltas[1:]]
    mean = shifted[0].clone()
    for x in shifted[1:]:
        mean += x
    mean /= len(deltas)
    total = mean.square()
    for x in shifted:
        total += (x - mean).square_()
    return total / len(deltas)


def _bits(variance: torch.Tensor) -> torch.Tensor:
    return variance.view(torch.int32) & 0x7FFFFFFF  # a NaN may carry a sign


def _histogram(values: torch.Tensor) -> torch.Tensor:
    return torch.bincount(values, minlength=1 << 16)


def _bin_of(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin with the k-th largest value, and how many of the k lie in it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def _threshold(slices: DeltaSlices, high: torch.Tensor, zeros: int, fraction: float) -> Threshold:
    """Exact, from the histogram of the upper 16 bits and one more pass for the lower 16."""
    k = int((slices.numel - zeros) * fraction)
    if k == 0:
        return Threshold(bits=0x7FFFFFFF, ties=0, selected=0)
    upper, k_in_bin = _bin_of(high, k)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for _, deltas in slices:
        bits = _bits(_variance(deltas))
        low += _histogram(bits[bits >> 16 == upper] & 0xFFFF)
    lower, ties = _bin_of(low, k_in_bin)
    return Threshold(bits=upper << 16 | lower, ties=ties, selected=k)


def _selections(slices: DeltaSlices, threshold: Threshold | None) -> Iterator[tuple]:
    """``(base, deltas, selected)`` for each slice; ``selected`` is None where everything is."""
    if threshold is None:
        for base, deltas in slices:
            yield base, deltas, None
        return
    left = threshold.ties
    for base, deltas in slices:
        bits = _bits(_variance(deltas))
        selected = bits > threshold.bits
        if left:
            equal = bits == threshold.bits
            rank = equal.cumsum(0)
            selected |= equal & (rank <= left)
            left = max(0, left - int(rank[-1]))
        yield base, deltas, selected


# --- calculate ---------------------------------------------------------------


def _row_sums(delta: torch.Tensor) -> list[float]:
    """Sums of squares of each row, fp64."""
    squares = delta.double().square_()
    whole = len(squares) // ROW * ROW
    sums = squares[:whole].view(-1, ROW).sum(dim=1).tolist()
    return [*sums, squares[whole:].sum().item()]


def _select_and_weigh(
    slices: DeltaSlices, n: int, select_topk: float
) -> tuple[Threshold | None, list[float], list[float]]:
    """The selection, and the sums of squares of the whole and of the selected deltas."""
    rows: list[list[float]] = [[] for _ in range(n)]
    high = torch.zeros(1 << 16, dtype=torch.int64)
    zeros = 0
    for _, deltas in slices:
        for j, delta in enumerate(deltas):
            rows[j] += _row_sums(delta)
        if select_topk < 1:
            bits = _bits(_variance(deltas))
            zeros += int((bits == 0).sum())
            high += _histogram(bits >> 16)
    whole = [math.fsum(r) for r in rows]
    if select_topk >= 1 or not all(map(math.isfinite, whole)):
        return None, whole, whole
    threshold = _threshold(slices, high, zeros, select_topk)
    rows = [[] for _ in range(n)]
    for _, deltas, selected in _selections(slices, threshold):
        for j, delta in enumerate(deltas):
            rows[j] += _row_sums(delta * selected)
    return threshold, whole, [math.fsum(r) for r in rows]


# --- erase and merge ---------------------------------------------------------


def _merge_block(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, int, int]:
    """The merged values, fp32; the number of conflicts; how many values are those of the base."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    positive = total >= 0
    numerator, divisor = torch.zeros_like(base), torch.zeros_like(base)
    any_up, any_down = torch.zeros_like(positive), torch.zeros_like(positive)
    for delta, weight in zip(deltas, weights, strict=True):
        up, down = delta > 0, delta < 0
        any_up |= up
        any_down |= down
        matches = torch.where(positive, up, down) * weight
        numerator += delta * matches
        divisor += matches
    changed = divisor > 0
    values = torch.where(changed, base + numerator / divisor, base)
    return values, int((any_up & any_down).sum()), len(base) - int(changed.sum())


def merge_slices(
    slices: DeltaSlices,
    n: int,
    write: Callable[[torch.Tensor], None],
    *,
    select_topk: float = 1.0,
    variant: str = "authors",
) -> TensorStats:
    """Merge one tensor of ``n`` experts; ``write`` gets the fp32 result slice by slice.

    Raises:
        ValueError: an expert differs from the base by NaN or an infinity.
    """
    check_options(select_topk, variant)
    threshold, whole, squares = _select_and_weigh(slices, n, select_topk)
    for j, square in enumerate(whole):
        if not math.isfinite(square):
            raise ValueError(f"expert {j + 1} differs from the base by NaN or an infinity")
    total = math.fsum(squares)
    weights = [s / total for s in squares] if total > 0 else [1 / n] * n
    conflicts = unchanged = 0
    applied = threshold if variant == "mergekit" else None
    for base, deltas, selected in _selections(slices, applied):
        if selected is not None:
            deltas = [delta * selected for delta in deltas]
        values, against, same = _merge_block(base, deltas, weights)
        conflicts += against
        unchanged += same
        write(values)
    return TensorStats(
        weights=weights,
        rms=[math.sqrt(s / max(1, slices.numel)) for s in whole],
        uniform=not total > 0,
        selected=slices.numel if threshold is None else threshold.selected,
        conflicts=conflicts,
        unchanged=unchanged,
    )


def check_options(select_topk: float, variant: str) -> None:
    if not 0 < select_topk <= 1:
        raise ValueError(f"select_topk is {select_topk}; it must be above 0 and at most 1")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


def sce_merge(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    *,
    select_topk: float = 1.0,
    variant: str = "authors",
) -> Merged:
    """Merge one tensor in memory. For checkpoints: ``qwenlong merge``.

    Args:
        base: any shape; bf16, fp16 or fp32, on the CPU.
        experts: at least two, of the same shape and dtype.
        select_topk: fraction of the elements with variance that are selected, in (0, 1].
        variant: ``"authors"`` or ``"mergekit"``, see the module.

    Returns:
        The merged tensor and what happened to it. Not differentiable.
    """
    if len(experts) < 2:
        raise ValueError(f"sce_merge: got {len(experts)} expert(s); a merge needs at least two")
    if base.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"sce_merge: base is {base.dtype}; it must be bf16, fp16 or fp32")
    for j, expert in enumerate(experts, 1):
        if expert.shape != base.shape or expert.dtype != base.dtype:
            raise ValueError(
                f"sce_merge: expert {j} is {tuple(expert.shape)} {expert.dtype}, "
                f"the base {tuple(base.shape)} {base.dtype}"
            )
    flat = [x.detach().reshape(-1) for x in (base, *experts)]
    merged = torch.empty_like(flat[0])
    written = 0

    def write(values: torch.Tensor) -> None:
        nonlocal written
        merged[written : written + len(values)] = values
        written += len(values)

    slices = DeltaSlices(
        lambda start, stop: [x[start:stop] for x in flat],
        len(merged),
        len(merged),
    )
    stats = merge_slices(slices, len(experts), write, select_topk=select_topk, variant=variant)
    return Merged(merged.view(base.shape), stats)
