"""How much of a picture an autoencoder loses: PSNR and SSIM of its reconstructions; the rest is as for a model.

Pictures are compared as the eight-bit pictures that a user would see. Shapes: N pictures (N, 3, S, S), uint8.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sfumato.evaluation.bootstrap import Array, mean_interval
from sfumato.evaluation.cache import content_hash
from sfumato.evaluation.measure import Made
from sfumato.evaluation.report import Figure
from sfumato.evaluation.truth import Truth
from sfumato.networks.compact import CompactAutoencoder
from sfumato.pixels import eight_bits, signed

MOST_PSNR = 100.0  # decibels, of a picture without any error


def psnr(x: Tensor, y: Tensor) -> Array:
    """Peak signal-to-noise ratio of pairs in decibels, at most 100, (N,)."""
    error = (x.double() - y.double()).square().mean((1, 2, 3)).clamp(min=255**2 * 10 ** (-MOST_PSNR / 10))
    return (10 * torch.log10(255**2 / error)).numpy()


def ssim(x: Tensor, y: Tensor) -> Array:
    """Structural similarity of pairs, averaged over pixels and channels, (N,); 1 for equal ones.

    Source: Wang et al., "Image Quality Assessment" (IEEE TIP 13, 2004), eq. 13, a Gaussian window of σ = 1.5, 11 px.
    """
    a, b = (v.double().numpy() for v in (x, y))

    def local(v: Array) -> Array:
        return gaussian_filter(v, 1.5, axes=(2, 3), radius=5, mode="reflect")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = local(a), local(b)
    var_a, var_b, both = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return np.asarray((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3)))


@torch.no_grad()
def reconstruct(network: CompactAutoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """Return what is left of uint8 pictures (N, 3, S, S) after encoding and decoding, as uint8."""
    parts: list[Tensor] = []
    for part in images.split(batch):
        parts.append(eight_bits(network.decode(network.encode(signed(part)))))
    return torch.cat(parts)


def reconstructions(network: CompactAutoencoder, truth: Truth) -> dict[str, Tensor]:
    """Return what is left of the pictures drawn, by split."""
    return {split: reconstruct(network, truth.images[list(rows)]) for split, rows in truth.drawn.items()}


def measure_pairs(truth: Truth, made: Made) -> list[Figure]:
    """Return PSNR and SSIM of pictures against those that they were made from."""
    figures: list[Figure] = []
    for split, rows in truth.drawn.items():
        real, concepts = truth.images[list(rows)], truth.concepts(rows)
        for metric, measure in (("PSNR", psnr), ("SSIM", ssim)):
            values, reference = measure(real, made[split]), content_hash(real)
            interval = mean_interval(values, concepts)
            figures.append(Figure(metric, split, "", float(values.mean()), interval, len(rows), "pixels", reference))
    return figures
