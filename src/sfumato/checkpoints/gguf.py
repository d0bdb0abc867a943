"""GGUF files: weights in blocks of few bits, as ggml, stable-diffusion.cpp and ComfyUI-GGUF write them.

    "GGUF", version, numbers of tensors and of entries
    entries       key, type, value
    tensors       name, sizes (fastest first), type, offset
    the rest      the tensors' blocks, each tensor at a multiple of ``general.alignment``

The header is read here, since a hostile one must end in an error, whatever numbers it holds; blocks become numbers by
the ``gguf`` library.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sfumato.checkpoints.tensors import MAX_DIMENSIONS, MAX_HEADER, MAX_TENSORS, Header, TensorInfo
from sfumato.errors import BadCheckpoint, NoResources

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
MAX_ENTRIES = 500_000  # keys and elements of arrays together
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # + a tensor's name: its sizes, where rows were laid out anew

# Number of a type → its name, numbers in a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Damaged(Exception):
    """Something wrong with a file, still without its name."""


class _Cursor:
    """A place in the header's bytes, which never runs past their end."""

    def __init__(self, raw: bytes):
        self.raw, self.at, self.entries = raw, 0, 0

    def take(self, size: int) -> bytes:
        if size > len(self.raw) - self.at:
            raise _Damaged("cut short within its header")
        self.at += size
        return self.raw[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, nested: bool = False) -> Any:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise _Damaged(f"its header holds more than {MAX_ENTRIES} entries")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise _Damaged(f"its header holds an entry of the unknown kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.raw) - self.at:
            raise _Damaged("an array in its header is longer than the file")
        return [self.value(inner, nested=True) for _ in range(count)]


def read_gguf_header(path: Path) -> Header:
    """Read and check a GGUF file's header; no tensor is read. Raises BadCheckpoint for what is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(MAX_HEADER)
    except OSError as e:
        _refuse(path, str(e.strerror or e))
    try:
        return _parse(raw, size)
    except _Damaged as e:
        _refuse(path, str(e))
    except UnicodeDecodeError:
        _refuse(path, "a name in its header is no text")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise BadCheckpoint(f"{path}: {reason}")


def _parse(raw: bytes, size: int) -> Header:
    at = _Cursor(raw)
    at.take(len(MAGIC))
    version = at.number("I")
    if version not in (2, 3):
        raise _Damaged(f"GGUF of version {version}; 2 and 3 are read")
    count, entries = at.number("Q"), at.number("Q")
    if count > MAX_TENSORS:
        raise _Damaged(f"its header lists more than {MAX_TENSORS} tensors")
    known: dict[str, Any] = {}
    for _ in range(entries):
        key = at.text()
        if key in known:
            raise _Damaged(f"its header names {key[:80]!a} twice")
        known[key] = at.value(at.number("I"))
    listed = [_tensor(at, known) for _ in range(count)]
    alignment = known.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Damaged("its alignment is no power of two")
    first = -(-at.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, info in sorted(listed, key=lambda item: item[1].start):
        if name in tensors:
            raise _Damaged(f"its header names {name[:80]!a} twice")
        if info.start % alignment or info.start < end:
            raise _Damaged(f"tensor {name[:80]!a} overlaps another or lies at no multiple of {alignment}")
        end = info.stop
        if first + end > size:
            raise _Damaged(f"cut short: tensor {name[:80]!a} ends at byte {first + end} and the file has {size}")
        tensors[name] = TensorInfo(info.dtype, info.shape, first + info.start, first + info.stop)
    texts = {k: str(v) for k, v in known.items() if isinstance(v, (str, int, float)) and not k.startswith("comfy.")}
    return Header(tensors, texts, size)


def _tensor(at: _Cursor, known: Mapping[str, Any]) -> tuple[str, TensorInfo]:
    name, dimensions = at.text(), at.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise _Damaged(f"tensor {name[:80]!a} has {dimensions} dimensions")
    shape = tuple(at.number("Q") for _ in range(dimensions))[::-1]
    kind, start = at.number("I"), at.number("Q")
    if kind not in TYPES:
        raise _Damaged(f"tensor {name[:80]!a} is of the unknown type {kind}")
    dtype, block, size = TYPES[kind]
    if any(n >= 1 << 48 for n in shape) or start >= 1 << 48 or (shape[-1] if shape else 1) % block:
        raise _Damaged(f"tensor {name[:80]!a} has no valid shape")
    numbers = math.prod(shape)
    original = known.get(ORIGINAL_SHAPE + name)
    if isinstance(original, list):
        if not all(type(n) is int and n >= 0 for n in original) or math.prod(original) != numbers:
            raise _Damaged(f"tensor {name[:80]!a} has a stated shape that does not agree with its size")
        shape = tuple(original)
    return name, TensorInfo(dtype, shape, start, start + numbers // block * size)


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Read all tensors: F32, F16 and BF16 mapped as they are, blocks as float32.

    Raises BadCheckpoint for a damaged file, NoResources if the ``gguf`` library is needed and not installed.
    """
    import numpy as np
    import torch

    header = read_gguf_header(path)
    data = np.memmap(path, np.uint8, "c") if header.size else np.zeros(0, np.uint8)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    plain |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    tensors: dict[str, Tensor] = {}
    for name, info in header.tensors.items():
        own = data[info.start : info.stop]
        if info.dtype in plain:
            tensor = torch.from_numpy(own).view(plain[info.dtype])
        else:
            tensor = torch.from_numpy(_dequantize(own, info.dtype, path))
        tensors[name] = tensor.reshape(info.shape)
    return tensors


def _dequantize(data: Any, dtype: str, path: Path) -> Any:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise NoResources(
            f"{path}: its weights are in blocks of few bits ({dtype}): pip install 'sfumato[gguf]'"
        ) from None
    try:
        return quants.dequantize(data.reshape(1, -1), GGMLQuantizationType[dtype]).reshape(-1)
    except (NotImplementedError, KeyError):
        _refuse(path, f"blocks of the type {dtype} cannot be read")
