"""CLIP's text tower (2103.00020), by OpenAI (L) and OpenCLIP (H, bigG): token ids → states and a pooled vector.

Shapes: B prompts, M tokens, D width, P width of the pooled vector. Modules are named as in the published folders of
weights, without their leading ``text_model``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import attend, of_vectors


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid form of GELU (1606.08415, section 2) that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class CLIPConfig:
    """The tower's shape.

    Args:
        projection: width P of the pooled vector's projection; 0 for none.
        activation: a name in ``ACTIVATIONS``.
        end: id of the end token whose state is pooled; None takes the largest id, as the first published files do.
    """

    vocabulary: int = 49408
    dim: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    projection: int = 0
    activation: str = "quick_gelu"
    eps: float = 1e-5
    end: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not a multiple of {self.heads} heads")


class TextStates(NamedTuple):
    """What a tower says of token ids.

    Args:
        layers: states (B, M, D) after 0, 1, … all layers, not normalized.
        last: the states after all layers, normalized.
        pooled: the end token's row of ``last``, projected (B, P) where the tower has a projection.
    """

    layers: list[Tensor]
    last: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, M) → (B, M, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Causal self-attention: a token sees those before it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1, self.fc2 = nn.Linear(config.dim, config.inner), nn.Linear(config.inner, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.dim, config.heads)
        self.mlp = FeedForward(config)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.dim, config.eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """The tower's layers, under the name that the published weights give them."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class CLIPText(nn.Module):
    """The text tower."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings, self.encoder = Embeddings(config), Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)
        self.text_projection = nn.Linear(config.dim, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor) -> TextStates:
        """Encode token ids (B, M), M at most the number of positions."""
        x = self.embeddings(ids)
        states = [x]
        for layer in self.encoder.layers:
            states.append(x := layer(x))
        last = self.final_layer_norm(x)
        end = ids if self.config.end is None else (ids == self.config.end).int()
        pooled = last[torch.arange(len(ids), device=ids.device), end.argmax(dim=-1)]  # the first of several ends
        if self.text_projection is not None:
            pooled = of_vectors(self.text_projection, pooled)
        return TextStates(states, last, pooled)
