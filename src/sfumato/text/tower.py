"""The text tower that is trained along with the denoiser: words → token states and one pooled vector.

Shapes: B prompts, M tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from sfumato.networks.blocks import Attention, FeedForward, zero
from sfumato.text.spelling import Word, spell

PAD, END = "<pad>", "<end>"


@dataclass(frozen=True)
class TextTowerConfig:
    """The tower's shape; ``max_tokens`` includes the end token that every prompt carries."""

    vocabulary: int = 3072
    dim: int = 160
    layers: int = 3
    heads: int = 4
    max_tokens: int = 32
    dropout: float = 0.0


class TextBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, both directions visible."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim)
        zero(self.attention.to_out)
        zero(self.feed_forward[-1])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, M, D) with what its tokens learned of each other; mask (B, M) is true at the real ones."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class TextTower(nn.Module):
    """A small transformer over the words, with the tokenizer that belongs to it."""

    def __init__(self, config: TextTowerConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.tokens = nn.Embedding(config.vocabulary, config.dim)
        self.positions = nn.Parameter(torch.randn(config.max_tokens, config.dim) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TextBlock(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and a mask of the real ones, both (B, M); longer prompts are cut, the end token kept."""
        end, pad = self.tokenizer.token_to_id(END), self.tokenizer.token_to_id(PAD)
        keep = self.config.max_tokens - 1
        rows = [[*encoding.ids[:keep], end] for encoding in self.tokenizer.encode_batch(prompts)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
        return ids, mask

    def truncated(self, prompt: str) -> int:
        """Number of a prompt's tokens that do not fit."""
        return max(0, len(self.tokenizer.encode(prompt).ids) - (self.config.max_tokens - 1))

    def spell(self, prompt: str) -> list[Word]:
        """The prompt's words with their columns of the context; what was cut is left out."""
        return spell(self.tokenizer, self.tokenizer.encode(prompt).ids[: self.config.max_tokens - 1])

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Encode token ids (B, M) as context (B, M, D), mask (B, M) and pooled (B, D), the words' mean.

        The mean carries every word from the first step on; an end token's state would first have to learn to look.
        """
        x = self.dropout(self.tokens(ids)) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"context": x, "mask": mask, "pooled": pooled}

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Turn prompts into conditioning on this tower's device."""
        ids, mask = self.tokenize(prompts)
        device = self.positions.device
        return self(ids.to(device), mask.to(device))


def train_tokenizer(captions: list[str], vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from captions; every string can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
