"""Noise levels and predictions: the one sentence that the whole system repeats.

    x_t = α_t · x0 + σ_t · ε          a picture at a noise level is a mix of data and noise

A denoiser splits x_t back into its two parts; a sampler mixes them again at the next level.
Everything here uses only +, −, ×, ÷, so NumPy arrays and torch tensors pass through alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np

from sfumato.errors import BadRequest


class Array(Protocol):
    """What samplers ask of a picture: the operators that ``numpy.ndarray`` and ``torch.Tensor`` share."""

    @property
    def shape(self) -> Any:
        """Sizes of the axes, the batch first."""
        ...

    def __add__(self, other: Any, /) -> Self: ...
    def __radd__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __rsub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __rmul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...


Scalar: TypeAlias = Any  # a float, or an array that broadcasts against pictures, such as (B, 1, 1, 1)
Noise: TypeAlias = Callable[[Any], Any]  # x -> fresh standard normal noise like x


def log(x: Scalar) -> Scalar:
    """Natural logarithm of a float, NumPy array or torch tensor, with log 0 = −inf."""
    if isinstance(x, (int, float)):
        return math.log(x) if x > 0 else -math.inf
    if hasattr(x, "log"):  # torch
        return x.log()
    with np.errstate(divide="ignore"):
        return np.log(x)


def float64(x: Scalar) -> Any:
    """A float, NumPy array or torch tensor as a NumPy array of float64."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


class NoiseLevel(NamedTuple):
    """The coefficients of x = alpha · x0 + sigma · eps at time ``t`` of a schedule.

    Each field is a float, or an array that broadcasts against a batch: one batch may hold many levels.
    """

    t: Scalar
    alpha: Scalar
    sigma: Scalar

    @property
    def log_snr(self) -> Scalar:
        """2 · log(α/σ): −inf at pure noise, +inf at a clean picture."""
        return 2 * (log(self.alpha) - log(self.sigma))


class Prediction(NamedTuple):
    """The two parts, data and noise, that a denoiser sees in a noisy picture; both shaped like it."""

    x0: Any
    eps: Any

    @classmethod
    def from_x0(cls, x: Any, level: NoiseLevel, x0: Any) -> Prediction:
        """Complete a predicted picture with the noise that x then holds: eps = (x − α·x0)/σ."""
        if _is_zero(level.sigma):  # no noise in x: any eps mixes to the same picture
            return cls(x0, x * 0)
        return cls(x0, (x - level.alpha * x0) / level.sigma)

    @classmethod
    def from_eps(cls, x: Any, level: NoiseLevel, eps: Any) -> Prediction:
        """Complete predicted noise with the picture that x then holds: x0 = (x − σ·eps)/α.

        Raises BadRequest at α = 0, where x holds no picture.
        """
        if _is_zero(level.alpha):
            raise BadRequest(NO_PICTURE)
        return cls((x - level.sigma * eps) / level.alpha, eps)

    @classmethod
    def through(cls, x: Any, level: NoiseLevel, y: Any, other: NoiseLevel) -> Prediction:
        """The data and noise that mix to x at one level and to y at another: what a single step from x to y predicts.

        Their ratios σ/α must differ; the levels' fields may be arrays.
        """
        det = level.alpha * other.sigma - other.alpha * level.sigma
        return cls((other.sigma * x - level.sigma * y) / det, (level.alpha * y - other.alpha * x) / det)

    def at(self, level: NoiseLevel) -> Any:
        """Mix the two parts at a noise level: α·x0 + σ·eps."""
        if _is_zero(level.sigma):
            return self.x0 if _is_one(level.alpha) else level.alpha * self.x0
        return level.alpha * self.x0 + level.sigma * self.eps

    def lerp(self, other: Prediction, w: Scalar) -> Prediction:
        """Go from this prediction towards another: w = 0 here, w = 1 there, w > 1 beyond."""
        return Prediction(self.x0 + w * (other.x0 - self.x0), self.eps + w * (other.eps - self.eps))

    def renew(self, fraction: Scalar, noise: Noise) -> Prediction:
        """Replace a fraction f in [0, 1] of the noise by fresh noise, keeping its variance: √(1−f²)·eps + f·z."""
        if _is_zero(fraction):
            return self
        return Prediction(self.x0, (1 - fraction**2) ** 0.5 * self.eps + fraction * noise(self.eps))


Denoiser: TypeAlias = Callable[[Any, NoiseLevel], Prediction]  # conditioning is bound beforehand

NO_PICTURE = (
    "a network that predicts noise (eps) cannot start from pure noise (alpha = 0): "
    "use a v or flow model, or a schedule without zero terminal SNR"
)


def q_sample(x0: Any, eps: Any, level: NoiseLevel) -> Any:
    """Noise a picture in closed form, q(x_t | x0) (DDPM, eq. 4): α·x0 + σ·eps."""
    return Prediction(x0, eps).at(level)


def q_renoise(x: Any, eps: Any, level: NoiseLevel, noisier: NoiseLevel) -> Any:
    """Bring x from its level to a noisier one by fresh noise, q(x_τ | x_s) (2107.00630, appendix A).

    x_τ = r·x_s + √(σ_τ² − r²·σ_s²)·eps with r = α_τ/α_s; α_s must not be 0.
    """
    r = noisier.alpha / level.alpha
    variance = noisier.sigma**2 - (r * level.sigma) ** 2
    return r * x + (0.5 * (variance + abs(variance))) ** 0.5 * eps  # rounding may leave it below 0


def _is_zero(x: Scalar) -> bool:
    return isinstance(x, (int, float)) and x == 0


def _is_one(x: Scalar) -> bool:
    return isinstance(x, (int, float)) and x == 1
