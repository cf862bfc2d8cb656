"""Which samples go into a batch: the same number of each task, exactly.

Task-balanced sampling (arXiv 2512.12967, section 4.2): every batch draws equally from each task. A
batch size that the tasks do not divide leaves a remainder, which is handed out one sample at a time
to the tasks in descending order of weight, equal weights in order of first appearance: 128 over
five tasks is 26, 26, 26, 25, 25.

Stratified selection (same section): before training, samples are put into equally wide bins of the
base model's pass rate, and the same number is drawn from each bin.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from qwenlong.types import Sample


def task_counts(tasks: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """How many samples of each task a batch holds.

    Args:
        tasks: weight of each task, finite and above 0; they need not sum to 1. Read as the decimal
            that Python prints, so that 0.29 of 100 is 29.
        batch_size: samples of a batch.

    Returns:
        ``floor(batch_size * weight / sum)`` each, and one more for the first tasks in descending
        order of weight (equal weights: in the order of ``tasks``) until the sum is ``batch_size``.
    """
    if batch_size < 1:
        raise ValueError(f"task_counts: batch_size is {batch_size}; it must be at least 1")
    if not tasks:
        raise ValueError("task_counts: there are no tasks")
    for task, weight in tasks.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"task_counts: the weight of task {task!r} is {weight}; it must be above 0 "
                "(leave the samples of a task out to leave the task out)"
            )
    exact = {task: Fraction(str(weight)) for task, weight in tasks.items()}
    total = sum(exact.values())
    counts = {task: int(batch_size * weight / total) for task, weight in exact.items()}
    by_weight = sorted(exact, key=exact.get, reverse=True)  # stable: ties keep their order
    for task in by_weight[: batch_size - sum(counts.values())]:
        counts[task] += 1
    return counts


class TaskBalancedSampler(Sampler[list[int]]):
    """Batches of indices with exact counts per task; a ``batch_sampler`` of a ``DataLoader``.

    Each task goes through all its samples in a random order before it repeats one. Where a batch
    takes the last samples of an order it goes on with the next order, in which the samples that
    this batch already has come last: no batch holds a sample twice, and none is left out.

    One iteration yields ``len(self) = len(tasks) // batch_size`` batches, and the next one goes on
    where it stopped. Everything random follows from ``seed`` and the number of batches drawn; the
    global random states are neither read nor changed.

    Args:
        tasks: the task of each sample, in the order of the dataset.
        batch_size: samples of a batch, over all ranks.
        seed: any integer; the same on every rank.
        weights: share of each task, see ``task_counts``; equal if None.
        rank, world_size: this process gets its slice of each batch, ``batch_size / world_size``
            samples; the slices of all ranks in order are the batch of a single process.

    Raises:
        ValueError: a task has fewer samples than its share of one batch, or no share; weights that
            do not fit the tasks; a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        sizes = Counter(tasks)  # in order of first appearance
        if not sizes:
            raise ValueError("TaskBalancedSampler: there are no samples")
        if weights is None:
            weights = dict.fromkeys(sizes, 1)
        if set(weights) != set(sizes):
            raise ValueError(
                f"TaskBalancedSampler: weights are for {sorted(weights)}, "
                f"but the samples' tasks are {sorted(sizes)}"
            )
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"TaskBalancedSampler: batch_size {batch_size} must be a multiple of world_size "
                f"{world_size}, and rank {rank} in 0 .. {world_size - 1}"
            )
        self.counts = task_counts({task: weights[task] for task in sizes}, batch_size)
        for task, count in self.counts.items():
            if count == 0:
                raise ValueError(
                    f"TaskBalancedSampler: task {task!r} gets no sample of a batch of {batch_size};"
                    " raise batch_size, or the task's weight"
                )
            if count > sizes[task]:
                raise ValueError(
                    f"TaskBalancedSampler: a batch takes {count} samples of task {task!r}, which "
                    f"has {sizes[task]}; add samples, or lower batch_size or the task's weight"
                )
        self.batch_size = batch_size
        self.seed = seed
        self._share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._samples: dict[str, list[int]] = {task: [] for task in sizes}
        for index, task in enumerate(tasks):
            self._samples[task].append(index)
        digest = hashlib.sha256(repr((list(tasks), self.counts)).encode())
        self._data = digest.hexdigest()[:16]
        self._rewind()

    def _rewind(self) -> None:
        self.batches = 0  # drawn since the start of training
        self._passes = dict.fromkeys(self._samples, 0)
        self._queues: dict[str, list[int]] = {task: [] for task in self._samples}

    def _take(self, task: str, count: int) -> list[int]:
        queue = self._queues[task]
        taken, queue[:] = queue[:count], queue[count:]
        if len(taken) < count:
            order = list(self._samples[task])
            # A string seeds the same on every platform and in every process.
            random.Random(f"{self.seed}/{task}/{self._passes[task]}").shuffle(order)
            self._passes[task] += 1
            seen = set(taken)
            order.sort(key=seen.__contains__)  # stable: False, the unseen, first
            missing = count - len(taken)
            taken += order[:missing]
            queue[:] = order[missing:]
        return taken

    def _draw(self) -> list[int]:
        batch = [i for task, count in self.counts.items() for i in self._take(task, count)]
        random.Random(f"{self.seed}//{self.batches}").shuffle(batch)
        self.batches += 1
        return batch

    def __len__(self) -> int:
        """Batches of one iteration."""
        return sum(map(len, self._samples.values())) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self) - self.batches % len(self)):
            yield self._draw()[self._share]

    def state_dict(self) -> dict[str, Any]:
        """The number of batches drawn and what they were drawn from; JSON types.

        A ``DataLoader`` with workers draws ahead of training: save the state with ``batches`` set
        to the number of batches that were trained on.
        """
        return {
            "batches": self.batches,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "data": self._data,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state["batches"]`` batches, exactly; the number of ranks may differ.

        Raises:
            ValueError: the state is of other data, weights, batch size or seed.
        """
        for name, mine in self.state_dict().items():
            if name != "batches" and state.get(name) != mine:
                raise ValueError(
                    f"TaskBalancedSampler: the saved state has {name} = {state.get(name)!r}, "
                    f"this sampler {mine!r}; resume with the data and settings it was saved with"
                )
        batches = state["batches"]
        if not isinstance(batches, int) or batches < 0:
            raise ValueError(f"TaskBalancedSampler: the saved state has batches = {batches!r}")
        self._rewind()
        for _ in range(batches):
            self._draw()


class Stratified(NamedTuple):
    """What ``stratified_by_pass_rate`` drew; bin i holds pass rates ``[i, i + 1) / bins``."""

    samples: list[Sample]  # in the order they came
    drawn: list[int]  # [bins]
    available: list[int]  # [bins]


def draw_key(purpose: str, seed: int, sample_id: str) -> float:
    """Uniform in (0, 1), a function of all three: a draw by it ignores the order of the samples,
    and draws for different purposes are independent at the same seed.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{sample_id}".encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def stratified_by_pass_rate(
    samples: Sequence[Sample], bins: int, per_bin: int, seed: int
) -> Stratified:
    """The same number of samples from each of ``bins`` equally wide bins of pass rate.

    The last bin includes 1. A bin with fewer than ``per_bin`` samples gives all it has: nothing is
    repeated, and ``drawn`` says so. The paper gives neither the number of bins nor their share.

    Args:
        samples: each with its ``difficulty``; ids must differ.
        bins, per_bin: at least 1.
        seed: the draw depends on it and on the ids alone.
    """
    if bins < 1 or per_bin < 1:
        raise ValueError(
            f"stratified_by_pass_rate: bins is {bins} and per_bin {per_bin}; both must be >= 1"
        )
    strata: list[list[tuple[float, int]]] = [[] for _ in range(bins)]
    ids = set()
    for index, sample in enumerate(samples):
        if sample.difficulty is None:
            raise ValueError(
                f"stratified_by_pass_rate: sample {sample.id!r} has no difficulty; "
                "measure its pass rate first"
            )
        if sample.id in ids:
            raise ValueError(f"stratified_by_pass_rate: two samples have the id {sample.id!r}")
        ids.add(sample.id)
        # 0.29 is 29/100 here; in floats 0.29 * 100 is below 29 and falls into the bin before
        rate = Fraction(sample.difficulty.pass_rate).limit_denominator(10**6)
        key = draw_key("stratify", seed, sample.id)
        strata[min(bins - 1, int(rate * bins))].append((key, index))
    chosen = [index for stratum in strata for _, index in sorted(stratum)[:per_bin]]
    return Stratified(
        samples=[samples[i] for i in sorted(chosen)],
        drawn=[min(per_bin, len(stratum)) for stratum in strata],
        available=[len(stratum) for stratum in strata],
    )
