"""Inpainting with any denoiser and any sampler: where the picture is known, the denoiser is told the truth.

    x0 ← m·x0 + (1 − m)·known,      ε ← m·ε + (1 − m)·(x − α·known)/σ,      m = 1 where to repaint

Started at α·known + σ·ε, every sampler then keeps the known part at q(x_t | known) with one and the same ε (or with
what a stochastic one puts in its place), which is RePaint's mixing (2201.09865, eq. 8) at every level, without a hand
in the sampler's loop; at σ = 0 the known part is exact.
"""

from __future__ import annotations

from typing import Any

from sfumato.diffusion.level import Denoiser, NoiseLevel, Prediction


def repaint(denoise: Denoiser, known: Any, mask: Any) -> Denoiser:
    """A denoiser that repaints a part of a known picture.

    Args:
        denoise: any denoiser, guided or not.
        known: the clean picture, broadcasting against x.
        mask: the same, 1 where to repaint, 0 where to keep, and mixed between.
    """

    def kept(x: Any, level: NoiseLevel) -> Prediction:
        out, truth = denoise(x, level), Prediction.from_x0(x, level, known)
        return Prediction(*(mask * new + (1 - mask) * old for new, old in zip(out, truth, strict=True)))

    return kept
