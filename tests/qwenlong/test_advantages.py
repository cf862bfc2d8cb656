import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qwenlong.advantages import group_advantages, spread_to_tokens

# two prompts of task "qa", one of task "niah"
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.2, 0.6])
GROUPS = ["a", "a", "b", "b", "c", "c"]
TASKS = ["qa", "qa", "qa", "qa", "niah", "niah"]


def close(actual, want):
    torch.testing.assert_close(actual, torch.tensor(want), rtol=1e-5, atol=0)


def test_group_std_by_hand():
    # group a: mean 1/2, unbiased std 1/sqrt(2); b: equal rewards; c: mean 0.4, std 0.2 sqrt(2)
    s = math.sqrt(0.5)
    close(group_advantages(REWARDS, GROUPS, scale="group"), [s, -s, 0.0, 0.0, -s, s])
    biased = group_advantages(REWARDS, GROUPS, scale="group", unbiased=False)
    close(biased, [1.0, -1.0, 0.0, 0.0, -1.0, 1.0])


def test_task_std_by_hand():
    # eq. 7: the qa rewards 1 0 1 1 have mean 3/4 and unbiased variance (3/16 + 9/16) / 3 = 1/4;
    # niah 0.2 0.6: variance 2 * 0.04 / 1 = 0.08
    niah = 0.2 / math.sqrt(0.08)
    actual = group_advantages(REWARDS, GROUPS, task_ids=TASKS)
    close(actual, [1.0, -1.0, 0.0, 0.0, -niah, niah])
    # centred by the group, not by the task: the mean of "qa" would give 0.5 and -1.5


def test_batch_std_by_hand():
    rewards = torch.tensor([0.0, 2.0, 4.0, 6.0])  # mean 3, biased variance 5, unbiased 20 / 3
    actual = group_advantages(rewards, [0, 0, 1, 1], scale="batch")
    close(actual, [-1 / math.sqrt(20 / 3), 1 / math.sqrt(20 / 3)] * 2)
    actual = group_advantages(rewards, [0, 0, 1, 1], scale="batch", unbiased=False)
    close(actual, [-1 / math.sqrt(5), 1 / math.sqrt(5)] * 2)


def test_mean_only_and_leave_one_out():
    rewards, ids = torch.tensor([3.0, 0.0, 0.0, 5.0]), torch.tensor([7, 7, 7, 2])
    close(group_advantages(rewards, ids, scale="none"), [2.0, -1.0, -1.0, 0.0])
    # the others' means are 0, 1.5, 1.5, and nothing for the single one
    actual = group_advantages(rewards, ids, scale="none", baseline="leave_one_out")
    close(actual, [3.0, -1.5, -1.5, 0.0])


def test_epsilon_is_added_to_the_std():
    actual = group_advantages(torch.tensor([0.0, 2.0]), [0, 0], scale="batch", eps=1.0)
    close(actual, [-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)])


@pytest.mark.parametrize("scale", ["group", "batch", "task", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_groups_and_tasks_of_one_do_not_explode(scale, baseline):
    tasks = ["x", "y", "y"] if scale == "task" else None
    actual = group_advantages(
        torch.tensor([1.0, 1.0, 0.0]), ["a", "b", "c"],
        task_ids=tasks, scale=scale, baseline=baseline,
    )  # fmt: skip
    assert actual.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero_whatever_their_rounding(scale):
    rewards = torch.full((8,), 0.1)  # eight times 0.1 does not sum to 0.8 in binary
    assert not group_advantages(rewards, [0] * 8, scale=scale).any()


def test_order_does_not_matter_and_the_empty_batch_is_empty():
    g = torch.Generator().manual_seed(0)
    rewards, order = torch.rand(40, generator=g), torch.randperm(40, generator=g)
    groups = [i // 8 for i in range(40)]
    tasks = [g % 2 for g in groups]
    straight = group_advantages(rewards, groups, task_ids=tasks)
    shuffled = group_advantages(
        rewards[order], [groups[i] for i in order], task_ids=[tasks[i] for i in order]
    )
    torch.testing.assert_close(shuffled, straight[order])
    assert group_advantages(torch.zeros(0), [], scale="batch").shape == (0,)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(group_ids=[0]), "group_ids has 1 entries for 2 rewards"),
        (dict(scale="tasks"), "scale must be one of group"),
        (dict(baseline="none"), "baseline must be one of group"),
        (dict(scale="task"), "task_ids belongs to"),
        (dict(task_ids=[0, 0]), "task_ids belongs to"),
        (dict(rewards=torch.zeros(2, 1)), r"rewards must be \[N\]"),
        (dict(rewards=torch.tensor([0.0, math.nan])), "reward 1 is nan"),
    ],
)
def test_errors(arguments, words):
    given = dict(rewards=torch.zeros(2), group_ids=[0, 0], scale="batch") | arguments
    with pytest.raises(ValueError, match=words):
        group_advantages(**given)


def _rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    groups = ["a", "c", "b", "b", "a", "c"]  # two groups span the ranks
    tasks = ["qa", "niah", "qa", "qa", "qa", "niah"]
    actual = group_advantages(
        REWARDS[[0, 4, 2, 3, 1, 5]][mine], groups[mine], task_ids=tasks[mine],
        process_group=dist.group.WORLD,
    )  # fmt: skip
    torch.save(actual, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_would(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    whole = group_advantages(REWARDS, GROUPS, task_ids=TASKS)
    assert torch.equal(found, whole[[0, 4, 2, 3, 1, 5]])


def test_spread_to_tokens():
    values = torch.tensor([2.0, -1.0, 5.0])
    mask = torch.tensor([True, False, True, True, False])
    packed = spread_to_tokens(values, mask, torch.tensor([0, 2, 2, 4]))
    assert packed.tolist() == [2.0, 0.0, 5.0, 5.0, 0.0]
    padded = spread_to_tokens(values[:2], torch.tensor([[True, False], [True, True]]))
    assert padded.tolist() == [[2.0, 0.0], [-1.0, -1.0]]
    keep = spread_to_tokens(torch.tensor([True, False, False]), mask, torch.tensor([0, 2, 2, 4]))
    assert keep.tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        spread_to_tokens(values, mask, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="without cu_seqlens"):
        spread_to_tokens(values, torch.ones(2, 2, dtype=torch.bool))
