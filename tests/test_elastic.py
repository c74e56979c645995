"""The elastic score: subsets counted by hand, intervals against the population that they are drawn from."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from copra_fl.probes.elastic import SubsetScores, layer_score, mean_over_subsets, rank_score, subsets
from copra_fl.seeding import generator


def test_few_subsets_are_all_of_them() -> None:
    rows = subsets(4, 2, 6, generator(0, "elastic"))
    assert {tuple(np.flatnonzero(row)) for row in rows} == set(combinations(range(4), 2)) and len(rows) == 6


def test_many_subsets_are_a_sample_of_distinct_ones() -> None:
    first, again, other = (subsets(12, 3, 32, generator(seed, "elastic")) for seed in (0, 0, 1))
    assert first.shape == (32, 12) and (first.sum(1) == 3).all()
    assert len({tuple(row) for row in first}) == 32
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.any(0).all(), "every layer is in some subset"


def test_the_interval_is_students_and_shrinks_with_the_share_of_subsets() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.6])
    mean = mean_over_subsets(values.tolist(), 20)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert mean.value == pytest.approx(0.325)
    assert 2 * mean.half_width == pytest.approx((high - low) * math.sqrt(16 / 20))
    assert mean_over_subsets(values.tolist(), 4).half_width == 0
    assert math.isnan(mean_over_subsets([0.1, math.nan], 20).value)


def test_the_interval_covers_the_mean_of_all_subsets() -> None:
    """20 of 84 skewed values, 400 samples: about 95 % of the intervals have the mean of all 84 in them."""
    rng = np.random.default_rng(0)
    population = rng.exponential(size=84)
    means = [mean_over_subsets(rng.choice(population, 20, replace=False).tolist(), 84) for _ in range(400)]
    covered = [abs(mean.value - population.mean()) <= mean.half_width for mean in means]
    assert 0.9 < np.mean(covered) < 0.98


def test_scores_by_hand() -> None:
    """Of three layers, 1, 3/4, 1/2 and 1/4 are 3, 2, 2 and 1 layers; of rank 8, they are 8, 6, 4 and 2 components."""
    scores = [
        SubsetScores(3, 3, {"accuracy": [0.8]}),
        SubsetScores(2, 3, {"accuracy": [0.5, 0.7]}),
        SubsetScores(1, 3, {"accuracy": [0.1, 0.2, 0.3]}),
    ]
    score = layer_score(scores, "accuracy")
    assert score.value == pytest.approx((0.8 + 0.6 + 0.6 + 0.2) / 4)
    half = stats.t.ppf(0.975, 1) * 0.1 * math.sqrt(1 / 3)  # 2 of the 3 subsets of two layers were evaluated
    assert score.half_width == pytest.approx(2 * half / 4)
    assert rank_score({8: 0.8, 6: 0.7, 4: 0.4, 2: 0.1, 1: 9.0}, 8) == pytest.approx(0.5)
