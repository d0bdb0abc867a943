"""T5's encoder (1910.10683), in its plain form and as version 1.1 with gated GELU (2002.05202): token ids → states.

Shapes: B prompts, M tokens, D width, A heads. Modules are named as in the published folders of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.networks.blocks import RMSNorm, attend
from sfumato.networks.clip import ACTIVATIONS


@dataclass(frozen=True)
class T5Config:
    """The encoder's shape; ``head_dim``·``heads`` need not be its width.

    Args:
        gated: whether the feed-forward layers are version 1.1's.
        activation: a name in ``networks.clip.ACTIVATIONS``: the first version's is relu, version 1.1's gelu_new.
    """

    vocabulary: int = 32128
    dim: int = 4096
    inner: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    gated: bool = True
    activation: str = "gelu_new"
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")


class SelfAttention(nn.Module):
    """Attention without scale, biased by the distance between tokens."""

    def __init__(self, config: T5Config, biased: bool):
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.dim, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D), with bias (B or 1, A, M, M) added to the scores."""
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, bias, scale=1.0))


class FeedForward(nn.Module):
    """Two linear layers around an activation, or gated by it."""

    def __init__(self, config: T5Config):
        super().__init__()
        names = ("wi_0", "wi_1") if config.gated else ("wi",)
        for name in names:
            self.add_module(name, nn.Linear(config.dim, config.inner, bias=False))
        self.gated, self.activation = config.gated, ACTIVATIONS[config.activation]
        self.wo = nn.Linear(config.inner, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        if self.gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class Sublayer(nn.Module):
    """A normalization and what it feeds, which is named ``name``, beside the identity."""

    def __init__(self, name: str, module: nn.Module, config: T5Config):
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return x + getattr(self, self.name)(self.layer_norm(x), *more)


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, config: T5Config, biased: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                Sublayer("SelfAttention", SelfAttention(config, biased), config),
                Sublayer("DenseReluDense", FeedForward(config), config),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return self.layer[1](self.layer[0](x, bias))


class Encoder(nn.Module):
    """The stack; its first block holds the distances' bias for all."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(config, biased=i == 0) for i in range(config.layers))
        self.final_layer_norm = RMSNorm(config.dim, config.eps)


class T5Encoder(nn.Module):
    """Token ids to states."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.dim)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode ids (B, M) as (B, M, D); ``mask`` (B, M) is true at real tokens, None takes all for real."""
        x = self.shared(ids)
        bias = self._bias(ids.shape[1], x)
        if mask is not None:
            bias = bias.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(x.dtype).min)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def _bias(self, length: int, x: Tensor) -> Tensor:
        """The bias (1, A, M, M) of every pair of tokens."""
        places = torch.arange(length, device=x.device)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(self._buckets(places[None, :] - places[:, None])).permute(2, 0, 1)[None].to(x.dtype)

    def _buckets(self, distance: Tensor) -> Tensor:
        """Number of the bucket of each distance: exact when near, by logarithm when far, later tokens apart."""
        half = self.config.buckets // 2
        exact = half // 2
        size = distance.abs()
        ratio = torch.log(size.float().clamp(min=1) / exact) / math.log(self.config.max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return half * (distance > 0) + torch.where(size < exact, size, far)
