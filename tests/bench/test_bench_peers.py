import importlib.metadata

import pytest
import torch

from bench import peers
from bench.peers import Peer
from bench.registry import Unavailable
from bench.truth import token_scores


def fails():
    raise ImportError("libcuda is missing\nand more lines")


@pytest.fixture
def installed(monkeypatch):
    """Versions of pretended installations; nothing else is installed."""
    versions = {}
    monkeypatch.setattr(peers, "package_version", lambda name: versions.get(name, ""))
    return versions


def test_absent_peers_are_listed_with_the_reason(monkeypatch, installed):
    installed.update({"good-kernel": "1.2", "broken": "3", "cuda-only": "4", "half": "5"})
    provider = print
    table = [
        Peer("op", "good", "same", lambda: provider, "good-kernel"),
        Peer("op", "plain", "less", lambda: provider),
        Peer("op", "missing", "same", lambda: provider, "missing-kernel"),
        Peer("op", "broken", "same", fails, "broken"),
        Peer("op", "cuda", "same", lambda: provider, "cuda-only", needs_cuda=True),
        Peer("op", "half", "same", lambda: provider, "half", has_backward=False),
        Peer("other", "unrelated", "same", fails),
    ]
    monkeypatch.setattr(peers, "PEERS", table)
    found, scopes, absent = peers.find("op", "cpu", backward=True)
    assert found == {"good-1.2": provider, "plain": provider}
    assert scopes == {"good-1.2": "same", "plain": "less"}
    assert absent == {
        "missing": "not installed (pip install missing-kernel)",
        "broken-3": "ImportError: libcuda is missing",
        "cuda-4": "it needs a CUDA device",
        "half-5": "it has no backward",
    }


def test_the_published_peers_are_known():
    labels = {(p.op, p.label): p.scope for p in peers.PEERS}
    assert labels["logprob_entropy", "trl"] == "same"
    assert labels["logprob_entropy", "liger"] == "less"  # no entropy
    assert labels["logprob_entropy", "quack"] == "less"
    assert labels["linear_logprob", "verl"] == "same"
    assert labels["linear_logprob", "cce"] == "less"
    for op in ("logprob_entropy", "token_entropy", "linear_logprob", "policy_loss"):
        assert labels[op, "eager"] == "same"


def test_a_package_that_is_not_there():
    with pytest.raises(Unavailable, match="no_such_package is not importable"):
        peers._package_folder("no_such_package")


def test_a_file_is_loaded_without_its_package(tmp_path, monkeypatch):
    """The parent package would fail to import; one of its files does not."""
    folder = tmp_path / "heavy_peer" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "heavy_peer" / "__init__.py").write_text("raise ImportError('needs everything')")
    (folder / "light.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path)
    found = peers._package_folder("heavy_peer") / "kernels"
    assert peers._load_file("bench_peer_light", found / "light.py").ANSWER == 42
    with pytest.raises(Unavailable, match="this version has no gone.py"):
        peers._load_file("bench_peer_gone", found / "gone.py")
    (folder / "bad.py").write_text("1 / 0")
    for _ in range(2):  # a failed load leaves nothing behind that looks loaded
        with pytest.raises(ZeroDivisionError):
            peers._load_file("bench_peer_bad", folder / "bad.py")


@pytest.mark.parametrize("grad", [False, True])
def test_eager_blocks_equal_one_block(monkeypatch, grad):
    monkeypatch.setattr(peers, "EAGER_ROWS", 4)
    torch.manual_seed(0)
    logits, ids = torch.randn(10, 7, requires_grad=grad), torch.randint(7, (10,))
    whole = token_scores(logits, ids)
    with torch.set_grad_enabled(grad):
        parts = peers._eager_scores(logits, ids)
    torch.testing.assert_close(parts["logprobs"], whole["logprobs"])
    torch.testing.assert_close(parts["entropy"], whole["entropy"])
    if grad:
        a, b = (torch.autograd.grad(x["entropy"].sum(), logits)[0] for x in (whole, parts))
        torch.testing.assert_close(a, b)


def test_live_rows_are_gathered_and_scattered():
    seen = []

    def score(hidden, weight, ids):
        seen.append(ids.tolist())
        return {"logprobs": hidden[:, 0]}

    call = peers._on_live_rows(score)
    hidden, ids = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([5, 6, 7])
    found = call(hidden, None, ids, torch.tensor([True, False, True]))
    assert found["logprobs"].tolist() == [1.0, 0.0, 3.0]
    assert seen == [[5, 7]]
    assert call(hidden, None, ids, None)["logprobs"].tolist() == [1.0, 2.0, 3.0]


def test_eager_policy_loss_by_hand():
    """Two sequences of one prompt and one answer token; ratios 1.5 (clipped at 1.28) and e^0."""
    inputs = {
        "logprobs": torch.tensor([0.0, -1.0, 0.0, -2.0]),
        "old_logprobs": torch.tensor([0.0, -1.0 - torch.log(torch.tensor(1.5)), 0.0, -2.0]),
        "ref_logprobs": torch.tensor([9.0, -1.0, 9.0, -2.0 + torch.log(torch.tensor(2.0))]),
        "entropy": torch.tensor([9.0, 0.2, 9.0, 0.6]),
        "advantages": torch.tensor([2.0, -1.0]),
        "response_mask": torch.tensor([False, True, False, True]),
        "keep_mask": torch.tensor([True, True, False, False]),
        "cu_seqlens": torch.tensor([0, 2, 4]),
    }
    found = peers.eager_policy_loss(inputs, {"eps_low": 0.2, "eps_high": 0.28, "kl_coef": 0.1})
    k3 = 2.0 - torch.log(torch.tensor(2.0)).item() - 1.0
    assert found["loss"].item() == pytest.approx((-1.28 * 2.0 + 0.1 * k3) / 2)
    assert found["clip_high"].item() == 0.5 and found["clip_low"].item() == 0.0
    assert found["kl"].item() == pytest.approx(k3 / 2)
    assert found["entropy_token_mean"].item() == pytest.approx(0.4)
    assert found["entropy_sequence_mean"].item() == pytest.approx(0.4)
    assert found["ratio_max"].item() == pytest.approx(1.5)
    assert found["ratio_min"].item() == pytest.approx(1.0)
    assert found["masked_fraction"].item() == 0.5


def test_clipped_loss_by_hand():
    logprobs = torch.tensor([-1.0, -1.0, -1.0, 9.0], requires_grad=True)
    steps = torch.log(torch.tensor([1.5, 1.5, 0.5, 1.0]))  # ratios
    A = torch.tensor([2.0, -2.0, -2.0, 5.0])
    mask = torch.tensor([True, True, True, False])
    loss = peers.clipped_loss(
        logprobs, logprobs.detach() - steps, A, mask, eps_low=0.2, eps_high=0.28
    )
    # clipped at 1.28; not clipped; clipped at 0.8
    assert loss.item() == pytest.approx((-1.28 * 2 + 1.5 * 2 + 0.8 * 2) / 3)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    on_policy = peers.clipped_loss(logprobs, None, A, mask, eps_low=0.2, eps_high=0.28)
    (grad,) = torch.autograd.grad(on_policy, logprobs)
    torch.testing.assert_close(grad, torch.tensor([-2 / 3, 2 / 3, 2 / 3, 0.0]))


def test_versions_come_from_the_metadata():
    assert peers.package_version("torch") == importlib.metadata.version("torch")
    assert Peer("op", "torchy", "same", fails, "torch").name == (
        f"torchy-{importlib.metadata.version('torch')}"
    )
