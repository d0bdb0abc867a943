"""What may be written in a prompt: weights, breaks, and more words than a text encoder takes at once.

    a (red:1.3) fox      the words in parentheses count 1.3 times
    a (red) fox          1.1 times; ((red)) 1.1² times
    a [red] fox          1/1.1 times
    a \\(red\\) fox        plain parentheses
    a fox BREAK a hill   the hill starts a new chunk

A prompt is cut into chunks of the encoder's length, each is encoded by itself, and the states follow one another.
Weights multiply a chunk's states, whose mean is then restored, as in AUTOMATIC1111's web UI, whose notation this is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadRequest
from sfumato.text.spelling import Word
from sfumato.text.tokenizer import Words

STEP = 1.1  # of one pair of parentheses
MAX_CHUNKS = 64
MAX_WEIGHT = 1000.0  # far beyond use, and far below what overflows
BREAK = None  # stands between two chunks in what ``parse`` returns

_TOKEN = re.compile(r"\\[\\()\[\]]|[(\[\])]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)


def parse(prompt: str) -> list[tuple[str, float] | None]:
    """Split a prompt into texts with their weights, and None at each BREAK; what is not closed counts to the end.

    Raises BadRequest for a weight beyond ±``MAX_WEIGHT``.
    """
    parts: list[list[str | float] | None] = []
    round_, square = [], []  # where each open bracket's content starts

    def weigh(start: int, factor: float) -> None:
        for part in parts[start:]:
            if part is not None:
                part[1] = float(part[1]) * factor

    for token in _TOKEN.findall(prompt):
        if token == "(":
            round_.append(len(parts))
        elif token == "[":
            square.append(len(parts))
        elif token == ")" and round_:
            weigh(round_.pop(), STEP)
        elif token == "]" and square:
            weigh(square.pop(), 1 / STEP)
        elif token[0] == ":" and token[-1] == ")" and len(token) > 1 and round_:
            weigh(round_.pop(), float(token[1:-1]))
        elif token == "BREAK":
            parts.append(BREAK)
        else:
            parts.append([token[1:] if token[0] == "\\" and len(token) > 1 else token, 1.0])
    for start in round_:
        weigh(start, STEP)
    for start in square:
        weigh(start, 1 / STEP)

    merged: list[tuple[str, float] | None] = []
    for part in parts:
        last = merged[-1] if merged else None
        if part is not None and not abs(float(part[1])) <= MAX_WEIGHT:
            raise BadRequest(f"{str(part[0])[:40]!r} has weight {part[1]:.3g} in the prompt; at most {MAX_WEIGHT:g}")
        if part is not None and last is not None and last[1] == part[1]:
            merged[-1] = (last[0] + str(part[0]), last[1])
        else:
            merged.append(None if part is None else (str(part[0]), float(part[1])))
    return merged


def without_breaks(prompt: str) -> str:
    """The prompt for an encoder of one chunk, where BREAK is a space."""
    return re.sub(r"\bBREAK\b", " ", prompt)


@dataclass(frozen=True)
class Chunk:
    """One row of ids for the text encoder, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def chunks(prompt: str, words: Words) -> list[Chunk]:
    """Cut a prompt into rows of the encoder's length, at least one and at most ``MAX_CHUNKS``; the rest is dropped."""
    rows: list[list[tuple[int, float]]] = [[]]
    for part in parse(prompt):
        if part is None:
            rows.append([])
            continue
        for token in words(part[0]):
            if len(rows[-1]) == words.room:
                rows.append([])
            rows[-1].append((token, part[1]))
    result = []
    for row in rows[:MAX_CHUNKS]:
        ids = words.row([token for token, _ in row])
        before = 0 if words.start is None else 1
        weights = [1.0] * before + [w for _, w in row]
        result.append(Chunk(tuple(ids), tuple(weights + [1.0] * (len(ids) - len(weights)))))
    return result


def grid(prompts: Sequence[str], words: Words, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, K, M) of prompts, K chunks each: those with fewer are filled up with empty ones.

    ``rows`` asks for at least so many chunks, so that two encoders' states keep the same length.
    """
    cut = [chunks(prompt, words) for prompt in prompts]
    k = max(rows, *(len(c) for c in cut))
    empty = chunks("", words)
    cut = [c + empty * (k - len(c)) for c in cut]
    ids = torch.tensor([[chunk.ids for chunk in c] for c in cut])
    return ids, torch.tensor([[chunk.weights for chunk in c] for c in cut])


def spell_prompt(prompt: str, words: Words, rows: int = MAX_CHUNKS) -> list[Word]:
    """The prompt's words, without brackets and weights, with their columns of the encoder's states."""
    cut = chunks(prompt, words)[:rows]
    return [word for i, chunk in enumerate(cut) for word in words.spell(chunk.ids, i * words.length)]


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply states (B, M, D) by their tokens' weights (B, M), and restore each chunk's mean."""
    if (weights == 1).all():
        return states
    weighted = states * weights[..., None].to(states)
    mean, after = (y.mean(dim=(-2, -1), keepdim=True) for y in (states, weighted))
    # A mean near zero would make the restoring factor explode.
    factor = torch.where(after.abs() > 1e-6, mean / after, torch.ones_like(mean)).clamp(-10, 10)
    return weighted * factor
