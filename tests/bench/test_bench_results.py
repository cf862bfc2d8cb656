import dataclasses
import shutil
import subprocess

import pytest
from rows import ceilings, row

from bench import machine
from bench.ceilings import Roof
from bench.results import COLUMNS, BadFile, append_rows, latest, rate_unit, read_rows


def test_header_is_the_published_format(tmp_path):
    path = tmp_path / "gpu.csv"
    append_rows(path, [row()])
    assert path.read_text() == (
        "run,op,case,impl,peer_scope,shape,dtype,ms_p20,ms_p50,ms_p80,useful_flops,bytes,peak_mb,"
        "rel_err,gpu,torch,triton,commit,date\n"
        "r1,logprob_entropy,fwd,ours-triton,,T=1000;V=500;data=peaked,bf16,0.9,1,1.2,0,1500000000,"
        "0.0,3.00e-08,NVIDIA Test 9000,2.11.0,3.6.0,abc1234,2026-01-02T03:04:05Z\n"
    )


def test_append_keeps_what_is_there_byte_for_byte(tmp_path):
    path = tmp_path / "sub" / "gpu.csv"
    append_rows(path, [row()])
    before = path.read_bytes()
    append_rows(path, [row(run="r2"), row(run="r2", impl='pe"er,1', peak_mb=None, triton="")])
    assert path.read_bytes().startswith(before)
    assert path.read_text().count("run,op") == 1
    second, third = read_rows(path)[1:]
    assert second == row(run="r2")
    assert (third.impl, third.peak_mb, third.triton) == ('pe"er,1', None, "")


def test_appending_nothing_makes_a_file_with_a_header(tmp_path):
    append_rows(tmp_path / "a.csv", [])
    append_rows(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert read_rows(tmp_path / "a.csv") == []


def test_files_that_do_not_fit_are_refused_untouched(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(BadFile, match="not the header"):
        append_rows(other, [row()])
    assert other.read_text() == "a,b\n1,2\n"

    cut = tmp_path / "cut.csv"
    append_rows(cut, [row()])
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(BadFile, match="last line is incomplete"):
        append_rows(cut, [row()])
    with pytest.raises(BadFile, match="line 2: "):
        read_rows(cut)


@pytest.mark.parametrize("column, text", [("ms_p50", "fast"), ("bytes", ""), ("rel_err", "")])
def test_a_bad_number_is_named_with_its_line(tmp_path, column, text):
    path = tmp_path / "gpu.csv"
    append_rows(path, [row(), row()])
    lines = path.read_text().splitlines()
    fields = lines[2].split(",")
    fields[COLUMNS.index(column)] = text
    path.write_text("\n".join([*lines[:2], ",".join(fields)]) + "\n")
    with pytest.raises(BadFile, match="line 3"):
        read_rows(path)


def test_latest_takes_the_last_run_of_each_point_with_its_ceilings():
    rows = [*ceilings("r1"), row(), *ceilings("r2"), row(run="r2"), row(run="r2", op="policy_loss")]
    rows += [*ceilings("r3"), row(run="r3", op="policy_loss")]
    (only,) = latest(rows, "logprob_entropy")
    assert {r.run for r in only} == {"r2"} and len(only) == 3
    assert [r.run for own in latest(rows, "policy_loss") for r in own] == ["r3"] * 3
    assert {r.run for own in latest(rows, "logprob_entropy", "r1") for r in own} == {"r1"}
    assert latest(rows, "logprob_entropy", "r3") == []
    assert latest(rows, "moe") == []


def test_a_run_of_some_cases_keeps_the_others_of_the_run_before():
    one, two = row(shape="T=1;V=5"), row(shape="T=2;V=5")
    rows = [*ceilings("r1"), one, two, row(shape="T=2;V=5", impl="trl-1.0", peer_scope="same")]
    rows += [*ceilings("r2"), row(run="r2", shape="T=2;V=5"), row(run="r2", case="fwd_bwd")]
    new, old = latest(rows, "logprob_entropy")
    assert [(r.run, r.case, r.shape) for r in new if r.op != "ceiling"] == [
        ("r2", "fwd", "T=2;V=5"), ("r2", "fwd_bwd", rows[-1].shape)
    ]  # fmt: skip
    assert [(r.run, r.shape, r.impl) for r in old if r.op != "ceiling"] == [
        ("r1", "T=1;V=5", one.impl)
    ]
    assert all(len({r.run for r in own}) == 1 for own in (new, old))


def test_a_measured_part_of_the_shape_is_no_other_point():
    first = row(op="scorer", shape="model=30b;T=8;weights_mb=0;h2d_gbs=54.5")
    second = row(op="scorer", run="r2", shape="model=30b;T=8;weights_mb=0;h2d_gbs=54.1")
    assert latest([first, second], "scorer") == [[second]]


def test_roof_by_hand():
    roof = Roof.of(ceilings())
    # 1.5 GB at 3 TB/s take 0.5 ms of the measured 1 ms
    assert roof.floor_ms(row()) == pytest.approx(0.5)
    assert roof.percent(row()) == pytest.approx(50.0)
    # 5e11 FLOPs at 500 TFLOP/s take 1 ms, longer than the bytes
    assert roof.floor_ms(row(useful_flops=5 * 10**11)) == pytest.approx(1.0)
    # FLOPs in a dtype whose GEMM was not measured have no floor
    assert roof.floor_ms(row(useful_flops=1, dtype="fp32")) is None
    assert Roof.of([row()]).percent(row()) is None


def test_rate_units():
    assert rate_unit([row()], "bytes") == ("TB/s", 1e-9)  # 1.5 TB/s
    assert rate_unit([row(bytes=10**7)], "bytes") == ("GB/s", 1e-6)
    assert rate_unit([row(useful_flops=5 * 10**11)], "useful_flops") == ("TFLOP/s", 1e-9)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_names_the_checkout_or_nothing(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    assert machine.git_commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "setup.py").write_text("1")
    git("add", "setup.py")
    git("commit", "-q", "-m", "first")
    clean = machine.git_commit(tmp_path)
    assert len(clean) == 10 and int(clean, 16) >= 0
    (tmp_path / "README.md").write_text("not measured code")
    assert machine.git_commit(tmp_path) == clean
    (tmp_path / "setup.py").write_text("2")
    assert machine.git_commit(tmp_path) == clean + "+"


def test_slug(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.slug("cuda") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(machine, "device_name", lambda device: "AMD EPYC")
    assert machine.slug("cpu") == "cpu-amd-epyc"


def test_run_ids_differ_and_sort_by_time():
    first, second = machine.new_run_id(), machine.new_run_id()
    assert first != second and first[:13] <= second[:13]


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().ms_p50 = 0.1
