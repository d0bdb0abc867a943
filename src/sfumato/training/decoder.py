"""The task of training a decoder alone: latents, not quite as they should be, to the pictures they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.checkpoints.tensors import to_half
from sfumato.config import to_dict
from sfumato.data.latents import Latents
from sfumato.families.autoencoder import FORMAT, PREVIEW_FORMAT
from sfumato.families.pretrained import load_lpips
from sfumato.files import write_atomically
from sfumato.networks.compact import CompactAutoencoder, PreviewDecoder
from sfumato.training.draws import draws
from sfumato.training.grid import write_sheet
from sfumato.training.objective import Losses
from sfumato.training.recipe import Recipe


class Pair(NamedTuple):
    """One micro-batch: latents with their noise (B, C, h, w), the pictures (B, 3, H, W) in [−1, 1], shares of noise."""

    x: Tensor
    pictures: Tensor
    share: Tensor  # (B,)


class OwnDecoder(nn.Module):
    """An autoencoder's decoder by itself: the denoiser's x (B, C, h, w) → pictures (B, 3, f·h, f·w)."""

    def __init__(self, autoencoder: CompactAutoencoder):
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        autoencoder.decoder.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Decode."""
        return self.autoencoder.decode(x)


class DecoderTask:
    """Latents in, reconstruction losses out: |x̂ − picture| + m·(x̂ − picture)² + p·LPIPS(x̂, picture).

    Args:
        autoencoder: whose latents they are.
        redrawn: the same latents as a model draws them, (N, C, h, w); every other place of the order takes them.
    """

    def __init__(
        self, recipe: Recipe, latents: Latents, autoencoder: CompactAutoencoder, redrawn: Tensor | None = None
    ):
        self.recipe, self.latents, self.redrawn = recipe, latents, redrawn
        torch.manual_seed(recipe.seed)
        self.module: nn.Module = self._network(autoencoder).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.perceptual = load_lpips("alex") if recipe.decoder.perceptual else None

    def fetch(self, places: range) -> Pair:
        """Prepare latents and pictures for some places of the endless order."""
        batch = self.latents.take(self.recipe.seed, places)
        assert batch.indices is not None
        pictures = self.latents.pictures.at(batch.indices)
        u, noise = draws(self.recipe.seed, places, batch.x0.shape[1:])
        x0, share = batch.x0, u.float() * self.recipe.decoder.noise
        if self.redrawn is not None:
            drawn = torch.tensor([place % 2 for place in places], dtype=torch.bool)
            x0 = torch.where(drawn[:, None, None, None], self.redrawn[batch.indices].float(), x0)
            share = share.masked_fill(drawn, 0.0)
        return Pair(x0 + share[:, None, None, None] * noise, pictures, share)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, their columns and their latents, and of what a model made of these."""
        if self.redrawn is None:
            return self.latents.fingerprint()
        return hashlib.sha256(self.latents.fingerprint().encode() + self.redrawn.numpy().tobytes()).hexdigest()

    def losses(self, module: Callable[..., Tensor], batch: Pair) -> Losses:
        """Return the losses of one micro-batch; their place is the share of noise."""
        device, config = next(self.module.parameters()).device, self.recipe.decoder
        x, pictures = (v.to(device).contiguous(memory_format=torch.channels_last) for v in (batch.x, batch.pictures))
        y = module(x).float()
        error = y - pictures
        loss = error.abs().mean((1, 2, 3)) + config.square * error.square().mean((1, 2, 3))
        if self.perceptual is not None:
            loss = loss + config.perceptual * self.perceptual.to(device)(y, pictures).float()
        return Losses(loss, batch.share / max(config.noise, 1e-6))

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the decoder for previews, or the whole autoencoder with its new decoder, fp16."""
        small = self.recipe.decoder.network
        if small is None:
            form, config = FORMAT, self._own().config
            weights = {k.removeprefix("autoencoder."): v for k, v in weights.items()}
        else:
            form, config = PREVIEW_FORMAT, small
        meta = {"config": to_dict(config), "card": {"name": self.recipe.name, **self.recipe.card}}
        write_atomically(path, save(to_half(weights), {form: json.dumps(meta)}))

    @torch.no_grad()
    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw pictures beside what is seen of them, in latents that a model drew where there are any."""
        network = self._network()
        network.load_state_dict(dict(weights))
        pictures = self.latents.pictures
        chosen = pictures.spread(min(32, len(pictures)))
        x = pictures.at(chosen)
        source = self.latents.latents if self.redrawn is None else self.redrawn
        seen = network(torch.stack([source[i] for i in chosen]).float())
        write_sheet(torch.stack([x, seen], 1).flatten(0, 1), 8, path)

    def _network(self, autoencoder: CompactAutoencoder | None = None) -> nn.Module:
        """What the recipe trains: a decoder for previews, or an autoencoder's own, by default a new one's."""
        small = self.recipe.decoder.network
        if small is not None:
            return PreviewDecoder(small)
        return OwnDecoder(CompactAutoencoder(self._own().config) if autoencoder is None else autoencoder)

    def _own(self) -> CompactAutoencoder:
        assert isinstance(self.module, OwnDecoder)
        return self.module.autoencoder
