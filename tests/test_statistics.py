"""Statistics against scipy and formulas written out here."""

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvbench import KVBenchError
from kvbench.statistics import holm, paired_difference


def scores(values, seed=42):
    return {seed: {f"task/{i}": float(v) for i, v in enumerate(values)}}


def test_binary_scores_get_mcnemars_exact_test():
    a = [1] * 20 + [0] * 9 + [1] * 2 + [0] * 9
    b = [1] * 20 + [1] * 9 + [0] * 2 + [0] * 9
    found = paired_difference(scores(a), scores(b))
    assert (found.n, found.wins, found.losses, found.ties, found.test) == (40, 9, 2, 29, "mcnemar")
    # Two-sided binomial probability of at most 2 of 11 discordant pairs, doubled: the distribution is symmetric.
    assert found.p_value == pytest.approx(2 * sum(comb(11, k) for k in range(3)) / 2**11)
    assert found.difference == pytest.approx(7 / 40)
    assert (found.mean_a, found.mean_b) == pytest.approx((22 / 40, 29 / 40))


def test_other_scores_get_the_exact_permutation_test_of_the_mean():
    a, b = [0.2, 0.4, 0.9, 0.5, 0.3, 0.1], [0.5, 0.3, 1.0, 0.9, 0.8, 0.4]
    found = paired_difference(scores(a), scores(b))
    difference = np.subtract(b, a)
    flipped = [np.mean(difference * signs) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean(np.abs(flipped) >= abs(difference.mean()) - 1e-12)
    assert (found.test, found.p_value) == ("permutation", pytest.approx(expected))


def test_the_interval_is_the_bca_bootstrap_of_the_paired_differences():
    rng = np.random.default_rng(5)
    a = rng.uniform(0, 0.8, 60)
    b = a + rng.normal(0.1, 0.05, 60).clip(0, 0.2)
    found = paired_difference(scores(a), scores(b))
    reference = stats.bootstrap((b - a,), np.mean, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    assert found.ci95 == pytest.approx(tuple(reference), abs=2e-3)
    # Pairing matters: the unpaired interval of the same means is several times wider.
    apart = stats.bootstrap(
        (a, b), lambda x, y, axis: y.mean(axis) - x.mean(axis), vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (apart.high - apart.low) > 4 * (found.ci95[1] - found.ci95[0])


def test_the_interval_covers_the_true_difference():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        a = (rng.random(80) < 0.6).astype(float)
        b = np.where(rng.random(80) < 0.25, 1 - a, a)  # true difference 0.25 * (0.4 - 0.6)
        low, high = paired_difference(scores(a), scores(b)).ci95
        hits += low <= -0.05 <= high
    assert 88 <= hits <= 100


@pytest.mark.parametrize(("a", "b", "value"), [([1] * 5, [1] * 5, 0.0), ([0] * 5, [1] * 5, 1.0), ([0.5], [0.75], 0.25)])
def test_equal_differences_still_leave_room_for_the_examples_not_seen(a, b, value):
    found = paired_difference(scores(a), scores(b))
    unseen = 1 - 0.025 ** (1 / len(a))  # Clopper-Pearson's upper bound for none of n
    assert found.ci95 == pytest.approx((value - unseen * (1 + value), value + unseen * (1 - value)))
    assert -1 <= found.ci95[0] <= value <= found.ci95[1] <= 1
    assert found.p_value == (1.0 if value != 1.0 else pytest.approx(2 / 2**5))


def test_scores_are_matched_by_example_and_seed_whatever_their_order():
    a = {1: {"x": 0.0, "y": 1.0, "z": 1.0}, 2: {"x": 1.0}}
    b = {1: {"z": 0.0, "w": 1.0, "y": 1.0, "x": 1.0}}
    found = paired_difference(a, b)
    assert (found.pairs, found.unpaired, found.difference) == (3, 2, 0.0)
    assert (found.wins, found.losses, found.ties) == (1, 1, 1)
    with pytest.raises(KVBenchError, match="no example and seed in common"):
        paired_difference({1: {"x": 1.0}}, {2: {"x": 1.0}})


def test_seeds_with_examples_of_their_own_are_pooled_and_shown_apart():
    a = {1: {"1/x": 0.0, "1/y": 1.0}, 2: {"2/x": 1.0, "2/y": 1.0}}
    b = {1: {"1/x": 1.0, "1/y": 1.0}, 2: {"2/x": 1.0, "2/y": 0.0}}
    found = paired_difference(a, b)
    assert (found.n, found.by_seed, found.test) == (4, {1: 0.5, 2: -0.5}, "mcnemar")
    assert found.seed_std == pytest.approx(np.std([0.5, -0.5], ddof=1))


def test_an_example_repeated_under_several_seeds_is_one_observation():
    one = paired_difference(scores([0, 1, 1, 0, 1, 0], 1), scores([1, 1, 1, 1, 1, 0], 1))
    values = {"a": [0, 1, 1, 0, 1, 0], "b": [1, 1, 1, 1, 1, 0]}
    sides = [{seed: scores(values[side])[42] for seed in (1, 2, 3)} for side in "ab"]
    three = paired_difference(*sides)
    assert three.pairs == 3 * one.pairs
    # Repetition adds no evidence: interval and p-value stay as they were.
    assert (three.n, three.ci95, three.p_value) == (one.n, one.ci95, one.p_value)


def test_holm_steps_down():
    # Written out for four: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, p * len(p_values)) + 1e-12
    # Rejections at a level are those of the procedure as published: the smallest ones, until the first that fails.
    level, rejected = 0.05, set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    assert {i for i, q in enumerate(adjusted) if q <= level} == rejected
