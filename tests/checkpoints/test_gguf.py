"""GGUF files: read as the library that defines them reads them, and hostile ones never without an end."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from sfumato.checkpoints.formats import form_of, weights, weights_header
from sfumato.checkpoints.gguf import TYPES
from sfumato.errors import BadCheckpoint

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K")
QUANTIZATION = gguf.GGMLQuantizationType


def quantized(values: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of a kind; of those that the library can only read, random ones."""
    try:
        return gguf.quants.quantize(values, QUANTIZATION[kind])
    except NotImplementedError:
        _, block, size = next(t for t in TYPES.values() if t[0] == kind)
        raw = np.random.default_rng(0).integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8)
        raw[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)  # both scales, lest they be NaN
        return raw.reshape(*values.shape[:-1], -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], architecture: str = "flux", **more: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for name, (values, kind) in tensors.items():
        if kind in ("F32", "F16"):
            writer.add_tensor(name, values.astype(kind.replace("F", "float")))
        else:
            writer.add_tensor(name, quantized(values, kind), raw_dtype=QUANTIZATION[kind])
    for key, shape in more.get("shapes", {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_kind_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"  # a name that says otherwise
    values = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    write(path, {f"a.{kind}": (values, kind) for kind in KINDS} | {"row": (values[0], "F32")})
    assert form_of(path) == "gguf"
    ours, header = weights(path), weights_header(path)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert ours.keys() == theirs.keys() == header.tensors.keys()
    for name, tensor in theirs.items():
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert tuple(ours[name].shape) == header.tensors[name].shape == tuple(int(n) for n in tensor.shape[::-1])
        assert np.array_equal(ours[name].float().numpy(), expected), name
    assert header.metadata["general.architecture"] == "flux"
    assert ours["a.BF16"].dtype == torch.bfloat16
    assert torch.allclose(ours["a.Q8_0"], torch.from_numpy(values), atol=0.02)


def test_a_stated_shape_is_taken(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((4, 288)).astype(np.float32)
    write(tmp_path / "m.gguf", {"conv": (values, "Q8_0")}, shapes={"conv": (4, 32, 3, 3)})
    tensor = weights(tmp_path / "m.gguf")["conv"]
    assert tensor.shape == (4, 32, 3, 3)
    assert torch.allclose(tensor.reshape(4, 288), torch.from_numpy(values), atol=0.05)


def test_mutated_headers_never_crash_or_hang(tmp_path: Path, soak: bool) -> None:
    good = tmp_path / "good.gguf"
    values = np.ones((2, 32), np.float32)
    write(good, {"a": (values, "Q8_0"), "b": (values, "F16")}, shapes={"a": (2, 8, 4)})
    source, path, draw = good.read_bytes(), tmp_path / "mutant.gguf", random.Random(0)
    end = min(len(source), 400)
    refused = 0
    count = 50_000 if soak else 1000
    for _ in range(count):
        data = bytearray(source)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(4, end)
            match draw.randrange(3):
                case 0:
                    data[at] = draw.choice([0, 1, 9, 127, 255, draw.randrange(256)])
                case 1:
                    del data[at : at + draw.randint(1, 9)]
                case 2:
                    data[at : at + 8] = draw.choice([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"])
        path.write_bytes(data)
        before = time.process_time()
        try:
            weights_header(path)
        except BadCheckpoint:
            refused += 1
        else:
            with contextlib.suppress(BadCheckpoint):
                weights(path)
        assert time.process_time() - before < 1
    assert refused > count / 3


def test_blocks_that_cannot_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.gguf", {"a": (np.ones((2, 32), np.float32), "Q8_0")})

    def not_yet(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", not_yet)
    with pytest.raises(BadCheckpoint, match="blocks of the type Q8_0"):
        weights(tmp_path / "m.gguf")
