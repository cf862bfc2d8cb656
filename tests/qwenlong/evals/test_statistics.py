"""Intervals against published numbers, hand-made cases and simulated coverage."""

import math

import numpy as np
import pytest

from qwenlong.evals.statistics import difference, estimate, wilson


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_against_published_intervals(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=6e-5)


def test_one_sample_a_question_is_wilson_with_one_question_less():
    got = estimate([[1.0]] * 8 + [[0.0]] * 2)
    assert (got.mean, got.questions, got.samples) == (0.8, 10, 10)
    assert (got.low, got.high) == pytest.approx(wilson(0.8, 9))


def test_samples_of_a_question_that_agree_count_as_one():
    once, often = estimate([[1.0], [0.0], [1.0]]), estimate([[1.0] * 50, [0.0] * 50, [1.0] * 50])
    assert (once.low, once.high) == pytest.approx((often.low, often.high))


def test_samples_that_differ_within_questions_narrow_the_interval():
    scores = [[1.0, 0.0, 1.0, 1.0]] * 6 + [[0.0, 1.0, 1.0, 0.0]] * 4
    got = estimate(scores)
    assert got.mean == pytest.approx(0.65)
    assert got.high - got.low < estimate([[1.0]] * 6 + [[0.0]] * 4).high - got.low
    # n_eff = p (1 - p) / (s² / n) = 0.2275 / (1 / 600) = 136.5, bounded by the 40 samples
    assert (got.low, got.high) == pytest.approx(wilson(0.65, 40))


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_wrong_or_all_right_leaves_room(score):
    got = estimate([[score, score]] * 20)
    assert got.mean == score
    assert (got.low == 0.0 and 0.1 < got.high < 0.2) or (got.high == 1.0 and 0.8 < got.low < 0.9)


def test_equal_scores_between_use_the_questions():
    got = estimate([[0.5]] * 20)
    assert (got.low, got.high) == pytest.approx(wilson(0.5, 20))


def test_one_question_says_little():
    got = estimate([[1.0, 1.0, 1.0]])
    assert got.low < 0.25 and got.high == 1.0


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], []], [[1.1]], [[-0.1]], [[math.nan]]])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(ValueError, match="estimate:"):
        estimate(scores)


@pytest.mark.parametrize("alpha, beta", [(2.0, 2.0), (0.3, 0.3), (9.0, 1.0)])
@pytest.mark.parametrize("n, k", [(20, 4), (100, 1)])
def test_coverage_of_clustered_samples(alpha, beta, n, k):
    """Questions of different difficulty (a beta distribution), k samples each: 95 % must hold."""
    rng = np.random.default_rng(0)
    truth, covered, rounds = alpha / (alpha + beta), 0, 600
    for _ in range(rounds):
        scores = (rng.random((n, k)) < rng.beta(alpha, beta, size=(n, 1))).astype(float)
        got = estimate(scores.tolist())
        covered += got.low <= truth <= got.high
    assert covered / rounds > 0.925


def test_paired_difference_by_hand():
    first = {"a": [1.0, 1.0], "b": [0.0], "c": [1.0], "only": [1.0]}
    second = {"a": [0.0], "b": [0.0, 0.0], "c": [1.0], "other": [0.0]}
    got = difference(first, second)
    assert got.mean == pytest.approx(1 / 3) and got.questions == 3
    one, two = estimate([[1.0, 1.0], [0.0], [1.0]]), estimate([[0.0], [0.0, 0.0], [1.0]])
    # question means (1, 0, 1) and (0, 0, 1): r = (1 / 9) / (2 / 9) = 1 / 2
    a, b = one.mean - one.low, two.high - two.mean
    assert got.low == pytest.approx(got.mean - math.sqrt(a * a - a * b + b * b))
    back = difference(second, first)
    assert (back.mean, back.low, back.high) == pytest.approx((-got.mean, -got.high, -got.low))
    assert -1 <= got.low <= got.high <= 1


def test_a_difference_of_runs_that_are_all_wrong_leaves_room():
    zeros = {str(i): [0.0] for i in range(20)}
    got = difference(zeros, zeros)
    assert got.mean == 0 and got.high == -got.low == pytest.approx(wilson(0.0, 20)[1])


def test_equal_runs_that_vary_differ_by_exactly_nothing():
    run = {str(i): [float(i % 2)] for i in range(20)}
    got = difference(run, run)
    assert (got.mean, got.low, got.high) == pytest.approx((0, 0, 0), abs=1e-7)


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_coverage_of_the_difference(shared):
    """Two runs that are right on 60 and 40 % of questions, alike on a share of them."""
    rng = np.random.default_rng(2)
    covered, rounds, n = 0, 500, 50
    for _ in range(rounds):
        base = rng.random(n)
        other = np.where(rng.random(n) < shared, base, rng.random(n))
        first = {str(i): [float(x < 0.6)] for i, x in enumerate(base)}
        second = {str(i): [float(x < 0.4)] for i, x in enumerate(other)}
        got = difference(first, second)
        covered += got.low <= 0.2 <= got.high
    assert covered / rounds > 0.925


def test_paired_difference_is_narrower_than_apart():
    rng = np.random.default_rng(1)
    base = rng.random(100) < 0.5
    first = {str(i): [float(x)] for i, x in enumerate(base)}
    second = {str(i): [float(x and i % 5 > 0)] for i, x in enumerate(base)}
    got, apart = difference(first, second), estimate(list(first.values()))
    assert got.low > 0 and got.high - got.low < 0.75 * (apart.high - apart.low)


def test_runs_without_a_shared_question_are_refused():
    with pytest.raises(ValueError, match="share no question"):
        difference({"a": [1.0]}, {"b": [1.0]})
