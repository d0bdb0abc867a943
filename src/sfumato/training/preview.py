"""The task of training a small decoder for previews: latents, a little noisy, to the pictures they came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.config import to_dict
from sfumato.data.latents import Latents
from sfumato.families.autoencoder import PREVIEW_FORMAT
from sfumato.families.pretrained import load_lpips
from sfumato.files import write_atomically
from sfumato.networks.compact import PreviewDecoder
from sfumato.training.draws import draws
from sfumato.training.grid import write_sheet
from sfumato.training.objective import Losses
from sfumato.training.recipe import Recipe


class Pair(NamedTuple):
    """One micro-batch: latents with their noise (B, C, h, w), the pictures (B, 3, H, W) in [−1, 1], shares of noise."""

    x: Tensor
    pictures: Tensor
    share: Tensor  # (B,)


class PreviewTask:
    """Latents in, reconstruction losses out: |x̂ − picture| + p·LPIPS(x̂, picture)."""

    def __init__(self, recipe: Recipe, latents: Latents):
        self.recipe, self.latents = recipe, latents
        torch.manual_seed(recipe.seed)
        network = PreviewDecoder(recipe.preview.network)
        self.module: nn.Module = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.perceptual = load_lpips("alex") if recipe.preview.perceptual else None

    def fetch(self, places: range) -> Pair:
        """Prepare latents and pictures for some places of the endless order."""
        batch = self.latents.take(self.recipe.seed, places)
        assert batch.indices is not None
        pictures = self.latents.pictures.at(batch.indices)
        u, noise = draws(self.recipe.seed, places, batch.x0.shape[1:])
        share = u.float() * self.recipe.preview.noise
        return Pair(batch.x0 + share[:, None, None, None] * noise, pictures, share)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, their columns and their latents."""
        return self.latents.fingerprint()

    def losses(self, module: Callable[..., Tensor], batch: Pair) -> Losses:
        """Return the losses of one micro-batch; their place is the share of noise."""
        device = next(self.module.parameters()).device
        x, pictures = (v.to(device).contiguous(memory_format=torch.channels_last) for v in (batch.x, batch.pictures))
        y = module(x).float()
        loss = (y - pictures).abs().mean((1, 2, 3))
        if self.perceptual is not None:
            loss = loss + self.recipe.preview.perceptual * self.perceptual.to(device)(y, pictures).float()
        return Losses(loss, batch.share / max(self.recipe.preview.noise, 1e-6))

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the decoder, fp16."""
        meta = {"config": to_dict(self.recipe.preview.network), "card": {"name": self.recipe.name, **self.recipe.card}}
        tensors = {k: v.half().contiguous() for k, v in weights.items()}
        write_atomically(path, save(tensors, {PREVIEW_FORMAT: json.dumps(meta)}))

    @torch.no_grad()
    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw pictures beside what is seen of them."""
        network = PreviewDecoder(self.recipe.preview.network)
        network.load_state_dict(dict(weights))
        pictures = self.latents.pictures
        chosen = pictures.spread(min(32, len(pictures)))
        x = pictures.at(chosen)
        seen = network(torch.stack([self.latents.latents[i] for i in chosen]).float())
        write_sheet(torch.stack([x, seen], 1).flatten(0, 1), 8, path)
