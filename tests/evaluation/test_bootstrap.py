"""Intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.evaluation.bootstrap import generator, mean_interval, normal_interval, share_interval


def coverage(draw: object, truth: float, trials: int = 200) -> float:
    intervals = [mean_interval(*draw(generator(s)), seed=s, replicates=400) for s in range(trials)]  # type: ignore[operator]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_means_are_covered() -> None:
    assert 0.91 <= coverage(lambda rng: (rng.exponential(2.0, 100),), 2.0) <= 0.98


def test_shares_are_covered() -> None:
    assert 0.91 <= coverage(lambda rng: ((rng.random(120) < 0.3) * 1.0,), 0.3) <= 0.98


def grouped(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Forty things, five pictures of each, and nearly all that varies is the thing."""
    return np.repeat(rng.normal(size=40), 5) + 0.1 * rng.normal(size=200), list(np.repeat(range(40), 5))


def test_groups_are_drawn_whole() -> None:
    assert 0.9 <= coverage(grouped, 0.0) <= 0.98
    assert coverage(lambda rng: (grouped(rng)[0],), 0.0) < 0.75  # and it matters


def test_none_or_all_has_a_width() -> None:
    none, all_ = mean_interval(np.zeros(60)), mean_interval(np.ones(60))
    assert none.low == 0
    assert 0.03 < none.high < 0.1
    assert all_.high == 1
    assert all_.low == pytest.approx(1 - none.high)


def test_wilson_is_the_published_example() -> None:
    low, high = share_interval(15, 148)  # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 15/148
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)


def test_normal_interval() -> None:
    low, high = normal_interval(1.0, 2.0)
    assert (low, high) == (pytest.approx(1 - 3.91993), pytest.approx(1 + 3.91993))


def test_same_values_same_bits() -> None:
    values = generator(0).normal(size=50)
    assert mean_interval(values) == mean_interval(values)
