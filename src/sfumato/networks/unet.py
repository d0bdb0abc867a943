"""The text-conditional U-Net: DDPM's (2006.11239) with the cross-attention of latent diffusion (2112.10752).

    x ─ conv ─ [ResBlock, Attention]×n ─ ↓ ─ … ─ ↓ ─ [ … ] ─ middle ─ [ … ] ─ ↑ ─ … ─ ↑ ─ [ResBlock, Attention]×n ─ conv
                         └───────────────────────── skip connections ─────────────────────────────┘

Shapes: x (B, C, H, W), clock (B,), context (B, M, D), mask (B, M), pooled (B, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import Attention, FeedForward, TimeEmbedding, group_norm, of_vectors, zero
from sfumato.networks.fused import norm_silu


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's shape.

    Args:
        patch: side of the squares of pixels that become one cell, as channels (simple diffusion, 2301.11093).
        widths: channels of each resolution, finest first; each next one has half the side.
        blocks: residual blocks per resolution on the way down (one more on the way up).
        attention: for each resolution, whether its blocks attend to themselves and to the words.
        clock_scale: brings the clock to about 0…1000, for which the sinusoids are made.
    """

    in_channels: int = 3
    out_channels: int = 3
    patch: int = 1
    widths: tuple[int, ...] = (64, 128, 192)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, True, True)
    heads: int = 4
    context_dim: int = 256
    clock_scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.attention):
            raise ValueError("a U-Net needs as many attention flags as widths")

    @property
    def multiple(self) -> int:
        """A picture's sides must be multiples of this."""
        return self.patch * 2 ** (len(self.widths) - 1)


class ResBlock(nn.Module):
    """Two convolutions around a scale and shift by the embedding (B, E); (B, C, H, W) → (B, out, H, W)."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out)
        self.norm2 = group_norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, out, H, W) from x (B, C, H, W)."""
        h = self.conv1(norm_silu(x, self.norm1))
        scale, shift = of_vectors(self.modulation, F.silu(embedding)).chunk(2, dim=1)  # (B, out)
        h = norm_silu(h, self.norm2, scale, shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the words, feed-forward, over the cells of a picture."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, heads)
        self.cross_attention = Attention(channels, heads, context_dim)
        self.feed_forward = FeedForward(channels)
        for last in (self.self_attention.to_out, self.cross_attention.to_out, self.feed_forward[-1]):
            zero(last)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Return x (B, C, H, W) with what its cells learned of each other and of the words."""
        h, w = x.shape[-2:]
        y = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        y = y + self.self_attention(self.norm1(y))
        y = y + self.cross_attention(self.norm2(y), context, mask)
        y = y + self.feed_forward(self.norm3(y))
        return y.transpose(1, 2).unflatten(2, (h, w))


class Stage(nn.Module):
    """A residual block, followed by attention where the resolution has it."""

    def __init__(self, channels: int, out: int, embedding: int, attention: bool, config: UNetConfig):
        super().__init__()
        self.res = ResBlock(channels, out, embedding, config.dropout)
        self.attention = TransformerBlock(out, config.heads, config.context_dim) if attention else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, out, H, W) from x (B, C, H, W)."""
        x = self.res(x, embedding)
        return x if self.attention is None else self.attention(x, context, mask)


class Upsample(nn.Module):
    """Double the side by repetition, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, 2·H, 2·W) from x (B, C, H, W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Split noisy pictures, told their noise level by the clock and their content by words."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, embedding = config.widths, 4 * config.widths[0]
        self.time = TimeEmbedding(widths[0], embedding, config.clock_scale)
        self.pooled = nn.Linear(config.context_dim, embedding)
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        channels, skips = widths[0], [widths[0]]
        for i, (width, attention) in enumerate(zip(widths, config.attention, strict=True)):
            for _ in range(config.blocks):
                self.down.append(Stage(channels, width, embedding, attention, config))
                skips.append(channels := width)
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)

        self.middle = nn.ModuleList(
            [
                Stage(channels, channels, embedding, True, config),
                Stage(channels, channels, embedding, False, config),
            ]
        )

        self.state_widths = [*skips[1:], channels]  # of ``every_state``
        self.up = nn.ModuleList()
        for i, (width, attention) in reversed(list(enumerate(zip(widths, config.attention, strict=True)))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(channels + skips.pop(), width, embedding, attention, config))
                channels = width
            if i > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(channels)
        self.conv_out = zero(nn.Conv2d(channels, config.out_channels * config.patch**2, 3, padding=1))

    def forward(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        """Return the network's output (B, C_out, H, W); its meaning is the parameterization's affair."""
        skips, h, embedding = self._descend(x, clock, context, mask, pooled)
        for layer in self.up:
            h = (
                layer(torch.cat([h, skips.pop()], 1), embedding, context, mask)
                if isinstance(layer, Stage)
                else layer(h)
            )
        return F.pixel_shuffle(self.conv_out(norm_silu(h, self.norm_out)), self.config.patch)

    def every_state(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None
    ) -> list[Tensor]:
        """The states (B, N, D) after each stage on the way down, and in the middle: what the network sees in x."""
        skips, middle, _ = self._descend(x, clock, context, mask, pooled)
        return [h.flatten(2).transpose(1, 2) for h in (*skips[1:], middle)]

    def _descend(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None, pooled: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """What each stage on the way down leaves, what comes out of the middle, and the embedding of the level."""
        embedding = self.time(clock)  # (B, E)
        if pooled is not None:
            embedding = embedding + of_vectors(self.pooled, pooled)
        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding, context, mask) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding, context, mask)
        return skips, h, embedding
