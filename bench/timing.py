"""Cold-cache, interleaved timing and peak memory. Only this module looks at a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

MIN_SAMPLES = 30
MIN_ROUNDS = 3  # even where one round takes longer than the budget
MIN_SECONDS = 0.5  # fast kernels get more than MIN_SAMPLES


@dataclass(frozen=True)
class Timing:
    """Samples of one provider in milliseconds."""

    ms: tuple[float, ...]

    def percentile(self, q: int) -> float:
        if len(self.ms) == 1:
            return self.ms[0]
        return statistics.quantiles(self.ms, n=100, method="inclusive")[q - 1]


class Clock(Protocol):
    def seconds(self) -> float:
        """Wall time, for the budget."""

    def cool(self) -> None:
        """Leave nothing of earlier work in the caches."""

    def round(self, calls: Sequence[tuple[str, Callable[[], object]]]) -> list[float]:
        """Run each call once, caches cold, and return its milliseconds."""


class CudaClock:
    """Events around each call; between calls a buffer larger than the L2 cache is written.

    The write also keeps the GPU busy while the host launches the call, so that launch latency shows
    only where the call itself cannot keep the queue full.
    """

    def __init__(self, device_index: int = 0):
        l2_bytes = torch.cuda.get_device_properties(device_index).L2_cache_size
        size = max(256 << 20, 2 * l2_bytes)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device_index}")
        self.seconds = time.perf_counter

    def cool(self) -> None:
        """Write the buffer, so that the next call finds none of its inputs in the cache."""
        self._buffer.zero_()

    def round(self, calls: Sequence[tuple[str, Callable[[], object]]]) -> list[float]:
        events = []
        for name, call in calls:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cool()
            torch.cuda.nvtx.range_push(name)
            start.record()
            call()
            stop.record()
            torch.cuda.nvtx.range_pop()
            events.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]


class CpuClock:
    """``perf_counter`` around each call; between calls a buffer twice the size of the last cache is
    written.
    """

    def __init__(self, cache_bytes: int | None = None):
        self._buffer = torch.empty(2 * (cache_bytes or last_level_cache_bytes()), dtype=torch.uint8)
        self.seconds = time.perf_counter

    def cool(self) -> None:
        """Write the buffer, so that the next call finds none of its inputs in the cache."""
        self._buffer.add_(1)

    def round(self, calls: Sequence[tuple[str, Callable[[], object]]]) -> list[float]:
        samples = []
        for _name, call in calls:
            self.cool()
            start = time.perf_counter()
            result = call()
            samples.append(1e3 * (time.perf_counter() - start))
            del result  # returning memory to the system is not part of the call
        return samples


def last_level_cache_bytes(
    caches: Path = Path("/sys/devices/system/cpu/cpu0/cache"), default: int = 64 << 20
) -> int:
    """Size of the largest cache that the first core sees; ``default`` where the system does not
    say.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [default >> 3]
    for path in caches.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1:] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes) if len(sizes) > 1 else default


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    seconds: float,
    min_samples: int = MIN_SAMPLES,
) -> dict[str, Timing]:
    """Time every call once a round, each round starting at the next call, until the samples or the
    budget are full.

    At least ``MIN_ROUNDS`` rounds; then until there are ``min_samples`` and ``MIN_SECONDS`` have
    passed, but no longer than ``seconds`` for all calls together. Warm-up is the caller's.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    began = clock.seconds()
    rounds = 0
    while names:
        elapsed = clock.seconds() - began
        enough = rounds >= min_samples and elapsed >= min(MIN_SECONDS, seconds)
        if rounds >= MIN_ROUNDS and (enough or elapsed >= seconds):
            break
        first = rounds % len(names)
        order = names[first:] + names[:first]
        results = clock.round([(name, calls[name]) for name in order])
        for name, ms in zip(order, results, strict=True):
            samples[name].append(ms)
        rounds += 1
    return {name: Timing(tuple(ms)) for name, ms in samples.items()}


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Device memory at the peak of ``call``, above what was there before and what the caller
    receives.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return max(0, peak - max(after, before))
