"""Reading weights strictly: hostile, damaged and foreign files are refused with one line, good ones load whole."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoints.tensors import MAX_HEADER, load_into, non_finite, read_header, read_tensors
from sfumato.errors import BadCheckpoint


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def entry(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


class Bomb:
    def __reduce__(self) -> Any:
        return (open, ("/tmp/sfumato-was-here", "w"))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return file.getvalue()


EIGHT = bytes(8)
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\0",
    "eight bytes": EIGHT,
    "zeros": bytes(4096),
    "pickle": pickle.dumps(Bomb()),
    "pickle of protocol 0": pickle.dumps(Bomb(), protocol=0),
    "zip of a pickle": zipped(),
    "gzip": gzip.compress(b"weights"),
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "json": b'{"a": 1}            ',
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "gguf": b"GGUF" + bytes(64),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "python source": b"import os; os.system('true')\n",
    "header beyond the file": packed(one(), EIGHT, length=10_000),
    "header of 2^64 - 1 bytes": packed(one(), EIGHT, length=2**64 - 1),
    "header of 2^63 bytes": packed(one(), EIGHT, length=2**63),
    "header one byte short": packed(one(), EIGHT, length=len(json.dumps(one())) - 1),
    "cut tensor": packed(one(), bytes(7)),
    "no tensor bytes": packed(one()),
    "trailing bytes": packed(one(), bytes(9)),
    "not utf-8": packed(b'{"\xff": 1}'),
    "no json": packed(b"{nope}"),
    "open json": packed(b'{"a": '),
    "deep lists": packed(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "deep dicts": packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "huge number": packed(b'{"a":' + b"9" * 100_000 + b"}"),
    "nan": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT),
    "float shape": packed(one(shape=[2.0]), EIGHT),
    "negative shape": packed(one(shape=[-2]), EIGHT),
    "bool shape": packed(one(shape=[True, 2]), EIGHT),
    "shape is text": packed(one(shape="2"), EIGHT),
    "shape overflows": packed(one(shape=[2**40, 2**40, 2**40]), EIGHT),
    "shape times zero": packed(one(shape=[0, 2**63]), EIGHT),
    "nine dimensions": packed(one(shape=[1] * 9, offsets=[0, 4]), bytes(4)),
    "shape disagrees": packed(one(shape=[3]), EIGHT),
    "unknown dtype": packed(one(dtype="F31"), EIGHT),
    "dtype is a list": packed(one(dtype=["F32"]), EIGHT),
    "offsets reversed": packed(one(offsets=[8, 0]), EIGHT),
    "offsets negative": packed(one(offsets=[-8, 0]), EIGHT),
    "three offsets": packed(one(offsets=[0, 4, 8]), EIGHT),
    "offsets beyond the file": packed(one(offsets=[0, 2**40], shape=[2**38]), EIGHT),
    "offsets not at zero": packed(one(offsets=[8, 16]), bytes(16)),
    "overlap": packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same bytes twice": packed({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
    "gap": packed({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
    "key twice": packed(b'{"a":%s,"a":%s}' % tuple(json.dumps(entry(i, i + 8)).encode() for i in (0, 8)), bytes(16)),
    "dtype twice": packed(b'{"a":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "extra field": packed(one(run="os.system"), EIGHT),
    "missing field": packed({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "entry is a list": packed({"a": []}),
    "entry is null": packed(b'{"a": null}'),
    "metadata not text": packed({"__metadata__": {"a": 1}}),
    "metadata a list": packed({"__metadata__": ["a"]}),
    "100,001 tensors": packed({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}),
    "a million lists": packed(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "two million numbers": packed(b'{"a":[' + b"1," * 2_000_000 + b"1]}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_quickly_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    before = time.process_time()
    with pytest.raises(BadCheckpoint) as caught:
        read_tensors(path)
    assert time.process_time() - before < 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
    assert not Path("/tmp/sfumato-was-here").exists()


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(BadCheckpoint):
            read_header(path)


def test_a_header_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:  # a sparse file
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{}")
        file.truncate(1 << 32)
    with pytest.raises(BadCheckpoint, match="at most"):
        read_header(path)


def test_a_good_file_is_known_by_its_content_and_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.png"
    tensors = {"a": torch.randn(3, 4).half(), "b": torch.arange(5), "empty": torch.zeros(0, 7)}
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.tensors["a"].shape == (3, 4)
    assert header.tensors["a"].dtype == "F16"
    assert header.metadata == {"format": "pt"}
    assert header.parameters == 17
    assert header.size == path.stat().st_size
    loaded = read_tensors(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_mutated_headers_load_or_are_refused_and_never_crash(tmp_path: Path, soak: bool) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a.weight": torch.randn(2, 3), "a.bias": torch.randn(3).half(), "n": torch.arange(2)}, good, {"k": "v"})
    source, path = good.read_bytes(), tmp_path / "mutant.safetensors"
    path.touch()
    random_ = random.Random(0)
    end = 8 + int.from_bytes(source[:8], "little")
    refused, slowest = 0, 0.0
    count = 100_000 if soak else 3000
    for _ in range(count):
        data = bytearray(source)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(end) if random_.random() < 0.95 else random_.randrange(len(data))
            match random_.randrange(5):
                case 0:
                    data[at] = random_.randrange(256)
                case 1:
                    data[at] ^= 1 << random_.randrange(8)
                case 2:
                    del data[at : at + random_.randint(1, 8)]
                case 3:
                    data[at:at] = random_.choice([b"[", b"{", b"9" * 30, b'"', b"-1", b"null", b"\\u0000", bytes(4)])
                case 4:
                    data[at:at] = data[at : at + random_.randint(1, 40)]
            end = min(end, len(data))
        with path.open("r+b") as file:  # quicker than a new file
            file.write(data)
            file.truncate()
        before = time.process_time()
        try:
            read_header(path)
        except BadCheckpoint:
            refused += 1
        slowest = max(slowest, time.process_time() - before)
        if random_.random() < 0.05:
            with contextlib.suppress(BadCheckpoint):
                read_tensors(path)
    assert refused > 0.8 * count
    assert slowest < 0.05


def test_what_read_header_accepts_the_library_reads(tmp_path: Path) -> None:
    """Padding and any order of entries are allowed; our reading and the library's must agree."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3, 4], dtype=torch.uint8)
    path = tmp_path / "m.safetensors"
    raw = json.dumps(
        {
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]},
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        }
    ).encode()
    path.write_bytes(packed(raw + b" " * 6, a.numpy().tobytes() + b.numpy().tobytes()))
    tensors = read_tensors(path)
    assert torch.equal(tensors["a"], a)
    assert torch.equal(tensors["b"], b)


def test_nan_weights_are_found_by_name() -> None:
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")]), "n": torch.arange(3)}
    assert non_finite(tensors) == ["bad"]


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_load_into_copies_all_or_nothing() -> None:
    source, target = network(), network()
    weights = {k: v.clone() for k, v in source.state_dict().items()}
    report = load_into(target, {k: v.half() if v.is_floating_point() else v for k, v in weights.items()})
    assert report.matched == 1
    assert target[0].weight.dtype == torch.float32  # type: ignore[index]
    torch.testing.assert_close(target.state_dict()["0.weight"], weights["0.weight"], atol=1e-3, rtol=1e-3)

    before = {k: v.clone() for k, v in target.state_dict().items()}
    faulty = {k: v for k, v in weights.items() if k != "0.bias"} | {"lora": torch.ones(1), "1.weight": torch.ones(9)}
    with pytest.raises(BadCheckpoint, match=r"1 missing: 0\.bias; 1 extra: lora; 1 misshaped: 1\.weight"):
        load_into(target, faulty)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())

    report = load_into(target, faulty, partial=True)
    assert report.missing == ("0.bias",)
    assert report.extra == ("lora",)
    assert len(report.misshaped) == 1
    assert torch.equal(target.state_dict()["0.weight"], weights["0.weight"])


def test_weights_of_which_none_fits_are_refused_even_in_part() -> None:
    for tensors in ({}, {"other": torch.ones(1)}):
        with pytest.raises(BadCheckpoint, match="at all"):
            load_into(network(), tensors, partial=True)


def test_a_module_without_memory_takes_the_tensors_themselves() -> None:
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 3)
    weights = {"weight": torch.randn(3, 2).half(), "bias": torch.randn(3).half()}
    load_into(empty, weights)
    assert not empty.weight.is_meta
    assert empty.weight.dtype == torch.float32
