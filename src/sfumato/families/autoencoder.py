"""Autoencoders of our own, and decoders for previews, as files by themselves: fp16, with metadata to build them by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sfumato.checkpoints.tensors import load_into, read_header, read_tensors
from sfumato.config import from_dict
from sfumato.errors import BadCheckpoint, SfumatoError
from sfumato.networks.compact import CompactAutoencoder, CompactConfig, PreviewConfig, PreviewDecoder

FORMAT, PREVIEW_FORMAT = "sfumato-autoencoder-1", "sfumato-preview-1"  # the metadata's keys
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


def is_autoencoder(path: Path) -> bool:
    """Whether a file is an autoencoder of this project's, by its content."""
    try:
        return path.is_file() and FORMAT in read_header(path).metadata
    except BadCheckpoint:
        return False


def load_autoencoder(path: Path) -> CompactAutoencoder:
    """Load an autoencoder, in float32 and frozen; BadCheckpoint if the file is no such thing or does not fit."""
    return _load(path, FORMAT, CompactConfig, CompactAutoencoder, "autoencoder")


def load_preview(path: Path) -> PreviewDecoder:
    """Load a decoder for previews, in float32 and frozen; BadCheckpoint as ``load_autoencoder``."""
    return _load(path, PREVIEW_FORMAT, PreviewConfig, PreviewDecoder, "decoder")


def _load(path: Path, form: str, config: type[C], network: Callable[[C], M], task: str) -> M:
    metadata = read_header(path).metadata
    if form not in metadata:
        raise BadCheckpoint(f"{path}: not what this project trains by task: {task}")
    try:
        module = network(from_dict(config, json.loads(metadata[form])["config"], "config"))
        load_into(module, read_tensors(path))
    except (SfumatoError, ValueError, KeyError) as e:
        raise BadCheckpoint(f"{path}: {e}") from None
    module = module.float().eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
