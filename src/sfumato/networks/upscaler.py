"""Enlargement of a picture by 4: convolutions at its own resolution, added to its nearest-neighbour enlargement.

    y = enlarge(x) + shuffle(convolutions(x))

Source: the compact network of Wang et al., Real-ESRGAN (2107.10833), trained for drawings ("animevideov3").
Shapes: B pictures, H × W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UpscalerConfig:
    """``body`` convolutions of ``width`` channels between the first and the last; ``factor``: of enlargement."""

    width: int = 64
    body: int = 16
    factor: int = 4


class Upscaler(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] → (B, 3, f·H, f·W), which may leave that range a little."""

    def __init__(self, config: UpscalerConfig = UpscalerConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for i in range(config.body + 1):
            layers += [nn.Conv2d(config.width if i else 3, config.width, 3, padding=1), nn.PReLU(config.width)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.width, 3 * config.factor**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge pictures."""
        details = F.pixel_shuffle(self.layers(x), self.config.factor)
        return details + F.interpolate(x, scale_factor=float(self.config.factor), mode="nearest")
