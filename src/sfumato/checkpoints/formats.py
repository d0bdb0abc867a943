"""Files of named tensors in any form that is read; which one it is, the first bytes decide and never the name.

| form        | first bytes             | read                                                   |
|-------------|-------------------------|--------------------------------------------------------|
| safetensors | a length, then "{"      | mapped                                                 |
| GGUF        | "GGUF"                  | mapped; blocks of few bits as float32                  |
| pickle      | "PK\\x03\\x04" or "\\x80" | only if allowed, by a child: see ``pickles``           |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.checkpoints.gguf import MAGIC, read_gguf, read_gguf_header
from sfumato.checkpoints.pickles import as_safetensors, is_pickle
from sfumato.checkpoints.tensors import Header, read_header, read_tensors
from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor


def form_of(path: Path) -> str:
    """Return "safetensors", "gguf" or "pickle"; what is none of them counts as safetensors, whose reader says why."""
    if not path.is_file():
        return "safetensors"
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return "safetensors"
    if start.startswith(MAGIC):
        return "gguf"
    # A safetensors header of 128 bytes also starts with the pickle's mark.
    return "pickle" if is_pickle(start) and start[8:9] != b"{" else "safetensors"


def weights_header(path: Path, *, allow_pickle: bool = False) -> Header:
    """Read names, shapes and metadata; raises BadCheckpoint for a damaged file, or a pickle that is not allowed."""
    match form_of(path):
        case "gguf":
            return read_gguf_header(path)
        case "pickle":
            return read_header(_unpickled(path, allow_pickle))
        case _:
            return read_header(path)


def weights(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read all tensors, mapped where that can be; raises BadCheckpoint as ``weights_header`` does."""
    match form_of(path):
        case "gguf":
            return read_gguf(path)
        case "pickle":
            return read_tensors(_unpickled(path, allow_pickle))
        case _:
            return read_tensors(path)


def placeholders(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Tensors of the file's names and shapes, without numbers: on torch's meta device, of one type."""
    import torch

    infos = weights_header(path, allow_pickle=allow_pickle).tensors
    kinds = {
        name: torch.int64 if re.match(r"I\d|U|BOOL", info.dtype) else torch.float32 for name, info in infos.items()
    }
    return {name: torch.empty(info.shape, dtype=kinds[name], device="meta") for name, info in infos.items()}


def _unpickled(path: Path, allowed: bool) -> Path:
    if not allowed:
        raise BadCheckpoint(
            f"{path}: a pickle (.ckpt, .pt, .bin), which can run code when it is read: take the safetensors of the "
            "same model, or allow it with --allow-pickle"
        )
    return as_safetensors(path)
