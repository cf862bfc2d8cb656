"""The long-context benchmark on a tiny model: every case runs, rows fit the file, a picture."""

import pytest
import torch
from rich.console import Console

from bench import long_context
from bench.gate import WrongResult
from bench.long_context import MODELS, Parts, check, group_flops, make_config, random_model, run
from bench.long_context_plot import draw
from bench.plot import plot_folder
from bench.results import append_rows, latest, read_rows
from qlkernels.scorer import Decoder, Scorer
from tests.bench.rows import row


@pytest.fixture
def no_ceilings(monkeypatch):
    """They take seconds and have tests of their own."""
    monkeypatch.setattr(long_context, "_ceilings", lambda *_: None)


def test_every_case(tmp_path, no_ceilings):
    out = tmp_path / "cpu.csv"
    report = run(
        "tiny", device="cpu", out=out, tokens=[16, 48], group_sizes=(20, 3, 5), repeats=2,
        commit="abc", console=Console(quiet=True),
    )  # fmt: skip
    rows = read_rows(out)
    assert [r.run for r in rows] == [report.run] * len(rows)
    peer = long_context.PEER
    assert [(r.case, r.impl, r.size("T")) for r in rows if r.op == "scorer"] == [
        ("resident", "ours-sdpa", "16"), ("resident", peer, "16"),
        ("resident", "ours-sdpa", "48"), ("resident", peer, "48"),
        ("group", "ours-sdpa", "34"), ("group", peer, "75"),
        ("streamed", "ours-sdpa", "20"),
    ]  # fmt: skip
    ours, theirs = (r for r in rows if r.op == "scorer" and r.size("T") == "48")
    assert ours.useful_flops == theirs.useful_flops and ours.dtype == "fp32"
    assert 0 < ours.ms_p20 <= ours.ms_p50 <= ours.ms_p80 and 0 < ours.rel_err < 1e-4
    assert (ours.peer_scope, theirs.peer_scope) == ("", "same")
    assert theirs.rel_err < ours.rel_err  # in fp32 transformers is the truth itself
    group = [r for r in rows if r.op == "scorer" and r.case == "group"]
    decoder = Decoder.of_config(make_config("tiny", None))
    whole = decoder.flops([25] * 3, 3 * 5)  # P + R tokens each, the answers scored
    assert group[1].useful_flops == sum(whole.values())
    parts = [r for r in rows if r.op == "scorer_part" and r.size("T") == "48"]
    assert {r.case for r in parts} == {
        f"resident/{p}"
        for p in (
            "embedding",
            "weights",
            "elementwise",
            "projections",
            "attention",
            "experts",
            "head",
        )
    }
    assert sum(r.useful_flops for r in parts) == ours.useful_flops
    assert len(latest(rows, "scorer")) == 1
    assert out.with_name("cpu-long-context-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_layers_and_cases_can_be_fewer(tmp_path, no_ceilings):
    run(
        "tiny", device="cpu", out=tmp_path / "x.csv", tokens=[8], layers=1, cases=["resident"],
        attention=["torch", "sdpa"], repeats=1, commit="abc", console=Console(quiet=True),
    )  # fmt: skip
    rows = [r for r in read_rows(tmp_path / "x.csv") if r.op == "scorer"]
    assert [(r.impl, r.size("layers")) for r in rows] == [("ours-torch", "1"), ("ours-sdpa", "1")]


def test_wrong_scores_have_no_speed(monkeypatch):
    def wrong(self, *arguments, **options):
        scores = right(self, *arguments, **options)
        return scores._replace(entropy=scores.entropy + 1e-3)

    right = Scorer.score
    config = make_config("tiny", None)
    assert max(check(config, "cpu", torch.float32, ["sdpa"])) < 1e-5
    monkeypatch.setattr(Scorer, "score", wrong)
    with pytest.raises(WrongResult, match="entropy, sdpa: rms error 1.00e-03"):
        check(config, "cpu", torch.float32, ["sdpa"])


def test_true_shapes_by_hand():
    """Published: 30.5B weights; 6.08 GFLOP a token beside attention's 393,216 T (causal)."""
    decoder = Decoder.of_config(make_config("30b", None))
    assert round(decoder.num_weights() / 1e9, 1) == 30.5
    assert decoder.max_positions == 262_144
    flops = decoder.flops([120_000], 120_000)
    rest = sum(flops.values()) - flops["attention"]
    assert rest / 120_000 == pytest.approx(6.083e9, rel=1e-3)
    assert flops["attention"] == pytest.approx(393_216 * 120_000**2, rel=1e-4)
    assert round(Decoder.of_config(make_config("4b", None)).num_weights() / 1e9, 1) == 4.0
    assert MODELS["30b"][3] == (120_000, 8, 2048)


def test_flops_of_a_group_by_hand():
    decoder = Decoder.of_config(make_config("tiny", None))
    P, G, R = 3, 2, 2
    # rows of the prefix see 1 + 2 tokens, of each answer 3 + 4
    found = group_flops(decoder, P, G, R)
    assert found["attention"] == 3 * 4 * 4 * 16 * (1 + 2 + 2 * (3 + 4))
    assert found["head"] == 2 * G * R * 64 * 512
    alone = decoder.flops([P - 1 + G * R], G * R)
    assert found["projections"] == alone["projections"]


def test_transformers_scores_only_the_tokens_asked_for():
    model = random_model(make_config("tiny", 1), "cpu", torch.float32)
    ids = long_context.random_ids(12, 512, "cpu")
    whole, part = long_context.peer_scores(model, ids), long_context.peer_scores(model, ids, 5)
    for name in ("logprobs", "entropy"):
        assert whole[name].shape == (11,) and part[name].shape == (5,)
        torch.testing.assert_close(part[name], whole[name][-5:])


def test_parts_add_up():
    parts = Parts("cpu")
    for name in ("a", "b", "a", ""):
        parts(name)
    marks = [t for _, t in parts._marks]
    found = parts.milliseconds()
    assert found == pytest.approx(
        {"a": 1e3 * (marks[1] - marks[0] + marks[3] - marks[2]), "b": 1e3 * (marks[2] - marks[1])}
    )


def test_random_models_are_repeatable_and_tied():
    config = make_config("tiny", 1)
    first, again = (random_model(config, "cpu", torch.float32) for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    config.tie_word_embeddings = True
    tied = random_model(config, "cpu", torch.float32)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_picture_without_a_group_or_rows(tmp_path):
    shape = "model=30b;layers=48;T={};weights_mb=61000"
    rows = [
        row(op="scorer", case="resident", shape=shape.format(T), ms_p50=ms, peak_mb=T / 50)
        for T, ms in ((4096, 90.0), (16_384, 440.0), (120_000, 11_000.0))
    ]
    draw(rows, tmp_path / "a.png")
    draw([], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 10_000


def test_the_last_run_of_each_model_is_drawn_from_the_file(tmp_path):
    shape = "model={};layers=48;T=4096;weights_mb=61000"
    rows = [
        row(op="scorer", case="resident", shape=shape.format(model), run=run)
        for model, run in (("30b", "r1"), ("4b", "r2"), ("30b", "r3"))
    ]
    append_rows(tmp_path / "card.csv", rows)
    names = ["card-long-context-30b.png", "card-long-context-4b.png"]
    assert [p.name for p in plot_folder(tmp_path)] == names
    assert [p.name for p in plot_folder(tmp_path, "r2")] == names[1:]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "card.csv"]


def test_unknown_names_are_refused(capsys):
    from typer.testing import CliRunner

    for arguments in (["--model", "70b"], ["--case", "everything"], ["--device", "tpu"]):
        assert CliRunner().invoke(long_context.app, arguments).exit_code == 2
