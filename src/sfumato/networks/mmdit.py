"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2403.03206).

    x ─ patches ─ + positions ─┐
                               ├─ [JointBlock]×n ─ norm ─ linear ─ unpatch ─ out
    words ─ linear ────────────┘

Shapes: x (B, C, H, W), clock (B,) up to 1000, context (B, M, D_context), pooled (B, P). Modules are named as in the
published folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.dit import Patches
from sfumato.networks.modulated import ClockAndWords, FinalNorm, JointBlock, unpatch


@dataclass(frozen=True)
class MMDiTConfig:
    """The network's shape.

    Args:
        positions: side of the table of positions, in patches; a picture takes its middle.
        dual: numbers of the blocks whose cells attend to themselves alone besides (3.5 medium).
        normalized: whether queries and keys are normalized (3.5).
    """

    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2
    layers: int = 24
    heads: int = 24
    head_dim: int = 64
    context_dim: int = 4096
    pooled_dim: int = 2048
    positions: int = 192
    dual: tuple[int, ...] = ()
    normalized: bool = False

    @property
    def dim(self) -> int:
        """The width D."""
        return self.heads * self.head_dim


class PlacedPatches(Patches):
    """Patches with a table of positions, which the published files hold."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig):
        super().__init__(config.in_channels, config.dim, config.patch)
        self.side = config.positions
        self.register_buffer("pos_embed", torch.zeros(1, config.positions**2, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, D); ValueError for more patches than there are positions."""
        y = self.proj(x)
        h, w = y.shape[-2:]
        if max(h, w) > self.side:
            raise ValueError(f"{h}x{w} patches are more than the table's {self.side}x{self.side}")
        top, left = (self.side - h) // 2, (self.side - w) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))[:, top : top + h, left : left + w]
        return y.flatten(2).transpose(1, 2) + table.flatten(1, 2).to(y.dtype)


class MMDiT(nn.Module):
    """Predict the flow of noisy latents under words."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config, c = config, config
        self.pos_embed = PlacedPatches(c)
        self.time_text_embed = ClockAndWords(c.dim, c.pooled_dim)
        self.context_embedder = nn.Linear(c.context_dim, c.dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(c.dim, c.heads, c.head_dim, normalized=c.normalized, last=i == c.layers - 1, dual=i in c.dual)
            for i in range(c.layers)
        )
        self.norm_out = FinalNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.patch**2 * c.out_channels)

    def forward(self, x: Tensor, clock: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Return (B, C_out, H, W); H and W whole patches."""
        y, words = self.pos_embed(x), self.context_embedder(context)
        embedding = F.silu(self.time_text_embed(clock, pooled))
        for block in self.transformer_blocks:
            y, words = block(y, words, embedding)
        return unpatch(self.proj_out(self.norm_out.normalize(y, embedding)), self.config.patch, *x.shape[-2:])
