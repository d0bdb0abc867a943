"""LPIPS, a distance between pictures that agrees with people's judgement.

    d(x, y) = Σ_l mean_hw Σ_c w_lc · (x̂_lchw − ŷ_lchw)²,   x̂_l = x_l / |x_l| over channels

with the maps x_l of a classifier's five layers and weights w ≥ 0 learned from people's choices.
Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (1801.03924), v0.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, pictures in [−1, 1]
SMALL = 1e-10


def alexnet() -> tuple[list[nn.Module], list[int]]:
    """AlexNet's five convolutions, one module per map, and the maps' channels."""
    pool = nn.MaxPool2d(3, 2)
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU()),
        nn.Sequential(pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(pool, nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ], [64, 192, 384, 256, 256]


def vgg16() -> tuple[list[nn.Module], list[int]]:
    """VGG16's five groups of convolutions, one module per map, and the maps' channels."""
    groups, channels, c = [], [64, 128, 256, 512, 512], 3
    for i, (repeats, out) in enumerate(zip((2, 2, 3, 3, 3), channels, strict=True)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for _ in range(repeats):
            layers += [nn.Conv2d(c, out, 3, padding=1), nn.ReLU()]
            c = out
        groups.append(nn.Sequential(*layers))
    return groups, channels


TRUNKS = {"alex": alexnet, "vgg": vgg16}
SMALLEST = {"alex": 31, "vgg": 16}  # sides of pictures that leave something for the last pooling


class LPIPS(nn.Module):
    """The distance of pictures x and y (B, 3, H, W) in [−1, 1], as (B,); 0 for equal ones.

    Args:
        net: ``alex``, the authors' choice for measuring, or ``vgg``, for training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        layers, channels = TRUNKS[net]()
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ParameterList(torch.ones(c) for c in channels)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the trunk's five maps, each (B, C, H, W)."""
        x = (x - self.mean) / self.deviation
        maps: list[Tensor] = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance (B,) of pairs of pictures."""
        return self.distance(self.maps(x), self.maps(y))

    def distance(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Return the distance (B,) of pictures whose maps are known."""
        parts = [
            torch.einsum("bchw,c->b", (_unit(a) - _unit(b)) ** 2, w) / (a.shape[2] * a.shape[3])
            for a, b, w in zip(x, y, self.heads, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(1, keepdim=True).sqrt() + SMALL)
