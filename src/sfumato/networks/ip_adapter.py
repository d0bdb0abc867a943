"""IP-Adapter (2308.06721): a picture as a prompt, by keys and values of its own in a U-Net's attention to words.

    picture ─ CLIP's tower ─ projection ─> tokens (B, K, D) ─ keys and values per layer ─> beside those of the words

| kind  | what the tower sees           | projection                                              | K               |
|-------|-------------------------------|---------------------------------------------------------|-----------------|
| plain | its embedding (B, P)          | one linear layer, cut into tokens, a norm               | 4 as published  |
| plus  | states before its last layer  | learned queries that attend to them (Perceiver's        | 16 as published |
|       |                               | resampler, 2204.14198)                                  |                 |
| full  | the same                      | two linear layers on each state, a norm                 | 257             |

Modules are named as in the published files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.networks.blocks import attend, of_vectors
from sfumato.networks.sd_unet import PictureKeys, PromptAttention, SDUNet

KINDS = ("plain", "plus", "full")


@dataclass(frozen=True)
class IPAdapterConfig:
    """The shape of an IP-Adapter.

    Args:
        kind: one of ``KINDS``.
        features: width of what the tower sees.
        dim: width of tokens, that of the U-Net's words.
        tokens: number of tokens; of kind "full", as many as the tower has states.
        inner: width within the projection; of kind "plain" there is none.
        layers, heads, head_dim, expanded: of the resampler's blocks.
        attention: of each of the U-Net's attentions to words, in the order of the files, width of words and of cells.
    """

    kind: str
    features: int
    dim: int
    tokens: int
    inner: int = 0
    layers: int = 0
    heads: int = 1
    head_dim: int = 64
    expanded: int = 0
    attention: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; there are {', '.join(KINDS)}")


class Plain(nn.Module):
    """An embedding (B, P) → tokens (B, K, D)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.features, config.tokens * config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, seen: Tensor) -> Tensor:
        """Apply."""
        return self.norm(of_vectors(self.proj, seen).unflatten(1, (-1, self.norm.normalized_shape[0])))


class Full(nn.Module):
    """States (B, M, F) → as many tokens (B, M, D)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        first, second = nn.Linear(config.features, config.inner), nn.Linear(config.inner, config.dim)
        self.proj = nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(config.dim))

    def forward(self, seen: Tensor) -> Tensor:
        """Apply."""
        return self.proj(seen)


class PerceiverAttention(nn.Module):
    """Queries (B, K, D) attend to states (B, M, D) and to themselves."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        dim, self.heads, inner = config.inner, config.heads, config.heads * config.head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        """Apply."""
        queries = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(states), queries], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(queries), k, v, self.heads))


class Resampler(nn.Module):
    """States (B, M, F) of any number → K tokens (B, K, D), by learned queries."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        c = config
        self.latents = nn.Parameter(torch.zeros(1, c.tokens, c.inner))
        self.proj_in, self.proj_out = nn.Linear(c.features, c.inner), nn.Linear(c.inner, c.dim)
        self.norm_out = nn.LayerNorm(c.dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(c), _feed_forward(c.inner, c.expanded)]) for _ in range(c.layers)
        )

    def forward(self, seen: Tensor) -> Tensor:
        """Apply."""
        states, y = self.proj_in(seen), self.latents.expand(len(seen), -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            y = y + attention(y, states)
            y = y + feed_forward(y)
        return self.norm_out(self.proj_out(y))


def _feed_forward(dim: int, inner: int) -> nn.Sequential:
    first, second = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), first, nn.GELU(), second)


class IPAdapter(nn.Module):
    """A picture's tokens, and every layer's keys and values of them."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.config = config
        self.image_proj = {"plain": Plain, "plus": Resampler, "full": Full}[config.kind](config)
        keys = {str(2 * i + 1): PictureKeys(*widths) for i, widths in enumerate(config.attention)}
        self.ip_adapter = nn.ModuleDict(keys)  # even numbers are the attentions of cells among themselves

    def forward(self, seen: Tensor) -> Tensor:
        """What the tower sees, its embedding (B, P) or its states (B, M, F), as tokens (B, K, D)."""
        return self.image_proj(seen)

    def attach(self, unet: SDUNet) -> None:
        """Give a U-Net's attentions to words their keys and values of pictures."""
        for layer, keys in zip(attentions(unet), self.ip_adapter.values(), strict=True):
            layer.picture = keys  # type: ignore[assignment]


def attentions(unet: SDUNet) -> list[PromptAttention]:
    """A U-Net's attentions to words in the order of IP-Adapters' files: those of the middle come last."""
    parts = [unet.down_blocks, unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    return [m for part in parts for m in part.modules() if isinstance(m, PromptAttention)]
