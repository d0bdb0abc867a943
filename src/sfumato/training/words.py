"""Word vectors to start a table of tokens from: those of a pretrained sentence encoder, cut to their main directions.

Every token lies near its synonyms from the start, also those that no caption holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.families.pretrained import load_sentence_encoder


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return what each token spells, in the order of their ids."""
    return [tokenizer.decode([i], skip_special_tokens=False).strip() for i in range(tokenizer.get_vocab_size())]


def word_table(tokenizer: Tokenizer, dim: int) -> Tensor:
    """Return rows (V, dim) of unit mean square for a tokenizer's tokens.

    A token's text is written in the sentence encoder's word pieces, whose vectors are averaged; the directions kept
    are those of most variance over all tokens. NoResources if the encoder is not installed.
    """
    encoder = load_sentence_encoder()
    unknown = [encoder.tokenizer.token_to_id("[UNK]")]
    pieces = [
        e.ids or unknown for e in encoder.tokenizer.encode_batch(token_texts(tokenizer), add_special_tokens=False)
    ]
    table = encoder.tokens.weight
    vectors = torch.stack([table[torch.tensor(ids)].mean(0) for ids in pieces])  # (V, 384)
    return principal(vectors, dim)


def principal(vectors: Tensor, dim: int) -> Tensor:
    """Cut unit vectors along rows (V, D) to their ``dim`` directions of most variance, and scale rows to unit size."""
    unit = F.normalize(vectors - vectors.mean(0), dim=1)
    unit = (unit - unit.mean(0)).double()
    _, axes = torch.linalg.eigh(unit.T @ unit)
    return (F.normalize(unit @ axes[:, -dim:], dim=1) * dim**0.5).float()
