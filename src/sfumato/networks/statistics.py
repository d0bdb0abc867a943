"""Group norms (Wu & He 1803.08494) by mean and variance that may be another picture's than the one they normalize.

    y = (x − mean) / √(variance + ε) · weight + bias

A picture that goes through a network part by part would be normalized differently in every part. A sample of all of it
that goes first, through ``with_fixed_norms`` of the network, tells the parts that follow what to be normalized by.

Shapes: B pictures, C channels in G groups.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.networks.stored import twin

M = TypeVar("M", bound=nn.Module)

AT_ONCE = 1 << 20  # numbers whose squares are held at one time


class FixedNorm(nn.GroupNorm):
    """A group norm that keeps the statistics of the first input it gets; its weights are the given one's."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self._taken: tuple[Tensor, Tensor] | None = None

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``statistics`` says of the first input; (B, G, 1) both."""
        if self._taken is None:
            self._taken = statistics(x, self)
        return self._taken

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W)."""
        return apply(input, *affine(input, self))


def with_fixed_norms(network: M) -> M:
    """A network of the same weights, whose group norms normalize everything as its first input wants to be."""
    fixed = twin(network)
    for module in list(fixed.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, FixedNorm(child))
    return fixed


def statistics(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + ε) of each group of x (B, C, H, W), at least in float32; (B, G, 1) both."""
    groups = x.reshape(len(x), norm.num_groups, -1)  # (B, G, C/G·H·W)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = groups.mean(-1, keepdim=True, dtype=wide)
    squares = [
        (part - mean).square_().sum(-1, keepdim=True) for part in groups.split(max(1, AT_ONCE // groups.shape[1]), -1)
    ]
    return mean, torch.rsqrt(torch.stack(squares).sum(0) / groups.shape[-1] + norm.eps)


def affine(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """What a group norm multiplies each channel of x by and adds to it, (B, C, 1, 1) both."""
    mean, rate = norm.statistics(x) if isinstance(norm, FixedNorm) else statistics(x, norm)
    scale = rate * norm.weight.view(1, norm.num_groups, -1)  # (B, G, C/G)
    shift = norm.bias.view(1, norm.num_groups, -1) - mean * scale
    return scale.flatten(1)[..., None, None], shift.flatten(1)[..., None, None]


def apply(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift, in x's type."""
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
