"""Interpolation: pictures between two noises, or between two prompts.

    slerp(a, b; w) = sin((1 − w)θ)/sin θ · a + sin(wθ)/sin θ · b,      cos θ = ⟨a, b⟩ / (|a|·|b|)

A straight mix of two noises has too little variance for the denoiser; the arc keeps their length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.diffusion.level import float64


def lerp(a: Any, b: Any, w: float) -> Any:
    """The straight line from a (w = 0) to b (w = 1)."""
    return a + w * (b - a)


def slerp(a: Any, b: Any, w: float, batch_dims: int = 1) -> Any:
    """The arc from a (w = 0) to b (w = 1) (DDIM, 2010.02502, section 5.3 and appendix D.5).

    Args:
        a: noise (B, C, H, W), or prompt embeddings (B, N, D); NumPy array or tensor.
        b: the same shape.
        w: how far along the arc.
        batch_dims: leading axes that count separate vectors: 0 takes all of a as one, 2 bends each token alone.

    Vectors that are nearly parallel or opposite, where the arc is not defined, are mixed in a straight line.
    """
    axes = tuple(range(batch_dims, len(a.shape)))
    u, v = float64(a), float64(b)
    dot, length = (
        (u * v).sum(axes, keepdims=True),
        ((u * u).sum(axes, keepdims=True) * (v * v).sum(axes, keepdims=True)),
    )
    cos = np.clip(dot / np.maximum(length, np.finfo(np.float64).tiny) ** 0.5, -1, 1)
    theta = np.arccos(cos)
    straight = 1 - np.abs(cos) < 1e-10
    sin = np.where(straight, 1.0, np.sin(theta))
    keep = np.where(straight, 1 - w, np.sin((1 - w) * theta) / sin)
    take = np.where(straight, w, np.sin(w * theta) / sin)
    return _like(a, keep) * a + _like(a, take) * b


def _like(x: Any, values: Any) -> Any:
    return x.new_tensor(values) if hasattr(x, "new_tensor") else values.astype(x.dtype)
