"""Aspect-ratio buckets: pictures keep about their own shape, and all pictures of one step share one.

    bucket b has n_b pictures, in an endless order of its own: place k·batch + i of it is picture i of its batch k
    after e rounds it has given ⌊e·n_b / batch⌋ batches; a round's batches, over all buckets, come in a drawn order

So every bucket's pictures are seen equally often, each once per epoch of its bucket, and which picture stands at a
place is a pure function of (seed, place), whatever was drawn before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Shape = tuple[int, int]  # height, width


def shapes_within(size: int, multiple: int, max_aspect: float) -> list[Shape]:
    """List the shapes of at most size² pixels with sides that are multiples of a number, each as long as may be.

    Args:
        size: side of the square.
        multiple: what every side is a multiple of.
        max_aspect: longest side by shortest, at least 1.
    """
    found: set[Shape] = {(size, size)}
    for short in range(multiple, size + 1, multiple):
        long = size * size // short // multiple * multiple
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_shape(shapes: Sequence[Shape], height: int, width: int) -> int:
    """Return the index of the shape whose aspect ratio is nearest, as a ratio of ratios."""
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0] * height / width)))


@dataclass(frozen=True)
class Buckets:
    """The order of batches among buckets.

    Args:
        lengths: pictures in an epoch of each bucket.
        batch: pictures of a step.
    """

    lengths: tuple[int, ...]
    batch: int
    _rounds: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, seed: int, place: int) -> tuple[int, int]:
        """Return whose turn it is at a place of the endless order: a bucket, and a place in that bucket's own order."""
        step, i = divmod(place, self.batch)
        # The last round that begins at this step or before; rounds may be empty where pictures are few.
        number = bisect_right(range(self._reach(step)), step, key=self._begin) - 1
        turns = self._turns(seed, number)
        within = step - self._begin(number)
        bucket = int(turns[within])
        batches = self._given(number, bucket) + int((turns[:within] == bucket).sum())
        return bucket, batches * self.batch + i

    def _reach(self, step: int) -> int:
        """Return a number of rounds that surely goes beyond a step."""
        return (step + len(self.lengths) + 1) * self.batch // sum(self.lengths) + 2

    def _given(self, number: int, bucket: int) -> int:
        return number * self.lengths[bucket] // self.batch

    def _begin(self, number: int) -> int:
        return sum(self._given(number, b) for b in range(len(self.lengths)))

    def _turns(self, seed: int, number: int) -> np.ndarray:
        known = self._rounds
        if (seed, number) not in known:  # a new dict each time, as threads may read the old one
            counts = [self._given(number + 1, b) - self._given(number, b) for b in range(len(self.lengths))]
            turns = rng(seed, number, stream=1).permutation(np.repeat(np.arange(len(counts)), counts))
            known = dict([*known.items()][-1:]) | {(seed, number): turns}
            object.__setattr__(self, "_rounds", known)
        return known[seed, number]


def rng(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    """Return the random numbers of an epoch; streams of one epoch never meet."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


def join_small(members: Sequence[int], shapes: Sequence[Shape], least: int) -> list[int]:
    """Let buckets of fewer pictures than a step takes join the nearest that has enough; return new members.

    Args:
        members: the shape of each picture, as an index.
        shapes: all shapes.
        least: pictures that a bucket must have; the largest one stays in any case.
    """
    counts = np.bincount(np.asarray(members), minlength=len(shapes))
    kept = [i for i, n in enumerate(counts) if n >= least] or [int(counts.argmax())]
    joins = {i: kept[nearest_shape([shapes[k] for k in kept], *shapes[i])] for i in set(members)}
    return [joins[i] for i in members]
