"""Parameterizations: what a network's output means, as one row of a table.

A row (a, b) says out = a·x0 + b·eps. With the mixture x = α·x0 + σ·eps it is a 2×2 system,
det = α·b − σ·a, solved by x0 = (b·x − σ·out)/det and eps = (α·out − a·x)/det. The same row is the
training target, and the error of ``out`` is (det/σ)² times that of x0.

| name | (a, b)               | det       |                                               |
|------|----------------------|-----------|-----------------------------------------------|
| eps  | (0, 1)               | α         | cannot start from pure noise                  |
| x0   | (1, 0)               | −σ        |                                               |
| v    | (−σ, α)              | α² + σ²   | Salimans & Ho 2202.00512, appendix D          |
| flow | (−1, 1)              | α + σ     | velocity of the straight path                 |
| edm  | (σ/(σ_d·r), −α·σ_d/r)| −r/σ_d    | Karras 2206.00364, table 1; r² = σ² + α²·σ_d² |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfumato.diffusion.level import NO_PICTURE, NoiseLevel, Prediction, Scalar, log
from sfumato.errors import BadRequest

Row = Callable[[NoiseLevel], tuple[Scalar, Scalar]]


def _one(level: NoiseLevel) -> Scalar:
    return 1.0


def _time(level: NoiseLevel) -> Scalar:
    return level.t


@dataclass(frozen=True)
class Parameterization:
    """The meaning of a network's output, and what the network is told.

    Args:
        row: level → (a, b) with out = a·x0 + b·eps.
        gain: level → the factor on x before the network sees it.
        clock: level → the number that the network's timestep embedding gets.
    """

    name: str
    row: Row
    gain: Callable[[NoiseLevel], Scalar] = _one
    clock: Callable[[NoiseLevel], Scalar] = _time

    def det(self, level: NoiseLevel) -> Scalar:
        """Determinant α·b − σ·a of the system that ``out`` and x form."""
        a, b = self.row(level)
        return level.alpha * b - level.sigma * a

    def __call__(self, x: Any, level: NoiseLevel, out: Any) -> Prediction:
        """Split x into data and noise by the network's output at this level; all shapes alike."""
        a, b = self.row(level)
        det = self.det(level)
        if isinstance(det, (int, float)) and det == 0:
            raise BadRequest(NO_PICTURE if level.alpha == 0 else "a network is never called at sigma = 0")
        return Prediction((b * x - level.sigma * out) / det, (level.alpha * out - a * x) / det)

    def target(self, x0: Any, eps: Any, level: NoiseLevel) -> Any:
        """What the network should put out for x = α·x0 + σ·eps: the training target a·x0 + b·eps."""
        a, b = self.row(level)
        return a * x0 + b * eps

    def loss_scale(self, level: NoiseLevel) -> Scalar:
        """(det/σ)²: the squared error of ``out`` in units of the squared error of x0."""
        return (self.det(level) / level.sigma) ** 2


def edm(sigma_data: float = 0.5) -> Parameterization:
    """EDM's preconditioning: out has unit variance at every level of data with this deviation."""

    def radius(level: NoiseLevel) -> Scalar:
        return (level.sigma**2 + (level.alpha * sigma_data) ** 2) ** 0.5

    def row(level: NoiseLevel) -> tuple[Scalar, Scalar]:
        r = radius(level)
        return level.sigma / (sigma_data * r), -level.alpha * sigma_data / r

    def clock(level: NoiseLevel) -> Scalar:
        if isinstance(level.alpha, (int, float)) and level.alpha == 0:
            raise BadRequest(
                "an edm network cannot start from pure noise (alpha = 0): its clock ln(sigma)/4 is infinite"
            )
        return log(level.sigma / level.alpha) / 4

    return Parameterization("edm", row, gain=lambda level: 1 / radius(level), clock=clock)


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": Parameterization("eps", lambda level: (0.0, 1.0)),
    "x0": Parameterization("x0", lambda level: (1.0, 0.0)),
    "v": Parameterization("v", lambda level: (-level.sigma, level.alpha)),
    "flow": Parameterization("flow", lambda level: (-1.0, 1.0)),
    "edm": edm(),
}
