"""Results in memory and on disk, under the hash of all that decided them; a damaged one is made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sfumato.errors import NoResources
from sfumato.files import write_atomically


def default_folder() -> Path:
    """Return where results are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / "evaluation"


def content_hash(*parts: Any) -> str:
    """Return the SHA-256, in hexadecimal, of tensors (shape, type and bytes) and of plain data (as JSON)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Tensors by kind and key; without a folder they are kept as long as this is, and never on disk."""

    folder: Path | None
    memory: dict[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def get(self, kind: str, key: str) -> Mapping[str, Tensor] | None:
        """Return what was kept under a key, or None if there is nothing, or nothing whole."""
        if (kind, key) in self.memory or self.folder is None:
            return self.memory.get((kind, key))
        try:
            return load((self.folder / kind / f"{key}.safetensors").read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key; raises NoResources if they cannot be written."""
        if self.folder is None:
            return
        path = self.folder / kind / f"{key}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise NoResources(f"cannot make {path.parent}: {e.strerror}; name another folder with --cache") from None
        write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}))

    def get_or_make(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return what is kept under a key, made and kept now if need be."""
        found = self.get(kind, key)
        if found is None:
            found = make()
            self.put(kind, key, found)
        self.memory[kind, key] = found
        return found
