"""FLUX's transformer: joint blocks, then blocks in which cells and words are one sequence, with rotary positions.

    x ─ 2×2 patches ─ linear ─┐
                              ├─ [JointBlock]×n ─ join ─ [SingleBlock]×m ─ norm ─ linear ─ unpatch ─ out
    words ─ linear ───────────┘

Known by its published weights and configuration; parallel layers as in 2302.05442, rotary positions as in 2104.09864.
Shapes: x (B, C, H, W), clock (B,) in [0, 1], context (B, M, D_context), pooled (B, P), guidance (B,). Modules are
named as in the published folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.modulated import (
    ClockAndWords,
    FinalNorm,
    JointAttention,
    JointBlock,
    Modulation,
    Rotation,
    modulated,
)


@dataclass(frozen=True)
class FluxConfig:
    """The network's shape.

    Args:
        in_channels: of a patch: four times those of the latents.
        axes: how a head's numbers are shared among the positions: none, row, column.
        guided: whether the guidance scale is embedded (dev).
    """

    in_channels: int = 64
    out_channels: int = 64
    layers: int = 19
    single_layers: int = 38
    heads: int = 24
    head_dim: int = 128
    context_dim: int = 4096
    pooled_dim: int = 768
    guided: bool = False
    axes: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if sum(self.axes) != self.head_dim or any(n % 2 for n in self.axes):
            raise ValueError(f"axes {self.axes} must be even and sum to the heads' {self.head_dim}")

    @property
    def dim(self) -> int:
        """The width D."""
        return self.heads * self.head_dim


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over words and cells together: (B, M + N, D) → the same."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        dim = config.dim
        self.norm = Modulation(dim, 3)
        self.attn = JointAttention(dim, config.heads, config.head_dim, normalized=True, projected=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, embedding: Tensor, rotation: Rotation) -> Tensor:
        """Apply under an embedding (B, D) through its SiLU."""
        shift, scale, gate = self.norm(embedding)
        y = modulated(x, shift, scale)
        both = torch.cat([self.attn(y, rotation=rotation)[0], F.gelu(self.proj_mlp(y), approximate="tanh")], dim=-1)
        return x + gate * self.proj_out(both)


class Flux(nn.Module):
    """Predict the flow of noisy latents under words."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config, c = config, config
        self.time_text_embed = ClockAndWords(c.dim, c.pooled_dim, c.guided)
        self.context_embedder = nn.Linear(c.context_dim, c.dim)
        self.x_embedder = nn.Linear(c.in_channels, c.dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(c.dim, c.heads, c.head_dim, normalized=True) for _ in range(c.layers)
        )
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.single_layers))
        self.norm_out = FinalNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.out_channels)

    def forward(
        self, x: Tensor, clock: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Return (B, C_out, H, W); H and W even."""
        patches = F.pixel_unshuffle(x, 2)  # (B, 4C, H/2, W/2)
        h, w = patches.shape[-2:]
        y = self.x_embedder(patches.flatten(2).transpose(1, 2))
        words = self.context_embedder(context)
        scaled = None if guidance is None else guidance * 1000
        embedding = F.silu(self.time_text_embed(clock * 1000, pooled, scaled))
        rotation = self._rotation(words.shape[1], h, w, y.device)
        for block in self.transformer_blocks:
            y, words = block(y, words, embedding, rotation)
        both = torch.cat([words, y], dim=1)
        for block in self.single_transformer_blocks:
            both = block(both, embedding, rotation)
        y = self.proj_out(self.norm_out.normalize(both[:, words.shape[1] :], embedding))
        return F.pixel_shuffle(y.transpose(1, 2).unflatten(2, (h, w)), 2)

    def _rotation(self, words: int, h: int, w: int, device: torch.device) -> Rotation:
        """The angles of words, which are all at 0, and of cells at (0, row, column)."""
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        cells = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        places = torch.cat([torch.zeros(words, 3, dtype=cells.dtype), cells]).double()  # (M + N, 3)
        angles = []
        for i, n in enumerate(self.config.axes):
            frequencies = 10_000 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
            angles.append(places[:, i : i + 1] * frequencies)
        pairs = torch.cat(angles, dim=1).repeat_interleave(2, dim=1).to(device)  # (M + N, D/heads)
        return pairs.cos().float(), pairs.sin().float()
