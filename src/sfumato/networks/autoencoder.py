"""Autoencoders between pictures and latents: the KL-regularized one of latent diffusion (2112.10752), and the tiny one.

    pictures (B, 3, H, W) in [−1, 1] ── encode ──> z (B, C, H/f, W/f) ── (z − shift)·scale ──> x, about unit variance

Modules are named as in the published folders of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import ConvBlock, CrossAttention, Downsample, GroupNorm, Upsample
from sfumato.networks.strips import convolve


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of a KL autoencoder.

    Args:
        widths: channels of each resolution, finest first.
        quantized, post_quantized: whether a 1×1 convolution follows the encoder, and precedes the decoder.
        middle_attention: whether the coarsest cells attend to each other.
        scale, shift: from its latents z to the denoiser's x = (z − shift)·scale.
        mean, deviation: the same for each channel, if given; they go before the scale.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    quantized: bool = True
    post_quantized: bool = True
    middle_attention: bool = True
    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @property
    def factor(self) -> int:
        """Pixels per side of one cell of the latents."""
        return 2 ** (len(self.widths) - 1)


class CellAttention(CrossAttention):
    """Self-attention of one head over the cells of a picture, beside it: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        y = super().forward(self.group_norm(x).flatten(2).transpose(1, 2))
        return x + y.transpose(1, 2).unflatten(2, x.shape[-2:])


class Middle(nn.Module):
    """Residual blocks around attention, at the coarsest resolution."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width, groups = config.widths[-1], config.groups
        self.resnets = nn.ModuleList(ConvBlock(width, width, None, groups) for _ in range(2))
        if config.middle_attention:
            self.attentions = nn.ModuleList([CellAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next."""

    def __init__(self, channels: int, width: int, blocks: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ConvBlock(width if i else channels, width, None, groups) for i in range(blocks))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(width, one_sided=True)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def __iter__(self) -> Iterator[nn.Module]:
        """Its layers in order: (B, channels, H, W) → (B, width, H or H/2 or 2H, …). Who runs them holds one x alone."""
        yield from self.resnets
        yield from getattr(self, "downsamplers", ())
        yield from getattr(self, "upsamplers", ())


class Encoder(nn.Module):
    """Pictures → moments of the latents: (B, 3, H, W) → (B, 2C, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.blocks, config.groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = Middle(config)
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return mean and log-variance, one after the other in the channels."""
        x = convolve(x, self.conv_in)
        for layer in chain.from_iterable(self.down_blocks):
            x = layer(x)
        return convolve(self.mid_block(x), self.conv_out, self.conv_norm_out)


class Decoder(nn.Module):
    """Latents → pictures: (B, C, H/f, W/f) → (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.blocks + 1, config.groups, up=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return pictures, about in [−1, 1]."""
        x = self.mid_block(self.conv_in(z))
        for layer in chain.from_iterable(self.up_blocks):
            x = layer(x)
        return convolve(x, self.conv_out, self.conv_norm_out)


class Autoencoder(nn.Module):
    """Pictures to latents and back."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config, c = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.quantized else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.post_quantized else None

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, held in [−30, 20], of the latents z of pictures (B, 3, H, W)."""
        h = self.encoder(pictures)
        mean, log_variance = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures in [−1, 1] → the denoiser's x: the mean, or a sample of it by unit noise of the latents' shape."""
        z, log_variance = self.moments(pictures)
        if noise is not None:
            z = z + (0.5 * log_variance).exp() * noise
        c = self.config
        if c.mean:
            z = (z - self._channels(c.mean, z)) / self._channels(c.deviation, z)
        return (z - c.shift) * c.scale

    def decode(self, x: Tensor) -> Tensor:
        """The denoiser's x (B, C, h, w) → pictures (B, 3, f·h, f·w)."""
        c = self.config
        z = x / c.scale + c.shift
        if c.mean:
            z = z * self._channels(c.deviation, z) + self._channels(c.mean, z)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _channels(self, values: tuple[float, ...], z: Tensor) -> Tensor:
        return z.new_tensor(values)[:, None, None]


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """The shape of a tiny autoencoder (TAESD and its kin).

    Args:
        encoder_blocks, decoder_blocks: residual blocks per resolution, in the order in which they are run; none for
            one that only decodes.
        encoder_widths, decoder_widths: channels per resolution, in the same order.
        scale, shift: from its latents to the denoiser's x = (z − shift)·scale.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scale: float = 1.0
    shift: float = 0.0

    @property
    def factor(self) -> int:
        """Pixels per side of one cell of the latents."""
        return 2 ** (len(self.decoder_widths) - 1)


class TinyBlock(nn.Module):
    """Three convolutions beside the identity, and a ReLU after all."""

    def __init__(self, width: int):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        return F.relu(self.conv(x) + x)


class Layers(nn.Module):
    """Layers run one after another, under the name that the published weights give them."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        return self.layers(x)


def _tiny_encoder(c: TinyAutoencoderConfig) -> Layers:
    layers: list[nn.Module] = []
    for i, (width, blocks) in enumerate(zip(c.encoder_widths, c.encoder_blocks, strict=True)):
        if i == 0:
            layers.append(nn.Conv2d(c.in_channels, width, 3, padding=1))
        else:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(width) for _ in range(blocks)]
    return Layers(*layers, nn.Conv2d(c.encoder_widths[-1], c.latent_channels, 3, padding=1))


def _tiny_decoder(c: TinyAutoencoderConfig) -> Layers:
    layers: list[nn.Module] = [nn.Conv2d(c.latent_channels, c.decoder_widths[0], 3, padding=1), nn.ReLU()]
    last = len(c.decoder_widths) - 1
    for i, (width, blocks) in enumerate(zip(c.decoder_widths, c.decoder_blocks, strict=True)):
        layers += [TinyBlock(width) for _ in range(blocks)]
        if i < last:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        else:
            layers.append(nn.Conv2d(width, c.out_channels, 3, padding=1))
    return Layers(*layers)


class TinyAutoencoder(nn.Module):
    """A small, fast autoencoder whose latents are the denoiser's own; pictures inside are in [0, 1]."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = _tiny_encoder(config) if config.encoder_blocks else None
        self.decoder = _tiny_decoder(config)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures in [−1, 1] → the denoiser's x; it has no variance, so that noise is not used."""
        if self.encoder is None:
            raise ValueError("this autoencoder only decodes")
        return (self.encoder((pictures + 1) / 2) - self.config.shift) * self.config.scale

    def decode(self, x: Tensor) -> Tensor:
        """The denoiser's x (B, C, h, w) → pictures (B, 3, f·h, f·w); latents are held softly within [−3, 3]."""
        z = x / self.config.scale + self.config.shift
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1


class Halves(nn.Module):
    """One autoencoder's way to latents and another's way back, over the same latents."""

    def __init__(self, encoder: Autoencoder | TinyAutoencoder, decoder: Autoencoder | TinyAutoencoder):
        super().__init__()
        self.first, self.second, self.config = encoder, decoder, encoder.config

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """As the first does."""
        return self.first.encode(pictures, noise)

    def decode(self, x: Tensor) -> Tensor:
        """As the second does."""
        return self.second.decode(x)


AnyAutoencoder: TypeAlias = Autoencoder | TinyAutoencoder | Halves
