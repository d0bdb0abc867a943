"""What a latent model makes of pictures: their latents, part of the way to noise and drawn back by the model.

So its own mistakes stand beside the pictures that were meant: what a decoder can learn to mend.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from sfumato.data.captions import write_caption
from sfumato.data.kept import kept
from sfumato.data.latents import Latents
from sfumato.diffusion.level import q_sample
from sfumato.diffusion.spacings import SPACINGS
from sfumato.errors import BadData
from sfumato.families.native import Native, read_native
from sfumato.networks.compact import CompactAutoencoder
from sfumato.training.draws import draws
from sfumato.training.grid import drawn
from sfumato.training.recipe import Recipe

BATCH = 64  # pictures that start from the same level


def load_latent_model(path: Path, autoencoder: CompactAutoencoder) -> Native:
    """Load a model of our own; BadCheckpoint if it is none, BadData if its latents are another autoencoder's."""
    native = read_native(path)
    theirs = {} if native.autoencoder is None else native.autoencoder.state_dict()
    ours = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("decoder.")}
    if not all(k in theirs and torch.equal(theirs[k], v) for k, v in ours.items()):
        raise BadData(f"recipe: {path} draws other latents than those of latents.autoencoder")
    return native


def redrawn(recipe: Recipe, latents: Latents, native: Native, key: str, folder: Path) -> Tensor:
    """Return each picture's latents, drawn back by the model under its caption, fp16 (N, C, h, w).

    ``key`` names the model; what is known already is taken from the folder.
    """
    pictures, config = latents.pictures, recipe.decoder
    schedule = native.config.build_schedule()
    low, high = config.strength

    def part(indices: range) -> Tensor:
        captions = [
            write_caption(pictures.rows[i], pictures.config.captions, 0.0, random.Random(f"redrawn/{i}"))
            for i in indices
        ]
        x0 = torch.stack([latents.latents[i] for i in indices]).float()
        u, eps = draws(recipe.seed, indices, x0.shape[1:])
        path = SPACINGS["trailing"](schedule, config.steps).last(low + float(u[0]) * (high - low))
        return drawn(native, captions, q_sample(x0, eps, path[0]), path).half()

    def make() -> dict[str, Tensor]:
        n = len(pictures)
        return {"redrawn": torch.cat([part(range(i, min(i + BATCH, n))) for i in range(0, n, BATCH)])}

    settings = (key, config.strength, config.steps, recipe.seed, pictures.config.captions)
    return kept(folder, f"redrawn/{settings}/{latents.fingerprint()}", make)["redrawn"]
