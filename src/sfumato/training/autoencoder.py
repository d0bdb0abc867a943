"""The task of training an autoencoder: pictures through a narrow, noisy place and back.

    loss = |x − x̂| + m·(x − x̂)² + p·LPIPS(x, x̂) + k·KL(N(μ, σ²) ‖ N(0, 1)) + a·adversarial

(2112.10752, section 3.1). The discriminator learns in the same step and by the same optimizer: its own hinge loss sees
the reconstruction without its history, the autoencoder's loss sees the discriminator's weights without theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.checkpoints.tensors import to_half
from sfumato.config import to_dict
from sfumato.data.pictures import Pictures
from sfumato.families.autoencoder import FORMAT
from sfumato.families.pretrained import load_lpips
from sfumato.files import write_atomically
from sfumato.networks.compact import CompactAutoencoder, PatchDiscriminator
from sfumato.training.adversary import opposed
from sfumato.training.draws import draws
from sfumato.training.grid import write_sheet
from sfumato.training.objective import Losses
from sfumato.training.recipe import AutoencoderLoss, Recipe


class Pair(NamedTuple):
    """One micro-batch: pictures (B, 3, H, W), unit noise like their latents, its excess, and whether the game is on."""

    x: Tensor
    noise: Tensor
    excess: Tensor  # (B, 1, 1, 1)
    adversarial: bool


class Game(nn.Module):
    """Autoencoder and, where the recipe has one, its discriminator: pictures → each one's loss (B,)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.weights: AutoencoderLoss = recipe.autoencoder.loss
        self.autoencoder = CompactAutoencoder(recipe.autoencoder.network)
        self.discriminator = PatchDiscriminator() if self.weights.adversarial else None
        # Outside the module's state: it is not learned.
        self.perceptual: nn.Module | None = None
        if self.weights.perceptual:
            object.__setattr__(self, "perceptual", load_lpips("alex"))

    def forward(self, x: Tensor, noise: Tensor, excess: Tensor, adversarial: bool) -> Tensor:
        """The loss of each picture (B,)."""
        w = self.weights
        y, mean, log_variance = self.autoencoder(x, noise, excess)
        y = y.float()
        error = y - x
        loss = error.abs().mean((1, 2, 3)) + w.square * error.square().mean((1, 2, 3))
        kl = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean((1, 2, 3))
        loss = loss + w.kl * kl
        if self.perceptual is not None:
            loss = loss + w.perceptual * self.perceptual.to(y.device)(y, x).float()
        if self.discriminator is not None:
            share = w.adversarial if adversarial else 0.0  # every parameter takes part in every step
            fooled, hinge = opposed(self.discriminator, (x,), (y,))
            loss = loss + share * fooled + hinge
        return loss


class AutoencoderTask:
    """Pictures in, reconstruction losses out."""

    def __init__(self, recipe: Recipe, pictures: Pictures):
        self.recipe, self.pictures = recipe, pictures
        torch.manual_seed(recipe.seed)
        self.module = Game(recipe).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def fetch(self, places: range) -> Pair:
        """Prepare pictures and noise for some places of the endless order."""
        x = self.pictures.take(self.recipe.seed, places).x0.contiguous(memory_format=torch.channels_last)
        config = self.recipe.autoencoder
        side = self.recipe.autoencoder.size // config.network.factor
        u, noise = draws(self.recipe.seed, places, (config.network.latent_channels, side, side))
        adversarial = places.start // self.recipe.batch >= config.loss.adversarial_from * self.recipe.steps
        return Pair(x, noise, config.loss.noise * u.float()[:, None, None, None], adversarial)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures and their columns."""
        return self.pictures.fingerprint()

    def losses(self, module: Callable[..., Tensor], batch: Pair) -> Losses:
        """Return the losses of one micro-batch."""
        device = next(self.module.parameters()).device
        loss = module(batch.x.to(device), batch.noise.to(device), batch.excess.to(device), batch.adversarial)
        return Losses(loss, torch.zeros(len(loss)))

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the autoencoder alone, fp16, its latents' mean and deviation measured on the training pictures."""
        network = self._averaged(weights)
        measure_latents(network, self.pictures)
        meta = {"config": to_dict(network.config), "card": {"name": self.recipe.name, **self.recipe.card}}
        write_atomically(path, save(to_half(network.state_dict()), {FORMAT: json.dumps(meta)}))

    @torch.no_grad()
    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw pictures beside their reconstructions."""
        network = self._averaged(weights).eval()
        x = self.pictures.at(self.pictures.spread(min(32, len(self.pictures))))
        pairs = torch.stack([x, network.decode(network.encode(x))], 1).flatten(0, 1)
        write_sheet(pairs, 8, path)

    def _averaged(self, weights: Mapping[str, Tensor]) -> CompactAutoencoder:
        network = CompactAutoencoder(self.recipe.autoencoder.network)
        prefix = "autoencoder."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        return network


@torch.no_grad()
def measure_latents(network: CompactAutoencoder, pictures: Pictures, most: int = 4096) -> None:
    """Set the network's mean and deviation from evenly chosen pictures, the latents' own noise included."""
    total = square = torch.zeros(network.config.latent_channels, dtype=torch.float64)
    chosen = pictures.spread(min(most, len(pictures)))
    cells = 0
    for start in range(0, len(chosen), 128):
        mean, log_variance = (v.double() for v in network.moments(pictures.at(chosen[start : start + 128])))
        total = total + mean.sum((0, 2, 3))
        square = square + (mean**2 + log_variance.exp()).sum((0, 2, 3))
        cells += mean[:, 0].numel()
    network.mean.copy_(total / cells)
    network.deviation.copy_((square / cells - (total / cells) ** 2).sqrt())
