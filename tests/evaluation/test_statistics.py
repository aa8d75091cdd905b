"""Intervals cover the truth as often as they say, and slopes find what was put in."""

import numpy as np
import pytest

from speechssm.evaluation.statistics import (
    bootstrap_ratio,
    entropy,
    fit_slope,
    grouped_mean,
    jackknife_statistic,
    student_quantile,
)


def test_bootstrap_intervals_cover_the_true_mean_about_95_times_in_100():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        counts = generator.integers(50, 400, size=40)
        # Units of a document share an offset: an interval over units would be far too narrow.
        means = 2.0 + generator.normal(0, 0.5, size=40)
        interval = bootstrap_ratio(means * counts, counts, seed=trial, resamples=400)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.99


def test_intervals_over_six_documents_cover_too():
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(400):
        means = generator.normal(2.0, 0.5, size=6)
        interval = bootstrap_ratio(means, np.ones(6), seed=trial, resamples=1000)
        hits += interval.low <= 2.0 <= interval.high
    # Plain percentiles cover 0.85.
    assert 0.91 <= hits / 400 <= 0.99


def test_bootstrap_weighs_groups_by_their_size():
    interval = bootstrap_ratio(np.array([10.0, 0.0]), np.array([1, 9]))
    assert interval.value == 1.0 and interval.n == 2


def test_one_group_has_no_interval_and_none_is_an_error():
    interval = bootstrap_ratio(np.array([3.0, 0.0]), np.array([2, 0]))
    assert interval == (1.5, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_ratio(np.array([0.0]), np.array([0]))


def test_the_same_seed_gives_the_same_interval():
    sums, counts = np.arange(10.0), np.full(10, 3)
    assert bootstrap_ratio(sums, counts, seed=3) == bootstrap_ratio(sums, counts, seed=3)
    assert bootstrap_ratio(sums, counts, seed=3) != bootstrap_ratio(sums, counts, seed=4)


def test_grouped_mean_resamples_whole_groups():
    values = np.array([1.0] * 50 + [3.0] * 50)
    two = grouped_mean(values, ["a"] * 50 + ["b"] * 50)
    many = grouped_mean(values, [str(index) for index in range(100)])
    assert two.value == many.value == 2.0
    assert two.high - two.low == 2.0 and many.high - many.low < 1.0


def test_entropy_intervals_over_documents_cover_the_true_entropy():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        # Documents differ in what they use; many of them together are uniform over 8 units.
        documents = generator.dirichlet(np.full(8, 5.0), size=60)
        histograms = np.array([generator.multinomial(400, row) for row in documents])
        interval = jackknife_statistic(histograms, entropy)
        hits += interval.low <= np.log(8) <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_document_has_no_entropy_interval():
    assert jackknife_statistic(np.ones((1, 4)), entropy) == (np.log(4), None, None, 1)


def test_slope_of_a_noisy_line_is_found():
    x = np.arange(200.0)
    y = 3.0 + 0.5 * x + np.random.default_rng(0).normal(0, 2, 200)
    slope = fit_slope(x, y)
    assert slope.low < 0.5 < slope.high and slope.high - slope.low < 0.03
    assert slope.intercept == pytest.approx(3.0, abs=1.0)


def test_flat_noise_has_no_slope_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        slope = fit_slope(np.arange(60.0), generator.normal(0, 1, 60))
        hits += slope.low <= 0 <= slope.high
    assert 0.88 <= hits / 400 <= 0.99


def test_drifting_noise_gets_a_wider_interval_than_independent_noise():
    generator = np.random.default_rng(2)
    independent = generator.normal(0, 1, 400)
    drifting = np.convolve(generator.normal(0, 1, 409), np.ones(10) / 10**0.5, "valid")
    widths = [
        fit_slope(np.arange(400.0), noise).high - fit_slope(np.arange(400.0), noise).low
        for noise in (independent, drifting)
    ]
    assert widths[1] > 1.5 * widths[0]


def test_an_exact_line_and_a_constant_have_intervals_of_no_width():
    assert fit_slope(np.arange(10.0), 2 * np.arange(10.0))[:3] == pytest.approx((2, 2, 2))
    assert fit_slope(np.arange(10.0), np.full(10, 7.0))[:3] == (0, 0, 0)


@pytest.mark.parametrize("x", [np.arange(4.0), np.ones(9)])
def test_too_few_points_have_no_slope(x):
    with pytest.raises(ValueError, match="at least 5"):
        fit_slope(x, x)


def test_student_quantiles_are_those_of_the_tables():
    for degrees, value in ((5, 2.571), (10, 2.228), (58, 2.002), (1000, 1.962)):
        assert student_quantile(degrees) == pytest.approx(value, rel=0.003)


def test_entropy_of_known_distributions():
    assert entropy(np.full(8, 3)) == pytest.approx(np.log(8))
    assert entropy(np.array([5, 0, 0])) == 0
