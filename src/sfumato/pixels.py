"""The two ways in which pixels are told: eight bits, as files and people have them, and [−1, 1], as networks do."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]  # (H, W, 3)


def digest(pixels: Pixels) -> str:
    """SHA-256 of a picture's pixels and shape."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def signed(pixels: Tensor) -> Tensor:
    """Eight-bit pixels of any shape → float32 in [−1, 1]."""
    return pixels.float() / 127.5 - 1


def eight_bits(x: Tensor) -> Tensor:
    """Pixels of any shape, held within [−1, 1] → uint8."""
    import torch

    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
