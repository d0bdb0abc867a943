"""Checkpoints that cannot be half-written, and that say when they are damaged.

One checkpoint is ``step-N.safetensors``, all tensors, or a folder ``step-N`` of such files, one per rank, where no
rank can hold them all; and ``step-N.json``: everything else, the tensor files' SHA-256 and, last, its own, so that no
byte can change unseen. All of it is written aside, fsynced, renamed, and its folder fsynced; the JSON comes last, so a
checkpoint exists once its JSON does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Size, Tensor

from sfumato.errors import SfumatoError
from sfumato.files import PART, cannot_write, sha256, sync_folder, write_atomically
from sfumato.training.world import World, placed_like


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and plain data beside them; ``shards`` is the folder of tensors that are not in memory."""

    step: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    shards: Path | None = None

    def shapes(self) -> dict[str, Size]:
        """Return the shape of every tensor, by its name; a shard's number counts as a vector of one."""
        if self.shards is None:
            return {k: v.shape for k, v in self.tensors.items()}
        return {k: v.size for k, v in _reader(self.shards).read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]

    def fill(self, targets: Mapping[str, Tensor], world: World) -> None:
        """Overwrite tensors, whole or this rank's shards, with those of their names; all ranks must do so together."""
        if self.shards is None:
            for k, v in targets.items():
                v.copy_(placed_like(self.tensors[k], v))
            return
        from torch.distributed.checkpoint.state_dict_loader import load as load_shards

        with _alone(world):
            load_shards(_vectors(targets), storage_reader=_reader(self.shards), no_dist=world.size == 1)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint as one file, then remove all but the newest ``keep`` up to it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:08d}"
    data = save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    write_atomically(folder / f"{name}.safetensors", data)
    plain = {"step": checkpoint.step, "sha256": hashlib.sha256(data).hexdigest(), **checkpoint.plain}
    write_atomically(folder / f"{name}.json", _sealed(plain))
    _remove_others(folder, checkpoint.step, keep)


def save_shards(folder: Path, checkpoint: Checkpoint, keep: int, world: World) -> None:
    """Write a checkpoint as a folder to which every rank adds what it holds; all ranks must do so together.

    Raises NoResources or BadRequest where it cannot be written, on every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    name = f"step-{checkpoint.step:08d}"
    target, part = folder / name, folder / f".{name}{PART}"

    def begin() -> None:
        if world.main:
            for left in (part, target):  # of a save that was killed
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)

    def settle() -> str:
        """Make this rank's share of the files durable, and return their hashes."""
        own = sorted(part.iterdir())[world.rank :: world.size]
        for file in own:
            with file.open("rb") as f:
                os.fsync(f.fileno())
        return json.dumps({file.name: sha256(file) for file in own})

    def end() -> None:
        if world.main:
            sync_folder(part)
            os.replace(part, target)
            sync_folder(folder)
            plain = {"step": checkpoint.step, "files": dict(sorted(files.items())), **checkpoint.plain}
            write_atomically(folder / f"{name}.json", _sealed(plain))
            _remove_others(folder, checkpoint.step, keep)

    try:
        world.together(begin)
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        tensors = {k: v.contiguous() for k, v in _vectors(checkpoint.tensors).items()}
        with _alone(world):
            save_parts(tensors, storage_writer=writer, no_dist=world.size == 1)
        files = {k: v for said in world.gather(world.together(settle)) for k, v in json.loads(said).items()}
        world.together(end)
    except CheckpointException as e:
        error = next((cause for cause, _ in e.failures.values()), e)
        raise _write_error(target, error) from e
    except OSError as e:
        raise _write_error(target, e) from e


def load_newest(folder: Path, warn: Callable[[str], None], world: World = World()) -> Checkpoint | None:  # noqa: B008
    """Return the newest checkpoint that is whole, warning about each damaged one passed over; None if none is.

    All ranks must ask together; each looks at its share of the files, and all come to the same answer.
    """
    if world.main:
        for part in folder.glob(f".*{PART}"):  # a save that was killed
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        found, reason = None, "another rank found so"
        try:
            found = _read(path, world)
        except (OSError, ValueError, KeyError) as e:
            reason = str(e)
        if not world.any(found is None):
            return found
        warn(f"{path.stem} is damaged ({reason}); falling back to the checkpoint before it")
    return None


def _read(path: Path, world: World) -> Checkpoint:
    plain = _unsealed(path.read_bytes())
    step = plain.pop("step")
    if "files" in plain:
        shards, hashes = path.with_suffix(""), plain.pop("files")
        if sorted(file.name for file in shards.iterdir()) != sorted(hashes):
            raise ValueError("files are missing")
        for name in sorted(hashes)[world.rank :: world.size]:
            if sha256(shards / name) != hashes[name]:
                raise ValueError(f"the bytes of {name} have changed since it was written")
        return Checkpoint(step, {}, plain, shards)
    data = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != plain.pop("sha256"):
        raise ValueError("its bytes have changed since it was written")
    return Checkpoint(step, load(data), plain)


def _remove_others(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` up to a step, and what is newer: it was damaged, or it would not be so."""
    found = sorted(folder.glob("step-*.json"))
    until = [path for path in found if path.name <= f"step-{step:08d}.json"]
    for old in {*found} - {*until[-keep:]}:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        shutil.rmtree(old.with_suffix(""), ignore_errors=True)


@contextmanager
def _alone(world: World) -> Iterator[None]:
    """Hush the remark that one process is no group."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views in which a number is a vector of one: shards are slices, and a number has none."""
    return {k: v.detach().reshape(1) if v.ndim == 0 else v.detach() for k, v in tensors.items()}


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def _write_error(path: Path, error: BaseException) -> SfumatoError:
    if isinstance(error, SfumatoError):
        return error
    return cannot_write(path, error if isinstance(error, OSError) else OSError(0, str(error) or type(error).__name__))


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
