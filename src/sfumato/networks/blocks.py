"""Parts that every network shares: timestep embedding, normalization, attention.

Shapes: B pictures, C channels, H × W cells, N tokens of width D, M tokens of context.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of a time (B,) at geometric frequencies, as (B, dim) (DDPM, after Transformer section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids through a two-layer perceptron: clock (B,) → (B, out)."""

    def __init__(self, dim: int, out: int, scale: float = 1.0):
        super().__init__()
        self.dim, self.scale = dim, scale
        self.mlp = nn.Sequential(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, t: Tensor) -> Tensor:
        """Embed a clock (B,) that runs over about 0…1000 once scaled."""
        return self.mlp(timestep_embedding(t * self.scale, self.dim).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over itself or over a context (B, M, D_context)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` (B, M) is true at the context's real tokens."""
        q = self._split(self.to_q(x))  # (B, heads, N, D/heads)
        k, v = (self._split(y) for y in self.to_kv(x if context is None else context).chunk(2, dim=-1))
        bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__(nn.Linear(dim, expansion * dim), nn.GELU(approximate="tanh"), nn.Linear(expansion * dim, dim))


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalization with as near to the usual number of groups as divides the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def zero(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that its residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
