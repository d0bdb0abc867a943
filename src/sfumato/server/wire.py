"""What server and worker say to each other: frames of JSON and bytes over a pipe, never a pickle.

frame = length of JSON (4 bytes, big-endian) · length of blob (4) · JSON (UTF-8) · blob
"""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

Message: TypeAlias = dict[str, Any]

HEAD = struct.Struct(">II")
MAX_FRAME = 1 << 30


def pack(message: Message, blob: bytes = b"") -> bytes:
    """Return a message and its blob as one frame."""
    body = json.dumps(message).encode()
    return HEAD.pack(len(body), len(blob)) + body + blob


def read(file: BinaryIO) -> tuple[Message, bytes] | None:
    """Read one frame, or None at the end."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    size, extra = HEAD.unpack(head)
    body, blob = file.read(size), file.read(extra)
    return None if len(body) < size or len(blob) < extra else (json.loads(body), blob)


async def receive(stream: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """Read one frame, or None at the end."""
    try:
        size, extra = HEAD.unpack(await stream.readexactly(HEAD.size))
        if size + extra > MAX_FRAME:
            return None
        return json.loads(await stream.readexactly(size)), await stream.readexactly(extra)
    except asyncio.IncompleteReadError:
        return None


@dataclass(frozen=True)
class DefaultSettings:
    """``families.model.Defaults`` as the worker tells them."""

    sampler: str
    spacing: str
    steps: int
    guidance: float
    width: int
    height: int
    upscale: int


@dataclass(frozen=True)
class ModelFacts:
    """What a server knows of a model without loading it: enough for ``Request.resolve``."""

    name: str
    hash: str
    family: str
    defaults: DefaultSettings
    multiple: int
    max_pixels: int
    distilled: bool
    takes_pictures: bool
    has_critic: bool
    card: dict[str, str]
    guide_counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_message(cls, name: str, facts: Message) -> ModelFacts:
        """Read what ``facts_of`` wrote, under the server's name for the model."""
        values: dict[str, Any] = {**facts, "defaults": DefaultSettings(**facts["defaults"])}
        return cls(name=name, **values)


def facts_of(model: Any) -> Message:
    """What the worker tells of a loaded model."""
    from dataclasses import asdict

    return {
        "hash": model.hash,
        "family": model.family,
        "defaults": asdict(model.defaults),
        "multiple": model.multiple,
        "max_pixels": model.max_pixels,
        "distilled": model.distilled,
        "takes_pictures": model.takes_pictures,
        "has_critic": model.has_critic,
        "guide_counts": model.guide_counts,
        "card": {k: str(v) for k, v in model.card.items()},
    }
