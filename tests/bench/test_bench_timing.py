import pytest

from bench import timing
from bench.timing import CpuClock, Timing, last_level_cache_bytes, time_interleaved


class FakeClock:
    """Time passes only inside calls: each takes the milliseconds that its list says."""

    def __init__(self, **durations: list[float]):
        self.durations, self.now, self.order = durations, 0.0, []

    def seconds(self) -> float:
        return self.now

    def cool(self) -> None:
        pass

    def round(self, calls):
        self.order.append([name for name, _call in calls])
        samples = []
        for name, call in calls:
            call()
            left = self.durations[name]
            samples.append(left.pop(0) if len(left) > 1 else left[0])
            self.now += samples[-1] / 1e3
        return samples


def calls(*names):
    counts = dict.fromkeys(names, 0)

    def make(name):
        def call():
            counts[name] += 1

        return call

    return {name: make(name) for name in names}, counts


def test_percentiles_by_hand():
    found = Timing(tuple(float(i) for i in range(1, 12)))  # 1 .. 11
    assert [found.percentile(q) for q in (20, 50, 80)] == [3.0, 6.0, 9.0]
    assert Timing((4.0,)).percentile(80) == 4.0
    assert Timing((1.0, 2.0)).percentile(50) == 1.5


def test_one_outlier_does_not_move_the_median():
    clock = FakeClock(a=[500.0, 10.0])
    found = time_interleaved(calls("a")[0], clock, seconds=100.0)["a"]
    assert max(found.ms) == 500.0
    assert found.percentile(50) == found.percentile(20) == 10.0


def test_providers_take_turns_and_the_first_place_rotates():
    made, counts = calls("a", "b", "c")
    clock = FakeClock(a=[20.0], b=[30.0], c=[10.0])
    found = time_interleaved(made, clock, seconds=100.0)
    assert clock.order[:4] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert set(counts.values()) == {timing.MIN_SAMPLES}
    assert {name: set(t.ms) for name, t in found.items()} == {"a": {20.0}, "b": {30.0}, "c": {10.0}}


def test_fast_calls_get_more_samples():
    found = time_interleaved(calls("a")[0], FakeClock(a=[1.0]), seconds=100.0)
    assert len(found["a"].ms) == pytest.approx(1e3 * timing.MIN_SECONDS, abs=1)


def test_the_budget_ends_slow_calls_but_not_before_three_rounds():
    found = time_interleaved(calls("a")[0], FakeClock(a=[1000.0]), seconds=10.0)
    assert len(found["a"].ms) == 10
    found = time_interleaved(calls("a")[0], FakeClock(a=[60_000.0]), seconds=10.0)
    assert len(found["a"].ms) == timing.MIN_ROUNDS


def test_nothing_to_time():
    assert time_interleaved({}, FakeClock(), seconds=1.0) == {}


def test_cpu_clock_measures_the_call_alone(monkeypatch):
    clock = CpuClock(cache_bytes=1024)
    ticks = iter([1.0, 1.25, 7.0, 7.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    events = []
    monkeypatch.setattr(CpuClock, "cool", lambda self: events.append("cool"))
    found = clock.round([("a", lambda: events.append("a")), ("b", lambda: events.append("b"))])
    assert found == [250.0, 500.0]
    assert events == ["cool", "a", "cool", "b"]


def test_cooling_writes_a_buffer_larger_than_the_cache():
    clock = CpuClock(cache_bytes=1024)
    before = clock._buffer.clone()
    clock.cool()
    assert clock._buffer.numel() == 2048 and (clock._buffer != before).all()


def test_cache_size_from_the_system(tmp_path):
    for index, text in enumerate(("32K", "1024K", "96M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text + "\n")
    assert last_level_cache_bytes(tmp_path) == 96 << 20
    assert last_level_cache_bytes(tmp_path / "missing", default=7) == 7


@pytest.mark.gpu
def test_peak_is_above_inputs_and_results():
    import torch

    x = torch.zeros(1 << 20, device="cuda")  # 4 MiB
    assert timing.peak_extra_bytes(lambda: x + 1) == 0
    peak = timing.peak_extra_bytes(lambda: (x + 1).exp().sum())
    assert abs(peak - (8 << 20)) <= 1024  # the result is a block of its own
