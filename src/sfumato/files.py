"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from sfumato.errors import NoResources


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part; NoResources on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise NoResources(f"cannot write {path}: {e.strerror}; nothing was changed") from None
