import math
from collections import Counter

import pytest

from qwenlong.curriculum import difficulty, mean_rewards, retrospective_sample, within_lengths
from qwenlong.types import Sample, Trajectory


def sample(name):
    return Sample(
        id=name, task="reading_qa", question="?", documents=[], answers=["x"],
        answer_type="text", reward="r",
    )  # fmt: skip


def trajectory(name, value, source="rule"):
    return Trajectory(
        sample_id=name, group_id=name, rollout_index=0, policy_step=0,
        turns=[{"prompt_ids": [1], "response_ids": [2], "finish_reason": "stop"}],
        reward=None if value is None else {"value": value, "source": source},
    )  # fmt: skip


def test_each_length_belongs_to_one_stage():
    names, tokens = "abcdef", [1, 20, 21, 60, 61, 121]
    stages = [(0, 20), (20, 60), (60, 120)]
    found = ["".join(within_lengths(names, tokens, *stage)) for stage in stages]
    assert found == ["ab", "cd", "e"]  # an upper bound belongs to its stage, 121 to none


@pytest.mark.parametrize("above, up_to", [(20, 20), (60, 20), (-1, 20)])
def test_bounds_must_rise(above, up_to):
    with pytest.raises(ValueError, match="above < up_to"):
        within_lengths([], [], above, up_to)


def test_a_length_for_each_sample():
    with pytest.raises(ValueError):
        within_lengths("ab", [1], 0, 20)


def test_mean_rewards_leave_out_what_says_nothing():
    rollouts = [
        trajectory("a", 1.0), trajectory("b", 0.0), trajectory("a", 0.25, "judge"),
        trajectory("a", 0.0, "error"), trajectory("a", None), trajectory("c", 0.0, "error"),
    ]  # fmt: skip
    assert mean_rewards(rollouts) == {"a": 0.625, "b": 0.0}


def test_difficulty_is_the_inverse_of_the_mean_reward():
    assert [difficulty(r) for r in (1, 0.25, 0.0)] == [1, 4, math.inf]
    for reward in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="mean reward is"):
            difficulty(reward)


def drawn(rewards, n, seed):
    samples = [sample(str(i)) for i in range(len(rewards))]
    return [int(s.id) for s in retrospective_sample(samples, rewards, n, seed)]


def test_unsolved_samples_come_first():
    for seed in range(20):
        assert {1, 3} <= set(drawn([0.01, 0.0, 1.0, 0.0], 3, seed))
        assert drawn([0.01, 0.0, 1.0, 0.0], 2, seed) == [1, 3]


def test_more_unsolved_than_asked_are_drawn_uniformly():
    counts = Counter(i for seed in range(900) for i in drawn([0.0, 0.0, 0.0, 0.5], 1, seed))
    assert counts[3] == 0
    assert all(abs(counts[i] - 300) < 71 for i in range(3))  # 5 standard deviations of 14.1


def test_one_draw_is_proportional_to_difficulty():
    # diff 4, 2, 1: chances 4/7, 2/7, 1/7
    seeds = 4200
    counts = Counter(drawn([0.25, 0.5, 1.0], 1, seed)[0] for seed in range(seeds))
    for index, chance in enumerate((4 / 7, 2 / 7, 1 / 7)):
        sd = math.sqrt(seeds * chance * (1 - chance))
        assert abs(counts[index] - seeds * chance) < 5 * sd


def test_two_draws_are_successive_without_replacement():
    # diff 4, 2, 1: the pair without the last one is (4/7)(2/3) + (2/7)(4/5)
    seeds = 4200
    chance = 4 / 7 * 2 / 3 + 2 / 7 * 4 / 5
    pairs = Counter(tuple(drawn([0.25, 0.5, 1.0], 2, seed)) for seed in range(seeds))
    assert abs(pairs[0, 1] - seeds * chance) < 5 * math.sqrt(seeds * chance * (1 - chance))


def test_the_order_of_the_samples_does_not_matter():
    rewards = [i % 9 / 8 for i in range(50)]
    samples = [sample(str(i)) for i in range(50)]
    straight = retrospective_sample(samples, rewards, 20, 3)
    turned = retrospective_sample(samples[::-1], rewards[::-1], 20, 3)
    assert straight == turned[::-1]
    assert straight != retrospective_sample(samples, rewards, 20, 4)


def test_all_and_none():
    assert drawn([0.0, 1.0], 2, 0) == [0, 1]
    assert drawn([0.0, 1.0], 0, 0) == []
    assert drawn([], 0, 0) == []


@pytest.mark.parametrize("n", [-1, 3])
def test_more_than_there_are(n):
    with pytest.raises(ValueError, match=f"n is {n}; there are 2"):
        drawn([0.0, 1.0], n, 0)


def test_two_samples_with_one_id():
    with pytest.raises(ValueError, match="same id"):
        retrospective_sample([sample("a"), sample("a")], [0.0, 1.0], 1, 0)
