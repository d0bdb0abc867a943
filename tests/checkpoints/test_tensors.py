"""Reading weights strictly: hostile, damaged and foreign files are refused with one line, good ones load whole."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import HOSTILE, packed
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.formats import weights
from sfumato.checkpoints.tensors import MAX_HEADER, load_into, non_finite, read_header, read_tensors, to_half
from sfumato.errors import BadCheckpoint
from sfumato.families import NATIVE_FORMAT


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_quickly_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    before = time.process_time()
    with pytest.raises(BadCheckpoint) as caught:
        weights(path)
    assert time.process_time() - before < 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


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


def test_half_keeps_numbers_that_it_cannot_hold() -> None:
    tensors = {
        "large": torch.tensor([1e5, -3.0]),
        "edge": torch.tensor([[65504.0, -1 / 3]]).T,
        "none": torch.zeros(0, 2),
    }
    kept = to_half(tensors)
    assert [kept[k].dtype for k in tensors] == [torch.float32, torch.float16, torch.float16]
    assert kept["large"].tolist() == [1e5, -3.0]
    assert kept["edge"].flatten().tolist() == [65504.0, float(torch.tensor(-1 / 3).half())]
    assert all(t.is_contiguous() for t in kept.values())


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


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("card"),
        lambda meta: meta.update(card=["x"]),
        lambda meta: meta["config"].update(schedule_settings={"unheard_of": 1}),
        lambda meta: meta.pop("tokenizer"),
    ],
)
def test_a_model_of_our_own_with_damaged_metadata_is_refused(change: Any, tiny_file: Path, tmp_path: Path) -> None:
    meta = json.loads(read_header(tiny_file).metadata[NATIVE_FORMAT])
    change(meta)
    save_file(read_tensors(tiny_file), tmp_path / "m.safetensors", {NATIVE_FORMAT: json.dumps(meta)})
    with pytest.raises(BadCheckpoint, match=r"m\.safetensors: its configuration cannot be read"):
        sfumato.load(tmp_path / "m.safetensors")
