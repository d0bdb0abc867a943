"""A compact KL autoencoder for small machines: convolutions without normalization, on patches of pixels.

    pictures (B, 3, H, W) in [−1, 1] ── encode ──> z (B, C, H/f, W/f) ── (z − mean)/deviation ──> x, of unit variance

The factor is f = patch · 2^(widths − 1). Pixels are folded into channels first, so that no convolution runs at full
resolution. Sources: latent diffusion (2112.10752) for the KL-regularized latents; the residual branches start as the
identity (Fixup, 1901.09321), which is what makes normalization dispensable.

Shapes: B pictures, C latent channels, W_l the width of level l.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import GroupNorm, zero


@dataclass(frozen=True)
class CompactConfig:
    """The shape of a compact autoencoder.

    Args:
        widths: channels of each resolution, finest first.
        patch: pixels per side that the finest resolution folds into one cell.
        encoder_blocks, decoder_blocks: residual blocks per resolution.
    """

    latent_channels: int = 16
    widths: tuple[int, ...] = (48, 96, 160)
    patch: int = 2
    encoder_blocks: int = 1
    decoder_blocks: int = 2

    @property
    def factor(self) -> int:
        """Pixels per side of one cell of the latents."""
        return self.patch * 2 ** (len(self.widths) - 1)


class Residual(nn.Module):
    """x + conv(SiLU(conv(SiLU(x)))), the last convolution zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) → the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def _residuals(width: int, n: int) -> list[nn.Module]:
    return [Residual(width) for _ in range(n)]


def _decoder_layers(channels: int, widths: tuple[int, ...], patch: int, blocks: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
    for i, width in reversed(list(enumerate(widths))):
        layers += _residuals(width, blocks)
        if i:
            layers += [nn.Conv2d(width, 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
    return [*layers, nn.SiLU(), nn.Conv2d(widths[0], 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch)]


class CompactAutoencoder(nn.Module):
    """Pictures to standardized latents and back; mean and deviation are measured when training ends."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: CompactConfig):
        super().__init__()
        self.config = config
        widths, c = config.widths, config.latent_channels
        down: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1),
        ]
        for i, width in enumerate(widths):
            if i:
                down.append(nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1))
            down += _residuals(width, config.encoder_blocks)
        self.encoder = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(widths[-1], 2 * c, 1))

        self.decoder = nn.Sequential(*_decoder_layers(c, widths, config.patch, config.decoder_blocks))
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("deviation", torch.ones(c))

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, held in [−14, 4], of the latents z (B, C, h, w) of pictures in [−1, 1]."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return mean, log_variance.clamp(-14, 4)

    def standardize(self, z: Tensor) -> Tensor:
        """Latents z (B, C, h, w) → the denoiser's x, about zero mean and unit variance in every channel."""
        return (z - self._channels(self.mean)) / self._channels(self.deviation)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures in [−1, 1] → the denoiser's x: the mean, or a sample of it by unit noise of the latents' shape."""
        z, log_variance = self.moments(pictures)
        if noise is not None:
            z = z + (0.5 * log_variance).exp() * noise
        return self.standardize(z)

    def decode(self, x: Tensor) -> Tensor:
        """The denoiser's x (B, C, h, w) → pictures (B, 3, f·h, f·w)."""
        return self.decoder(x * self._channels(self.deviation) + self._channels(self.mean))

    def forward(self, pictures: Tensor, noise: Tensor, excess: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions (B, 3, H, W) of pictures through noisy latents, and the moments; for training.

        Args:
            noise: unit noise (B, C, h, w).
            excess: noise beside the latents' own, as a share (B, 1, 1, 1) of each channel's deviation over the batch:
                what a denoiser leaves, and the decoder has to bear (l-DeTok, 2507.15856).
        """
        mean, log_variance = self.moments(pictures)
        spread = excess * mean.detach().std((0, 2, 3), correction=0)[:, None, None]
        return self.decoder(mean + (log_variance.exp() + spread**2).sqrt() * noise), mean, log_variance

    def _channels(self, v: Tensor) -> Tensor:
        return v[:, None, None]


def deepened(network: CompactAutoencoder, blocks: int) -> CompactAutoencoder:
    """The same autoencoder with so many blocks per resolution of its decoder; new ones start as the identity.

    Raises ValueError for fewer blocks than there are.
    """
    before = network.config.decoder_blocks
    if blocks < before:
        raise ValueError(f"the decoder has {before} blocks per resolution: it cannot be given {blocks}")
    deeper = CompactAutoencoder(replace(network.config, decoder_blocks=blocks))
    old = [layer.state_dict() for layer in network.decoder]
    in_a_row = 0
    for layer in deeper.decoder:
        in_a_row = in_a_row + 1 if isinstance(layer, Residual) else 0
        if in_a_row <= before:
            layer.load_state_dict(old.pop(0))
    shared = {k: v for k, v in network.state_dict().items() if not k.startswith("decoder.")}
    deeper.load_state_dict(deeper.state_dict() | shared)
    return deeper


@dataclass(frozen=True)
class PreviewConfig:
    """The shape of a decoder for previews: as a compact autoencoder's, but small."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (16, 32, 48)
    patch: int = 2
    blocks: int = 1

    @property
    def factor(self) -> int:
        """Pixels per side of one cell of the latents."""
        return self.patch * 2 ** (len(self.widths) - 1)


class PreviewDecoder(nn.Module):
    """A quick look at latents: the denoiser's x (B, C, h, w) → pictures (B, 3, f·h, f·w)."""

    def __init__(self, config: PreviewConfig):
        super().__init__()
        self.config = config
        layers = _decoder_layers(config.latent_channels, config.widths, config.patch, config.blocks)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Decode."""
        return self.layers(x)


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of a picture, real or made: (B, 3, H, W) → logits (B, 1, H/8, W/8) (1611.07004)."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Judge."""
        return self.layers(x)
