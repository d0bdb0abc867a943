"""The compact autoencoder: factors, standardized latents, and who learns from what in the adversarial game."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.networks.compact import CompactAutoencoder, CompactConfig, PatchDiscriminator, Residual, deepened


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module


@pytest.mark.parametrize(("patch", "widths", "factor"), [(2, (8, 12), 4), (4, (8, 12), 8), (2, (8, 8, 12, 12), 16)])
def test_factor_and_shapes(patch: int, widths: tuple[int, ...], factor: int) -> None:
    config = CompactConfig(latent_channels=5, widths=widths, patch=patch)
    network = CompactAutoencoder(config)
    x = network.encode(torch.zeros(2, 3, 32, 64))
    assert config.factor == factor
    assert x.shape == (2, 5, 32 // factor, 64 // factor)
    assert network.decode(x).shape == (2, 3, 32, 64)


def test_the_decoder_undoes_the_standardization() -> None:
    network = CompactAutoencoder(CompactConfig(latent_channels=4, widths=(8, 12)))
    shaken(network)
    network.mean.copy_(torch.tensor([0.3, -2.0, 0.0, 1.0]))
    network.deviation.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, log_variance = network.moments(pictures)
    torch.testing.assert_close(network.decode(network.encode(pictures)), network.decoder(mean), atol=1e-4, rtol=1e-4)
    noise = torch.randn_like(mean)
    with_noise, own_mean, own_variance = network(pictures, noise)
    torch.testing.assert_close(network.decode(network.encode(pictures, noise)), with_noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((own_mean, own_variance), (mean, log_variance))


def test_excess_noise_is_a_share_of_the_latents_deviation() -> None:
    """The decoder sees μ + √(σ² + (excess · deviation)²)·noise, each picture by its own excess; none by default."""
    network = CompactAutoencoder(CompactConfig(latent_channels=4, widths=(8, 12)))
    shaken(network)
    network.decoder = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    pictures, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 4, 4)
    mean, log_variance = network.moments(pictures)
    torch.testing.assert_close(network(pictures, noise)[0], mean + (0.5 * log_variance).exp() * noise)
    excess = torch.tensor([0.0, 0.5, 2.0])[:, None, None, None]
    spread = mean.transpose(0, 1).flatten(1).std(1, correction=0)[:, None, None]
    deviation = (log_variance.exp() + (excess * spread) ** 2).sqrt()
    torch.testing.assert_close(network(pictures, noise, excess)[0], mean + deviation * noise)


def test_a_residual_network_starts_as_linear_maps() -> None:
    """Zero last convolutions: the encoder before training is a straight line, so that doubling doubles."""
    network = CompactAutoencoder(CompactConfig(latent_channels=4, widths=(8, 12)))
    body = network.encoder[:-2]  # without the last activation and projection
    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    zero = body(torch.zeros_like(x))
    torch.testing.assert_close(body(x + y) - zero, (body(x) - zero) + (body(y) - zero), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_deepened_decoder_starts_as_it_was(blocks: int) -> None:
    torch.manual_seed(0)
    network = CompactAutoencoder(CompactConfig(3, (8, 12), decoder_blocks=1))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    network.mean.fill_(0.3)
    network.deviation.fill_(2.0)
    deeper = deepened(network, blocks)
    assert deeper.config.decoder_blocks == blocks
    assert sum(isinstance(layer, Residual) for layer in deeper.decoder) == 2 * blocks
    z, pictures = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 16, 16)
    assert torch.equal(deeper.decode(z), network.decode(z))
    assert torch.equal(deeper.encode(pictures), network.encode(pictures))
    with pytest.raises(ValueError, match="it cannot be given 0"):
        deepened(network, 0)


def test_the_discriminator_judges_patches() -> None:
    """A change in one corner is felt most there: elsewhere only by way of the norms, which see the whole."""
    judge = shaken(PatchDiscriminator(8))
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[..., :8, :8] += 2.0
    change = (judge(x) - judge(y)).abs().mean(0)[0]
    assert change.shape == (8, 8)
    assert change[:2, :2].max() > 2 * change[4:, 4:].max()
