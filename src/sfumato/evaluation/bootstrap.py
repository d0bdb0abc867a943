"""Intervals by the bootstrap: what would the figure be, had other pictures been drawn?

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 (groups) and 13 (percentiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Array = NDArray[np.float64]
REPLICATES = 2000


class Interval(NamedTuple):
    """Where a figure lies with 95 % confidence, unless another level was asked for."""

    low: float
    high: float


def generator(seed: int) -> np.random.Generator:
    """Return the random numbers of a seed, the same on every machine."""
    return np.random.Generator(np.random.Philox(key=seed))


def mean_interval(
    values: Array,
    groups: Sequence[object] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """Return the percentile interval of the mean of values (N,).

    Args:
        values: one number per picture.
        groups: what each picture shows, (N,): pictures of one thing are alike, so whole groups are drawn.
        level: confidence.
        seed: of the draws.
        replicates: number of draws.
    """
    values = np.asarray(values, np.float64)
    labels = (
        np.arange(len(values))
        if groups is None
        else np.unique(np.array([str(g) for g in groups]), return_inverse=True)[1]
    )
    sums, sizes = np.bincount(labels, values), np.bincount(labels)
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        return share_interval(len(sums) if values[0] else 0, len(sums), level)  # all, or none
    drawn = generator(seed).integers(0, len(sums), (replicates, len(sums)))  # (R, G)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def share_interval(hits: int, n: int, level: float = 0.95) -> Interval:
    """Return Wilson's interval of a share (JASA 22, 1927): the bootstrap has no width where all or none are hits."""
    z, p = float(ndtri((1 + level) / 2)), hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(float(centre - half) if hits else 0.0, float(centre + half) if hits < n else 1.0)


def normal_interval(value: float, deviation: float, level: float = 0.95) -> Interval:
    """Return value ± z · standard error."""
    half = float(ndtri((1 + level) / 2)) * deviation
    return Interval(value - half, value + half)
