"""The task of training a model of our own: denoiser and text tower together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.data.pictures import Pictures
from sfumato.families.native import Native, metadata
from sfumato.files import write_atomically
from sfumato.text.tower import train_tokenizer
from sfumato.training.draws import draws
from sfumato.training.objective import DenoisingObjective, Losses
from sfumato.training.recipe import Recipe
from sfumato.training.world import World


class Prepared(NamedTuple):
    """One micro-batch: pictures (B, C, H, W), token ids and mask (B, M), uniform numbers (B,), noise like x0."""

    x0: Tensor
    ids: Tensor
    mask: Tensor
    u: Tensor
    eps: Tensor


class DenoiserTask:
    """Words and pictures in, denoising losses out."""

    def __init__(self, recipe: Recipe, pictures: Pictures, run: Path, world: World = World()):  # noqa: B008
        self.recipe, self.pictures = recipe, pictures
        if world.main:
            _learn_tokenizer(pictures, recipe.model.text.vocabulary, run / "tokenizer.json")
        world.barrier()
        tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
        torch.manual_seed(recipe.seed)
        self.module = Native(recipe.model, tokenizer).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        config = recipe.model
        self.objective = DenoisingObjective(config.build_schedule(), config.build_parameterization(), recipe.objective)

    def fetch(self, places: range) -> Prepared:
        """Prepare pictures, token ids, levels and noise for some places of the endless order."""
        batch = self.pictures.take(self.recipe.seed, places)
        ids, mask = self.module.text.tokenize(batch.captions)
        u, eps = draws(self.recipe.seed, places, batch.x0.shape[1:])
        return Prepared(batch.x0, ids, mask, u, eps)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures and their columns."""
        return self.pictures.fingerprint()

    def losses(self, module: Callable[..., Tensor], batch: Prepared) -> Losses:
        """Return the losses of one micro-batch."""
        device = next(self.module.parameters()).device
        x0, ids, mask, u, eps = (v.to(device) for v in batch)
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        return self.objective(lambda x, clock: module(x, clock, ids, mask), x0, u, eps)

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a model file: fp16 weights, and metadata that say how to build it."""
        tensors = {k: v.half().contiguous() for k, v in weights.items()}
        meta = metadata(self.recipe.model, self.module.text.tokenizer, {"name": self.recipe.name, **self.recipe.card})
        write_atomically(path, save(tensors, meta))

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw the recipe's prompts with the averaged weights, one row of three seeds each."""
        from sfumato.training.grid import draw_grid

        averaged = Native(self.recipe.model, self.module.text.tokenizer)
        averaged.load_state_dict(dict(weights))
        draw_grid(averaged, list(self.recipe.grid_prompts), path)


def _learn_tokenizer(pictures: Pictures, vocabulary: int, path: Path) -> None:
    """Learn a vocabulary from the captions and store it with the run, unless it has one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer([str(text) for row in pictures.rows for text in _texts(row)], vocabulary)
        write_atomically(path, tokenizer.to_str().encode())


def _texts(row: Mapping[str, object]) -> list[object]:
    names = row.get("alt_names") or []
    tags = row.get("tags") or []
    return [row.get("caption", ""), row.get("name", ""), row.get("style_phrase", ""), *names, *tags]  # type: ignore[misc]
