"""Intervals and slopes: the few statistics behind every number that is reported.

All intervals are 95%. Items that are not independent (units of one document,
crops of one speaker) are never resampled one by one: the bootstrap draws whole groups.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value with its interval; `low` and `high` are None where fewer than two groups exist."""

    value: float
    low: float | None
    high: float | None
    n: int


class Slope(NamedTuple):
    """A fitted straight line: change of y per unit of x, its interval, and the value at x = 0."""

    value: float
    low: float
    high: float
    intercept: float
    n: int


def bootstrap_ratio(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Mean over all units, sum(sums) / sum(counts), with a bootstrap interval over groups.

    Percentiles of few groups are too narrow, so they are the expanded ones of Hesterberg (2015),
    which agree with Student's t for a plain mean.

    Args:
        sums: [G] sum of the quantity in each group (document); may be a paired difference.
        counts: [G] number of units in each group; groups without units are dropped.
        seed: of the resampling; the same input and seed give the same interval.
        resamples: bootstrap draws.

    Returns:
        Interval over the groups. `n` is the number of groups.

    Raises:
        ValueError: there is no unit at all.
    """
    sums = np.asarray(sums, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        raise ValueError("a mean needs at least one unit")
    value = float(sums.sum() / counts.sum())
    groups = len(counts)
    if groups < 2:
        return Interval(value, None, None, groups)
    # Drawing groups with replacement is drawing multinomial weights for them.
    weights = np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=resamples
    )
    means = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(means, expanded_tails(groups))
    return Interval(value, float(low), float(high), groups)


def grouped_mean(values: np.ndarray, groups: list[str], *, seed: int = 0) -> Interval:
    """Mean of values [N] with a bootstrap over their groups (document or speaker names, [N])."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    return bootstrap_ratio(sums, np.bincount(index), seed=seed)


def jackknife_statistic(
    histograms: np.ndarray, statistic: Callable[[np.ndarray], float]
) -> Interval:
    """A function of pooled counts (an entropy, a share), with an interval over groups.

    The standard error is the jackknife's, from leaving out one group at a time, with Student's t.
    A bootstrap would not do: counts of resampled groups are less even than the whole, so their
    entropies are biased low.

    Args:
        histograms: [G, V] counts of each group.
        statistic: function [V] -> float of the pooled counts.
    """
    histograms = np.asarray(histograms, dtype=np.float64)
    groups = len(histograms)
    pooled = histograms.sum(0)
    value = float(statistic(pooled))
    if groups < 2:
        return Interval(value, None, None, groups)
    others = np.array([statistic(pooled - row) for row in histograms])
    error = np.sqrt((groups - 1) / groups * np.square(others - others.mean()).sum())
    margin = student_quantile(groups - 1) * float(error)
    return Interval(value, value - margin, value + margin, groups)


def expanded_tails(groups: int) -> tuple[float, float]:
    """Quantile levels of a 95% bootstrap interval over so many groups.

    Phi(-t sqrt(n / (n - 1))) on either side, t the quantile of Student's t with n - 1 degrees of
    freedom (Hesterberg 2015, "What teachers should know about the bootstrap", section 4.3):
    0.025 for many groups, less for few.
    """
    reach = student_quantile(groups - 1) * math.sqrt(groups / (groups - 1))
    tail = 0.5 * math.erfc(reach / math.sqrt(2))
    return tail, 1 - tail


def fit_slope(x: np.ndarray, y: np.ndarray) -> Slope:
    """Least-squares slope of y [N] against x [N] with a 95% interval that allows for drift.

    Memory readings of neighbouring windows are not independent, so the standard error is Newey and
    West's (1987): Bartlett weights over floor(4 (N / 100)^(2/9)) lags, times N / (N - 2), with
    Student's t for the interval.

    Raises:
        ValueError: fewer than 5 points, or all x equal.
    """
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    n = len(x)
    if n < 5 or np.ptp(x) == 0:
        raise ValueError("a slope needs at least 5 points at different places")
    centred = x - x.mean()
    spread = centred @ centred
    slope = float(centred @ (y - y.mean()) / spread)
    residual = y - y.mean() - slope * centred
    score = centred * residual
    lags = int(4 * (n / 100) ** (2 / 9))
    variance = score @ score
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (score[lag:] @ score[:-lag])
    error = float(np.sqrt(max(variance, 0.0) * n / (n - 2)) / spread)
    margin = student_quantile(n - 2) * error
    return Slope(slope, slope - margin, slope + margin, float(y.mean() - slope * x.mean()), n)


def student_quantile(degrees: int) -> float:
    """97.5% quantile of Student's t by Cornish and Fisher's expansion (below 1% off from 5 up)."""
    z = 1.959963985
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by counts [V] (plug-in estimate, biased low)."""
    counts = np.asarray(counts, dtype=np.float64)
    probabilities = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(probabilities * np.log(probabilities)).sum()))  # and never -0.0
