"""Guidance: from two denoisers, a strong and a weak one, to one denoiser that goes beyond the strong.

    D = D_weak + w·(D_strong − D_weak)

    Guidance = Callable[[Pair], Denoiser]

    denoise = cfg(5.0)(Pair(conditional, unconditional))
    denoise = interval(rescale(cfg(7.5), 0.7), low=0.3, high=5.0)(Pair(conditional, negative, batch=doubled))

The weak denoiser is the same network without the prompt, with a negative prompt, or a worse network with the
prompt. A Prediction holds data and noise, and both are linear in the network's output at a given x, so guidance
is the same for eps, v, x0 and flow networks. It knows the noise level and no step number, and has no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from sfumato.diffusion.level import Denoiser, NoiseLevel, Prediction


@dataclass(frozen=True)
class Pair:
    """The two denoisers between which guidance draws its line.

    Args:
        strong: conditioned on what is wanted.
        weak: without a prompt, with a negative one, or a worse network.
        batch: (x, level) → (strong's, weak's) prediction from one doubled batch; without it, two calls.
    """

    strong: Denoiser
    weak: Denoiser
    batch: Callable[[Any, NoiseLevel], tuple[Prediction, Prediction]] | None = None

    def __call__(self, x: Any, level: NoiseLevel) -> tuple[Prediction, Prediction]:
        """Both predictions for the same x."""
        if self.batch is not None:
            return self.batch(x, level)
        return self.strong(x, level), self.weak(x, level)


Guidance: TypeAlias = Callable[[Pair], Denoiser]


def cfg(scale: float = 5.0) -> Guidance:
    """Classifier-free guidance (Ho & Salimans 2207.12598, in the form 1 + w), and autoguidance (2406.02507).

    scale 1 is the strong denoiser alone, without a call of the weak; 0 is the weak.
    """

    def guide(pair: Pair) -> Denoiser:
        def denoise(x: Any, level: NoiseLevel) -> Prediction:
            strong, weak = pair(x, level)
            return weak.lerp(strong, scale)

        return pair.strong if scale == 1 else denoise

    return guide


def apg(scale: float = 5.0, eta: float = 0.0, norm: float = math.inf) -> Guidance:
    """Adaptive projected guidance (Sadat et al. 2410.02416, algorithm 1), against oversaturation at high scales.

    Args:
        scale: as in ``cfg``; with eta = 1 and no norm it is ``cfg``.
        eta: how much to keep of the part of the difference that is parallel to the strong picture.
        norm: the difference's length per picture is held below this.

    The paper's momentum is left out: it would need memory of earlier calls.
    """

    def guide(pair: Pair) -> Denoiser:
        def denoise(x: Any, level: NoiseLevel) -> Prediction:
            strong, weak = pair(x, level)
            d = strong.x0 - weak.x0
            if math.isfinite(norm):
                d = d / (_dot(d, d) ** 0.5 / norm).clip(1.0, None)
            parallel = _dot(d, strong.x0) / (_dot(strong.x0, strong.x0) + 1e-30) * strong.x0
            return Prediction.from_x0(x, level, strong.x0 + (scale - 1) * (d + (eta - 1) * parallel))

        return pair.strong if scale == 1 else denoise

    return guide


def rescale(guidance: Guidance, phi: float = 0.7) -> Guidance:
    """Give the guided picture a share phi of the strong one's contrast back (Lin et al. 2305.08891, eq. 14–16).

    The standard deviation is taken per picture and of x0, so that it does not depend on the parameterization.
    """

    def guide(pair: Pair) -> Denoiser:
        def denoise(x: Any, level: NoiseLevel) -> Prediction:
            strong, weak = pair(x, level)
            guided = guidance(_known(strong, weak))(x, level)
            factor = phi * _std(strong.x0) / (_std(guided.x0) + 1e-30) + (1 - phi)
            return Prediction.from_x0(x, level, factor * guided.x0)

        return denoise

    return guide


def interval(guidance: Guidance, low: float = 0.0, high: float = math.inf) -> Guidance:
    """Guide only where low < σ/α ≤ high; elsewhere call the strong denoiser alone (Kynkäänniemi 2404.07724)."""

    def guide(pair: Pair) -> Denoiser:
        guided = guidance(pair)

        def denoise(x: Any, level: NoiseLevel) -> Prediction:
            ratio = level.sigma / level.alpha if level.alpha > 0 else math.inf
            return guided(x, level) if low < ratio <= high else pair.strong(x, level)

        return denoise

    return guide


def _known(strong: Prediction, weak: Prediction) -> Pair:
    """A pair that was already called."""
    return Pair(lambda x, level: strong, lambda x, level: weak, lambda x, level: (strong, weak))


def _sum(x: Any) -> Any:
    """Sum over all but the batch axis, (B, …) → (B, 1, …)."""
    return x.reshape(x.shape[0], -1).sum(-1).reshape(-1, *[1] * (len(x.shape) - 1))


def _dot(a: Any, b: Any) -> Any:
    return _sum(a * b)


def _std(x: Any) -> Any:
    size = math.prod(x.shape[1:])
    centred = x - _sum(x) / size
    return (_dot(centred, centred) / size) ** 0.5


GUIDANCE: dict[str, Callable[..., Guidance]] = {
    "cfg": cfg,
    "apg": apg,
    "rescale": rescale,
    "interval": interval,
    "autoguidance": cfg,
}
