"""The task of training a model of our own: denoiser and text tower together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.data.pictures import Pictures
from sfumato.families.native import Native, metadata
from sfumato.text.tower import train_tokenizer
from sfumato.training.objective import DenoisingObjective, Losses
from sfumato.training.recipe import Recipe
from sfumato.training.state import write_atomically


class DenoiserTask:
    """Words and pictures in, denoising losses out."""

    def __init__(self, recipe: Recipe, pictures: Pictures, run: Path):
        self.recipe, self.pictures = recipe, pictures
        tokenizer = _tokenizer(pictures, recipe.model.text.vocabulary, run / "tokenizer.json")
        torch.manual_seed(recipe.seed)
        self.module = Native(recipe.model, tokenizer).to(memory_format=torch.channels_last)
        config = recipe.model
        self.objective = DenoisingObjective(
            config.build_schedule(), config.build_parameterization(), recipe.objective
        )

    def losses(self, step: int, generator: torch.Generator) -> Losses:
        """Return the losses of one step's batch."""
        batch = self.pictures.batch(self.recipe.seed, step, self.recipe.batch)
        ids, mask = self.module.text.tokenize(batch.captions)
        x0 = batch.x0.to(memory_format=torch.channels_last)
        return self.objective(lambda x, clock: self.module(x, clock, ids, mask), x0, generator)

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a model file: fp16 weights, and metadata that say how to build it."""
        tensors = {k: v.half().contiguous() for k, v in weights.items()}
        meta = metadata(self.recipe.model, self.module.text.tokenizer, {"name": self.recipe.name, **self.recipe.card})
        write_atomically(path, save(tensors, meta))

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw the recipe's prompts with the averaged weights, one row of three seeds each."""
        from sfumato.training.grid import draw_grid

        current = {k: v.clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(dict(weights))
        try:
            draw_grid(self.module, list(self.recipe.grid_prompts), path)
        finally:
            self.module.load_state_dict(current)
            self.module.train()


def _tokenizer(pictures: Pictures, vocabulary: int, path: Path) -> Tokenizer:
    """Take up the run's vocabulary, or learn it from the captions and store it with the run."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer([str(text) for row in pictures.rows for text in _texts(row)], vocabulary)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tokenizer.to_str().encode())
    return tokenizer


def _texts(row: Mapping[str, object]) -> list[object]:
    names = row.get("alt_names") or []
    tags = row.get("tags") or []
    return [row.get("caption", ""), row.get("name", ""), row.get("style_phrase", ""), *names, *tags]  # type: ignore[misc]


