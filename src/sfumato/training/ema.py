"""The exponential moving average of weights that sampling uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Averages of a module's parameters and buffers: e ← d·e + (1−d)·w, with d warmed up as (1+n)/(10+n)."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after training step ``step`` (counted from 0)."""
        d = min(self.decay, (1 + step) / (10 + step))
        new = [v.detach().float() for v in module.state_dict().values()]
        torch._foreach_lerp_(list(self.average.values()), new, 1 - d)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged state dict."""
        return self.average
