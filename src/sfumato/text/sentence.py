"""A BERT encoder for sentences, such as all-MiniLM-L6-v2: words → token states, and one vector per sentence.

Source: Devlin et al., "BERT" (1810.04805); Wang et al., "MiniLM" (2002.10957); Reimers and Gurevych,
"Sentence-BERT" (1908.10084) for the pooling. Shapes: B sentences, M tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.networks.blocks import attend


@dataclass(frozen=True)
class SentenceEncoderConfig:
    """The encoder's shape; the defaults are MiniLM-L6's. ``max_tokens`` counts the tokens at both ends."""

    vocabulary: int = 30_522
    dim: int = 384
    layers: int = 6
    heads: int = 12
    positions: int = 512
    max_tokens: int = 128


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each added to its input and then normalized."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Let each token see all real tokens of its sentence."""
        y = attend(self.q(x), self.k(x), self.v(x), self.heads, mask[:, None, None, :])
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class SentenceEncoder(nn.Module):
    """The encoder, with the tokenizer that belongs to it."""

    def __init__(self, config: SentenceEncoderConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: its settings are changed
        self.tokenizer.enable_truncation(config.max_tokens)
        self.tokenizer.no_padding()
        self.tokens = nn.Embedding(config.vocabulary, config.dim)
        self.positions = nn.Embedding(config.positions, config.dim)
        self.segments = nn.Embedding(2, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(config.dim, config.heads) for _ in range(config.layers))

    def tokenize(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and a mask of the real ones, both (B, M)."""
        rows = [e.ids for e in self.tokenizer.encode_batch(sentences)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor([[i < len(row) for i in range(width)] for row in rows])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states (B, M, D) of tokens (B, M)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(places) + self.segments.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        return x

    @torch.no_grad()
    def embed(self, sentences: list[str], batch: int = 128) -> Tensor:
        """Return unit vectors (B, D): the mean of each sentence's token states, normalized."""
        parts: list[Tensor] = []
        for i in range(0, len(sentences), batch):
            ids, mask = self.tokenize(sentences[i : i + batch])
            weights = mask[..., None].float()
            mean = (self(ids, mask) * weights).sum(1) / weights.sum(1)
            parts.append(F.normalize(mean, dim=1))
        return torch.cat(parts)
