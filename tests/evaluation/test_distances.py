"""Distances against closed forms, brute force and the formulas of the published codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sfumato.errors import BadRequest
from sfumato.evaluation.bootstrap import generator, normal_interval
from sfumato.evaluation.distances import (
    Moments,
    frechet_deviation,
    frechet_distance,
    kid,
    moments,
    precision_recall,
    squared_distances,
)
from sfumato.evaluation.judge import retrieval_ranks


def gaussian(n: int, d: int, seed: int, mean: float = 0.0) -> np.ndarray:
    """Correlated normal features."""
    mix = generator(99).normal(size=(d, d)) / math.sqrt(d)
    return generator(seed).normal(size=(n, d)) @ mix + mean


# ── Fréchet distance ───────────────────────────────────────────────────────────────────────────────────


def test_frechet_is_the_closed_form_for_commuting_covariances() -> None:
    rng = generator(0)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    s, t, mu, nu = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5), rng.normal(size=5), rng.normal(size=5)
    a, b = Moments(9, mu, np.diag(s) @ rotation.T), Moments(9, nu, np.diag(t) @ rotation.T)
    want = ((mu - nu) ** 2).sum() + ((s - t) ** 2).sum()  # |μ − ν|² + Σ (s − t)²
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-12)


def test_frechet_in_one_dimension() -> None:
    x, y = generator(1).normal(1, 2, (50, 1)), generator(2).normal(-1, 3, (70, 1))
    want = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(want), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (40, 60)])  # full and deficient rank
def test_frechet_is_the_usual_formula(n: int, d: int) -> None:
    """The formula of the FID codes, by SciPy's matrix square root and by eigenvalues (torch-fidelity)."""
    x, y = gaussian(n, d, 1), gaussian(n + 5, d, 2, mean=0.3)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    by_eigenvalues = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    got = frechet_distance(moments(x), moments(y))
    assert got == pytest.approx(apart + np.trace(a) + np.trace(b) - 2 * by_eigenvalues, rel=1e-5)
    if n > d:
        root = sqrtm(a @ b)
        assert got == pytest.approx(apart + np.trace(a + b - 2 * np.real(root)), rel=1e-8)


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    for n, d in ((100, 8), (20, 50)):
        m = moments(gaussian(n, d, 3))
        assert frechet_distance(m, m) == pytest.approx(0, abs=1e-10)


def test_frechet_is_symmetric_and_ignores_order() -> None:
    x, y = gaussian(60, 9, 1), gaussian(50, 9, 2)
    value = frechet_distance(moments(x), moments(y))
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(moments(x[::-1]), moments(y)) == pytest.approx(value, rel=1e-10)


def test_frechet_intervals_cover() -> None:
    """Of 95 % intervals about 95 % hold the value that sets of this size have on average."""
    reference = moments(gaussian(500, 4, 1000, mean=0.5))
    values, deviations = [], []
    for seed in range(120):
        x = gaussian(120, 4, seed)
        values.append(frechet_distance(moments(x), reference))
        deviations.append(frechet_deviation(x, reference, replicates=60, seed=seed))
    intervals = [normal_interval(v, s) for v, s in zip(values, deviations, strict=True)]
    covered = np.mean([low <= np.mean(values) <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.99
    assert np.mean(deviations) == pytest.approx(np.std(values), rel=0.2)


# ── KID ────────────────────────────────────────────────────────────────────────────────────────────────


def brute_force_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_brute_force_sum() -> None:
    x, y = gaussian(17, 5, 1), gaussian(13, 5, 2, mean=0.4)
    assert kid(x, y).value == pytest.approx(brute_force_mmd(x, y), rel=1e-10)


def test_kid_error_is_the_brute_force_jackknife() -> None:
    x, y = gaussian(9, 3, 1), gaussian(7, 3, 2, mean=0.4)
    without_x = [brute_force_mmd(np.delete(x, i, 0), y) for i in range(len(x))]
    without_y = [brute_force_mmd(x, np.delete(y, i, 0)) for i in range(len(y))]
    want = (len(x) - 1) * np.var(without_x) + (len(y) - 1) * np.var(without_y)
    assert kid(x, y).error == pytest.approx(math.sqrt(want), rel=1e-8)


def test_kid_subsets_are_the_published_code() -> None:
    """With subsets of one half drawn by our generator, mean and deviation are Bińkowski's."""
    x, y = gaussian(40, 6, 1), gaussian(50, 6, 2, mean=0.2)
    k, rng, values = kid(x, y, subsets=8, seed=3), generator(3), []
    for _ in range(8):
        a, b = x[rng.choice(40, 20, replace=False)], y[rng.choice(50, 20, replace=False)]
        values.append(brute_force_mmd(a, b))
    assert (k.subset_size, k.subsets) == (20, 8)
    assert k.subset_mean == pytest.approx(np.mean(values), rel=1e-9)
    assert k.subset_deviation == pytest.approx(np.std(values), rel=1e-9)


def test_kid_is_unbiased_for_equal_distributions() -> None:
    found = [kid(gaussian(60, 8, 2 * s), gaussian(60, 8, 2 * s + 1), subsets=1) for s in range(200)]
    values = np.array([k.value for k in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean(values < 0) > 0.3  # an unbiased estimate of zero is often below it
    intervals = [normal_interval(k.value, k.error) for k in found]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= 0.93


def test_kid_intervals_cover_for_different_distributions() -> None:
    found = [kid(gaussian(100, 4, 2 * s), gaussian(100, 4, 2 * s + 1, mean=0.5), subsets=1) for s in range(200)]
    mean = np.mean([k.value for k in found])
    intervals = [normal_interval(k.value, k.error) for k in found]
    assert 0.89 <= np.mean([low <= mean <= high for low, high in intervals]) <= 0.99


# ── precision and recall ───────────────────────────────────────────────────────────────────────────────


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    left, right = generator(1).normal(0, 1, (200, 2)), generator(2).normal(50, 1, (200, 2))
    precision, recall = precision_recall(generator(3).normal(0, 0.5, (200, 2)), np.concatenate([left, right]))
    assert precision.mean() > 0.97
    assert 0.35 < recall.mean() <= 0.5
    assert recall[200:].sum() == 0


def test_far_away_is_neither() -> None:
    x, y = gaussian(30, 3, 1), gaussian(30, 3, 2, mean=1000)
    assert [v.mean() for v in precision_recall(x, y)] == [0, 0]
    assert [v.mean() for v in precision_recall(y, y)] == [1, 1]


def test_precision_by_hand() -> None:
    """Reference on a line at 0, 1, 2, 10: with k = 1 the radii are 1, 1, 1, 8."""
    y = np.array([[0.0], [1], [2], [10]])
    x = np.array([[-1.5], [-0.5], [2.5], [17.9], [18.1]])
    precision, recall = precision_recall(x, y, k=1)
    assert precision.tolist() == [0, 1, 1, 1, 0]
    assert recall.tolist() == [1, 1, 1, 0]  # radii of x: 1, 1, 3, 0.2, 0.2


def test_squared_distances() -> None:
    x, y = gaussian(5, 7, 1, mean=100), gaussian(6, 7, 2, mean=100)
    want = ((x[:, None] - y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(x, y), want, rtol=1e-10)


# ── bad input, same again ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", [lambda x, y: moments(x), kid, precision_recall])
def test_too_few_pictures(measure: object) -> None:
    with pytest.raises(BadRequest, match="needs at least"):
        measure(np.zeros((1, 4)), np.zeros((9, 4)))  # type: ignore[operator]
    with pytest.raises(BadRequest, match="not finite"):
        measure(np.full((9, 4), np.nan), np.zeros((9, 4)))  # type: ignore[operator]
    with pytest.raises(BadRequest, match="of shape"):
        measure(np.zeros(9), np.zeros(9))  # type: ignore[operator]


def test_same_features_same_bits() -> None:
    x, y = gaussian(80, 20, 1), gaussian(80, 20, 2)
    assert kid(x, y) == kid(x, y)
    assert frechet_distance(moments(x), moments(y)) == frechet_distance(moments(x), moments(y))
    assert frechet_deviation(x, moments(y), replicates=5) == frechet_deviation(x, moments(y), replicates=5)


def test_ranks_count_what_is_at_least_as_near_and_nothing_is_won_by_ties_or_nan():
    near = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.9, 0.1], [math.nan, 0.5, 0.1], [0.9, math.nan, 0.1]])
    assert retrieval_ranks(near, [0, 0, 0, 0]).tolist() == [0, 1, 2, 1]
    assert retrieval_ranks(near, [2, 2, 2, 2]).tolist() == [2, 2, 2, 2]
