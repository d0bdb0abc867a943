"""A picture's random numbers in training, from one counter-based generator per place in the endless order.

Place p of a run with seed s gets the same level and noise whatever batch, rank or worker it falls to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draws(seed: int, places: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return uniform numbers in (0, 1), float64 (B,), and standard normal noise, float32 (B, *shape)."""
    uniform = np.empty(len(places))
    noise = np.empty((len(places), *shape), dtype=np.float32)
    for i, place in enumerate(places):
        rng = np.random.Generator(np.random.Philox(key=[seed, place]))
        uniform[i] = (rng.integers(1 << 52) + 0.5) * 2.0**-52
        noise[i] = rng.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(uniform), torch.from_numpy(noise)
