"""The exponential moving averages of weights that sampling uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.training.world import local


class EMA:
    """Averages of a module's state: e ← d·e + (1−d)·w, with d warmed up as min(d, (1+n)/(10+n)).

    Args:
        decays: one average is kept for each; the first is the one that is sampled from and shipped.
    """

    def __init__(self, module: nn.Module, decays: tuple[float, ...]):
        self.decays = decays
        self.averages = [{k: v.detach().clone().float() for k, v in module.state_dict().items()} for _ in decays]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after training step ``step``, counted from 0."""
        new = [local(v.detach()).float() for v in module.state_dict().values()]
        for decay, average in zip(self.decays, self.averages, strict=True):
            d = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([local(v) for v in average.values()], new, 1 - d)  # pyright: ignore

    def tensors(self) -> dict[str, Tensor]:
        """All averages under flat names, sharing their memory."""
        return {f"{i}.{k}": v for i, average in enumerate(self.averages) for k, v in average.items()}
