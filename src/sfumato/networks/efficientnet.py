"""EfficientNet-lite0, a small image classifier's trunk, for features of pictures.

Source: Tan and Le, "EfficientNet" (1905.11946); the lite variant has no squeeze-and-excitation, ReLU6 for SiLU,
and a stem and head that are not scaled. Shapes: B pictures, C channels, H × W cells.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: more of it below and to the right; output ⌈n / stride⌉."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad and convolve."""
        k, s = self.kernel_size[0], self.stride[0]
        h, w = (max((-(-n // s) - 1) * s + k - n, 0) for n in input.shape[-2:])
        return super().forward(F.pad(input, (w // 2, w - w // 2, h // 2, h - h // 2)))


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalization and, unless it ends a block, ReLU6."""

    def __init__(self, c: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__(SameConv(c, out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(out, eps=1e-3))
        if act:
            self.append(nn.ReLU6())


class MBConv(nn.Module):
    """Inverted bottleneck: widen, mix each channel over space, narrow; with a skip where shapes allow."""

    def __init__(self, c: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = c * expansion
        self.expand = ConvNorm(c, wide) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, out, act=False)
        self.skip = stride == 1 and c == out

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, C, H, W)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """The trunk without its classifier: pictures (B, 3, H, W) in [−1, 1] → the maps of 7 stages and of the head.

    Channels 16, 24, 40, 80, 112, 192, 320, 1280 at strides 2, 4, 8, 16, 16, 32, 32, 32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2)
        c, stages = STEM, nn.ModuleList()
        for repeats, kernel, stride, expansion, out in STAGES:
            blocks = [
                MBConv(c if i == 0 else out, out, kernel, stride if i == 0 else 1, expansion) for i in range(repeats)
            ]
            stages.append(nn.Sequential(*blocks))
            c = out
        self.stages, self.head = stages, ConvNorm(c, HEAD)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the eight maps, the finest first."""
        x = self.stem(((x + 1) * 127.5 - 127) / 128)  # its training's scale
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps, self.head(x)]
