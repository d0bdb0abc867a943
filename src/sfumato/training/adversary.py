"""An adversary for a student of few steps: it looks at where the student arrives through its teacher's eyes.

    arrived at s ──noise──> τ ──teacher, frozen──> states of each layer ──heads──> opinions, one per cell

The heads learn to tell the student's pictures from noised real ones, by the hinge max(0, 1 − real) + max(0, 1 + made);
the student learns to raise their opinion of its own. Both look at a level τ no lower than s, at which the teacher
knows its way: at a clean picture it is never asked. Sources: a frozen denoiser's states as features, adversarial
diffusion distillation in latents (LADD, 2403.12015, section 3); beside a loss of distillation (2311.17042, eq. 1);
judged where each segment ends (2402.13929, section 3.2).

Shapes: B pictures, N_l cells of width D_l in layer l, N = Σ N_l.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.diffusion.level import q_renoise, q_sample
from sfumato.training.consistency import ConsistencyObjective
from sfumato.training.objective import flat

HIDDEN = 64
States = Sequence[Tensor]  # of each layer, (B, N_l, D_l)


class Heads(nn.Module):
    """A small perceptron for each layer's states (B, N_l, D_l): how real it finds each cell, (B, N)."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        # Not a list: FSDP shards a list's items apart, where ``opposed`` could not take their weights.
        self.layers = nn.ModuleDict({str(i): _head(d) for i, d in enumerate(widths)})

    def forward(self, *states: Tensor) -> Tensor:
        """Opinions of all layers' cells."""
        return torch.cat([head(s)[..., 0] for head, s in zip(self.layers.values(), states, strict=True)], 1)


def _head(width: int) -> nn.Module:
    norm = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))


def opposed(judge: nn.Module, real: States, made: States) -> tuple[Tensor, Tensor]:
    """The loss of who made it and the judge's own, (B,) each: neither moves the other's weights.

    Args:
        judge: what it is given, one tensor or several → opinions (B, …).
    """
    fixed = {k: v.detach() for k, v in judge.named_parameters()}
    fooled = -functional_call(judge, fixed, tuple(made)).float().flatten(1).mean(1)
    of_real, of_made = judge(*real).float(), judge(*(v.detach() for v in made)).float()
    return fooled, (F.relu(1 - of_real) + F.relu(1 + of_made)).flatten(1).mean(1)


def looked_at(
    o: ConsistencyObjective, look: Callable[[Tensor, Tensor], States], x0: Tensor, x: Tensor, end: Tensor,
    where: Tensor, eps: Tensor,
) -> tuple[States, States]:  # fmt: skip
    """What is seen of real pictures, and of a student's arrivals, at one level above these.

    Args:
        look: (the network's input, its clock) → states of each layer.
        x0: real pictures (B, C, H, W); ``eps``: standard normal noise like them.
        x: the arrivals, at places ``end`` (B,) of the teacher's path.
        where: uniform numbers in (0, 1), (B,), that decide the level.
    """
    level, noisier = o.level(end, x), o.level((where * end).long().minimum(end - 1), x)
    gain, clock = o.parameterization.gain(noisier), flat(o.parameterization.clock(noisier), len(x), x)
    with torch.no_grad():
        real = look(gain * q_sample(x0, eps, noisier), clock)
    return real, look(gain * q_renoise(x, eps, level, noisier), clock)
