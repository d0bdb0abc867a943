"""CLIP's text tower (2103.00020), by OpenAI (L) and OpenCLIP (H, bigG): token ids → states and a pooled vector.

Shapes: B prompts, M tokens, D width, P width of the pooled vector. Modules are named as in the published folders of
weights, without their leading ``text_model``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.networks.blocks import of_vectors
from sfumato.networks.clip import Layers, TowerConfig


@dataclass(frozen=True)
class CLIPConfig(TowerConfig):
    """The tower's shape.

    Args:
        projection: width P of the pooled vector's projection; 0 for none.
        end: id of the end token whose state is pooled; None takes the largest id, as the first published files do.
    """

    vocabulary: int = 49408
    positions: int = 77
    projection: int = 0
    end: int | None = None


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


class CLIPText(nn.Module):
    """The text tower."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings, self.encoder = Embeddings(config), Layers(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)
        self.text_projection = nn.Linear(config.dim, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor) -> TextStates:
        """Encode token ids (B, M), M at most the number of positions."""
        states = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(states[-1])
        end = ids if self.config.end is None else (ids == self.config.end).int()
        pooled = last[torch.arange(len(ids), device=ids.device), end.argmax(dim=-1)]  # the first of several ends
        if self.text_projection is not None:
            pooled = of_vectors(self.text_projection, pooled)
        return TextStates(states, last, pooled)
