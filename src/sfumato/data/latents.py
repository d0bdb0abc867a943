"""Latents in the place of pictures: encoded once, kept in a file that is named by what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from sfumato.data.pictures import Batch, Pictures, Row
from sfumato.errors import BadData
from sfumato.files import write_atomically


def encoded(pictures: Pictures, encode: Callable[[Tensor], Tensor], key: str, folder: Path, batch: int = 128) -> Tensor:
    """Return what ``encode`` makes of every picture, fp16 (N, …), from the folder where it is known already.

    Args:
        encode: pictures (B, C, H, W) in [−1, 1] → (B, …).
        key: names ``encode`` and all that it depends on; the file's name is a hash of it and of the pictures.
    """
    if pictures.config.flip or pictures.config.crop == "random" or pictures.config.lazy:
        raise BadData("data: flip, crop=random and lazy do not go with latents, which are made once: turn them off")
    path = folder / f"{hashlib.sha256(f'{key}/{pictures.fingerprint()}'.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        return load(path.read_bytes())["latents"]
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pictures), batch):
            parts.append(encode(pictures.at(range(start, min(start + batch, len(pictures))))).half())
    latents = torch.cat(parts).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"latents": latents}))
    return latents


@dataclass(frozen=True, eq=False)
class Latents:
    """Pictures whose x0 is a latent: the same order and captions as theirs."""

    pictures: Pictures
    latents: Tensor  # (N, C, h, w)

    @property
    def rows(self) -> Sequence[Row]:
        """The pictures' columns."""
        return self.pictures.rows

    def take(self, seed: int, places: Iterable[int]) -> Batch:
        """Return what stands at some places of the endless order."""
        drawn = [(i, self.pictures.caption(i, rng)) for i, rng in self.pictures.drawn(seed, places)]
        indices = [i for i, _ in drawn]
        return Batch(self.latents[indices].float(), [caption for _, caption in drawn], indices)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, their columns and their latents."""
        digest = hashlib.sha256(self.pictures.fingerprint().encode())
        digest.update(self.latents.numpy().tobytes())
        return digest.hexdigest()
