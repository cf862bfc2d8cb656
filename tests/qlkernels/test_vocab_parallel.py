from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qlkernels import linear_logprob
from qlkernels._scores import TokenScores
from qlkernels.vocab_parallel import merge_scores, vocab_parallel_logprob

T, H, V = 9, 16, 67


def make():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=g)
    w = torch.randn(V, H, generator=g)
    y = torch.randint(V, (T,), generator=g)
    y[:3] = torch.tensor([0, 40, V - 1])  # both slices, and both ends
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1]).bool()
    upstream = [torch.randn(T, generator=g) for _ in range(3)]
    return x, w, y, mask, upstream


def run(scorer, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    _, _, _, _, upstream = make()
    scores = scorer(x, w)
    sum((s * g).sum() for s, g in zip(scores, upstream, strict=True)).backward()
    return [*(s.detach() for s in scores), x.grad, w.grad]


def _rank(rank, world, file, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    x, w, y, mask, _ = make()
    bounds = [0, 41, V]
    first, last = bounds[rank], bounds[rank + 1]

    def scorer(x, w):
        return vocab_parallel_logprob(
            x, w, y, first_id=first, row_mask=mask, temperature=0.7, impl="torch"
        )

    found = [run(scorer, x, w[first:last]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    results[rank] = found[0]
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    x, w, y, mask, _ = make()
    want = run(
        lambda x, w: linear_logprob(x, w, y, row_mask=mask, temperature=0.7, impl="torch"), x, w
    )
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(2, str(tmp_path / "store"), results), nprocs=2)
        first, second = results[0], results[1]
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)  # the same bits on every rank
    got = [*first[:4], torch.cat([first[4], second[4]])]
    for name, a, b in zip(("logprobs", "entropy", "lse", "dx", "dw"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=name)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_one_rank_changes_nothing(one_rank):
    x, w, y, _, _ = make()
    local = linear_logprob(x, w, y)
    merged = merge_scores(local, torch.ones(T, dtype=torch.bool))
    for a, b in zip(merged, local, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_target_that_no_rank_owns_is_nan(one_rank):
    x, w, y, _, _ = make()
    y[4] = -100
    scores = vocab_parallel_logprob(x, w, y, first_id=0)
    assert scores.logprobs.isnan().tolist() == (y == -100).tolist()
    assert scores.entropy.isfinite().all()


def test_gradient_of_the_merge(one_rank):
    owns = torch.tensor([True, True, True])
    leaves = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *fields: tuple(merge_scores(TokenScores(*fields), owns)), leaves
    )


def test_refusals(one_rank):
    local = TokenScores(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="T = 3"):
        merge_scores(local, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        merge_scores(local, torch.ones(3))
