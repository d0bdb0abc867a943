"""Our own text tower: words → token states and one pooled vector.

It is trained along with a denoiser, over a vocabulary learned from the captions, or contrastively (``families.clip``)
over CLIP's vocabulary, whose table is factorized: 49,408 narrow rows and one matrix that widens them, as in ALBERT
(1909.11942, section 3.1). Shapes: B prompts, M tokens, E width of the table, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from sfumato.errors import nearest
from sfumato.networks.blocks import Attention, FeedForward, zero
from sfumato.text import tokenizer as clip
from sfumato.text.spelling import Word, spell

PAD, END = "<pad>", "<end>"
TOKENIZERS = {"learned": (END, PAD), "clip": (clip.END, clip.END)}  # the tokens that end and that fill a row


@dataclass(frozen=True)
class TextTowerConfig:
    """The tower's shape.

    Args:
        vocabulary: number of tokens; 49,408 with CLIP's tokenizer.
        max_tokens: of a prompt, the end token that every one carries included.
        tokenizer: ``learned`` from the captions, and stored with the model, or ``clip``, the packaged one.
        token_dim: width E of the table of tokens; 0 for ``dim`` itself, without a matrix after it.
    """

    vocabulary: int = 3072
    dim: int = 160
    layers: int = 3
    heads: int = 4
    max_tokens: int = 32
    dropout: float = 0.0
    tokenizer: str = "learned"
    token_dim: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"no tokenizer named {self.tokenizer!r}{nearest(self.tokenizer, list(TOKENIZERS))}")
        if self.tokenizer == "clip" and self.vocabulary != clip.VOCABULARY:
            raise ValueError(f"CLIP's tokenizer has {clip.VOCABULARY} tokens, but vocabulary is {self.vocabulary}")


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
        self.tokens = nn.Embedding(config.vocabulary, config.token_dim or config.dim)
        self.widen = nn.Linear(config.token_dim, config.dim, bias=False) if config.token_dim else nn.Identity()
        self.positions = nn.Parameter(torch.randn(config.max_tokens, config.dim) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TextBlock(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and a mask of the real ones, both (B, M); longer prompts are cut, the end token kept."""
        end, pad = map(self.tokenizer.token_to_id, TOKENIZERS[self.config.tokenizer])
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
        x = self.dropout(self.widen(self.tokens(ids))) + self.positions[: ids.shape[1]]
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


def stored_tokenizer(tokenizer: Tokenizer, config: TextTowerConfig) -> dict[str, Any] | None:
    """Return what a model's file says of its tokenizer: nothing of the packaged one."""
    return None if config.tokenizer == "clip" else json.loads(tokenizer.to_str())


def build_tokenizer(config: TextTowerConfig, stored: Mapping[str, Any] | None) -> Tokenizer:
    """Return the tokenizer of a model's file; ValueError if it is to be in the file and is not."""
    if config.tokenizer == "clip":
        return clip.packaged_clip()
    if stored is None:
        raise ValueError("its tokenizer is missing")
    return Tokenizer.from_str(json.dumps(stored))


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
