"""Word vectors to start a table of tokens from: those of a pretrained sentence encoder, cut to their main directions.

Every token lies near its synonyms from the start, also those that no caption holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.families.pretrained import load_sentence_encoder

PIECES = 0.7  # weight of the pieces' mean beside the sentence


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return what each token spells, in the order of their ids."""
    return [tokenizer.decode([i], skip_special_tokens=False).strip() for i in range(tokenizer.get_vocab_size())]


def word_table(tokenizer: Tokenizer, dim: int) -> Tensor:
    """Return rows (V, dim) of unit mean square for a tokenizer's tokens.

    A token's text is taken both as a sentence and as the mean of its word pieces' vectors, which knows the commoner
    sense of a word less and its form better; the directions kept are those of most variance over all tokens.
    Takes about two minutes of a core. NoResources if the encoder is not installed.
    """
    encoder = load_sentence_encoder()
    unknown = [encoder.tokenizer.token_to_id("[UNK]")]
    texts = token_texts(tokenizer)
    pieces = [e.ids or unknown for e in encoder.tokenizer.encode_batch(texts, add_special_tokens=False)]
    table = encoder.tokens.weight
    means = torch.stack([table[torch.tensor(ids)].mean(0) for ids in pieces])  # (V, 384)
    order = sorted(range(len(texts)), key=lambda i: len(pieces[i]))  # little padding
    sentences = torch.empty_like(means)
    sentences[order] = encoder.embed([texts[i] or "." for i in order], batch=256)
    return principal(torch.cat([_unit(sentences), PIECES * _unit(means)], 1), dim)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors - vectors.mean(0), dim=1)


def principal(vectors: Tensor, dim: int) -> Tensor:
    """Cut rows (V, D) to their ``dim`` directions of most variance, and scale each to unit mean square."""
    centred = (vectors - vectors.mean(0)).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    return (F.normalize(centred @ axes[:, -dim:], dim=1) * dim**0.5).float()
