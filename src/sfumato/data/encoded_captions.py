"""Captions as a frozen text tower encodes them: each once, kept in a file that is named by what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.data.kept import kept
from sfumato.data.pictures import Pictures

Encode = Callable[[list[str]], Mapping[str, Tensor]]  # captions → context (B, M, D), mask (B, M), pooled (B, D)


@dataclass(frozen=True, eq=False)
class EncodedCaptions:
    """The states of captions, T tokens in all.

    Args:
        places: caption → its row of ``pooled`` and of ``starts``.
        starts: where each caption's tokens begin in ``context``, and where the last one's end.
        context: fp16 (T, D); ``pooled``: fp16 (captions, D).
    """

    places: Mapping[str, int]
    starts: Sequence[int]
    context: Tensor
    pooled: Tensor

    def take(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the captions' context (B, M, D), mask (B, M) and pooled (B, D), in fp32."""
        rows = [self.places[caption] for caption in captions]
        states = [self.context[self.starts[i] : self.starts[i + 1]].float() for i in rows]
        lengths = torch.tensor([len(s) for s in states])
        context = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        mask = torch.arange(context.shape[1])[None] < lengths[:, None]
        return {"context": context, "mask": mask, "pooled": self.pooled[rows].float()}

    def fingerprint(self) -> str:
        """SHA-256 of all states, to tell whether another tower has read the captions since a run began."""
        digest = hashlib.sha256(self.context.numpy().tobytes())
        digest.update(self.pooled.numpy().tobytes())
        return digest.hexdigest()


def captions_of(pictures: Pictures) -> list[str]:
    """Return every caption that can be drawn, each once; ``data.variants`` must be set."""
    drawn = {pictures.variant(i, k) for i in range(len(pictures)) for k in range(pictures.config.variants)}
    return sorted({"", *drawn}, key=lambda caption: (len(caption), caption))  # alike in length: little padding


def encoded_captions(captions: list[str], encode: Encode, key: str, folder: Path, batch: int = 256) -> EncodedCaptions:
    """Return what ``encode`` makes of captions, from the folder where it is known already.

    Args:
        key: names ``encode`` and all that it depends on; the file's name is a hash of it and of the captions.
    """

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        context: list[Tensor] = []
        pooled: list[Tensor] = []
        lengths = [0]
        for i in range(0, len(captions), batch):
            states = encode(captions[i : i + batch])
            context.append(states["context"][states["mask"]].half())
            pooled.append(states["pooled"].half())
            lengths += states["mask"].sum(1).tolist()
        starts = torch.tensor(lengths).cumsum(0)
        return {"context": torch.cat(context).cpu(), "pooled": torch.cat(pooled).cpu(), "starts": starts}

    stored = kept(folder, json.dumps([key, captions]), make)
    places = {caption: i for i, caption in enumerate(captions)}
    return EncodedCaptions(places, stored["starts"].tolist(), stored["context"], stored["pooled"])
