"""Weights inside Python pickles (.ckpt, .pt, .pth, .bin), turned into safetensors by a child that may do little else.

    file ── zip and size checked ──> child: memory, CPU and file size limited; torch.load(weights_only=True)
         ── names → tensors ──> a safetensors file in a folder of its own, read as any other, gone with this process

A pickle is a program. ``weights_only=True`` lets it build tensors and plain containers alone; the limits hold where
that has a hole, or where honest instructions ask for all memory there is.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

from sfumato.errors import BadCheckpoint, NoResources

MAX_PROGRAM = 64 << 20  # bytes of the pickle itself, without the tensors
BASE_MEMORY = 8 << 30  # address space of the child besides three times the file: torch alone maps gigabytes
SECONDS = 60  # besides one for every 20 MB
MAGIC = (b"PK\x03\x04", b"\x80")

_converted: dict[tuple[str, int, int], Path] = {}  # (path, size, time of change) → what the child wrote
_folder: Path | None = None


def is_pickle(start: bytes) -> bool:
    """Tell by a file's first bytes whether it is what ``torch.save`` writes: a zip archive, or a bare pickle."""
    return start.startswith(MAGIC)


def as_safetensors(path: Path) -> Path:
    """Return a safetensors file with the tensors of a pickle; nested names are joined by dots, "state_dict" left out.

    Raises BadCheckpoint for a file that is damaged or asks for more than tensors, NoResources where a child's memory
    cannot be limited.
    """
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _converted or not _converted[key].is_file():
        _check_archive(path, state.st_size)
        _converted[key] = _convert(path, state.st_size)
    return _converted[key]


def _refuse(path: Path, reason: str) -> NoReturn:
    raise BadCheckpoint(f"{path}: {reason}")


def _check_archive(path: Path, size: int) -> None:
    """Refuse archives that grow when they are unpacked."""
    with open(path, "rb") as file:
        if file.read(4) != MAGIC[0]:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError):
        _refuse(path, "not a whole zip archive")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        _refuse(path, "a zip archive that grows when it is unpacked, which torch.save does not write")
    if not any(e.filename.endswith("data.pkl") for e in entries):
        _refuse(path, "a zip archive that torch.save did not write")
    if any(e.file_size > MAX_PROGRAM for e in entries if e.filename.endswith(".pkl")):
        _refuse(path, f"its pickle is larger than {MAX_PROGRAM >> 20} MiB")


def _convert(path: Path, size: int) -> Path:
    if sys.platform == "win32":
        raise NoResources(f"{path}: pickles are read where a process's memory can be limited; convert it elsewhere")
    handle, name = tempfile.mkstemp(".safetensors", dir=_temporary())
    os.close(handle)
    target = Path(name)
    memory, seconds = BASE_MEMORY + 3 * size, SECONDS + size // 20_000_000
    # -P: a file named torch.py beside the weights is not taken for torch.
    command = [sys.executable, "-P", "-m", "sfumato.checkpoints.unpickle"]
    command += [os.fspath(path.resolve()), name, str(memory), str(seconds), str(2 * size + (1 << 20))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=2 * seconds, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        target.unlink(missing_ok=True)
        _refuse(path, f"reading it took longer than {2 * seconds} s")
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] if done.returncode == 3 else []
        _refuse(
            path, said[0][:300] if said else "reading it broke off: it is damaged, or needs too much memory or time"
        )
    return target


def _temporary() -> Path:
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="sfumato-pickles-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder
