"""Noise schedules: from a time t to a noise level, and from a noise level back to its time.

| name          | α, σ                      | time t                                  |
|---------------|---------------------------|-----------------------------------------|
| linear        | α² = ᾱ_t, α² + σ² = 1     | index 0 … T−1, fractions between them   |
| scaled-linear | the same                  | the same                                |
| cosine        | the same                  | the same                                |
| exploding     | α = 1, σ = t              | σ itself (EDM)                          |
| flow          | α = 1 − t, σ = t          | σ itself                                |

Arithmetic is NumPy float64 whatever comes in; a float gives floats, an array arrays, a tensor tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.diffusion.level import NoiseLevel, Scalar, float64
from sfumato.errors import BadRequest

Floats = NDArray[np.float64]


class Schedule(Protocol):
    """A noise level for every time from ``t_min`` (nearly clean) to ``t_max`` (noisiest)."""

    @property
    def t_min(self) -> float:
        """The least noisy time that the network was trained on."""
        ...

    @property
    def t_max(self) -> float:
        """The noisiest time."""
        ...

    @property
    def steps(self) -> int | None:
        """Number of discrete times T the schedule was defined on, or None if time is continuous."""
        ...

    @property
    def clean(self) -> NoiseLevel:
        """The level of a picture without noise: σ = 0."""
        ...

    def __call__(self, t: Scalar) -> NoiseLevel:
        """The level at a time, or at an array of times."""
        ...

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """The level with a given 2·log(α/σ), held within the schedule's range."""
        ...


def _interp(x: Any, xs: Any, ys: Any) -> Floats:
    return np.asarray(np.interp(x, xs, ys), dtype=np.float64)


def _like(t: Scalar, values: Any) -> Scalar:
    """Give float64 values the kind of t: float, array or tensor."""
    if hasattr(t, "new_tensor"):
        return t.new_tensor(values) if t.is_floating_point() else t.float().new_tensor(values)
    return float(values) if np.ndim(t) == 0 else values


@dataclass(frozen=True)
class Discrete:
    """A variance-preserving schedule known at T indices; log(σ/α) is linear between them.

    Args:
        alpha_bar: ᾱ_t for t = 0 … T−1 (DDPM, section 2), strictly falling from below 1 to at least 0.
    """

    alpha_bar: Floats
    t_min: float = field(default=0.0, init=False)
    clean: NoiseLevel = field(default=NoiseLevel(-1.0, 1.0, 0.0), init=False)

    def __post_init__(self) -> None:
        a = self.alpha_bar
        if a.ndim != 1 or len(a) < 2 or not (np.diff(a) < 0).all() or not a[0] < 1 or not a[-1] >= 0:
            raise BadRequest("a noise schedule's alpha_bar must fall strictly, within [0, 1), over at least 2 steps")

    @property
    def steps(self) -> int:
        """T, the number of indices."""
        return len(self.alpha_bar)

    @property
    def t_max(self) -> float:
        """The last index."""
        return float(self.steps - 1)

    @property
    def _log_ratio(self) -> Floats:
        with np.errstate(divide="ignore"):
            return 0.5 * (np.log1p(-self.alpha_bar) - np.log(self.alpha_bar))  # log(σ/α), (T,)

    def __call__(self, t: Scalar) -> NoiseLevel:
        """The level at index t, with fractions; below 0 it is clean."""
        u, ratio = float64(t), self._log_ratio
        if math.isinf(ratio[-1]):  # zero terminal SNR: the last interval bridges to infinity by angle
            angle = np.arctan(np.exp(_interp(u, np.arange(self.steps - 1), ratio[:-1])))
            last = _interp(u, [self.t_max - 1, self.t_max], [math.atan(math.exp(ratio[-2])), math.pi / 2])
            angle = np.where(u > self.t_max - 1, last, angle)
        else:
            angle = np.arctan(np.exp(_interp(u, np.arange(self.steps), ratio)))
        alpha, sigma = np.cos(angle), np.sin(angle)
        alpha, sigma = np.where(angle == math.pi / 2, 0.0, alpha), np.where(u < self.t_min, 0.0, sigma)
        alpha = np.where(u < self.t_min, 1.0, alpha)
        return NoiseLevel(t, _like(t, alpha), _like(t, sigma))

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """The level with a given 2·log(α/σ), held within the range."""
        ratio = self._log_ratio
        t = float(_interp(-log_snr / 2, ratio[np.isfinite(ratio)], np.arange(self.steps)[np.isfinite(ratio)]))
        if -log_snr / 2 > ratio[np.isfinite(ratio)][-1]:
            # Only a zero-SNR schedule reaches past its last finite index: invert the angle's bridge.
            if not math.isinf(ratio[-1]):
                return self(self.t_max)
            low = math.atan(math.exp(ratio[-2]))
            t = self.t_max - 1 + (math.atan(math.exp(min(-log_snr / 2, 700.0))) - low) / (math.pi / 2 - low)
            return self(min(t, self.t_max))
        return self(t)


@dataclass(frozen=True)
class Flow:
    """The straight path x = (1 − t)·x0 + t·eps (flow matching, rectified flow)."""

    t_min: float = 1e-3
    t_max: float = 1.0
    steps: int | None = field(default=None, init=False)
    clean: NoiseLevel = field(default=NoiseLevel(0.0, 1.0, 0.0), init=False)

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max <= 1:
            raise BadRequest(f"a flow schedule needs 0 < t_min < t_max <= 1, not {self.t_min} and {self.t_max}")

    def __call__(self, t: Scalar) -> NoiseLevel:
        """The level (1 − t, t)."""
        u = float64(t)
        return NoiseLevel(t, _like(t, 1 - u), _like(t, u))

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """The level with a given 2·log(α/σ), held within the range."""
        t = 1 / (1 + math.exp(min(log_snr / 2, 700.0)))
        return self(min(max(t, self.t_min), self.t_max))


@dataclass(frozen=True)
class Exploding:
    """The variance-exploding path x = x0 + t·eps, t = σ (EDM, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    steps: int | None = field(default=None, init=False)
    clean: NoiseLevel = field(default=NoiseLevel(0.0, 1.0, 0.0), init=False)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise BadRequest(f"needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    @property
    def t_min(self) -> float:
        """The smallest σ that the network was trained on."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """The largest σ."""
        return self.sigma_max

    def __call__(self, t: Scalar) -> NoiseLevel:
        """The level (1, t)."""
        u = float64(t)
        return NoiseLevel(t, _like(t, np.ones_like(u)), _like(t, u))

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """The level with a given 2·log(α/σ), held within the range."""
        sigma = math.exp(min(-log_snr / 2, 700.0))
        return self(min(max(sigma, self.sigma_min), self.sigma_max))


def from_betas(betas: Any, *, zero_snr: bool = False) -> Discrete:
    """Build a schedule from β_t (DDPM, eq. 2): ᾱ_t = Π (1 − β_s)."""
    alpha_bar = np.asarray(np.cumprod(1 - np.asarray(betas, dtype=np.float64)), dtype=np.float64)
    return rescale_zero_snr(Discrete(alpha_bar)) if zero_snr else Discrete(alpha_bar)


def rescale_zero_snr(schedule: Discrete) -> Discrete:
    """Shift and scale α so that the last level is pure noise (Lin et al. 2305.08891, algorithm 1)."""
    alpha = np.sqrt(schedule.alpha_bar)
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return Discrete(alpha**2)


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000, zero_snr: bool = False) -> Discrete:
    """β_t linear in t (DDPM, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, steps), zero_snr=zero_snr)


def scaled_linear(
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, zero_snr: bool = False
) -> Discrete:
    """√β_t linear in t (latent diffusion; Stable Diffusion's schedule)."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2, zero_snr=zero_snr)


def cosine(s: float = 0.008, steps: int = 1000, beta_max: float = 0.999, zero_snr: bool = False) -> Discrete:
    """ᾱ_t = cos² of a quarter turn, with β_t ≤ beta_max (Nichol & Dhariwal 2102.09672, eq. 17)."""
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * math.pi / 2) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], beta_max), zero_snr=zero_snr)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled-linear": scaled_linear,
    "cosine": cosine,
    "exploding": Exploding,
    "flow": Flow,
}
