"""Data whose ideal denoiser is known in closed form, and the exact flow of its probability-flow ODE.

x = α·x0 + σ·ε with x0 from component k, N(m_k, diag(v_k)), is N(α·m_k, α²·v_k + σ²), and E[x0 | x] is the mean
of the components' regressions m_k + α·v_k/(α²·v_k + σ²)·(x − α·m_k), weighted by their posterior odds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from sfumato.diffusion import SCHEDULES, NoiseLevel, Path, Prediction

Floats = Any


@dataclass(frozen=True)
class Mixture:
    weights: Floats  # (K,)
    means: Floats  # (K, D)
    variances: Floats  # (K, D); zero for a data set of pictures

    def __call__(self, x: Floats, level: NoiseLevel) -> Prediction:  # x (B, …) with D numbers each
        assert level.sigma > 0, "a network is never called at sigma = 0"
        flat = x.reshape(len(x), 1, -1).astype(np.float64)
        total = level.alpha**2 * self.variances + level.sigma**2  # (K, D)
        away = flat - level.alpha * self.means  # (B, K, D)
        odds = np.log(self.weights) - 0.5 * (away**2 / total + np.log(total)).sum(-1)
        odds = np.exp(odds - odds.max(1, keepdims=True))
        odds = odds / odds.sum(1, keepdims=True)  # (B, K)
        x0 = (odds[..., None] * (self.means + level.alpha * self.variances / total * away)).sum(1)
        return Prediction.from_x0(x, level, x0.reshape(x.shape).astype(x.dtype))

    def mean(self) -> Floats:
        return self.weights @ self.means

    def covariance(self) -> Floats:
        centred = self.means - self.mean()
        return np.diag(self.weights @ self.variances) + (self.weights[:, None] * centred).T @ centred

    def draw(self, n: int, rng: np.random.Generator) -> Floats:
        k = rng.choice(len(self.weights), size=n, p=self.weights)
        return self.means[k] + np.sqrt(self.variances[k]) * rng.standard_normal((n, self.means.shape[1]))


def pictures(data: Floats) -> Mixture:
    """The ideal denoiser of a finite data set (N, …)."""
    flat = data.reshape(len(data), -1).astype(np.float64)
    return Mixture(np.full(len(flat), 1 / len(flat)), flat, np.zeros_like(flat))


MIXTURE = Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[1.0, -0.5], [-1.2, 0.3], [0.2, 1.4]]),
    np.array([[0.25, 0.4], [0.3, 0.2], [0.5, 0.35]]),
)
GAUSSIAN = Mixture(np.array([1.0]), np.array([[0.7, -0.4]]), np.array([[0.5, 0.2]]))

CURVES = {"vp": SCHEDULES["linear"](), "ve": SCHEDULES["exploding"](), "flow": SCHEDULES["flow"]()}


def smooth_path(curve: str, steps: int, high: float = 8.0, low: float = 0.1) -> Path:
    """Levels at a smooth, uneven function of the step, from one σ/α to another."""
    schedule = CURVES[curve]
    u = np.linspace(0, 1, steps + 1)
    u = u + 0.3 / math.pi * np.sin(math.pi * u) ** 2
    log_snr = -2 * (math.log(high) + (math.log(low) - math.log(high)) * u)
    return Path([schedule.at_log_snr(float(s)) for s in log_snr], schedule)


def exact(denoise: Any, x: Floats, p: NoiseLevel, q: NoiseLevel) -> Floats:
    """x carried from level p to level q by the ODE dx = x0·dα + ε·dσ, which is d(x/α)/d(σ/α) = ε."""

    def eps(ratio: float, y: Floats) -> Floats:
        return denoise(y.reshape(x.shape), NoiseLevel(ratio, 1.0, ratio)).eps.ravel()

    ends = (p.sigma / p.alpha, q.sigma / q.alpha)
    out = solve_ivp(eps, ends, (x / p.alpha).ravel(), "DOP853", rtol=1e-12, atol=1e-13)
    return q.alpha * out.y[:, -1].reshape(x.shape)


def moments(sampler: Any, path: Path, mean: Floats, deviation: Floats, **settings: Any) -> tuple[Floats, Floats]:
    """Exact mean and variance of a sampler's result for GAUSSIAN, where each step is affine in x and noise.

    Row 0 of the batch has no noise at all, row 1 that of the start, and row 2 + k that of the k-th draw.
    """
    x = np.tile(mean, (2 * len(path) + 2, 1))
    x[1] += deviation
    draws = iter(range(2, len(x)))

    def noise(y: Floats) -> Floats:
        z = np.zeros_like(y)
        z[next(draws)] = 1
        return z

    *_, last = sampler(GAUSSIAN, x, path, noise, **settings)
    return last.x[0], ((last.x[1:] - last.x[0]) ** 2).sum(0)
