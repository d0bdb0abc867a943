"""Hostile, damaged and foreign files of weights: a name for each kind, and its bytes or the way to make it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "sfumato-was-here"  # a file that the bombs would leave in the current folder


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def entry(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


class Bomb:
    def __reduce__(self) -> Any:
        return (open, (MARK, "w"))


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


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(
    count: int = 1, entries: bytes = b"", n_entries: int = 0, shape: tuple[int, ...] = (32,), kind: int = 8,
    at: int = 0, data: bytes = bytes(64), version: int = 3, name: str = "a",
) -> bytes:  # fmt: skip
    """A GGUF file of one tensor, repeated ``count`` times in the header."""
    one = text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
    head = b"GGUF" + struct.pack("<IQQ", version, count, n_entries) + entries + one * min(count, 60_000)
    return head + bytes(-len(head) % 32) + data


def entry_of(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HOSTILE |= {
    "gguf: empty": b"GGUF",
    "gguf: of version 9": gguf(version=9),
    "gguf: of the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64),
    "gguf: 2^64 - 1 tensors": gguf(count=2**64 - 1),
    "gguf: 60,000 tensors": gguf(count=60_000),
    "gguf: 2^63 entries": gguf(n_entries=2**63),
    "gguf: array of 2^63": gguf(entries=entry_of("k", 9, struct.pack("<IQ", 0, 2**63)), n_entries=1),
    "gguf: arrays in arrays": gguf(entries=entry_of("k", 9, struct.pack("<IQ", 9, 8) + bytes(99)), n_entries=1),
    "gguf: a name of 2^60 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 2**60),
    "gguf: a name that is no text": gguf().replace(text("a"), struct.pack("<Q", 1) + b"\xff"),
    "gguf: the same tensor twice": gguf(count=2),
    "gguf: 2^32 - 1 dimensions": gguf().replace(struct.pack("<IQ", 1, 32), struct.pack("<IQ", 2**32 - 1, 32)),
    "gguf: shape overflows": gguf(shape=(2**40, 2**40)),
    "gguf: shape that is no block": gguf(shape=(31,)),
    "gguf: unknown type": gguf(kind=999),
    "gguf: tensor beyond the file": gguf(at=2**40),
    "gguf: cut tensor": gguf(data=bytes(33)),
    "gguf: tensor at an odd place": gguf(at=1),
    "gguf: alignment of zero": gguf(entries=entry_of("general.alignment", 4, struct.pack("<I", 0)), n_entries=1),
    "gguf: key twice": gguf(entries=entry_of("k", 0, b"1") * 2, n_entries=2),
    "gguf: a shape that is another": gguf(
        entries=entry_of("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 5, 7)), n_entries=1
    ),
}


def torch_zip(program: bytes, *, compressed: bool = False, name: str = "archive/data.pkl", more: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as z:
        z.writestr(name, program)
        z.writestr("archive/version", "3")
        z.writestr("archive/data/0", more)
    return file.getvalue()


class Call:
    """Pickled, it asks for a call of any function."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


PICKLES: dict[str, bytes] = {  # refused even where pickles are allowed
    "open": pickle.dumps(Bomb(), protocol=2),
    "system": pickle.dumps({"w": Call(os.system, f"touch {MARK}")}, protocol=2),
    "eval": pickle.dumps({"w": Call(eval, f"open({MARK!r}, 'w')")}, protocol=2),
    "import": pickle.dumps({"w": Call(__import__, "antigravity")}, protocol=2),
    "getattr": b"\x80\x02cos\nsystem\n.",
    "in a zip": torch_zip(pickle.dumps({"w": Call(os.system, f"touch {MARK}")}, protocol=2)),
    "newest protocol": pickle.dumps({"w": Call(os.system, f"touch {MARK}")}, protocol=5),
    "no tensor": pickle.dumps({"a": 1}, protocol=2),
    "cut": pickle.dumps({"a": [1] * 1000}, protocol=2)[:-200],
    "zip that grows": torch_zip(bytes(1 << 24), compressed=True),
    "zip of another program": torch_zip(b"", name="word/document.xml"),
    "cut zip": torch_zip(bytes(1000))[:-40],
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


def spoil_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def spoil_text(file: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def spoil_index(where: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(folder / "unet" / "part.safetensors")
        index = weights.with_name(weights.name + ".index.json")
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": where}}))

    return spoil


def spoil_weights(of: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(of(weights.read_bytes()))

    return spoil


PYTHON = f"open({MARK!r}, 'w')\n"


def python_and_auto_map(folder: Path) -> None:
    """A repository that brings its own code, and a configuration that cannot be followed without it."""
    for place in ("", "unet", "text_encoder", "scheduler", "tokenizer"):
        for name in ("__init__.py", "modeling.py", "unet.py", "pipeline.py", "torch.py", "sitecustomize.py"):
            (folder / place / name).write_text(PYTHON)
    spoil_json("model_index.json", _class_name=["pipeline", "Mine"], unet=["unet", "Mine"])(folder)
    spoil_json("unet/config.json", auto_map={"AutoModel": "modeling.Mine"}, act_fn="modeling.mine")(folder)


FOLDERS: dict[str, Callable[[Path], None]] = {  # ways to spoil a whole published model
    "python and auto_map": python_and_auto_map,
    "index that is no json": spoil_text("model_index.json", "{"),
    "index of deep lists": spoil_text("model_index.json", "[" * 100_000),
    "configuration that is no text": spoil_text("unet/config.json", b"\xff\xfe"),
    "configuration of a million widths": spoil_json("unet/config.json", block_out_channels=[1] * 1_000_000),
    "configuration of a vast width": spoil_json("unet/config.json", block_out_channels=[2**40, 2**40]),
    "configuration of a vast depth": spoil_json("unet/config.json", transformer_layers_per_block=10**6),
    "configuration of negative layers": spoil_json("unet/config.json", layers_per_block=-1),
    "activation by name of a function": spoil_json("text_encoder/config.json", hidden_act="os.system"),
    "activation of the autoencoder": spoil_json("vae/config.json", act_fn="__import__('os').system('true')"),
    "shard above": spoil_index("../../../etc/passwd.safetensors"),
    "shard at the root": spoil_index("/etc/passwd"),
    "shard by url": spoil_index("https://localhost/x.safetensors"),
    "shard with a NUL": spoil_index("a\0.safetensors"),
    "shard by back-slashes": spoil_index("..\\..\\x.safetensors"),
    "shard that is a pickle": spoil_index("weights.bin"),
    "weights that are a pickle": spoil_weights(lambda _: pickle.dumps(Bomb())),
    "weights that are a zip": spoil_weights(lambda _: zipped()),
    "weights cut short": spoil_weights(lambda raw: raw[: len(raw) // 2]),
    "weights of another network": spoil_weights(lambda _: packed(one(), EIGHT)),
    "tokenizer of deep lists": spoil_text("tokenizer/tokenizer.json", "[" * 100_000),
    "tokenizer that is no json": spoil_text("tokenizer/tokenizer.json", "nothing"),
    "tokenizer that is a pickle": spoil_text("tokenizer/tokenizer.json", pickle.dumps(Bomb())),
    "scheduler of text": spoil_json("scheduler/scheduler_config.json", num_train_timesteps="many"),
    "scheduler without end": spoil_json("scheduler/scheduler_config.json", num_train_timesteps=10**12),
    "scheduler of betas": spoil_json("scheduler/scheduler_config.json", trained_betas=["a"]),
}
