"""Samplers: loops that walk a picture down a path of noise levels.

Every schedule's probability-flow ODE is dx = x0·dα + ε·dσ, where (x0, ε) is the denoiser's split of x. Its
first-order step from level p to level q mixes the two parts again, x_q = α_q·x0 + σ_q·ε: that is DDIM under VP,
Euler on EDM's path and Euler flow matching on the straight path. What the methods change in that loop:

    ancestral, DDPM     ε ← √(1−f²)·ε + f·z                      a fraction of the noise is renewed
    DPM-Solver++        x0 ← x0 extrapolated in λ = log(α/σ)     then ε = (x − α_p·x0)/σ_p keeps to x
    PLMS, DPM-Solver-2  ε ← ε extrapolated or at the middle      then x0 = (x − σ_p·ε)/α_p keeps to x
    Heun                x ← x + Δα·mean(x0) + Δσ·mean(ε)         the only one that depends on the coordinates

History is a local variable, so a sampler can be entered any number of times at once. No network is called at
σ = 0, and a step out of α = 0 or into σ = 0, where λ is infinite, is of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sfumato.diffusion.level import Denoiser, Noise, NoiseLevel, Prediction, Scalar, q_renoise
from sfumato.diffusion.spacings import Path, check_settings, plain, settings_of
from sfumato.errors import BadRequest, nearest

from_x0, from_eps = Prediction.from_x0, Prediction.from_eps

Node: TypeAlias = tuple[NoiseLevel, Any]  # a level and the x0 that was predicted there


class Step(NamedTuple):
    """What a sampler yields after each step: x at ``level``, and the picture ``preview`` foreseen in it."""

    level: NoiseLevel
    x: Any
    preview: Any


def renewal(p: NoiseLevel, q: NoiseLevel) -> Scalar:
    """The fraction of the noise at q that DDPM draws afresh when coming from p (DDIM, eq. 16, over σ_q)."""
    return (1 - (p.alpha * q.sigma / (q.alpha * p.sigma)) ** 2) ** 0.5


def ddim(denoise: Denoiser, x: Any, path: Path, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2010.02502, eq. 12): eta = 0 is the ODE's Euler step, eta = 1 is DDPM."""
    for p, q in pairwise(path):
        out = denoise(x, p)
        x = out.renew(eta and eta * renewal(p, q), noise).at(q)
        yield Step(q, x, out.x0)


def ddim_inversion(denoise: Denoiser, x: Any, path: Path, noise: Noise, refine: int = 5) -> Iterator[Step]:
    """Walk the path upwards, from a picture to the noise from which DDIM makes that picture again.

    Each step solves DDIM's own equation x_q = α_q·x0(x_p) + σ_q·ε(x_p) for x_p by ``refine`` fixed-point
    iterations (Pan et al. 2309.04907); with refine = 0 it is the explicit step of DDIM's section 4.3.
    """
    for q, p in pairwise(reversed(path)):
        out = denoise(x, q) if q.sigma > 0 else Prediction(x / q.alpha, x * 0)  # a first guess
        y = out.at(p)
        for _ in range(refine):
            out = denoise(y, p)
            y = (from_x0(x, q, out.x0) if p.alpha == 0 else from_eps(x, q, out.eps)).at(p)
        x = y
        yield Step(p, x, out.x0)


def heun(
    denoise: Denoiser,
    x: Any,
    path: Path,
    noise: Noise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """EDM's Heun sampler (Karras et al. 2206.00364, algorithms 1 and 2) in the path's own coordinates.

    Churn lifts the noise before a step whose σ/α lies in [s_tmin, s_tmax], as far as the schedule reaches.
    """
    gamma = min(s_churn / (len(path) - 1), math.sqrt(2) - 1)
    for p, q in pairwise(path):
        if gamma > 0 and s_tmin * p.alpha <= p.sigma <= s_tmax * p.alpha and p.alpha > 0:
            low, p = p, path.between(p, q, p.log_snr - 2 * math.log1p(gamma))
            x = q_renoise(x, s_noise * noise(x), low, p)
        out = denoise(x, p)
        y = out.at(q)
        if q.sigma > 0:
            end = denoise(y, q)
            y = x + (q.alpha - p.alpha) / 2 * (out.x0 + end.x0) + (q.sigma - p.sigma) / 2 * (out.eps + end.eps)
        x = y
        yield Step(q, x, out.x0)


def middle(path: Path, p: NoiseLevel, q: NoiseLevel, fraction: float = 0.0) -> NoiseLevel:
    """Halfway in λ from p to q, or to the lower level at which q's noise without the renewed fraction lies."""
    return path.between(p, q, (p.log_snr + q.log_snr - math.log(1 - fraction**2)) / 2)


def dpm_2(denoise: Denoiser, x: Any, path: Path, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2206.00927, algorithm 1), the midpoint rule on ε; eta = 1 is ancestral."""
    for p, q in pairwise(path):
        out = best = denoise(x, p)
        f = eta * renewal(p, q)
        if p.alpha > 0 and q.sigma > 0:
            m = middle(path, p, q, f)
            best = from_eps(x, p, denoise(out.at(m), m).eps)
        x = best.renew(f, noise).at(q)
        yield Step(q, x, out.x0)


def dpmpp_2s(denoise: Denoiser, x: Any, path: Path, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2211.01095, algorithm 1), the midpoint rule on x0; eta = 1 is ancestral."""
    for p, q in pairwise(path):
        out = best = denoise(x, p)
        f = eta * renewal(p, q)
        if p.alpha > 0 and q.sigma > 0:
            m = middle(path, p, q, f)
            best = from_x0(x, p, denoise(out.at(m), m).x0)
        x = best.renew(f, noise).at(q)
        yield Step(q, x, out.x0)


def dpmpp_sde(denoise: Denoiser, x: Any, path: Path, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """The midpoint rule on x0 of the SDE, both noises from one Brownian path (k-diffusion's DPM-Solver++ SDE)."""
    for p, q in pairwise(path):
        out = best = denoise(x, p)
        z = noise(x)
        if p.alpha > 0 and q.sigma > 0:
            m = middle(path, p, q)
            y = out.renew(eta * renewal(p, m), _given(z)).at(m)
            best = from_x0(x, p, denoise(y, m).x0)
            kept = renewal(p, m) * m.alpha * q.sigma / (m.sigma * q.alpha) / renewal(p, q)  # of m's noise, at q
            z = kept * z + (1 - kept**2) ** 0.5 * noise(x)
        x = best.renew(eta * renewal(p, q), _given(z)).at(q)
        yield Step(q, x, out.x0)


def _given(z: Any) -> Noise:
    return lambda _: z


def dpmpp_2m(denoise: Denoiser, x: Any, path: Path, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2); eta = 1 is the same paper's SDE form."""
    seen: list[Node] = []
    for p, q in pairwise(path):
        out = denoise(x, p)
        x0 = out.x0
        if seen and q.sigma > 0:
            o, last = seen[0]
            x0 = x0 + (q.log_snr - p.log_snr) / (p.log_snr - o.log_snr) / 2 * (x0 - last)  # h/∞ = 0 from α_o = 0
        f = (1 - (1 - renewal(p, q) ** 2) ** eta) ** 0.5
        x = from_x0(x, p, x0).renew(f, noise).at(q)
        seen = [(p, out.x0)]
        yield Step(q, x, out.x0)


def dpmpp_3m(denoise: Denoiser, x: Any, path: Path, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(3M): a parabola through the last three x0, weighted as in the authors' code for 2211.01095.

    Their weight of the bend is half of Taylor's, and the first step is of first order: the method's order is 2,
    not 3, though its error is smaller than 2M's.
    """
    seen: list[Node] = []  # newest first
    for p, q in pairwise(path):
        out = denoise(x, p)
        seen = [(p, out.x0), *seen][:3]
        x = from_x0(x, p, _parabola(q, seen)).at(q)
        yield Step(q, x, out.x0)


def _parabola(q: NoiseLevel, seen: list[Node]) -> Any:
    (p, x0), *older = seen
    if q.sigma == 0 or not older:
        return x0
    h = (q.log_snr - p.log_snr) / 2
    o, x1 = older[0]
    h1 = (p.log_snr - o.log_snr) / 2
    slope = h / h1 * (x0 - x1)
    if len(older) == 1:
        return x0 + slope / 2
    n, x2 = older[1]
    h2 = (o.log_snr - n.log_snr) / 2
    bend = slope - h / h2 * (x1 - x2)
    first, second = _moments(h, 2)
    return x0 + first * (slope + h1 / (h1 + h2) * bend) + second / 2 * h / (h1 + h2) * bend


def _moments(h: float, n: int) -> list[float]:
    """Mean of τ^k, k = 1 … n, for τ in [0, 1] with density ∝ e^(hτ): the weights of x0's Taylor series in a step."""
    means = [1.0]
    for k in range(1, n + 1):
        means.append(-1 / math.expm1(-h) - k / h * means[-1])
    return means[1:]


def plms(denoise: Denoiser, x: Any, path: Path, noise: Noise) -> Iterator[Step]:
    """PLMS (Liu et al. 2202.09778, section 3.3): Adams–Bashforth of order 4 on ε, started by the improved Euler rule.

    The weights are those of even steps in σ/α; on any other path the method is of order 2.
    """
    seen: list[Any] = []  # ε, newest first
    for p, q in pairwise(path):
        out = denoise(x, p)
        seen = [out.eps, *seen][:4]
        eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(seen) - 1], seen, strict=True))
        if len(seen) == 1 and q.sigma > 0:
            eps = (out.eps + denoise(out.at(q), q).eps) / 2
        x = (out if p.alpha == 0 else from_eps(x, p, eps)).at(q)
        yield Step(q, x, out.x0)


ADAMS_BASHFORTH = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def unipc(denoise: Denoiser, x: Any, path: Path, noise: Noise, order: int = 2) -> Iterator[Step]:
    """UniPC-p on x0 with B(h) = e^h − 1 (Zhao et al. 2302.04867, section 3): a corrector that costs no call.

    Of order p + 1 by its corrector, but at most 3 by its first step.
    """
    seen: list[Node] = []  # newest first
    start = x
    for p, q in pairwise(path):
        out = denoise(x, p)
        if seen:  # UniC: correct the arrival at p by what the denoiser saw there
            x = from_x0(start, seen[0][0], _unified(p, seen, [(p, out.x0)])).at(p)
        seen = [(p, out.x0), *seen][:order]
        start, x = x, from_x0(x, p, _unified(q, seen)).at(q)  # UniP
        yield Step(q, x, out.x0)


def _unified(q: NoiseLevel, seen: list[Node], end: list[Node] | None = None) -> Any:
    """Mean over the step to q of the polynomial in λ through the newest x0 and the others."""
    (p, x0), *others = seen
    h = (q.log_snr - p.log_snr) / 2
    others = [node for node in [*others, *(end or [])] if math.isfinite(node[0].log_snr)]
    if math.isinf(h) or not others:
        return x0
    r = [(level.log_snr - p.log_snr) / 2 / h for level, _ in others]
    weights = [0.5]  # the paper's shortcut for a single one
    if len(r) > 1:
        weights = np.linalg.solve(np.vander(r, increasing=True).T, _moments(h, len(r))).tolist()
    return x0 + sum(w / rk * (y - x0) for w, rk, (_, y) in zip(weights, r, others, strict=True))


def lcm(denoise: Denoiser, x: Any, path: Path, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2303.01469, algorithm 1): all of the noise is renewed."""
    for p, q in pairwise(path):
        out = denoise(x, p)
        x = out.renew(1.0, noise).at(q)
        yield Step(q, x, out.x0)


LIMITS: dict[str, tuple[float, float]] = {
    "eta": (0, 1),
    "order": (1, 3),
    "refine": (0, 1000),
    "s_churn": (0, math.inf),
    "s_tmin": (0, math.inf),
    "s_tmax": (0, math.inf),
    "s_noise": (0, math.inf),
}


@dataclass(frozen=True)
class Sampler:
    """A named sampler, called as its loop is.

    Args:
        run: (denoise, x, path, noise, **settings) → one Step for each step of the path.
        order: the error falls as (number of steps)^−order, between levels with 0 < α and 0 < σ; where it draws
            noise, the error of the result's mean and covariance; 0 for a method without such a limit.
        stochastic: whether it draws noise with its default settings.
        calls: calls of the denoiser per step.
        aliases: what other programs call it.
        summary: one line for ``sfumato samplers``.
    """

    name: str
    run: Callable[..., Iterator[Step]]
    order: int
    summary: str
    stochastic: bool = False
    calls: int = 1
    aliases: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Names and defaults of the settings that it takes."""
        return settings_of(self.run, 4)

    def count(self, path: Path, **settings: Any) -> int:
        """Count the denoiser's calls down a path: ``calls`` a step, but for those at its ends that need fewer."""
        called: list[NoiseLevel] = []

        def denoise(x: float, level: NoiseLevel) -> Prediction:
            called.append(level)
            return Prediction(x, x)

        for _ in self(denoise, 0.0, path, lambda x: x, **settings):
            pass
        return len(called)

    def __call__(
        self, denoise: Denoiser, x: Any, path: list[NoiseLevel], noise: Noise, **settings: Any
    ) -> Iterator[Step]:
        """Walk x down the path, yielding a Step for each level after the first.

        Args:
            denoise: (x, level) → Prediction.
            x: the picture at the path's first level (for ddim-inversion at its last), any shape (B, …).
            path: levels whose noise strictly falls, usually down to σ = 0.
            noise: x → fresh standard normal noise like x.
            settings: the sampler's own, see ``settings``; BadRequest for one that it does not have.
        """
        check_settings(f"sampler {self.name!r}", settings, self.settings)
        for key, value in settings.items():
            low, high = LIMITS[key]
            whole = isinstance(self.settings[key], int)
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                what = "a whole number" if whole else "a number"
                raise BadRequest(f"sampler {self.name!r}: {key} must be {what} from {low:g} to {high:g}, not {value!r}")
        return self.run(denoise, x, path if isinstance(path, Path) else Path(path), noise, **settings)


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddpm", partial(ddim, eta=1.0), 1, "ancestral sampling: DDIM with all of DDPM's noise", stochastic=True,
            aliases=("DDPMScheduler",),
        ),
        Sampler("ddim", ddim, 1, "the ODE's first-order step; eta adds noise", aliases=("DDIMScheduler",)),
        Sampler(
            "ddim-inversion", ddim_inversion, 1, "up from a picture to the noise that makes it; setting refine",
            calls=6, aliases=("DDIMInverseScheduler",),
        ),
        Sampler(
            "euler", ddim, 1, "the same loop as ddim",
            aliases=("EulerDiscreteScheduler", "EDMEulerScheduler"),
        ),
        Sampler(
            "euler-ancestral", partial(ddim, eta=1.0), 1, "the same loop as ddpm", stochastic=True,
            aliases=("Euler a", "EulerAncestralDiscreteScheduler"),
        ),
        Sampler(
            "heun", heun, 2, "EDM's trapezoid rule, with churn; depends on the schedule's coordinates", calls=2,
            aliases=("HeunDiscreteScheduler",),
        ),
        Sampler(
            "dpm-2", dpm_2, 2, "midpoint rule on the noise", calls=2,
            aliases=("DPM2", "DPM-Solver-2", "KDPM2DiscreteScheduler"),
        ),
        Sampler(
            "dpm-2-ancestral", partial(dpm_2, eta=1.0), 2, "dpm-2 with fresh noise", stochastic=True, calls=2,
            aliases=("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
        ),
        Sampler(
            "plms", plms, 2, "four-step Adams-Bashforth on the noise, improved-Euler start",
            aliases=("PNDM", "PNDMScheduler"),
        ),
        Sampler("dpmpp-1", ddim, 1, "the same loop as ddim", aliases=("DPM++ 1", "DPM-Solver++(1)")),
        Sampler(
            "dpmpp-2s", dpmpp_2s, 2, "midpoint rule on the picture", calls=2,
            aliases=("DPM++ 2S", "DPM-Solver++(2S)", "DPMSolverSinglestepScheduler"),
        ),
        Sampler(
            "dpmpp-2s-ancestral", partial(dpmpp_2s, eta=1.0), 2, "dpmpp-2s with fresh noise", stochastic=True, calls=2,
            aliases=("DPM++ 2S a",),
        ),
        Sampler(
            "dpmpp-2m", dpmpp_2m, 2, "two-step extrapolation of the picture: a good default",
            aliases=("DPM++ 2M", "DPM-Solver++(2M)", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
        ),
        Sampler(
            "dpmpp-3m", dpmpp_3m, 2, "three-step extrapolation; order 2 by its published weights, smaller error",
            aliases=("DPM++ 3M", "DPM-Solver++(3M)"),
        ),
        Sampler(
            "dpmpp-sde", dpmpp_sde, 2, "midpoint rule on the picture with fresh noise", stochastic=True, calls=2,
            aliases=("DPM++ SDE", "DPMSolverSDEScheduler"),
        ),
        Sampler(
            "dpmpp-2m-sde", partial(dpmpp_2m, eta=1.0), 2, "dpmpp-2m with fresh noise", stochastic=True,
            aliases=("DPM++ 2M SDE",),
        ),
        Sampler(
            "unipc", unipc, 3, "a predictor, and a corrector that costs no call; setting order",
            aliases=("uni_pc", "UniPCMultistepScheduler"),
        ),
        Sampler(
            "lcm", lcm, 0, "for consistency models: a whole picture each step", stochastic=True,
            aliases=("LCMScheduler",),
        ),
        Sampler("flow-euler", ddim, 1, "the same loop as ddim", aliases=("FlowMatchEulerDiscreteScheduler",)),
        Sampler("flow-heun", heun, 2, "the same loop as heun", calls=2, aliases=("FlowMatchHeunDiscreteScheduler",)),
    )
}  # fmt: skip


def find_sampler(name: str) -> Sampler:
    """Return the sampler of a name or alias, whatever its case; BadRequest names the nearest."""
    table = {plain(key): s for s in SAMPLERS.values() for key in (s.name, *s.aliases)}
    if plain(name) not in table:
        raise BadRequest(f"unknown sampler {name!r}{nearest(plain(name), list(table))}; see `sfumato samplers`")
    return table[plain(name)]
