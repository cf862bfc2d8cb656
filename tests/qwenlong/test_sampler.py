import json
import random
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from qwenlong.sampler import TaskBalancedSampler, stratified_by_pass_rate, task_counts
from qwenlong.types import Sample

FIVE = ("multiple_choice", "multihop_qa", "reading_qa", "dialogue_memory", "corpus_numeric")


def labels(**sizes):
    """Task labels in a mixed, fixed order."""
    tasks = [task for task, n in sizes.items() for _ in range(n)]
    first = list(sizes)  # so that the order of first appearance is that of the call
    random.Random(0).shuffle(tasks)
    for task in first:
        tasks.remove(task)
    return first + tasks


def endless(sampler):
    while True:
        yield from sampler


# --- counts ------------------------------------------------------------------


def test_128_over_five_tasks():
    assert list(task_counts(dict.fromkeys(FIVE, 1), 128).values()) == [26, 26, 26, 25, 25]


@pytest.mark.parametrize("weights, batch_size, want", [
    ({"a": 1, "b": 1}, 7, [4, 3]),  # a tie goes to the first
    ({"a": 1, "b": 2, "c": 4}, 7, [1, 2, 4]),
    ({"a": 1, "b": 2, "c": 4}, 8, [1, 2, 5]),  # 8/7, 16/7, 32/7; the heaviest gets the one left
    ({"a": 0.2, "b": 0.3, "c": 0.5}, 4, [0, 1, 3]),  # 0.8, 1.2, 2; by weight, not by remainder
    ({"a": 0.29, "b": 0.71}, 100, [29, 71]),  # 100 * 0.29 is 28.999999999999996 in floats
    ({"a": 7}, 3, [3]),
])  # fmt: skip
def test_counts_by_hand(weights, batch_size, want):
    assert list(task_counts(weights, batch_size).values()) == want


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weights_are_named(weight):
    with pytest.raises(ValueError, match="weight of task 'b'"):
        task_counts({"a": 1, "b": weight}, 8)


# --- batches -----------------------------------------------------------------


def test_every_batch_has_the_exact_counts_and_no_sample_twice():
    tasks = labels(**{task: n for task, n in zip(FIVE, (26, 40, 300, 77, 53), strict=True)})
    sampler = TaskBalancedSampler(tasks, 128, seed=1)
    assert sampler.counts == dict(zip(FIVE, (26, 26, 26, 25, 25), strict=True))
    for batch in islice(endless(sampler), 40):
        assert Counter(tasks[i] for i in batch) == sampler.counts
        assert len(set(batch)) == 128


def test_a_task_uses_every_sample_before_it_repeats_one():
    # 5 of 7: leftovers of an order open the next batch
    tasks = labels(a=7, b=5)
    sampler = TaskBalancedSampler(tasks, 10, seed=3)
    seen = Counter()
    for batches, batch in enumerate(islice(endless(sampler), 70), 1):
        seen.update(i for i in batch if tasks[i] == "a")
        uses = [seen[i] for i, task in enumerate(tasks) if task == "a"]
        assert sum(uses) == 5 * batches
        assert max(uses) - min(uses) <= 1
    assert uses == [50] * 7


def test_orders_differ_between_passes_batches_are_mixed_and_the_seed_decides():
    tasks = labels(a=8, b=8)
    batches = list(islice(endless(TaskBalancedSampler(tasks, 16, seed=0)), 4))
    assert len({tuple(b) for b in batches}) == 4
    assert [tasks[i] for i in batches[0]] != sorted(tasks[i] for i in batches[0])
    again = list(islice(endless(TaskBalancedSampler(tasks, 16, seed=0)), 4))
    other = list(islice(endless(TaskBalancedSampler(tasks, 16, seed=1)), 4))
    assert batches == again and batches != other


def test_the_bits_of_a_seed_are_fixed():
    # a change here breaks the resumption of saved runs
    sampler = TaskBalancedSampler(["a", "b", "a", "b", "a"], 4, seed=7)
    assert list(islice(endless(sampler), 3)) == [[2, 3, 0, 1], [1, 3, 2, 4], [4, 1, 0, 3]]


def test_every_position_of_a_task_is_equally_likely():
    counts = Counter()
    for seed in range(600):
        counts.update(next(iter(TaskBalancedSampler(["a"] * 6, 3, seed=seed))))
    assert all(abs(counts[i] - 300) < 60 for i in range(6))  # 5 standard deviations of 12.2


def test_global_random_states_are_left_alone():
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    first = next(iter(TaskBalancedSampler(labels(a=9, b=9), 6, seed=0)))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    random.seed(6)
    assert next(iter(TaskBalancedSampler(labels(a=9, b=9), 6, seed=0))) == first


# --- state -------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 11])
def test_a_resumed_sampler_continues_exactly(stop):
    tasks = labels(a=11, b=6, c=5)  # 22 // 5 = 4 batches an iteration

    def run(sampler, n):
        return list(islice(endless(sampler), n))

    want = run(TaskBalancedSampler(tasks, 5, seed=2), 20)
    first = TaskBalancedSampler(tasks, 5, seed=2)
    assert run(first, stop) == want[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = TaskBalancedSampler(tasks, 5, seed=2)
    next(iter(resumed))  # what it has drawn before is forgotten
    resumed.load_state_dict(state)
    assert run(resumed, 20 - stop) == want[stop:]


def test_an_iteration_that_was_cut_short_ends_where_it_would_have():
    sampler = TaskBalancedSampler(labels(a=8, b=8), 4, seed=2)
    assert len(sampler) == 4
    assert len(list(islice(sampler, 3))) == 3
    assert [len(list(sampler)) for _ in range(3)] == [1, 4, 4]


@pytest.mark.parametrize("tasks, batch_size, seed, name", [
    (labels(a=8, b=9), 4, 2, "data"),
    (labels(b=8, a=8), 4, 2, "data"),
    (labels(a=8, b=8), 6, 2, "batch_size"),
    (labels(a=8, b=8), 4, 3, "seed"),
])  # fmt: skip
def test_the_state_of_another_run_is_refused(tasks, batch_size, seed, name):
    state = TaskBalancedSampler(labels(a=8, b=8), 4, seed=2).state_dict()
    with pytest.raises(ValueError, match=f"has {name} ="):
        TaskBalancedSampler(tasks, batch_size, seed=seed).load_state_dict(state)


def test_a_damaged_state_is_refused():
    sampler = TaskBalancedSampler(labels(a=8, b=8), 4, seed=2)
    with pytest.raises(ValueError, match="batches = -1"):
        sampler.load_state_dict({**sampler.state_dict(), "batches": -1})


# --- refusals ----------------------------------------------------------------


@pytest.mark.parametrize("tasks, batch_size, weights, words", [
    ([], 4, None, "no samples"),
    (["a", "b"], 4, None, "takes 2 samples of task 'a', which has 1"),
    (["a", "a", "b"], 1, None, "task 'b' gets no sample"),
    (["a", "b"], 2, {"a": 1}, r"weights are for \['a'\]"),
    (["a", "b"], 2, {"a": 1, "b": 1, "c": 1}, "weights are for"),
    (["a", "b"], 0, None, "batch_size is 0"),
])  # fmt: skip
def test_what_cannot_be_balanced_is_refused(tasks, batch_size, weights, words):
    with pytest.raises(ValueError, match=words):
        TaskBalancedSampler(tasks, batch_size, seed=0, weights=weights)


@pytest.mark.parametrize("rank, world_size", [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_ranks_must_fit(rank, world_size):
    with pytest.raises(ValueError, match="multiple of world_size|modulo"):
        TaskBalancedSampler(["a"] * 8, 8, seed=0, rank=rank, world_size=world_size)


# --- with torch --------------------------------------------------------------


def test_a_data_loader_gets_the_batches_of_all_its_epochs():
    tasks = labels(a=8, b=8)
    loader = DataLoader(range(100, 116), batch_sampler=TaskBalancedSampler(tasks, 4, seed=0))
    assert len(loader) == 4
    epochs = [batch.tolist() for _ in range(2) for batch in loader]
    want = list(islice(endless(TaskBalancedSampler(tasks, 4, seed=0)), 8))
    assert epochs == [[100 + i for i in batch] for batch in want]


def test_workers_draw_ahead_and_the_count_of_trained_batches_resumes_exactly():
    tasks = labels(a=40, b=40)
    sampler = TaskBalancedSampler(tasks, 4, seed=0)
    batches = iter(DataLoader(range(80), batch_sampler=sampler, num_workers=1, prefetch_factor=4))
    want = [next(batches).tolist() for _ in range(6)]
    assert sampler.batches > 6
    resumed = TaskBalancedSampler(tasks, 4, seed=0)
    resumed.load_state_dict({**sampler.state_dict(), "batches": 2})
    assert list(islice(resumed, 4)) == want[2:]


def test_the_ranks_share_the_batch_of_one_process():
    tasks = labels(a=12, b=12, c=12)
    whole = list(TaskBalancedSampler(tasks, 8, seed=4))
    parts = [
        list(TaskBalancedSampler(tasks, 8, seed=4, rank=rank, world_size=4)) for rank in range(4)
    ]
    assert [sum(slices, []) for slices in zip(*parts, strict=True)] == whole
    assert all(len(s) == 2 for part in parts for s in part)


def test_a_run_may_resume_on_another_number_of_ranks():
    tasks = labels(a=12, b=12)
    one = TaskBalancedSampler(tasks, 4, seed=4)
    two = TaskBalancedSampler(tasks, 4, seed=4, rank=1, world_size=2)
    list(islice(one, 2))
    two.load_state_dict(one.state_dict())
    assert next(iter(two)) == next(iter(one))[2:]


# --- selection by pass rate --------------------------------------------------


def sample(name, pass_rate, k=8):
    difficulty = None if pass_rate is None else {"model": "m", "k": k, "pass_rate": pass_rate}
    return Sample(
        id=name, task="reading_qa", question="?", documents=[], answers=["x"],
        answer_type="text", reward="r", difficulty=difficulty,
    )  # fmt: skip


def test_strata_by_hand():
    rates = {"a": 0.0, "b": 0.125, "c": 0.25, "d": 0.5, "e": 0.75, "f": 1.0, "g": 0.875}
    found = stratified_by_pass_rate([sample(n, r) for n, r in rates.items()], 4, 1, seed=0)
    # bins [0, 1/4) a b, [1/4, 1/2) c, [1/2, 3/4) d, [3/4, 1] e f g
    assert found.available == [2, 1, 1, 3] and found.drawn == [1, 1, 1, 1]
    names = [s.id for s in found.samples]
    assert names[0] in "ab" and names[1:3] == ["c", "d"] and names[3] in "efg"


def test_a_thin_bin_gives_all_it_has_and_says_so():
    samples = [sample(str(i), 0.0) for i in range(5)] + [sample("x", 1.0)]
    found = stratified_by_pass_rate(samples, 3, 4, seed=0)
    assert found.drawn == [4, 0, 1] and found.available == [5, 0, 1]
    assert len(found.samples) == 5 and found.samples[-1].id == "x"


@pytest.mark.parametrize("k", [3, 7, 8, 10, 64, 100])
def test_every_pass_rate_c_of_k_falls_into_its_bin(k):
    # as many bins as attempts: c successes are bin c, and k successes are in the last bin
    for c in range(k + 1):
        found = stratified_by_pass_rate([sample("s", c / k, k)], k, 1, seed=0)
        assert found.available.index(1) == min(c, k - 1)


def test_the_draw_ignores_the_order_and_depends_on_the_seed():
    samples = [sample(f"s{i}", (i % 9) / 8) for i in range(90)]
    turned = samples[::-1]
    ids = {s.id for s in stratified_by_pass_rate(samples, 4, 5, seed=0).samples}
    assert ids == {s.id for s in stratified_by_pass_rate(turned, 4, 5, seed=0).samples}
    assert ids != {s.id for s in stratified_by_pass_rate(samples, 4, 5, seed=1).samples}
    assert len(ids) == 20


@pytest.mark.parametrize("samples, bins, per_bin, words", [
    ([sample("a", None)], 4, 1, "'a' has no difficulty"),
    ([sample("a", 0.5), sample("a", 0.5)], 4, 1, "two samples have the id 'a'"),
    ([], 0, 1, "bins is 0"),
    ([], 4, 0, "per_bin 0"),
])  # fmt: skip
def test_a_selection_that_makes_no_sense_is_refused(samples, bins, per_bin, words):
    with pytest.raises(ValueError, match=words):
        stratified_by_pass_rate(samples, bins, per_bin, seed=0)


def test_nothing_to_draw_from():
    assert stratified_by_pass_rate([], 2, 3, seed=0) == ([], [0, 0], [0, 0])
