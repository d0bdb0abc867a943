"""Captioned pictures behind one random-access index.

Which picture comes when, with which words and which crop, is a pure function of (seed, epoch, place):
the same for any number of workers, and free to be taken up anywhere.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from sfumato.data import SAMPLE
from sfumato.errors import BadData
from sfumato.training.captions import plain_caption, template_caption
from sfumato.training.recipe import DataConfig

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 3, H, W) in [−1, 1] and their captions."""

    x0: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Pictures:
    """All pictures of a data set at training size in memory: uint8 (N, 3, H, W), rows of columns, draw weights (N,)."""

    images: Tensor
    rows: list[Row]
    weights: np.ndarray
    config: DataConfig

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int, rng: random.Random) -> str:
        """Write the words for one picture."""
        row, how = self.rows[index], self.config.captions
        if how == "template":
            return template_caption(row, self.config.dropout, rng)
        column = "caption" if how == "plain" else how.removeprefix("field:")
        return plain_caption(str(row[column]), self.config.dropout, rng)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the indices of one epoch: a permutation in which weights set how often each is drawn.

        Systematic sampling keeps every epoch at round(Σ weights) pictures, each drawn ⌊w⌋ or ⌈w⌉ times.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        edges = np.cumsum(self.weights)
        count = self.epoch_length
        points = (np.arange(count) + rng.random()) * edges[-1] / count
        chosen = np.searchsorted(edges, points, side="right").clip(max=len(self) - 1)
        return rng.permutation(chosen)

    @property
    def epoch_length(self) -> int:
        """Pictures in one epoch."""
        return max(1, round(float(self.weights.sum())))

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Return the pictures and captions of one training step."""
        first, length = step * size, self.epoch_length
        images: list[Tensor] = []
        captions: list[str] = []
        orders = {e: self.order(seed, e) for e in range(first // length, (first + size - 1) // length + 1)}
        for place in range(first, first + size):
            index = int(orders[place // length][place % length])
            rng = random.Random(f"{seed}/{place}")
            captions.append(self.caption(index, rng))
            image = self.images[index]
            images.append(image.flip(-1) if self.config.flip and rng.random() < 0.5 else image)
        return Batch(torch.stack(images).float() / 127.5 - 1, captions)


def load_pictures(config: DataConfig, size: int, root: Path) -> Pictures:
    """Read a data set's pictures at a square size; raises BadData where nothing usable is left."""
    path = SAMPLE if config.path == "sample" else (root / config.path).expanduser()
    if not path.exists():
        raise BadData(f"no data at {path}: give the data set with data.path=…")
    rows = [row for row in pq.read_table(path).to_pylist() if _wanted(row, config)]
    if not rows:
        raise BadData(f"{path}: no picture is left after where={dict(config.where)} exclude={dict(config.exclude)}")
    images = torch.stack([_decode(row.pop("image"), size) for row in rows])
    weights = np.array([_weight(row, config) for row in rows], dtype=np.float64)
    return Pictures(images, rows, weights, config)


def _wanted(row: Row, config: DataConfig) -> bool:
    return all(row[k] == v for k, v in config.where.items()) and not any(
        row[k] in values for k, values in config.exclude.items()
    )


def _weight(row: Row, config: DataConfig) -> float:
    weight = 1.0
    for column, table in config.weights.items():
        weight *= table.get(str(row[column]), 1.0)
    return weight


def _decode(data: bytes, size: int) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)  # (3, H, W)


Captioner = Callable[[int, random.Random], str]
