"""Tensors that are made once and kept in a file named by what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from sfumato.files import write_atomically


def kept(folder: Path, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what ``make`` makes, or made before in this folder under this key, which names all that decides it."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        return load(path.read_bytes())
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(made))
    return made
