"""Which columns of a text encoder's states hold which word of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

STARTS, ENDS = ("Ġ", "▁"), "</w>"  # how byte-level, SentencePiece and CLIP's vocabularies mark a word's edges


class Word(NamedTuple):
    """A word of a prompt, and the columns of the context that hold its pieces."""

    text: str
    columns: tuple[int, ...]


def spell(tokenizer: Tokenizer, ids: Sequence[int], first: int = 0) -> list[Word]:
    """Join the pieces of a prompt (ids without start, end and padding) into its words; ``first`` is their column."""
    groups: list[list[int]] = []
    open_word = False
    for i, id in enumerate(ids):
        piece = tokenizer.id_to_token(id)
        if piece is None:  # learned later: the tokenizer does not know it
            groups.append([i])
            open_word = False
            continue
        bare = piece.removesuffix(ENDS).lstrip("".join(STARTS))
        punctuation = bare.isascii() and not any(c.isalnum() for c in bare)
        if open_word and not piece.startswith(STARTS) and not punctuation:
            groups[-1].append(i)
        else:
            groups.append([i])
        open_word = not piece.endswith(ENDS) and not (punctuation and bare)
    words = []
    for group in groups:
        text = tokenizer.decode([ids[i] for i in group], skip_special_tokens=False).strip()
        text = text.removesuffix(ENDS).strip() or (f"#{ids[group[0]]}" if len(group) == 1 else "")
        words.append(Word(text, tuple(first + i for i in group)))
    return words
