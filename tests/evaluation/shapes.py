"""Synthetic pictures: shapes in colours, in three styles; and which optional packages are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.checkpoints.packaged import ALEXNET, LITE0, MINILM, PackagedFile
from sfumato.errors import NoResources
from sfumato.evaluation.bootstrap import generator

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 210, 30),
    "black": (20, 20, 20),
}
SHAPES = ("disc", "square", "bar", "ring", "cross", "half")
STYLES = ("plain", "framed", "dark")


def missing(*files: PackagedFile) -> str:
    """Return the first missing package's message, or ''."""
    for file in files:
        try:
            file.locate()
        except NoResources as e:
            return str(e)
    return ""


needs_weights = pytest.mark.skipif(bool(missing(LITE0, ALEXNET, MINILM)), reason=missing(LITE0, ALEXNET, MINILM))


def picture(shape: str, colour: str, style: str, seed: int, size: int = 16) -> torch.Tensor:
    """Draw one, uint8 (3, S, S), its place and size by the seed."""
    rng = generator(seed)
    y, x = np.mgrid[:size, :size] + 0.5
    cy, cx, r = size * rng.uniform(0.42, 0.58), size * rng.uniform(0.42, 0.58), size * rng.uniform(0.28, 0.4)
    dy, dx = np.abs(y - cy) / r, np.abs(x - cx) / r
    distance = np.hypot(dy, dx)
    mask = {
        "disc": distance < 1,
        "square": np.maximum(dy, dx) < 0.85,
        "bar": (dy < 0.35) & (dx < 1),
        "ring": (distance < 1) & (distance > 0.55),
        "cross": ((dy < 0.3) & (dx < 1)) | ((dx < 0.3) & (dy < 1)),
        "half": (distance < 1) & (y > cy),
    }[shape]
    canvas = np.full((size, size, 3), 60 if style == "dark" else 255, np.uint8)
    if style == "framed":
        canvas[[0, -1]], canvas[:, [0, -1]] = 128, 128
    canvas[mask] = COLOURS[colour]
    return torch.from_numpy(canvas).permute(2, 0, 1)


def drawings(copies: int = 4, splits: bool = True) -> tuple[torch.Tensor, list[dict[str, object]]]:
    """Return all shapes in all colours and styles: 90 concepts' drawings times copies, a sixth of them held out."""
    images, rows = [], []
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for t, style in enumerate(STYLES):
                for copy in range(copies):
                    images.append(picture(shape, colour, style, seed=len(images)))
                    held_out = (c + s + t) % 6 == 0
                    name = f"{colour} {shape}"
                    rows.append(
                        {
                            "caption": f"{name}, {style} style",
                            "name": name,
                            "concept": name,
                            "style": style,
                            "copy": copy,
                        }
                        | ({"split": "test" if held_out else "train"} if splits else {})
                    )
    return torch.stack(images), rows  # type: ignore[return-value]
