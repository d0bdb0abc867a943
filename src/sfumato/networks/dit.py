"""DiT, the transformer over patches of latents, told the time and a class (Peebles & Xie 2212.09748).

    x ─ patches ─ + positions ─ [Block]×n ─ norm ─ linear ─ unpatch ─ noise, and the variance where it is learned

Shapes: x (B, C, H, W), clock (B,), classes (B,), N cells, D width. Modules are named as in the published folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import CrossAttention, Perceptron, ProjectedFeedForward, of_vectors, sinusoids
from sfumato.networks.modulated import Modulation, modulated, unpatch


@dataclass(frozen=True)
class DiTConfig:
    """The network's shape.

    Args:
        out_channels: twice ``in_channels`` where the variance is learned.
        size: side of the latents it was trained on, to which positions are scaled.
        classes: number of classes, without the one that stands for none, whose number this is.
        frequency_shift: of the clock's sinusoids, see ``sinusoids``.
    """

    in_channels: int = 4
    out_channels: int = 8
    patch: int = 2
    size: int = 32
    layers: int = 28
    heads: int = 16
    head_dim: int = 72
    classes: int = 1000
    bias: bool = True
    eps: float = 1e-5
    activation: str = "gelu-tanh"
    frequency_shift: float = 1.0

    @property
    def dim(self) -> int:
        """The width D."""
        return self.heads * self.head_dim


def position_sinusoids(dim: int, height: int, width: int, base: int) -> Tensor:
    """Sines and cosines of columns, then of rows, (1, height·width, dim), places scaled to a square of side base."""
    frequencies = 1 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def one(n: int) -> Tensor:
        places = torch.arange(n, dtype=torch.float32) / (n / base)
        angles = places.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, dim/2)

    columns = one(width)[None].expand(height, -1, -1)
    rows = one(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, height * width, dim).float()


class Patches(nn.Module):
    """Patches of latents as tokens: (B, C, H, W) → (B, N, D)."""

    def __init__(self, channels: int, dim: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        """Row after row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class ClassTable(nn.Module):
    """One vector per class, and one for none."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class ClockAndClass(nn.Module):
    """The embedding (B, D) of clock and class."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.shift = config.frequency_shift
        self.timestep_embedder = Perceptron(256, config.dim)
        self.class_embedder = ClassTable(config.classes, config.dim)

    def forward(self, clock: Tensor, classes: Tensor) -> Tensor:
        """Not through a SiLU yet."""
        y = self.timestep_embedder(sinusoids(clock, 256, self.shift))
        return y + self.class_embedder.embedding_table(classes)


class ToldModulation(Modulation):
    """A modulation with an embedding of clock and class of its own, as the published files hold one per block."""

    def __init__(self, config: DiTConfig):
        super().__init__(config.dim, 6)
        self.emb = ClockAndClass(config)


class Block(nn.Module):
    """Self-attention and feed-forward, each modulated and gated."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.norm1 = ToldModulation(config)
        self.attn1 = CrossAttention(config.dim, config.heads, bias=config.bias)
        self.ff = ProjectedFeedForward(config.dim, config.activation)

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(F.silu(self.norm1.emb(clock, classes)))
        x = x + gate * self.attn1(modulated(x, shift, scale))
        return x + gate_ff * self.ff(modulated(x, shift_ff, scale_ff, self.eps))


class DiT(nn.Module):
    """Split noisy latents, told their noise level by the clock and their content by a class."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, dim = config, config.dim
        self.pos_embed = Patches(config.in_channels, dim, config.patch)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return (B, C_out, H, W): the prediction, then the variance where it is learned; H and W whole patches."""
        c, (h, w) = self.config, x.shape[-2:]
        y = self.pos_embed(x)
        positions = position_sinusoids(c.dim, h // c.patch, w // c.patch, c.size // c.patch)
        y = y + positions.to(y)
        for block in self.transformer_blocks:
            y = block(y, clock, classes)
        embedding = F.silu(self.transformer_blocks[0].norm1.emb(clock, classes))
        shift, scale = of_vectors(self.proj_out_1, embedding)[:, None].chunk(2, dim=-1)
        return unpatch(self.proj_out_2(modulated(y, shift, scale)), c.patch, h, w)
