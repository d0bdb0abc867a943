"""The autoencoder tile by tile: memory for one tile, whatever the picture's size, and no seam between them.

    weight of a tile   0 ──┐ third of the overlap ┌── ramp ──┐ third ┌── 1      towards each neighbour

Each tile sees a whole overlap more than it is responsible for: its outer third, where it lacks what lies beyond its
edge, is thrown away, in the middle third both tiles fade into each other. So layers that see no further than a third
of the overlap give the same as at once. Group norms depend on the whole picture: they take their statistics from a
``mosaic`` of it that goes through the network first. What differs still from tile to tile (attention in the middle, and
what the mosaic missed) is little, and faded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # a tile's side over the overlap of two
PIECES = 8  # of a mosaic's side


def tiled(way: Callable[[Tensor], Tensor], x: Tensor, side: int, unit: int, scale: float) -> Tensor:
    """Go one way through an autoencoder tile by tile.

    Args:
        way: (B, C, h, w) → (B, C', h·scale, w·scale).
        x: (B, C, h, w), its sides multiples of ``unit``.
        side: a tile's side in units.
        unit: pixels of x that tiles are cut along: 1 for latents, the autoencoder's factor for pictures.
        scale: output pixels for one of x.
    """
    h, w = x.shape[-2] // unit, x.shape[-1] // unit
    overlap = max(1, side // OVERLAP)
    out: Tensor | None = None
    weights: Tensor | None = None
    cell = round(unit * scale)  # output pixels of a unit
    for top in places(h, side, overlap):
        for left in places(w, side, overlap):
            bottom, right = min(h, top + side), min(w, left + side)
            y = way(x[..., top * unit : bottom * unit, left * unit : right * unit])
            across = ramp(left, right, w, overlap, cell).to(y)
            weight = ramp(top, bottom, h, overlap, cell).to(y)[:, None] * across
            if out is None or weights is None:
                out, weights = y.new_zeros(*y.shape[:2], h * cell, w * cell), y.new_zeros(h * cell, w * cell)
            there = (..., slice(top * cell, bottom * cell), slice(left * cell, right * cell))
            out[there] += weight * y
            weights[there] += weight
    assert out is not None
    assert weights is not None
    return out / weights


def mosaic(x: Tensor, side: int, unit: int) -> Tensor:
    """A picture no larger than a tile, made of pieces from all over x (B, C, h, w), as they are and in their order.

    It has what x has, in about the same shares, coarse and fine: a smaller copy would have lost what is fine. Only the
    joints of its pieces, ``PIECES`` by ``PIECES``, are its own.
    """
    for axis in (-2, -1):
        length = x.shape[axis] // unit
        if length > side:
            piece = max(1, side // PIECES)
            starts = [round(i * (length - piece) / (side // piece - 1)) for i in range(side // piece)]
            x = torch.cat([x.narrow(axis, start * unit, piece * unit) for start in starts], axis)
    return x


def places(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin that cover a length evenly, each overlapping the next by at least so much."""
    if length <= side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def ramp(start: int, end: int, length: int, overlap: int, cell: int) -> Tensor:
    """A tile's weights along one axis, ((end − start)·cell,): 1, but fading towards each neighbour."""
    n, third = (end - start) * cell, overlap * cell / 3
    j = torch.arange(n) + 0.5
    rise = ((j - third) / third).clamp(0, 1) if start > 0 else torch.ones(n)
    fall = ((n - j - third) / third).clamp(0, 1) if end < length else torch.ones(n)
    return rise * fall
