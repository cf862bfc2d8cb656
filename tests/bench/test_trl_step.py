"""The comparison with TRL's update, on a model of a few thousand weights."""

import pytest

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from bench import plot, results, tables, trl_step  # noqa: E402
from bench.gate import WrongResult  # noqa: E402


def test_every_variant_gives_rows_and_the_same_logprobs(tmp_path):
    out = tmp_path / "rows.csv"
    rows = trl_step.run("tiny", device="cpu", out=out, repeats=1, commit="abc")
    assert [(row.case, row.impl) for row in rows if row.is_ours] == [
        ("loss", "ours-scores"),
        ("update", "ours-scores"),
        ("update", "ours-scores+apply"),
        ("loss", "ours-one_pass"),
        ("update", "ours-one_pass"),
        ("prefix", "ours-shared_prefix"),
        ("prefix", "ours-shared_prefix+one_pass"),
    ]
    assert {row.case for row in rows if not row.is_ours} == set(trl_step.CASES)
    assert all(row.rel_err < 1e-5 and row.ms_p50 > 0 for row in rows)
    assert [row.impl for row in results.read_rows(out)] == [row.impl for row in rows]
    [picture] = plot.plot_folder(tmp_path)  # the files that all results are drawn and shown from
    assert picture.stat().st_size > 10_000
    table = tables.render(trl_step.OP, {"cpu-test": results.read_rows(out)})
    assert "ours-shared_prefix" in table and "T=288 model=tiny P=64 G=4 R=8" in table


def test_a_wrong_variant_is_not_timed(tmp_path, monkeypatch):
    ours = trl_step.AEPOGRPOTrainer

    class Wrong(ours):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 1.01 * logps, *rest

    monkeypatch.setattr(trl_step, "AEPOGRPOTrainer", Wrong)
    out = tmp_path / "rows.csv"
    with pytest.raises(WrongResult, match="ours-scores: relative error 1.0e-02"):
        trl_step.run("tiny", device="cpu", out=out, cases=("loss",), repeats=1, commit="abc")
    assert [row.impl.startswith("trl-") for row in results.read_rows(out)] == [True]


@pytest.mark.parametrize("case", ["loss", "update"])
def test_wrong_gradients_are_not_timed(case, tmp_path, monkeypatch):
    ours = trl_step.AEPOGRPOTrainer

    class Wrong(ours):
        def _compute_loss(self, *args, **kwargs):
            return 1.01 * super()._compute_loss(*args, **kwargs)

    monkeypatch.setattr(trl_step, "AEPOGRPOTrainer", Wrong)
    out = tmp_path / "rows.csv"
    with pytest.raises(WrongResult, match=f"{case}, ours-scores: gradients differ by 1.0e-02"):
        trl_step.run("tiny", device="cpu", out=out, cases=(case,), repeats=1, commit="abc")
    assert [row.impl.startswith("trl-") for row in results.read_rows(out)] == [True]


def test_flops_by_hand():
    """One prompt token, two completions of three tokens; H = 2, V = 5, one layer: 60 for a row of
    the head, and 2 * (2 * (1 + 1) * 3 + 3 * 4) = 48 weights, 6 FLOPs each, on 7 rows.
    """
    sizes = dict(
        hidden_size=2, vocab_size=5, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=3, intermediate_size=4,
    )  # fmt: skip
    assert trl_step.useful_flops(sizes, (1, 2, 3), "loss") == 6 * 60
    assert trl_step.useful_flops(sizes, (1, 2, 3), "update") == 6 * 60 + 7 * 6 * 48
