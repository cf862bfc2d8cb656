import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qlkernels.policy_loss import policy_loss
from qwenlong.advantages import spread_to_tokens
from qwenlong.aepo import (
    EntropyController,
    EntropyMeter,
    batch_entropy,
    clip_negative_gradients,
    replay,
)
from qwenlong.aepo_plot import (
    BEST_FITS,
    MASKED_PHASES,
    PUBLISHED_DECISIONS,
    PUBLISHED_ENTROPY,
    agreement,
    plot,
)

NAN = float("nan")
# two sequences, of 1 and 3 response tokens; what the mask hides is NaN
ENTROPY = torch.tensor([NAN, 1.0, 0.1, 0.2, 0.6, NAN])
MASK = torch.tensor([False, True, True, True, True, False])
CU = torch.tensor([0, 2, 6])
PADDED = torch.tensor([[NAN, 1.0, NAN], [0.1, 0.2, 0.6]])


# --- entropy of a batch ----------------------------------------------------------


def test_batch_entropy_by_hand():
    # means 1.0 and 0.3: eq. 11 gives 0.65; the four tokens alike give 1.9 / 4
    assert batch_entropy(ENTROPY, MASK, CU).item() == pytest.approx(0.65)
    assert batch_entropy(ENTROPY, MASK, CU, kind="token_mean").item() == pytest.approx(0.475)
    mask = torch.tensor([[False, True, False], [True, True, True]])
    assert batch_entropy(PADDED, mask).item() == pytest.approx(0.65)


def test_a_sequence_without_response_is_not_a_sequence():
    cu = torch.tensor([0, 1, 2, 2, 6])  # the first row is hidden, the third sequence is empty
    assert batch_entropy(ENTROPY, MASK, cu).item() == pytest.approx(0.65)
    nothing = batch_entropy(ENTROPY, torch.zeros(6, dtype=torch.bool), CU)
    assert nothing.isnan()


@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean"])
def test_micro_batches_add_up(kind):
    meter = EntropyMeter(kind)
    meter.add(ENTROPY[:2], MASK[:2], torch.tensor([0, 2]))
    meter.add(ENTROPY[2:], MASK[2:], torch.tensor([0, 4]))
    assert meter.value() == batch_entropy(ENTROPY, MASK, CU, kind=kind)
    assert meter.value() == meter.value()


def test_the_turns_of_a_trajectory_are_one_sequence_by_hand():
    # Trajectory 7 has one turn of one token: mean 1.0. Trajectory 2 has three turns of 2, 1 and 3
    # tokens: (0.2 + 0.4) + 0.6 + (0.1 + 0.1 + 0.4) = 1.8 over 6 tokens, mean 0.3.
    entropy = torch.tensor([NAN, 0.2, 0.4, 1.0, 0.6, NAN, 0.1, 0.1, 0.4])
    mask = ~entropy.isnan()
    cu = torch.tensor([0, 1, 3, 4, 5, 6, 9])  # two prefixes, which have no row that counts
    of = torch.tensor([2, 2, 7, 2, 7, 2])
    for cuts in ([0, 6], [0, 2, 6], [0, 1, 2, 3, 4, 5, 6]):  # in one micro-batch, or over several
        meter = EntropyMeter()
        for a, b in zip(cuts, cuts[1:], strict=False):
            rows = slice(int(cu[a]), int(cu[b]))
            part = cu[a : b + 1] - cu[a]
            meter.add(entropy[rows], mask[rows], part, sequence_of=of[a:b])
        assert meter.value().item() == pytest.approx((1.0 + 0.3) / 2)
        # a sequence of its own beside them, as when a rank adds what has no trajectory
        meter.add(torch.tensor([0.8]), torch.tensor([True]), torch.tensor([0, 1]))
        assert meter.value().item() == pytest.approx((1.0 + 0.3 + 0.8) / 3)
    turns = batch_entropy(entropy, mask, cu)  # each a sequence of its own
    assert turns.item() == pytest.approx((0.3 + 1.0 + 0.6 + 0.2) / 4)
    tokens = EntropyMeter("token_mean")
    tokens.add(entropy, mask, cu, sequence_of=of)
    assert tokens.value().item() == pytest.approx(2.8 / 7)
    with pytest.raises(ValueError, match=r"sequence_of is \(2,\) for 6 blocks"):
        meter.add(entropy, mask, cu, sequence_of=of[:2])


def _rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = dist.group.WORLD
    rows, cu = (slice(0, 2), [0, 2]) if rank == 0 else (slice(2, 6), [0, 4])
    found = [
        batch_entropy(ENTROPY[rows], MASK[rows], torch.tensor(cu), kind=kind, process_group=world)
        for kind in ("sequence_mean", "token_mean")
    ]
    controller = EntropyController(low=0.1, high=0.3, if_empty="keep-all", dropping=True)
    # rank 1 has nothing left, but rank 0 has: the step is not empty, so rank 1 trains on nothing
    mine = torch.tensor([1.0, -1.0]) if rank == 0 else torch.tensor([-1.0, -2.0])
    found.append(controller.keep_sequences(mine, process_group=world))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0] == second[0] and first[0].item() == pytest.approx(0.65)
    assert first[1] == second[1] and first[1].item() == pytest.approx(0.475)
    assert first[2].tolist() == [True, False] and second[2].tolist() == [False, False]


# --- negative-gradient clipping --------------------------------------------------


@pytest.mark.parametrize(
    "level, clip, threshold, want",
    [
        # the second sequence (0.1, 0.2, 0.6; mean 0.3) is the negative one
        ("token", "high", 0.2, [0, 1, 1, 1, 0, 0]),
        ("token", "low", 0.2, [0, 1, 0, 1, 1, 0]),
        ("sequence", "high", 0.29, [0, 1, 0, 0, 0, 0]),
        ("sequence", "high", 0.31, [0, 1, 1, 1, 1, 0]),
        ("sequence", "low", 0.31, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_clipping_by_hand(level, clip, threshold, want):
    A = torch.tensor([1.0, -1.0])
    options = dict(level=level, clip=clip, threshold=threshold)
    keep = clip_negative_gradients(A, ENTROPY, MASK, CU, **options)
    assert keep.tolist() == [bool(x) for x in want]
    padded = clip_negative_gradients(
        A, PADDED, torch.tensor([[False, True, False], [True, True, True]]), **options
    )
    assert padded.flatten().tolist() == [bool(x) for x in [0, want[1], 0, *want[2:5]]]
    # nothing negative, nothing dropped; an advantage of 0 is not negative
    for others in ([1.0, 1.0], [1.0, 0.0]):
        keep = clip_negative_gradients(torch.tensor(others), ENTROPY, MASK, CU, **options)
        assert torch.equal(keep, MASK)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip", ["high", "low"])
def test_quantile_is_that_of_the_negative_tokens(quantile, clip):
    g = torch.Generator().manual_seed(0)
    entropy, mask = torch.rand(60, generator=g), torch.rand(60, generator=g) < 0.7
    cu, A = torch.tensor([0, 10, 30, 60]), torch.tensor([-1.0, 2.0, -0.5])
    negative = mask & (spread_to_tokens(A, mask, cu) < 0)
    tau = torch.quantile(entropy[negative].double(), quantile)
    want = mask & ~(negative & (entropy > tau if clip == "high" else entropy < tau))
    actual = clip_negative_gradients(
        A, torch.where(mask, entropy, NAN), mask, cu, level="token", clip=clip, quantile=quantile
    )
    assert torch.equal(actual, want)
    dropped = (mask & ~actual).sum() / negative.sum()
    assert dropped.item() == pytest.approx(1 - quantile if clip == "high" else quantile, abs=0.05)


def test_quantile_over_sequences_and_over_nothing():
    entropy = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9])
    mask, cu = torch.ones(5, dtype=torch.bool), torch.arange(6)
    A = torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0])
    keep = clip_negative_gradients(A, entropy, mask, cu, quantile=0.5)
    assert keep.tolist() == [True, True, False, False, True]  # above 0.25
    assert torch.equal(clip_negative_gradients(-A.abs() * 0, entropy, mask, cu, quantile=0.5), mask)
    empty = torch.zeros(0)
    keep = clip_negative_gradients(empty, empty, empty.bool(), torch.tensor([0]), quantile=0.5)
    assert keep.shape == (0,)


# --- the controller --------------------------------------------------------------

SERIES = [0.1, 0.25, 0.35, 0.25, 0.15, 0.25, 0.35]


@pytest.mark.parametrize(
    "mode, want",
    [
        # low 0.2, high 0.3: up through both, down through both, up again
        ("latch", [0, 0, 1, 1, 0, 0, 1]),
        ("above-high", [0, 0, 1, 0, 0, 0, 1]),
        ("band", [0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_modes_by_hand(mode, want):
    same = EntropyController(low=0.2, high=0.3, mode=mode, entropy_source="scoring_pass")
    assert replay(same, SERIES) == [bool(x) for x in want]
    before = EntropyController(low=0.2, high=0.3, mode=mode)
    assert replay(before, SERIES) == [False, *(bool(x) for x in want[:-1])]


def test_bounds_themselves_change_nothing():
    for mode in ("latch", "above-high", "band"):
        controller = EntropyController(low=0.2, high=0.3, mode=mode, entropy_source="scoring_pass")
        assert not controller.begin_step(0.3) and not controller.begin_step(0.2)


def test_published_series_is_the_figure():
    assert len(PUBLISHED_ENTROPY) == 203 and sum(PUBLISHED_DECISIONS) == 33
    assert PUBLISHED_ENTROPY[88] == max(PUBLISHED_ENTROPY) == 0.2803
    assert [PUBLISHED_ENTROPY[last] for _, last in MASKED_PHASES] == [0.1332, 0.1370, 0.1171]


@pytest.mark.parametrize(
    "mode, source, low, high, percent",
    [
        ("latch", "previous_step", 0.138, 0.248, 91.1),
        ("latch", "scoring_pass", 0.134, 0.248, 90.6),
        ("band", "scoring_pass", 0.262, 0.274, 84.7),
        ("above-high", "scoring_pass", 0.262, 0.262, 84.2),
        ("latch", "previous_step", 1.0, 1.0, 83.7),  # never drops
    ],
)
def test_agreement_with_the_published_run(mode, source, low, high, percent):
    assert 100 * agreement(mode, source, low, high) == pytest.approx(percent, abs=0.05)


def test_no_other_bounds_agree_better():
    """The latch written out once more, over the whole grid of bounds."""
    bounds = [x / 1000 for x in range(100, 291, 2)]
    best = {"previous_step": 0, "scoring_pass": 0}
    for low in bounds:
        for high in bounds:
            state, same, before = False, 0, 0
            for entropy, want in zip(PUBLISHED_ENTROPY, PUBLISHED_DECISIONS, strict=True):
                before += state == want
                state = entropy > high or (state and entropy >= low)
                same += state == want
            if low <= high:
                best["previous_step"] = max(best["previous_step"], before)
                best["scoring_pass"] = max(best["scoring_pass"], same)
    for _, mode, source, low, high in BEST_FITS[:2]:
        assert mode == "latch" and best[source] == round(203 * agreement(mode, source, low, high))


def test_keep_sequences():
    A = torch.tensor([1.0, -1.0, 0.0])
    controller = EntropyController(low=0.1, high=0.3)
    assert controller.keep_sequences(A).tolist() == [True, True, True]
    controller.end_step(torch.tensor(0.4))
    assert controller.begin_step() and controller.last_entropy == pytest.approx(0.4)
    assert controller.keep_sequences(A).tolist() == [True, False, True]
    controller.drop = "nonpositive"
    assert controller.keep_sequences(A).tolist() == [True, False, False]


def test_an_empty_step():
    A = torch.tensor([0.0, -1.0])  # nothing positive is left
    for drop, skipped in (("negative", [True, False]), ("nonpositive", [False, False])):
        skip = EntropyController(low=0.1, high=0.3, drop=drop, dropping=True)
        assert skip.keep_sequences(A).tolist() == skipped
        keep = EntropyController(low=0.1, high=0.3, drop=drop, dropping=True, if_empty="keep-all")
        assert keep.keep_sequences(A).tolist() == [True, True]
        assert keep.keep_sequences(torch.tensor([0.5, -0.5])).tolist() == [True, False]


@pytest.mark.parametrize("drop", ["negative", "nonpositive"])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_a_masked_step_is_rejection_sampling(denominator, drop):
    """Positives keep A rho / N, everything else is exactly zero; N is 6 tokens or the kept ones."""
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.1, -0.3, -0.7], requires_grad=True)
    mask, cu = torch.ones(6, dtype=torch.bool), torch.tensor([0, 2, 5, 6])
    A = torch.tensor([1.5, -1.5, 0.0])
    controller = EntropyController(low=0.1, high=0.3, drop=drop, dropping=True)
    keep = spread_to_tokens(controller.keep_sequences(A), mask, cu)
    found = policy_loss(
        logprobs, None, A, mask,
        cu_seqlens=cu, keep_mask=keep, aggregation="token-mean", denominator=denominator,
    )  # fmt: skip
    found.loss.backward()
    n = {("all", "negative"): 6, ("all", "nonpositive"): 6, ("kept", "negative"): 3}
    share = 1.5 / n.get((denominator, drop), 2)
    assert logprobs.grad.tolist() == pytest.approx([-share, -share, 0, 0, 0, 0])
    assert found.metrics.live_fraction.item() == pytest.approx(2 / 6)
    dropped = 3 if drop == "negative" else 4
    assert found.metrics.masked_fraction.item() == pytest.approx(dropped / 6)


def test_state_survives_a_restart():
    whole = replay(EntropyController(low=0.138, high=0.248), PUBLISHED_ENTROPY)
    first, second = (EntropyController(low=0.138, high=0.248) for _ in range(2))
    head = replay(first, PUBLISHED_ENTROPY[:95])  # inside a masked phase
    state = first.state_dict()
    assert state == {"dropping": True, "last_entropy": 0.2327}
    second.load_state_dict(state)
    assert head + replay(second, PUBLISHED_ENTROPY[95:]) == whole


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: c.begin_step(0.2), "begin_step got an entropy"),
        (
            lambda c: EntropyController(0.1, 0.2, entropy_source="scoring_pass").begin_step(),
            "got no",
        ),
        (lambda c: c.end_step(NAN), "the entropy of the batch is nan"),
        (lambda c: c.load_state_dict({"dropping": True}), r"got \['dropping'\]"),
        (lambda c: c.keep_sequences(torch.zeros(2, 2)), r"advantages must be \[N\]"),
        (lambda c: EntropyController(0.3, 0.2), "low <= high"),
        (lambda c: EntropyController(0.1, math.inf), "low <= high"),
        (lambda c: EntropyController(0.1, 0.2, mode="hold"), "mode must be one of latch"),
        (lambda c: EntropyController(0.1, 0.2, drop="all"), "drop must be one of"),
        (lambda c: EntropyController(0.1, 0.2, if_empty="raise"), "if_empty must be one of"),
        (
            lambda c: EntropyController(0.1, 0.2, entropy_source="now"),
            "entropy_source must be one of",
        ),
        (lambda c: EntropyMeter("mean"), "kind must be one of sequence_mean"),
        (lambda c: EntropyMeter().value(), "nothing was added"),
        (lambda c: batch_entropy(ENTROPY, MASK), "with cu_seqlens or"),
        (lambda c: batch_entropy(ENTROPY, MASK[:2], CU), "response_mask is"),
        (lambda c: _clip(), "exactly one of threshold and quantile"),
        (lambda c: _clip(threshold=0.1, quantile=0.5), "exactly one of"),
        (lambda c: _clip(quantile=1.5), r"quantile must lie in \[0, 1\]"),
        (lambda c: _clip(threshold=0.1, level="batch"), "level must be one of token"),
        (lambda c: _clip(threshold=0.1, clip="both"), "clip must be one of high"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(EntropyController(low=0.1, high=0.3))


def _clip(**options):
    return clip_negative_gradients(torch.zeros(2), ENTROPY, MASK, CU, **options)


def test_figure_is_written(tmp_path):
    plot(tmp_path / "aepo.png")
    assert (tmp_path / "aepo.png").read_bytes().startswith(b"\x89PNG")
    assert [x.name for x in tmp_path.iterdir()] == ["aepo.png"]


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "aepo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/aepo.md", "exec"), {})
    for name, mode, source, low, high in BEST_FITS:
        percent = f"{100 * agreement(mode, source, low, high):.1f} %"
        name = name.removesuffix(" (published snippet)").removesuffix(", no memory")
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert percent in row and f"{high:.3f}" in row
