"""A wrong kernel gets no speed, and the run says so."""

import csv
import io

import pytest
import torch
from rich.console import Console

from bench import __main__ as cli
from bench import registry, run
from bench.gate import Comparison, WrongResult, require
from bench.registry import Problem, Unavailable
from bench.results import read_rows


def judged(actual, truth, baseline, strict, name="x"):
    found = Comparison(name)
    found.add(torch.tensor(actual), torch.tensor(truth).double(), torch.tensor(baseline))
    found.judge(strict)
    return found


def test_ours_may_err_twice_as_much_as_the_baseline():
    # truth 10, baseline off by 0.01: 0.02 + 1e-5 * 10 is allowed
    assert judged([10.02], [10.0], [10.01], strict=True).relative == pytest.approx(0.002, rel=1e-3)
    with pytest.raises(WrongResult, match="off by 2.1"):
        judged([10.021], [10.0], [10.01], strict=True)


def test_peers_may_round_but_not_be_wrong():
    # of norm 5: an error of norm 1.9 passes, even in one entry, and one of norm 3 does not
    assert judged([3.0, 5.9], [3.0, 4.0], [3.0, 4.0], strict=False).relative == pytest.approx(0.475)
    with pytest.raises(WrongResult, match="x is another function: .* 3.00e.00, of the truth 5.00"):
        judged([6.0, 4.0], [3.0, 4.0], [3.0, 4.0], strict=False)
    with pytest.raises(WrongResult, match="another function"):
        judged([0.0, 1e-9], [0.0, 0.0], [0.0, 0.0], strict=False)


def test_the_norm_of_an_error_is_over_all_blocks():
    found = Comparison("x")
    for actual in (2.0, 2.0, 2.0, 6.0):  # norms 4 and 4
        found.add(torch.tensor([actual]), torch.tensor([2.0]).double())
    with pytest.raises(WrongResult, match="4.00e.00, of the truth 4.00e.00"):
        found.judge(strict=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_element_that_was_not_written_is_wrong(value):
    with pytest.raises(WrongResult, match="NaN or infinite"):
        judged([1.0, value], [1.0, 2.0], [1.0, 2.0], strict=False)


def test_a_wrong_shape_is_wrong_and_nothing_is_right():
    with pytest.raises(WrongResult, match=r"shape \(1,\), not \(2,\)"):
        judged([1.0], [1.0, 2.0], [1.0, 2.0], strict=True)
    found = Comparison("empty")
    found.add(torch.zeros(0), torch.zeros(0).double())
    found.judge(strict=True)
    assert found.relative == 0.0


def test_the_worst_block_counts():
    found = Comparison("x")
    for actual in (1.0, 3.0, 2.0):
        found.add(torch.tensor([actual]), torch.tensor([2.0]).double())
    assert (found.error, found.scale, found.relative) == (1.0, 2.0, 0.5)


def test_required_outputs():
    outputs = {"logprobs": 1, "other": 2}
    assert require(outputs, ("logprobs", "entropy"), complete=False) == ["logprobs"]
    with pytest.raises(WrongResult, match="does not return entropy"):
        require(outputs, ("logprobs", "entropy"), complete=True)
    with pytest.raises(WrongResult, match="does not return entropy"):
        require(outputs, ("entropy",), complete=False)


# --- the runner on an op of our own ----------------------------------------------


class CountingClock:
    def __init__(self):
        self.timed = []

    def seconds(self) -> float:
        return 1e3 * len(self.timed)

    def cool(self) -> None:
        pass

    def round(self, calls):
        self.timed += [name for name, _call in calls]
        return [2.0 for _ in calls]


@pytest.fixture
def doubling(monkeypatch):
    """An op that doubles, with a right and some wrong providers; other ops are out of the way."""
    monkeypatch.setattr(registry, "OPS", {})
    behaviours = {}

    @registry.register(
        "doubling", cuda=[], cpu=[{"case": "fwd", "dtype": "fp32", "T": 4, "data": "random"}]
    )
    def _doubling(device, case, dtype, T, data):
        x = torch.arange(1.0, T + 1)

        def check(outputs, strict, complete):
            found = Comparison("y")
            require(outputs, ("y",), complete)
            found.add(outputs["y"], 2.0 * x.double(), 2.0 * x)
            found.judge(strict)
            return found.relative

        impls = {name: (lambda f=f: {"y": f(x)}) for name, f in behaviours.items()}
        scopes = {name: "same" for name in impls if not name.startswith("ours-")}
        return Problem(impls, check, 8 * T, 0, scopes, {"absent-peer": "not installed"})

    return behaviours


def measure(tmp_path, impls=()):
    text, clock = io.StringIO(), CountingClock()
    console = Console(file=text, width=120)
    points = registry.select(["doubling"], "cpu")
    out = tmp_path / "cpu.csv"
    report = run.run_points(points, "cpu", out, impls=impls, clock=clock, console=console)
    return report, clock, text.getvalue(), out


def unable(x):
    raise RuntimeError("doubling: impl='cuda' cannot run here: no nvcc")


def too_large(x):
    raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")


def test_wrong_kernels_are_refused_and_the_others_timed(tmp_path, doubling):
    doubling["ours-right"] = lambda x: x + x
    doubling["ours-wrong"] = lambda x: x + x + 1e-3
    doubling["ours-unwritten"] = lambda x: torch.empty(len(x))
    doubling["ours-broken"] = lambda x: x @ x.reshape(2, 2)
    doubling["ours-cuda"] = unable
    doubling["ours-large"] = too_large
    doubling["peer-1.0"] = lambda x: (x + x).bfloat16()
    doubling["peer-bad-1.0"] = lambda x: x
    report, clock, text, out = measure(tmp_path)

    assert [r.impl for r in read_rows(out)] == ["ours-right", "peer-1.0"]
    assert set(clock.timed) == {"bench.doubling.fwd.ours-right", "bench.doubling.fwd.peer-1.0"}
    failed = " ".join(report.failed)
    assert "ours-wrong: wrong: y is off by" in failed
    assert "ours-unwritten: wrong: y holds NaN" in failed
    assert "ours-broken: RuntimeError" in failed
    assert not any(name in failed for name in ("peer-bad", "ours-cuda", "ours-large"))
    assert "absent  ours-large: out of memory at this shape" in text
    assert "refused peer-bad-1.0: wrong" in text
    assert "refused ours-wrong: wrong" in text
    assert "absent  ours-cuda: doubling: impl='cuda' cannot run here: no nvcc" in text
    assert "absent  absent-peer: not installed" in text


def test_a_provider_that_fails_at_its_second_call_does_not_stop_the_run(tmp_path, doubling):
    def fails_later(x, calls=[]):  # noqa: B006 - counts its calls
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("cannot be captured")
        return x + x

    doubling["peer-graph-1.0"] = fails_later
    doubling["ours-right"] = lambda x: x + x
    report, _clock, text, _out = measure(tmp_path)
    assert [r.impl for r in report.rows] == ["ours-right"]
    assert "refused peer-graph-1.0: RuntimeError: cannot be captured" in text


def test_rows_say_what_was_measured(tmp_path, doubling):
    doubling["ours-right"] = lambda x: x + x
    doubling["peer-1.0"] = lambda x: x + x
    report, _clock, _text, out = measure(tmp_path)
    ours, peer = csv.DictReader(out.open())
    assert ours["run"] == peer["run"] == report.run
    assert (ours["peer_scope"], peer["peer_scope"]) == ("", "same")
    assert ours["shape"] == f"T=4;data=random;threads={torch.get_num_threads()}"
    assert (ours["ms_p50"], ours["bytes"], ours["peak_mb"]) == ("2", "32", "")
    assert ours["torch"] == torch.__version__
    assert float(ours["rel_err"]) == 0.0


def test_patterns_choose_providers(tmp_path, doubling):
    doubling["ours-right"] = lambda x: x + x
    doubling["ours-wrong"] = lambda x: x
    doubling["peer-1.0"] = lambda x: x + x
    report, *_ = measure(tmp_path, impls=["peer-*"])
    assert [r.impl for r in report.rows] == ["peer-1.0"]
    assert report.failed == []


def test_an_op_that_is_missing_is_listed_and_the_run_goes_on(tmp_path, doubling):
    @registry.register("missing", cuda=[], cpu=[{"case": "fwd", "dtype": "fp32", "T": 1}])
    def _missing(*_, **__):
        raise Unavailable("qlkernels.missing does not exist")

    doubling["ours-right"] = lambda x: x + x
    text = io.StringIO()
    report = run.run_points(
        registry.select(["all"], "cpu")[::-1],
        "cpu",
        tmp_path / "cpu.csv",
        clock=CountingClock(),
        console=Console(file=text, width=120),
    )
    assert "absent  missing fwd T=1 fp32: qlkernels.missing does not exist" in text.getvalue()
    assert [r.op for r in report.rows] == ["doubling"]


def test_an_interrupted_run_keeps_the_finished_points(tmp_path, doubling, monkeypatch):
    @registry.register("stopped", cuda=[], cpu=[{"case": "fwd", "dtype": "fp32", "T": 1}])
    def _stopped(device, case, dtype, T):
        raise KeyboardInterrupt

    doubling["ours-right"] = lambda x: x + x
    with pytest.raises(KeyboardInterrupt):
        run.run_points(
            registry.select(["all"], "cpu"),
            "cpu",
            tmp_path / "cpu.csv",
            clock=CountingClock(),
            console=Console(file=io.StringIO()),
        )
    assert [r.op for r in read_rows(tmp_path / "cpu.csv")] == ["doubling"]


@pytest.mark.parametrize("wrong, status", [(False, 0), (True, 1)])
def test_exit_status(tmp_path, doubling, monkeypatch, capsys, wrong, status):
    @registry.register("ceiling", cuda=[], cpu=[])
    def _ceiling(*_, **__):
        raise AssertionError("no points, so never built")

    doubling["ours-right"] = lambda x: x + x
    doubling["ours-other"] = lambda x: x + x + wrong
    monkeypatch.setattr(cli.registry, "select", lambda names, *a, **k: select_but_ceiling(names))
    with pytest.raises(SystemExit) as stop:
        cli.app(
            ["run", "doubling", "--device", "cpu", "--seconds", "0.01", "--commit", "c1"]
            + ["--out", str(tmp_path / "x.csv")],
        )
    assert stop.value.code == status
    out = capsys.readouterr().out
    assert ("failed doubling fwd" in out) == wrong
    assert {r.commit for r in read_rows(tmp_path / "x.csv")} == {"c1"}


def test_a_pattern_without_a_provider_is_an_error(tmp_path, doubling, monkeypatch, capsys):
    doubling["ours-right"] = lambda x: x + x
    monkeypatch.setattr(cli.registry, "select", lambda names, *a, **k: select_but_ceiling(names))
    arguments = ["run", "doubling", "--device", "cpu", "--impl", "moo-*"]
    with pytest.raises(SystemExit) as stop:
        cli.app([*arguments, "--out", str(tmp_path / "x.csv")])
    assert stop.value.code == 2
    assert "no provider that runs here matches moo-*" in capsys.readouterr().err


def select_but_ceiling(names):
    return [] if names == ["ceiling"] else list(registry.OPS["doubling"].points["cpu"])
