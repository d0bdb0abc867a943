"""Families of models: one file, one readable recipe. ``load`` finds the family by what a file holds."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import BadCheckpoint, BadRequest, nearest

if TYPE_CHECKING:
    from sfumato.families.model import Model

DEFAULT_MODEL = "emoji-32"


def embedded_models() -> dict[str, Path]:
    """Return the models that ship with the package, by name."""
    folder = Path(str(files("sfumato"))) / "models"
    return {p.stem: p for p in sorted(folder.glob("*.safetensors"))}


def locate(name: str | Path | None) -> Path:
    """Find a model file by embedded name or path; None is the default model. Raises BadRequest if there is none."""
    models = embedded_models()
    if name is None:
        name = DEFAULT_MODEL
    if str(name) in models:
        return models[str(name)]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / "final.safetensors").is_file():  # a training run's folder
        return path / "final.safetensors"
    hint = nearest(str(name), list(models))
    raise BadRequest(f"no model {str(name)!r}: neither a file nor one of {', '.join(models) or 'none embedded'}{hint}")


def load(name: str | Path | None = None) -> Model:
    """Load a model by embedded name or path.

    Raises BadRequest if there is no such model, BadCheckpoint if its file cannot be trusted or does not fit.
    """
    import hashlib

    from sfumato.checkpoints.tensors import read_header, read_tensors

    path = locate(name)
    header = read_header(path)
    from sfumato.families.native import FORMAT, load_native

    if FORMAT not in header.metadata:
        stated = ", ".join(header.metadata) or "nothing"
        raise BadCheckpoint(f"{path}: holds no model that this version knows (its metadata state {stated})")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    display = str(name) if name is not None else DEFAULT_MODEL
    return load_native(path, display, read_tensors(path), header.metadata[FORMAT], digest)
