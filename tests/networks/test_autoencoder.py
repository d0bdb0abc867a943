"""Autoencoders against diffusers, on configurations chosen by the seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from sfumato.families.configs import autoencoder_config, tiny_autoencoder_config
from sfumato.networks.autoencoder import Autoencoder, TinyAutoencoder


@pytest.mark.parametrize("seed", range(5))
@torch.inference_mode()
def test_kl_equals_diffusers(seed: int) -> None:
    r = random.Random(seed)
    levels, groups = r.choice([1, 2, 3]), r.choice([2, 4])
    channels = r.choice([4, 16])
    more: dict[str, Any] = {"use_quant_conv": r.random() < 0.5, "use_post_quant_conv": r.random() < 0.5}
    if r.random() < 0.5:
        more |= {"shift_factor": r.uniform(0.01, 0.2), "mid_block_add_attention": False}
    torch.manual_seed(seed)
    theirs = AutoencoderKL(
        block_out_channels=[8 * r.choice([1, 2, 3]) for _ in range(levels)],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=r.choice([1, 2]),
        latent_channels=channels,
        norm_num_groups=groups,
        scaling_factor=r.uniform(0.1, 2),
        **more,
    ).eval()
    ours = Autoencoder(autoencoder_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    c = theirs.config
    posterior = theirs.encode(pictures).latent_dist
    shift = c.shift_factor or 0.0
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(ours.encode(pictures), (posterior.mean - shift) * c.scaling_factor, **close)
    noise = torch.randn_like(posterior.mean)
    sampled = (posterior.mean + posterior.std * noise - shift) * c.scaling_factor
    torch.testing.assert_close(ours.encode(pictures, noise), sampled, **close)
    x = torch.randn(2, channels, 4, 6)
    torch.testing.assert_close(ours.decode(x), theirs.decode(x / c.scaling_factor + shift).sample, **close)


def test_latents_normalized_by_channel_come_back() -> None:
    config = autoencoder_config(
        {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2,
         "latents_mean": [0.5, -1.0], "latents_std": [2.0, 3.0], "scaling_factor": 0.5}
    )  # fmt: skip
    ours = Autoencoder(config).eval()
    pictures = torch.rand(1, 3, 4, 4)
    z, _ = ours.moments(pictures)
    x = ours.encode(pictures)
    mean, deviation = torch.tensor([0.5, -1.0])[:, None, None], torch.tensor([2.0, 3.0])[:, None, None]
    torch.testing.assert_close(x, (z - mean) / deviation * 0.5)
    assert ours.post_quant_conv is not None
    torch.testing.assert_close(ours.decode(x), ours.decoder(ours.post_quant_conv(z)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_tiny_equals_diffusers(seed: int) -> None:
    r = random.Random(seed)
    levels = r.choice([2, 3, 4])
    width = r.choice([4, 8])
    torch.manual_seed(seed)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=[width] * levels,
        decoder_block_out_channels=[width] * levels,
        num_encoder_blocks=[r.choice([1, 2]) for _ in range(levels)],
        num_decoder_blocks=[r.choice([1, 2]) for _ in range(levels)],
        latent_channels=r.choice([4, 16]),
        scaling_factor=r.uniform(0.5, 2),
        shift_factor=r.uniform(0, 0.3),
    ).eval()
    ours = TinyAutoencoder(tiny_autoencoder_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    c = theirs.config
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = (theirs.encode(pictures).latents - c.shift_factor) * c.scaling_factor
    torch.testing.assert_close(ours.encode(pictures), expected, atol=1e-5, rtol=0)
    x = torch.randn(2, c.latent_channels, 3, 4)
    expected = theirs.decode(x / c.scaling_factor + c.shift_factor).sample
    torch.testing.assert_close(ours.decode(x), expected, atol=1e-5, rtol=0)
