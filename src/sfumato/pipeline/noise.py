"""Noise that depends on a picture's seed alone: one counter-based generator per picture.

    noise(seed, draw) = Box-Muller(Philox(key = seed, counter = draw · 2^192 …))

A draw can be made at any time, in any order and beside any other picture's: nothing is carried along.
Philox's bits are fixed by its paper (Salmon et al. 2011) and by NumPy's promise for bit generators; the
normal numbers are made here, since NumPy makes no such promise for its own. They are made in float64, so that
what machines may differ by in log and cos is rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def normal(seed: int, draw: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return draw number ``draw`` of standard normal noise of a seed, float32 of the given shape."""
    size = math.prod(shape)
    half = (size + 1) // 2
    bits = np.random.Philox(key=seed, counter=draw << 192).random_raw(2 * half)
    u = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    radius, angle = np.sqrt(-2 * np.log(u[:half])), 2 * math.pi * u[half:]
    z = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
    return z.reshape(tuple(shape)).astype(np.float32)


def start(seeds: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the noise that each picture starts from, float32 (n, *shape): draw 0 of each seed."""
    return np.stack([normal(seed, 0, shape) for seed in seeds])


class FreshNoise:
    """The noise that a sampler adds on its way: call k gives draw k = 1, 2, … of every picture in the batch.

    Args:
        seeds: the seed of each picture in the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._draw = 0

    def __call__(self, x: Any) -> Any:
        """Return fresh standard normal noise like x (n, …), an array or a tensor."""
        self._draw += 1
        z = np.stack([normal(seed, self._draw, x.shape[1:]) for seed in self._seeds])
        return x.new_tensor(z) if hasattr(x, "new_tensor") else z.astype(x.dtype)
