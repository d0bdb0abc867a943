"""Checkpoints that cannot be half-written, and that say when they are damaged.

One checkpoint is ``step-N.safetensors`` (all tensors) and ``step-N.json`` (everything else, and the
tensors' SHA-256). Each is written aside, fsynced, renamed, and its folder fsynced; the JSON comes last, so a
checkpoint exists once its JSON does. The JSON ends in its own SHA-256: no byte of either file can change unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from sfumato.files import PART, write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and plain data beside them."""

    step: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint, then remove all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:08d}"
    data = save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    write_atomically(folder / f"{name}.safetensors", data)
    plain = {"step": checkpoint.step, "sha256": hashlib.sha256(data).hexdigest(), **checkpoint.plain}
    write_atomically(folder / f"{name}.json", _sealed(plain))
    for old in sorted(folder.glob("step-*.json"))[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, warning about each damaged one passed over; None if none is."""
    for part in folder.glob(f".*{PART}"):  # a save that was killed
        part.unlink(missing_ok=True)
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            plain = _unsealed(path.read_bytes())
            data = path.with_suffix(".safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != plain.pop("sha256"):
                raise ValueError("its bytes have changed since it was written")
            return Checkpoint(plain.pop("step"), load(data), plain)
        except (OSError, ValueError, KeyError) as e:
            warn(f"{path.stem} is damaged ({e}); falling back to the checkpoint before it")
    return None


def _sealed(plain: Mapping[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(plain, indent=1).encode()).hexdigest()
    return json.dumps({**plain, "seal": seal}, indent=1).encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    plain = json.loads(data)
    if set(plain) == {"step", "sha256", "version"}:  # written before there were seals
        return plain
    if _sealed({k: v for k, v in plain.items() if k != "seal"}) != data:
        raise ValueError("its bytes have changed since it was written")
    del plain["seal"]
    return plain
