"""Latents in the place of pictures: encoded once, kept in a file that is named by what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.data.kept import kept
from sfumato.data.pictures import Batch, Pictures, Row
from sfumato.errors import BadData


def encoded(pictures: Pictures, encode: Callable[[Tensor], Tensor], key: str, folder: Path, batch: int = 128) -> Tensor:
    """Return what ``encode`` makes of every picture, fp16 (N, …), from the folder where it is known already.

    Args:
        pictures: all of one shape.
        encode: pictures (B, C, H, W) in [−1, 1] → (B, …).
        key: names ``encode`` and all that it depends on; the file's name is a hash of it and of the pictures.
    """
    return _stacks(pictures, {"latents": range(len(pictures))}, encode, key, folder, batch)["latents"]


def encoded_in_shapes(
    pictures: Pictures, encode: Callable[[Tensor], Tensor], key: str, folder: Path, batch: int = 128
) -> Sequence[Tensor] | Tensor:
    """Return what ``encode`` makes of each picture, as ``encoded`` does, but for pictures of many shapes."""
    if pictures.shapes is None:
        return encoded(pictures, encode, key, folder, batch)
    members: dict[str, list[int]] = {}
    for i, (h, w) in enumerate(pictures.shapes):
        members.setdefault(f"{h}x{w}", []).append(i)
    stacks = _stacks(pictures, members, encode, f"{key}/{pictures.shapes}", folder, batch)
    each = {i: z for shape, indices in members.items() for i, z in zip(indices, stacks[shape], strict=True)}
    return [each[i] for i in range(len(pictures))]


def _stacks(
    pictures: Pictures, members: Mapping[str, Sequence[int]], encode: Callable[[Tensor], Tensor], key: str,
    folder: Path, batch: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Encode groups of pictures, each of one shape, and keep the results by the groups' names."""
    if pictures.config.flip or pictures.config.crop == "random" or pictures.config.lazy:
        raise BadData("data: flip, crop=random and lazy do not go with latents, which are made once: turn them off")

    @torch.no_grad()
    def stack(indices: Sequence[int]) -> Tensor:
        return torch.cat([encode(pictures.at(indices[i : i + batch])).half() for i in range(0, len(indices), batch)])

    return kept(folder, f"{key}/{pictures.fingerprint()}", lambda: {name: stack(of) for name, of in members.items()})


@dataclass(frozen=True, eq=False)
class Latents:
    """Pictures whose x0 is a latent: the same order and captions as theirs."""

    pictures: Pictures
    latents: Sequence[Tensor] | Tensor  # N times (C, h, w)

    @property
    def rows(self) -> Sequence[Row]:
        """The pictures' columns."""
        return self.pictures.rows

    def take(self, seed: int, places: Iterable[int]) -> Batch:
        """Return what stands at some places of the endless order."""
        drawn = [(i, self.pictures.caption(i, rng)) for i, rng in self.pictures.drawn(seed, places)]
        indices = [i for i, _ in drawn]
        x0 = torch.stack([self.latents[i] for i in indices]).float()  # of one shape, as batches are
        return Batch(x0, [caption for _, caption in drawn], indices)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, their columns and their latents."""
        digest = hashlib.sha256(self.pictures.fingerprint().encode())
        for z in self.latents:
            digest.update(z.numpy().tobytes())
        return digest.hexdigest()
