"""Reading weights from a safetensors file, strictly: what is wrong is refused before anything is allocated.

    8 bytes      N, little-endian
    N bytes      JSON: {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …, "__metadata__": {…}}
    the rest     the tensors' bytes, without gap or overlap

What a file is, its content decides and never its name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_HEADER = 16 << 20  # bytes; LoRA files carry megabytes of notes in theirs
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

FOREIGN: list[tuple[bytes, str]] = [
    (b"PK\x03\x04", "a zip archive, such as torch.save writes, which can run code when it is read"),
    (b"\x80", "a Python pickle, which can run code when it is read"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs", "a Git LFS pointer: the weights themselves were not fetched"),
    (b"%PDF", "a PDF document"),
]

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SKELETON = re.compile(rb'[{}\[\]:,"0-9 \t\r\n]*')


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: byte offsets ``start`` to ``stop`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """All that a safetensors file says of itself; ``size`` is that of the file in bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0

    @property
    def parameters(self) -> int:
        """Number of numbers in all tensors."""
        return sum(math.prod(t.shape) for t in self.tensors.values())


@dataclass(frozen=True)
class LoadReport:
    """Which tensors found their place in a module, and which did not."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]

    @property
    def matched(self) -> float:
        """Share of the module's tensors that were loaded, 0 to 1."""
        return len(self.loaded) / max(1, len(self.loaded) + len(self.missing) + len(self.misshaped))

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded ({self.matched:.1%})"]
        for what in ("missing", "extra", "misshaped"):
            names: tuple[str, ...] = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what}: " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))
        return "; ".join(parts)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises BadCheckpoint, naming file and reason, for anything but a whole and consistent file.
    """
    path = Path(path)
    if not path.is_file():  # a pipe or a device would never end
        _refuse(path, "not a file" if path.exists() else "no such file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            if not start:
                _refuse(path, "the file is empty")
            if len(start) < 10 or start[8:9] != b"{":
                _refuse(path, _foreign(start))
            length = int.from_bytes(start[:8], "little")
            if length > size - 8:
                _refuse(path, f"cut short: its header takes {length} bytes and the file has {size}")
            if length > MAX_HEADER:
                _refuse(path, f"its header takes {length} bytes; at most {MAX_HEADER} are read")
            file.seek(8)
            raw = file.read(length)
    except OSError as e:
        _refuse(path, str(e.strerror or e), e)
    try:
        return _parse(raw, size)
    except _HeaderError as e:
        _refuse(path, str(e))
    except (ValueError, RecursionError) as e:
        _refuse(path, "its header is no valid JSON", e)


def read_tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a safetensors file whose header has been found good.

    Raises BadCheckpoint as ``read_header`` does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as e:
        _refuse(Path(path), f"not readable as safetensors: {e}", e)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    import torch

    def wide(t: Tensor) -> Tensor:  # torch knows no such question to types of 8 bits
        return t.float() if t.itemsize == 1 else t

    numbers = {k: t for k, t in tensors.items() if t.is_floating_point()}
    return [k for k, t in numbers.items() if not torch.isfinite(wide(t)).all()]


def to_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as files of our own hold them: contiguous fp16, or float32 where a number is too large for it."""

    def half(t: Tensor) -> Tensor:
        return t.half() if not t.numel() or float(t.abs().max()) <= 65504 else t.float()

    return {k: half(t).contiguous() for k, t in tensors.items()}


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    partial: bool = False,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> LoadReport:
    """Copy tensors into a module's parameters and buffers of the same names, all of them or, if they differ, none.

    With ``partial`` those that fit are copied, and the report tells which did not; at least one must fit.
    Numbers take the module's dtype, one tensor after another, unless ``keep`` says what becomes of each. Raises
    BadCheckpoint with lists of what is missing, extra or misshaped.
    """
    own: dict[str, Tensor] = module.state_dict()
    fits = {
        k: t for k, t in tensors.items()
        if k in own and t.shape == own[k].shape and t.is_floating_point() == own[k].is_floating_point()
    }  # fmt: skip
    report = LoadReport(
        loaded=tuple(sorted(fits)),
        missing=tuple(sorted(own.keys() - tensors.keys())),
        extra=tuple(sorted(tensors.keys() - own.keys())),
        misshaped=tuple(
            f"{k} {_kind(tensors[k])} for {_kind(own[k])}" for k in sorted((own.keys() & tensors.keys()) - fits.keys())
        ),
    )
    if not fits:
        raise BadCheckpoint(f"the weights do not fit the network at all: {report}")
    if not partial and (report.missing or report.extra or report.misshaped):
        raise BadCheckpoint(f"the weights do not fit the network: {report}")
    on_meta = any(t.is_meta for t in own.values())  # memory is yet to be given: take the tensors themselves
    place = keep or (lambda k, t: t.to(own[k].dtype))
    module.load_state_dict({k: place(k, t) for k, t in fits.items()}, strict=False, assign=on_meta)
    return report


class _HeaderError(Exception):
    """Something wrong with a header, still without the name of its file."""


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise BadCheckpoint(f"{path}: {reason}") from cause


def _foreign(start: bytes) -> str:
    """Say what a file is that does not start as safetensors do."""
    for magic, name in FOREIGN:
        if start.startswith(magic):
            return f"{name}; only safetensors files are read"
    if start[257:262] == b"ustar":
        return "a tar archive; only safetensors files are read"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<svg")):
        return "a web page, as a failed download leaves; only safetensors files are read"
    if text[:1] in (b"{", b"["):
        return "a JSON file; only safetensors files are read"
    return "not a safetensors file"


def _parse(raw: bytes, size: int) -> Header:
    skeleton = _STRING.sub(b'""', raw)  # structure alone, so that it can be measured before it is built
    if not _SKELETON.fullmatch(skeleton):
        raise _HeaderError("its header holds more than names, strings and whole numbers")
    if skeleton.count(b"{") + skeleton.count(b"[") > 3 * MAX_TENSORS or skeleton.count(b",") > 8 * MAX_TENSORS:
        raise _HeaderError(f"its header lists more than {MAX_TENSORS} tensors")
    entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _HeaderError("its metadata are no plain texts")
    if len(entries) > MAX_TENSORS:
        raise _HeaderError(f"its header lists more than {MAX_TENSORS} tensors")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    end = 0
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != end:
            raise _HeaderError(
                f"tensor {_short(name)} {'overlaps another' if t.start < end else 'leaves a gap before it'}"
            )
        end = t.stop
    data = size - 8 - len(raw)
    if end != data:
        raise _HeaderError(
            f"{'cut short' if end > data else 'too long'}: tensors take {end} bytes and the file has {data}"
        )
    return Header(tensors, metadata, size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _HeaderError("its header names something twice")
    return result


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"tensor {_short(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _HeaderError(f"tensor {_short(name)} has an unknown dtype {_short(str(dtype))}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _HeaderError(f"tensor {_short(name)} has no valid shape")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderError(f"tensor {_short(name)} has no valid offsets")
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _HeaderError(f"tensor {_short(name)} has a shape that does not agree with its offsets")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _short(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
