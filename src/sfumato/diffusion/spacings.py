"""Timestep spacings: from a schedule and a number of steps to the levels that a sampler visits.

    path = [level_0, …, level_{n−1}, clean],      σ/α strictly falling, σ = 0 at the end

| name        | level k of n, k = 0 … n−1                                                | visits t_max |
|-------------|--------------------------------------------------------------------------|--------------|
| leading     | index (n−1−k)·⌊T/n⌋ + offset                                             | no           |
| trailing    | index round(T·(n−k)/n) − 1                                               | yes          |
| linspace    | n times evenly from t_max to t_min, rounded to an index                  | yes          |
| karras      | (σ/α)^(1/ρ) falls evenly                                                 | yes          |
| exponential | log(σ/α) falls evenly                                                    | yes          |
| shift       | trailing's fraction τ of the time becomes s·τ/(1 + (s−1)·τ)              | yes          |
| beta        | trailing's fraction τ becomes the τ-quantile of a beta distribution      | yes          |

Where time is continuous there is nothing to round and T is the length of the range.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadRequest, nearest

RATIO_MAX = 80.0  # karras and exponential take a noisier end than this σ/α for this; EDM's σ_max


class Path(list[NoiseLevel]):
    """The levels from noise to picture that a sampler visits, and the curve on which they lie.

    Args:
        levels: at least two, their noise strictly falling.
        schedule: the curve; without it, the one of VP, flow and VE that fits the levels best.
    """

    def __init__(self, levels: Iterable[NoiseLevel], schedule: Schedule | None = None) -> None:
        """Hold the levels; BadRequest for fewer than two."""
        super().__init__(levels)
        self.schedule = schedule
        if len(self) < 2:
            raise BadRequest("a path needs at least two noise levels")

    def tail(self, start: int) -> Path:
        """The path from one of its levels on, as image-to-image walks it."""
        return Path(self[start:], self.schedule)

    def last(self, share: float) -> Path:
        """The last ``share``, in (0, 1], of the path's steps, as image-to-image walks them.

        It starts at one of the path's levels, or between two of them in time, so that the noise at its start grows
        steadily with the share and any number of steps will do.
        """
        place = round((len(self) - 1) * (1 - share), 6)
        k = min(int(place), len(self) - 2)
        if self.schedule is None or place == k:
            return self.tail(k)
        t = self[k].t + (place - k) * (self[k + 1].t - self[k].t)
        return Path([self.schedule(max(t, min(self.schedule.t_min, self[k].t))), *self[k + 1 :]], self.schedule)

    def between(self, p: NoiseLevel, q: NoiseLevel, log_snr: float) -> NoiseLevel:
        """The level on the curve through p and q with a given, finite 2·log(α/σ), held within the schedule's range."""
        if self.schedule is not None:
            level = self.schedule.at_log_snr(log_snr)
            if not p.log_snr < log_snr < q.log_snr or p.log_snr < level.log_snr < q.log_snr:
                return level  # else p and q lie below the schedule's range, but within its curve
        size = min(_SIZES, key=lambda f: max(f(*n[1:]) for n in self) / min(f(*n[1:]) for n in self))
        w = (log_snr - p.log_snr) / (q.log_snr - p.log_snr)
        sigma = 1 / (1 + math.exp(log_snr / 2))  # on α + σ = 1; only the direction counts
        scale = ((1 - w) * size(*p[1:]) + w * size(*q[1:])) / size(1 - sigma, sigma)
        return NoiseLevel((1 - w) * p.t + w * q.t, scale * (1 - sigma), scale * sigma)


def _alpha(alpha: float, sigma: float) -> float:
    return alpha or math.ulp(0.0)


def _sum(alpha: float, sigma: float) -> float:
    return alpha + sigma


_SIZES: list[Callable[[float, float], float]] = [math.hypot, _sum, _alpha]  # constant along VP, flow, VE


def leading(schedule: Schedule, steps: int, offset: Any = 0) -> list[float]:
    """Multiples of ⌊T/n⌋ plus an offset (DDIM; Stable Diffusion 1 and 2 with offset 1)."""
    if not isinstance(offset, (int, float)) or not 0 <= offset < math.inf:
        raise BadRequest(f"spacing: offset must be a number of at least 0, not {offset!r}")
    span = schedule.t_max - schedule.t_min
    unit = span / steps if schedule.steps is None else schedule.steps // steps
    return [float(schedule.t_min + unit * k + offset) for k in reversed(range(steps))]


def trailing(schedule: Schedule, steps: int) -> list[float]:
    """Even steps down from the noisiest time (Lin et al. 2305.08891, table 2)."""
    if schedule.steps is None:
        return [_at_fraction(schedule, k / steps) for k in range(steps, 0, -1)]
    return [float(round(schedule.steps * k / steps) - 1) for k in range(steps, 0, -1)]


def linspace(schedule: Schedule, steps: int) -> list[float]:
    """Even steps from the noisiest time to the least noisy one, both included."""
    low, high = schedule.t_min, schedule.t_max
    times = [low + (high - low) * k / max(steps - 1, 1) for k in reversed(range(steps))]
    times[0] = high
    return times if schedule.steps is None else [float(round(t)) for t in times]


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> list[NoiseLevel]:
    """(σ/α)^(1/ρ) falls evenly (Karras et al. 2206.00364, eq. 5)."""
    _positive("rho", rho)
    low, high = (r ** (1 / rho) for r in _ratios(schedule))
    return _at_ratios(schedule, [(high + (low - high) * k / max(steps - 1, 1)) ** rho for k in range(steps)])


def exponential(schedule: Schedule, steps: int) -> list[NoiseLevel]:
    """log(σ/α) falls evenly, so every step has the same h in DPM-Solver's terms (2206.00927)."""
    low, high = (math.log(r) for r in _ratios(schedule))
    return _at_ratios(schedule, [math.exp(high + (low - high) * k / max(steps - 1, 1)) for k in range(steps)])


def shift(schedule: Schedule, steps: int, s: float = 3.0) -> list[float]:
    """Trailing's fractions of the time, moved towards the noise for s > 1 (SD3, 2403.03206, eq. 23)."""
    _positive("s", s)
    fractions = (k / steps for k in range(steps, 0, -1))
    return [_at_fraction(schedule, tau / (tau + (1 - tau) / s)) for tau in fractions]


def beta(schedule: Schedule, steps: int, alpha: float = 0.6, beta: float = 0.6) -> list[float]:
    """Quantiles of a beta distribution over the time: dense at both ends (Lee et al. 2407.12173)."""
    _positive("alpha", alpha)
    _positive("beta", beta)
    special: Any = importlib.import_module("scipy.special")  # lazily: it takes a tenth of a second
    low, high = schedule.t_min, schedule.t_max
    fractions = [k / steps for k in range(steps, 0, -1)]
    return [low + (high - low) * float(special.betaincinv(alpha, beta, tau)) for tau in fractions]


def _at_fraction(schedule: Schedule, tau: float) -> float:
    """The time at a fraction τ of the way from clean (0) to noisiest (1)."""
    return schedule.clean.t + (schedule.t_max - schedule.clean.t) * tau


def _ratios(schedule: Schedule) -> tuple[float, float]:
    low, high = schedule(schedule.t_min), schedule(schedule.t_max)
    return low.sigma / low.alpha, min(high.sigma / high.alpha if high.alpha > 0 else math.inf, RATIO_MAX)


def _at_ratios(schedule: Schedule, ratios: list[float]) -> list[NoiseLevel]:
    inner = (schedule.at_log_snr(-2 * math.log(r)) for r in ratios[1:])
    return [schedule(schedule.t_max), *inner]


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise BadRequest(f"spacing: {name} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class Spacing:
    """A named way to place levels.

    Args:
        run: (schedule, steps, **settings) → n noise levels, or n times of them, noisiest first.
        aliases: what other programs call it.
        summary: one line for ``sfumato samplers``.
    """

    name: str
    run: Callable[..., list[NoiseLevel] | list[float]]
    summary: str
    aliases: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Names and defaults of the settings that it takes."""
        return settings_of(self.run, 2)

    def __call__(self, schedule: Schedule, steps: int, **settings: Any) -> Path:
        """Return a path of ``steps`` + 1 levels that ends at σ = 0.

        Raises BadRequest for steps < 1 or beyond the schedule's own, and for an unknown setting.
        """
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
            raise BadRequest(f"steps must be a whole number of at least 1, not {steps!r}")
        if schedule.steps is not None and steps > schedule.steps:
            raise BadRequest(f"the noise schedule has {schedule.steps} steps; asked for {steps}")
        check_settings(f"spacing {self.name!r}", settings, self.settings)
        places = self.run(schedule, int(steps), **settings)
        levels = [place if isinstance(place, NoiseLevel) else schedule(place) for place in places]
        path = Path([*levels, schedule.clean], schedule)
        inside = all(schedule.clean.t < level.t <= schedule.t_max for level in levels)
        if not inside or not all(p.log_snr < q.log_snr for p, q in pairwise(path)):
            raise BadRequest(
                f"spacing {self.name!r} cannot place {steps} distinct levels on this noise schedule"
                f"{' with ' + ', '.join(f'{k}={v}' for k, v in settings.items()) if settings else ''}; take fewer steps"
            )
        return path


def settings_of(run: Callable[..., Any], skip: int) -> dict[str, Any]:
    """Names and defaults of a function's parameters after the first few."""
    parameters = list(inspect.signature(run).parameters.values())[skip:]
    return {p.name: p.default for p in parameters}


def check_settings(what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise BadRequest for a setting that is not known, naming the nearest."""
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise BadRequest(f"{what} has no setting {name!r}{nearest(name, list(known))} ({takes})")


def plain(name: str) -> str:
    """The form in which names are compared: lower case, with hyphens."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


SPACINGS: dict[str, Spacing] = {
    spacing.name: spacing
    for spacing in (
        Spacing("leading", leading, "multiples of T/n from the clean end up; setting offset", ("ddim_uniform",)),
        Spacing("trailing", trailing, "even steps of time down from the noisiest", ("sgm_uniform", "simple")),
        Spacing("linspace", linspace, "even steps of time, both ends included", ("normal", "uniform")),
        Spacing("karras", karras, "dense near the picture; setting rho", ("use_karras_sigmas",)),
        Spacing("exponential", exponential, "even steps of log noise", ("use_exponential_sigmas",)),
        Spacing("shift", shift, "more time at high noise; setting s", ("flow_shift", "discrete_flow_shift")),
        Spacing("beta", beta, "dense at both ends; settings alpha, beta", ("use_beta_sigmas",)),
    )
}


def find_spacing(name: str) -> Spacing:
    """Return the spacing of a name or alias, whatever its case; BadRequest names the nearest."""
    table = {plain(key): s for s in SPACINGS.values() for key in (s.name, *s.aliases)}
    if plain(name) not in table:
        raise BadRequest(
            f"unknown spacing {name!r}{nearest(plain(name), list(table))}; there are {', '.join(SPACINGS)}"
        )
    return table[plain(name)]
