"""The training objective: draw a level, mix, predict, compare, weight.

    x_t = α·x0 + σ·ε,   loss = w(t) · ‖a·x0 + b·ε − network(x_t, clock, words)‖²

(a, b) is the parameterization's row; nothing here knows which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, q_sample
from sfumato.diffusion.parameterizations import Parameterization
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadData, nearest
from sfumato.training.recipe import ObjectiveConfig


@dataclass(frozen=True)
class Losses:
    """Each picture's loss (B,), and the share of the schedule's range its level was drawn at (B,).

    ``error`` (B,) is what is shown by level, where the loss holds more than depends on it.
    """

    loss: Tensor
    place: Tensor
    error: Tensor | None = None


def _uniform(config: ObjectiveConfig, u: Tensor) -> Tensor:
    return u


def _logit_normal(config: ObjectiveConfig, u: Tensor) -> Tensor:
    return torch.sigmoid(config.mean + config.deviation * torch.special.ndtri(u))


def _no_weight(config: ObjectiveConfig, parameterization: Parameterization, level: NoiseLevel) -> Tensor | float:
    return 1.0


def _min_snr(config: ObjectiveConfig, parameterization: Parameterization, level: NoiseLevel) -> Tensor | float:
    # min(SNR, γ) is a weight on the error of x0 (2303.09556, section 3.4); loss_scale turns it into one on
    # the network's own output, whatever that means.
    snr = (level.alpha / level.sigma) ** 2
    return snr.clamp(max=config.gamma) / parameterization.loss_scale(level)


# Quantile functions: from uniform numbers in (0, 1) to shares of the schedule's range.
TIMES: dict[str, Callable[[ObjectiveConfig, Tensor], Tensor]] = {
    "uniform": _uniform,  # DDPM
    "logit-normal": _logit_normal,  # 2403.03206, eq. 19
}
WEIGHTS: dict[str, Callable[[ObjectiveConfig, Parameterization, NoiseLevel], Tensor | float]] = {
    "none": _no_weight,
    "min-snr": _min_snr,
}


class DenoisingObjective:
    """Loss of a denoiser under a schedule and a parameterization."""

    def __init__(self, schedule: Schedule, parameterization: Parameterization, config: ObjectiveConfig):
        for kind, name, table in (("times", config.times, TIMES), ("weight", config.weight, WEIGHTS)):
            if name not in table:
                raise BadData(
                    f"objective: no {kind} named {name!r}{nearest(name, list(table))}; there are {list(table)}"
                )
        _check(config)
        self.schedule, self.parameterization, self.config = schedule, parameterization, config
        self._check_noisiest()

    def __call__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        u: Tensor,
        eps: Tensor,
        beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Losses:
        """Return the losses of a network(x, clock).

        Args:
            x0: clean pictures (B, C, H, W).
            u: uniform numbers in (0, 1), (B,), that decide the levels.
            eps: standard normal noise like x0.
            beside: what is added to the loss: (predicted x0, place in the schedule's range (B,)) → (B,).
        """
        place = TIMES[self.config.times](self.config, u)  # (B,) in [0, 1]
        level = self.schedule(times_at(self.schedule, place).to(x0)[:, None, None, None])  # fields (B, 1, 1, 1)
        p = self.parameterization
        clock = flat(p.clock(level), len(x0), x0)
        x = q_sample(x0, eps, level)
        out = network(p.gain(level) * x, clock).float()
        error = (out - p.target(x0, eps, level)).pow(2)
        loss = (WEIGHTS[self.config.weight](self.config, p, level) * error).mean(dim=(1, 2, 3))
        whole = loss if beside is None else loss + beside(p(x, level, out).x0, place)
        return Losses(whole, place, error=loss)

    def _check_noisiest(self) -> None:
        """Raise BadData where the loss has no number at the noisiest of discrete levels; continuous ones miss it."""
        if self.schedule.steps is None:
            return
        p, x0 = self.parameterization, torch.ones(1, 1, 1, 1)
        level = self.schedule(torch.full_like(x0, self.schedule.t_max))
        told = torch.as_tensor(p.clock(level), dtype=torch.float32)
        weight = torch.as_tensor(WEIGHTS[self.config.weight](self.config, p, level), dtype=torch.float32)
        if not (told.isfinite().all() and weight.isfinite().all()):
            raise BadData(
                f"objective: {p.name} with weight {self.config.weight} has no finite loss at this schedule's noisiest "
                "level (alpha = 0): take v, flow or x0, or a schedule without zero terminal SNR"
            )


def times_at(schedule: Schedule, place: Tensor) -> Tensor:
    """Times (B,) at shares of a schedule's range (B,) in [0, 1]; discrete ones have equal parts of it."""
    if schedule.steps is None:
        return schedule.t_min + place * (schedule.t_max - schedule.t_min)
    return schedule.t_min + (place * schedule.steps).floor().clamp(max=schedule.steps - 1)


def _check(config: ObjectiveConfig) -> None:
    for name in ("deviation", "gamma"):
        if not 0 < getattr(config, name) < math.inf:  # NaN is neither
            raise BadData(f"objective: {name} must be a number above 0, not {getattr(config, name)!r}")
    if not math.isfinite(config.mean):
        raise BadData(f"objective: mean must be a number, not {config.mean!r}")


def flat(clock: Any, n: int, like: Tensor) -> Tensor:
    """A clock, of one level or of each picture's, as the network takes it: float32 (n,)."""
    return torch.as_tensor(clock, dtype=torch.float32, device=like.device).reshape(-1).expand(n)


def loss_by_level(losses: Losses, bins: int = 4) -> list[float]:
    """Mean error in equal slices of the schedule's range, cleanest first; NaN where none fell."""
    slot = (losses.place * bins).long().clamp(max=bins - 1)
    error = (losses.loss if losses.error is None else losses.error).detach()
    return [float(error[slot == i].mean()) if (slot == i).any() else math.nan for i in range(bins)]
