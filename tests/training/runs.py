"""Small runs that the tests of the trainer share."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.data.pictures import Pictures, load_pictures
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.distillation import DistillTask
from sfumato.training.loop import train
from sfumato.training.progress import Progress
from sfumato.training.recipe import DistillRecipe, Recipe, load_recipe
from sfumato.training.world import World

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
SMALL = [
    "model.size=8",
    "model.network.widths=[8,16]",
    "model.network.context_dim=16",
    "model.text.dim=16",
    "batch=6",
    "steps=12",
    "checkpoint_every=3",
    "grid_every=0",
    "optimizer.warmup=2",
    "optimizer.decay=0",  # so that a run may go on longer than it was told at first
    "log_every=1",
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny.yaml", [*SMALL, *overrides])


def few(count: int = 20) -> Pictures:
    """Return so few pictures that a run of twelve steps of six goes through several epochs."""
    whole = load_pictures(recipe().data, 8, ROOT / "recipes")
    return replace(whole, images=whole.images[:count], rows=whole.rows[:count], weights=whole.weights[:count])


class Taught(DistillTask):
    """A student, judged too, whose teacher was drawn by lot."""

    def __init__(self, recipe: Recipe, pictures: Pictures, run: Path, world: World = World()):  # noqa: B008
        teacher = DenoiserTask(recipe, pictures, run, world).module
        for p in teacher.parameters():
            torch.nn.init.normal_(p, std=0.05)
        recipe = replace(recipe, distill=DistillRecipe(steps=2, substeps=2, adversarial=0.5))
        super().__init__(recipe, pictures, run, teacher.requires_grad_(False).eval(), world)


def run(
    pictures: Pictures,
    folder: Path,
    *overrides: str,
    task: type[DenoiserTask] = DenoiserTask,
    world: World = World(),  # noqa: B008
) -> bytes:
    """Train, or go on, in this process, and return the bytes of the final weights."""
    r = recipe(*overrides)
    train(task(r, pictures, folder, world), r, folder, Progress(quiet=True), world)
    return (folder / "final.safetensors").read_bytes()


def figures(folder: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()]


def states(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all checkpoints: weights, averages, moments, random numbers, cursor."""
    return {p.name: p.read_bytes() for p in sorted((folder / "checkpoints").iterdir())}


def command(folder: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    recipe_path = str(ROOT / "recipes/tiny.yaml")
    settings = {o.partition("=")[0]: o for o in (*SMALL, *overrides, f"run={folder}")}  # the command takes none twice
    return [sys.executable, *launcher, "-m", "sfumato", "train", recipe_path, *settings.values()]


class Watched(DenoiserTask):
    """Notes which places of the order each step has really learned from."""

    def fetch(self, places: range) -> Any:
        return places, super().fetch(places)

    def losses(self, module: Any, batch: Any) -> Any:
        places, prepared = batch
        self.seen = [*getattr(self, "seen", []), *places]
        return super().losses(module, prepared)
