"""The update of a group beside that of full sequences, on a model of a few thousand weights."""

import pytest

pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")

from bench import group_step, results, tables  # noqa: E402
from bench.gate import WrongResult  # noqa: E402
from bench.long_context import make_config  # noqa: E402


def test_every_variant_has_the_same_gradient_and_a_row(tmp_path):
    out = tmp_path / "rows.csv"
    rows = group_step.run("tiny", device="cpu", out=out, repeats=1, commit="abc")
    assert [row.impl for row in rows] == list(group_step.variants(offload=False))
    assert all(row.rel_err < 1e-4 and row.ms_p50 > 0 for row in rows)
    assert [row.is_ours for row in rows] == [True, False, False]
    table = tables.render(group_step.OP, {"cpu-test": results.read_rows(out)})
    assert "ours-group" in table and "P=48" in table


def test_offloaded_activations_give_the_same_gradient():
    model = group_step.training_model(make_config("tiny", 2), "cpu", group_step.torch.float32)
    group = group_step.make_group((9, 3, 5), model.config.vocab_size, "cpu")
    found = []
    for offload in (False, True):
        model.zero_grad()
        group_step.shared_prefix(model, group, offload=offload)()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch):
    class Wrong(group_step.PackedPolicy):
        def forward(self, layout, inputs=None):
            return super().forward(layout, inputs._replace(weights=1.001 * inputs.weights))

    monkeypatch.setattr(group_step, "PackedPolicy", Wrong)
    out = tmp_path / "rows.csv"
    with pytest.raises(WrongResult, match="gradient is off by 1.0.e-03"):
        group_step.run("tiny", device="cpu", out=out, commit="abc")
    assert not out.exists()


def test_flops_by_hand():
    """A prompt of 2, one answer of 1, so 3 rows and 3 + 2 + 1 pairs, in one layer of the tiny
    model: 64 wide, (4 + 2) heads of 16, 2 of 8 experts of 32.
    """
    weights = 64 * (2 * 6 * 16 + 3 * 2 * 32 + 8)
    attention = 12 * 4 * 16 * (3 + 2 + 1)
    expected = 6 * 3 * weights + attention + 6 * 64 * 512
    assert group_step.useful_flops(make_config("tiny", 1), (2, 1, 1)) == expected
