"""CLIP's transformer (2103.00020), which its two towers have alike, and the tower for pictures.

    picture (B, 3, S, S) ─ patches ─> [class, cells] + positions ─ norm ─ layers ─> states
    states ─ the class's alone ─ norm ─ projection ─> embedding (B, P)

Shapes: B rows, M tokens of width D, of a picture 1 + (S / patch)²; P width of the projection. Modules are named as in
the published folders of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class TowerConfig:
    """The shape that both towers have; ``activation`` is a name in ``ACTIVATIONS``."""

    dim: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not a multiple of {self.heads} heads")


class SelfAttention(nn.Module):
    """Self-attention; if causal, a token sees those before it alone."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=self.causal))


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1, self.fc2 = nn.Linear(config.dim, config.inner), nn.Linear(config.inner, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(config.dim, config.heads, causal)
        self.mlp = FeedForward(config)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.dim, config.eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) → (B, M, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """A tower's layers, under the name that the published weights give them."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The states (B, M, D) after 0, 1, … all layers."""
        states = [x]
        for layer in self.layers:
            states.append(x := layer(x))
        return states


@dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """The picture tower's shape: it looks at ``side`` × ``side`` pixels in patches of ``patch`` × ``patch``."""

    channels: int = 3
    side: int = 224
    patch: int = 32
    projection: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.patch <= self.side:
            raise ValueError(f"patches of {self.patch} pixels in a picture of {self.side}")
        if self.layers < 1:
            raise ValueError("a tower without layers")


class PictureStates(NamedTuple):
    """What the tower sees.

    Args:
        penultimate: states (B, M, D) before the last layer, not normalized.
        embedding: the class token's projected state (B, P).
    """

    penultimate: Tensor
    embedding: Tensor


class PictureEmbeddings(nn.Module):
    """Patches, a class token before them, and their positions: (B, 3, S, S) → (B, M, D)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        c = config
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.patch_embedding = nn.Conv2d(c.channels, c.dim, c.patch, stride=c.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (c.side // c.patch) ** 2, c.dim)

    def forward(self, pictures: Tensor) -> Tensor:
        """Embed normalized pictures."""
        cells = self.patch_embedding(pictures).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(cells), 1, -1)
        return torch.cat([whole, cells], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """The tower without its projection: states after every layer; the norm after the last is kept beside them."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = PictureEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim, config.eps)  # so it is written in the files
        self.encoder = Layers(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.dim, config.eps)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """The states (B, M, D) after 0, 1, … all layers."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pictures)))


class CLIPVision(nn.Module):
    """The picture tower."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.dim, config.projection, bias=False)

    def forward(self, pictures: Tensor) -> PictureStates:
        """Look at pictures (B, 3, S, S), normalized channel by channel."""
        states = self.vision_model(pictures)
        seen = self.vision_model.post_layernorm(states[-1][:, 0])
        return PictureStates(states[-2], of_vectors(self.visual_projection, seen))
