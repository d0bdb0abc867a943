"""Multistep consistency distillation: what a teacher reaches in many small steps, in few large ones.

    t ──teacher──> t′ ──student, as it is──> s          the goal, without gradient
    t ────────────────student──────────────> s          what is learned

The path from noise to picture is cut into as many segments as the student shall take steps; t is a level of the
teacher's finer path, t′ the next, s the end of t's segment. What the student should have said at t are the data and
noise that mix to x_t at t and to the goal at s, and its loss is that of any training: ‖a·x0 + b·ε − network(x_t)‖².
With one segment s is the clean picture, and this is consistency distillation (2303.01469, algorithm 2); segments are
of 2403.06807, the guided teacher of 2310.04378. The goal comes from the student itself, not from an average of it
(2310.14189, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.diffusion.level import Denoiser, NoiseLevel, Prediction, q_sample
from sfumato.diffusion.parameterizations import Parameterization
from sfumato.diffusion.schedules import Schedule
from sfumato.diffusion.spacings import SPACINGS
from sfumato.errors import BadData
from sfumato.training.objective import Losses, flat


class ConsistencyObjective:
    """Loss of a student that takes ``steps`` steps where its teacher takes ``steps · substeps``."""

    def __init__(self, schedule: Schedule, parameterization: Parameterization, steps: int, substeps: int):
        self.parameterization, self.steps, self.substeps = parameterization, steps, substeps
        path = SPACINGS["trailing"](schedule, steps * substeps)
        if parameterization.det(path[0]) == 0:
            raise BadData(
                f"a teacher that predicts {parameterization.name} cannot be followed from pure noise, where its "
                "schedule begins: distil one that predicts v, flow or x0"
            )
        self.path = torch.tensor([tuple(level) for level in path], dtype=torch.float64)  # (steps · substeps + 1, 3)

    def __call__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        teacher: Denoiser,
        x0: Tensor,
        u: Tensor,
        eps: Tensor,
        beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Losses:
        """Return the losses of a network(x, clock).

        Args:
            teacher: the denoiser that is followed, with its guidance.
            x0: clean pictures (B, C, H, W); ``eps``: standard normal noise like them.
            u: uniform numbers in (0, 1), (B,), that decide the levels.
            beside: what else there is to lose: (where the student arrives, the places of these levels) → (B,).
        """
        p, n = self.parameterization, self.steps * self.substeps
        i = (u.to(x0.device) * n).long().clamp(max=n - 1)  # (B,)
        end = (i // self.substeps + 1) * self.substeps
        here, there, goal_level = (self.level(k, x0) for k in (i, i + 1, end))
        x = q_sample(x0, eps, here)

        def says(x: Tensor, level: NoiseLevel) -> Tensor:
            return network(p.gain(level) * x, flat(p.clock(level), len(x), x)).float()

        with torch.no_grad():
            y = teacher(x, here).at(there)
            arrived = i + 1 == end
            between = self.level(torch.where(arrived, i, i + 1), x0)  # nobody is asked about a clean picture
            ahead = p(y, between, says(y, between)).at(goal_level)
            goal = torch.where(arrived[:, None, None, None], y, ahead)
        wanted = Prediction.through(x, here, goal, goal_level)
        said = says(x, here)
        error = (said - p.target(wanted.x0, wanted.eps, here)).square().mean((1, 2, 3))
        loss = error if beside is None else error + beside(p(x, here, said).at(goal_level), end)
        return Losses(loss, 1 - (i + 0.5) / n, error)

    def level(self, k: Tensor, like: Tensor) -> NoiseLevel:
        """The path's levels at places (B,), their fields (B, 1, 1, 1)."""
        rows = self.path.to(like.device)[k].to(like)
        return NoiseLevel(*(v[:, None, None, None] for v in rows.unbind(1)))
