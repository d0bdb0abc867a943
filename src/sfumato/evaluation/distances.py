"""How far two sets of pictures lie apart, by their features: x of the generated, y of the reference; float64.

Shapes: N generated and M reference pictures, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sfumato.errors import BadRequest
from sfumato.evaluation.bootstrap import Array, generator


def _features(values: ArrayLike, at_least: int, what: str) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 2:
        raise BadRequest(f"{what} needs features of shape (N, D), not {array.shape}")
    if len(array) < at_least:
        raise BadRequest(f"{what} needs at least {at_least} pictures on either side, not {len(array)}")
    if not np.isfinite(array).all():
        raise BadRequest(f"{what}: features are not finite")
    return array


# ── Fréchet distance ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and covariance factorᵀ · factor of N features; factor is (min(N, D), D)."""

    n: int
    mean: Array
    factor: Array


def moments(features: ArrayLike) -> Moments:
    """Return mean and unbiased covariance, the latter as a factor; raises BadRequest for fewer than 2 pictures."""
    x = _features(features, 2, "the Fréchet distance")
    n, d = x.shape
    mean = x.mean(0)
    centred = (x - mean) / math.sqrt(n - 1)
    return Moments(n, mean, np.asarray(np.linalg.qr(centred, mode="r")) if n > d else centred)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |μa − μb|² + tr(A + B − 2·(A·B)^½), the squared Wasserstein-2 distance of two Gaussians.

    With A = FᵀF and B = GᵀG, the eigenvalues of A·B are the squared singular values of F·Gᵀ, so that
    tr (A·B)^½ is their sum: no matrix square root, no complex numbers, and singular covariances are harmless.
    Biased upwards by about tr(A)·D/N: compare only at equal N.
    Source: Heusel et al. (1706.08500), eq. 6; Dowson and Landau, J. Multivariate Anal. 12 (1982).
    """
    apart = a.mean - b.mean
    spread = (a.factor**2).sum() + (b.factor**2).sum()
    return float(max(0.0, apart @ apart + spread - 2 * np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()))


def frechet_deviation(features: ArrayLike, reference: Moments, *, replicates: int = 100, seed: int = 0) -> float:
    """Return the bootstrap's standard error of the Fréchet distance of features (N, D), the reference held fixed.

    The draws' own mean is no estimate: a resampled set has fewer different pictures, and so a larger bias.
    """
    x = _features(features, 2, "the Fréchet distance")
    n, rng = len(x), generator(seed)
    across, norms = x @ reference.factor.T, (x**2).sum(1)  # (N, r), (N,)
    fixed = (reference.factor**2).sum()
    found = np.empty(replicates)
    for i in range(replicates):
        w = rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64)
        mean, apart = w @ x / n, w @ x / n - reference.mean
        spread = (w @ norms - n * (mean @ mean)) / (n - 1)
        some = w > 0
        f = np.sqrt(w[some, None] / (n - 1)) * (across[some] - w @ across / n)  # F·Gᵀ of this draw
        gram = f @ f.T if len(f) < f.shape[1] else f.T @ f
        found[i] = apart @ apart + spread + fixed - 2 * np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(found.std(ddof=1))


# ── kernel distance ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Kid:
    """The kernel distance, its standard error, and mean and deviation over subsets as other tools report them."""

    value: float
    error: float
    subset_mean: float
    subset_deviation: float
    subset_size: int
    subsets: int


def polynomial_kernel(x: Array, y: Array) -> Array:
    """Return k(x, y) = (x·y / D + 1)³ for all pairs, (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: ArrayLike, y: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """Return the unbiased squared maximum mean discrepancy under the cubic kernel, over all pairs; near 0 if equal.

    Its standard error is the two-sample jackknife's. Subsets take at most half of the smaller set, so that they
    differ. Needs 8·(N² + M² + N·M) bytes.
    Source: Bińkowski et al. (1801.01401), section 4; Gretton et al., JMLR 13 (2012), eq. 3.
    """
    x, y = _features(x, 4, "KID"), _features(y, 4, "KID")
    n, m = len(x), len(y)
    xx, yy, xy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    np.fill_diagonal(xx, 0)  # U-statistic: no picture is paired with itself
    np.fill_diagonal(yy, 0)
    rows_x, rows_y, to_y, to_x = xx.sum(1), yy.sum(1), xy.sum(1), xy.sum(0)
    within_x, within_y, between = rows_x.sum(), rows_y.sum(), to_y.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)
    without_x = (within_x - 2 * rows_x) / ((n - 1) * (n - 2)) - 2 * (between - to_y) / ((n - 1) * m)
    without_y = (within_y - 2 * rows_y) / ((m - 1) * (m - 2)) - 2 * (between - to_x) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()

    size, rng = min(subset_size, min(n, m) // 2), generator(seed)
    found = np.empty(subsets)
    for s in range(subsets):
        i, j = rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)
        inside = xx[np.ix_(i, i)].sum() + yy[np.ix_(j, j)].sum()
        found[s] = inside / (size * (size - 1)) - 2 * xy[np.ix_(i, j)].mean()
    return Kid(float(value), math.sqrt(variance), float(found.mean()), float(found.std()), size, subsets)


# ── precision and recall ───────────────────────────────────────────────────────────────────────────────


def squared_distances(x: Array, y: Array) -> Array:
    """Return |x − y|² for all pairs, (N, M)."""
    centre = y.mean(0)  # small numbers lose fewer digits in the difference below
    x, y = x - centre, y - centre
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T)).clip(0)


def precision_recall(x: ArrayLike, y: ArrayLike, *, k: int = 3) -> tuple[Array, Array]:
    """Return which generated pictures look real (N,), and which real ones are within reach (M,), each 1 or 0.

    A set's manifold is the union of balls around its points that reach to their k-th neighbour; the means are
    precision and recall. Source: Kynkäänniemi et al. (1904.06991), eq. 1 and 2, k = 3.
    """
    x, y = _features(x, k + 1, "precision and recall"), _features(y, k + 1, "precision and recall")
    between = squared_distances(x, y)
    real_radii, made_radii = _radii(y, k), _radii(x, k)
    inside, reached = between <= real_radii, np.less_equal(between.T, made_radii)
    return np.where(np.any(inside, 1), 1.0, 0.0), np.where(np.any(reached, 1), 1.0, 0.0)


def _radii(points: Array, k: int) -> Array:
    """Squared distance of each point (N, D) to its k-th neighbour, (N,)."""
    within = squared_distances(points, points)
    np.fill_diagonal(within, np.inf)
    return np.partition(within, k - 1, axis=1)[:, k - 1]
