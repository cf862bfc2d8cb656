import pytest
from rows import ceilings, row

from bench import plot, tables
from bench.results import BadFile, append_rows

README = """# Title

<!-- bench:logprob_entropy -->
old text
<!-- /bench -->

after
"""

TABLE = """\
NVIDIA Test 9000, torch 2.11.0, Triton 3.6.0, commit abc1234, 2026-01-02 (run r1):

| case | shape | implementation | computes | ms (p20 to p80) | TB/s | % of roof | extra MB | rel. error |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
| fwd | T=1000 V=500 data=peaked bf16 | **ours-triton** |  | 1 (0.9 to 1.2) | 1.5 | 50 | 0 | 3e-08 |
|  |  | liger-1.0 | less | 1.5 (0.9 to 2) | 1 | 33 | 0 | 3e-08 |
|  |  | trl-1.0 | the same | 2 (0.9 to 3) | 0.75 | 25 | 1,250 | 2e-04 |"""  # noqa: E501

PEERS = [
    row(impl="trl-1.0", peer_scope="same", ms_p50=2.0, ms_p80=3.0, peak_mb=1250.0, rel_err=2e-4),
    row(impl="liger-1.0", peer_scope="less", ms_p50=1.5, ms_p80=2.0),
]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    append_rows(folder / "nvidia-test-9000.csv", [*ceilings(), row(), *PEERS])
    return folder


def test_table_by_hand(tmp_path, results):
    (tmp_path / "README.md").write_text(README)
    assert tables.update(tmp_path, results, write=True) == [tmp_path / "README.md"]
    text = (tmp_path / "README.md").read_text()
    assert text == README.replace("old text", f"\n{TABLE}\n")
    assert tables.update(tmp_path, results, write=True) == []


def test_check_writes_nothing(tmp_path, results):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "speed.md").write_text(README)
    assert tables.update(tmp_path, results, write=False) == [tmp_path / "docs" / "speed.md"]
    assert (tmp_path / "docs" / "speed.md").read_text() == README


def test_only_the_last_run_with_the_op_is_shown(results):
    path = results / "nvidia-test-9000.csv"
    append_rows(path, [*ceilings("r2"), row(run="r2", ms_p50=0.8)])
    append_rows(path, [*ceilings("r3"), row(run="r3", op="policy_loss")])
    files = {path.stem: tables.read_rows(path)}
    text = tables.render("logprob_entropy", files)
    assert "(run r2)" in text and "0.8 (" in text
    assert "trl-1.0" not in text and "r1" not in text


def test_not_measured_is_said_in_words(tmp_path, results):
    assert tables.render("moe", {}) == "Not measured yet: `python -m bench moe` adds the rows."
    (tmp_path / "README.md").write_text("<!-- bench:moe/fwd -->\n<!-- /bench -->\n")
    tables.update(tmp_path, results, write=True)
    text = (tmp_path / "README.md").read_text()
    assert text == (
        "<!-- bench:moe/fwd -->\n\nNot measured yet: `python -m bench moe` adds the rows.\n\n"
        "<!-- /bench -->\n"
    )
    assert tables.update(tmp_path, results, write=False) == []


def test_case_and_file_patterns(results):
    append_rows(
        results / "cpu-test.csv",
        [row(case="fwd_bwd", gpu="Some CPU", peak_mb=None, triton="", commit="")],
    )
    files = {path.stem: tables.read_rows(path) for path in results.glob("*.csv")}
    both = tables.render("logprob_entropy", files)
    assert both.index("NVIDIA") < both.index("Some CPU")
    assert "Some CPU" not in tables.render("logprob_entropy/fwd", files)
    assert "NVIDIA" not in tables.render("logprob_entropy@cpu-*", files)
    only = tables.render("logprob_entropy/fwd_*@cpu-*", files)
    # no Triton, commit, roof, memory or scope: those columns and words are left out
    assert only.startswith("Some CPU, torch 2.11.0, 2026-01-02 (run r1):")
    assert "| case | shape | implementation | ms (p20 to p80) | TB/s | rel. error |" in only


def test_flops_and_ceilings_have_their_units():
    gemm = row(op="linear_logprob", useful_flops=4 * 10**11)
    text = tables.render("linear_logprob", {"gpu": [*ceilings(), gemm]})
    assert "useful TFLOP/s" in text and "| 400 | 80 |" in text
    text = tables.render("ceiling", {"gpu": ceilings()})
    assert "| 3 TB/s |" in text and "| 500 |" in text and "% of roof" not in text


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench:a -->\nno end\n",
        "<!-- bench:a -->\n<!-- bench:b -->\n<!-- /bench -->\n",
    ],
)
def test_a_block_without_an_end_is_an_error(text):
    with pytest.raises(ValueError, match="README: the block bench:a has no"):
        tables.rewrite(text, {}, "README")


def test_text_without_blocks_is_left_alone():
    text = "no `<!-- bench:a -->` in a sentence is a block\n"
    assert tables.rewrite(text, {}) == text


# --- plots -------------------------------------------------------------------------


def test_plots_are_written_beside_the_results(results):
    more = [row(shape="T=4000;V=500;data=peaked", bytes=6_000_000_000, ms_p50=3.0)]
    append_rows(results / "nvidia-test-9000.csv", more)
    append_rows(results / "cpu-test.csv", [row(op="linear_logprob", useful_flops=10)])
    written = plot.plot_folder(results)
    assert [path.name for path in written] == [
        "cpu-test-linear_logprob.png",
        "nvidia-test-9000-logprob_entropy.png",
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert sorted(p.suffix for p in results.iterdir()) == [".csv", ".csv", ".png", ".png"]


def test_a_plot_shows_every_provider_and_the_roof(results, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        plot.plt.Figure,
        "savefig",
        lambda figure, path, **_: (
            path.touch(),
            seen.update(
                labels=[t.get_text() for t in figure.legends[0].get_texts()],
                title=figure.get_suptitle(),
                percents=[list(line.get_ydata()) for line in figure.axes[1].get_lines()],
            ),
        ),
    )
    plot.plot_folder(results)
    assert set(seen["labels"]) == {"ours-triton", "trl-1.0", "liger-1.0 (computes less)", "roof"}
    assert "NVIDIA Test 9000" in seen["title"] and "run r1" in seen["title"]
    assert [50.0] in [[round(y, 6) for y in ys] for ys in seen["percents"]]


def test_one_run_can_be_chosen(results):
    assert plot.plot_folder(results, "r9") == []
    assert len(plot.plot_folder(results, "r1")) == 1


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(BadFile, match="x.csv: its columns"):
        plot.plot_folder(tmp_path)
