"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path

from sfumato.errors import BadRequest, NoResources, SfumatoError

WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")  # endings of files that hold weights
PART = ".part"  # ending of a file that is being written; a crash may leave one behind


def climbs(path: Path) -> bool:
    """Whether a path climbs by ".." to a file that is not named as weight files are, and so is not to be opened."""
    return ".." in path.parts and path.suffix.lower() not in WEIGHTS


def write_atomically(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Without ``overwrite`` a file that exists, even one made meanwhile, is left alone and BadRequest raised.
    """
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}{PART}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _move_to_new(temporary, path)
        sync_folder(path.parent)
    except FileExistsError as e:
        raise BadRequest(f"{path} exists already; it is left as it is") from e
    except OSError as e:
        raise cannot_write(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path, before: set[str]) -> set[str]:
    """Remove what crashes left half-written in a folder, where others may be writing.

    Args:
        before: what the last sweep returned, long enough ago for any file to have been written: the names of files that
            were being written then. Those that still are have nobody who writes them.
    """
    with os.scandir(folder) as files:
        names = {f.name for f in files if f.name.startswith(".") and f.name.endswith(PART)}
    for name in names & before:
        with contextlib.suppress(OSError):  # another server's sweep was faster
            os.unlink(folder / name)
    return names - before


def check_target(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Refuse, before the work begins, a file that could not be written after it.

    Raises BadRequest for a name without the suffix, a file that exists and may not be replaced, and a place where
    nothing can be written; folders that are missing are no fault, ``make_folder`` makes them.
    """
    if path.suffix.lower() != suffix or os.path.isdir(path):
        raise BadRequest(f"cannot write {path}: its name must end in {suffix}, and it must be no folder")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as e:  # a name that is too long, a folder that is a file
        raise cannot_write(path, e) from e
    else:
        if not overwrite:
            raise BadRequest(f"{path} exists already; --force replaces it")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Try to create a file where the folder is, or where it would be made."""
    place = folder
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        trial = place / f".sfumato-{secrets.token_hex(4)}{PART}"
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as e:
        raise cannot_write(folder, e) from e


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they exist; raises as ``cannot_write`` says."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cannot_write(folder, e) from e


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; raises OSError as opening it does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError) -> SfumatoError:
    """Return the error to raise when a path cannot be written."""
    kind = NoResources if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else BadRequest
    return kind(f"cannot write {path}: {error.strerror or error}")


def _move_to_new(temporary: Path, path: Path) -> None:
    """Rename unless the target exists; a hard link fails where rename would replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "x"):
            pass
        os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a system whose folders cannot be opened
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
