"""The picture's side of a CLIP: what a pretrained trunk sees of a picture, as a vector comparable with words.

Shapes: B pictures, F features of the trunk, D width of the space that words and pictures share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.efficientnet import EfficientNetLite0

SIDE = 128  # pixels of side at which the trunk looks


@dataclass(frozen=True)
class PictureHeadConfig:
    """The head's shape: ``features`` of the trunk through ``hidden`` units."""

    features: int = 1432
    hidden: int = 512
    dropout: float = 0.3


class PictureHead(nn.Module):
    """Features (B, F), standardized, through two layers to (B, D)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PictureHeadConfig, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("deviation", torch.ones(config.features))
        self.layers = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.features, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, dim),
        )

    def standardize(self, features: Tensor) -> None:
        """Take mean and deviation from the training pictures' features (N, F)."""
        self.mean.copy_(features.float().mean(0))
        self.deviation.copy_(features.float().std(0) + 1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) → (B, D)."""
        return self.layers((features.float() - self.mean) / self.deviation)


def look(trunk: EfficientNetLite0, x: Tensor) -> Tensor:
    """The trunk's features (B, 1432) of pictures (B, 3, H, W) in [−1, 1], brought to 128 × 128 pixels."""
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    maps = trunk(x.contiguous(memory_format=torch.channels_last))
    return torch.cat([maps[i].mean((2, 3)) for i in (2, 4, 7)], 1)
