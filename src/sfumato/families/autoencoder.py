"""An autoencoder of our own as a file by itself: fp16 tensors, and metadata that say how to build it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sfumato.checkpoints.tensors import load_into, read_header, read_tensors
from sfumato.config import from_dict
from sfumato.errors import BadCheckpoint, SfumatoError
from sfumato.networks.compact import CompactAutoencoder, CompactConfig

FORMAT = "sfumato-autoencoder-1"  # the metadata's key


def is_autoencoder(path: Path) -> bool:
    """Whether a file is an autoencoder of this project's, by its content."""
    try:
        return path.is_file() and FORMAT in read_header(path).metadata
    except BadCheckpoint:
        return False


def load_autoencoder(path: Path) -> CompactAutoencoder:
    """Load an autoencoder, in float32 and frozen; BadCheckpoint if the file is no such thing or does not fit."""
    metadata = read_header(path).metadata
    if FORMAT not in metadata:
        raise BadCheckpoint(f"{path}: no autoencoder of this project's; train one with task: autoencoder")
    try:
        config = from_dict(CompactConfig, json.loads(metadata[FORMAT])["config"], "config")
        network = CompactAutoencoder(config)
        load_into(network, read_tensors(path))
    except (SfumatoError, ValueError, KeyError) as e:
        raise BadCheckpoint(f"{path}: {e}") from None
    network = network.float().eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
