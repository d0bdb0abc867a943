"""Models by their id: the real client against a server of the hub's interface on this machine, and without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sfumato.checkpoints.hub import HubId, choose, commit_of, parse
from sfumato.errors import BadCheckpoint, BadRequest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/small-model"
WEIGHTS = bytes(range(256)) * (6 << 14)  # 24 MiB: the client keeps what it has got by pieces of 10 MB


class Hub(BaseHTTPRequestHandler):
    """Serves one repository; of large files it breaks off the first answer half-way."""

    files: dict[str, bytes]
    asked: list[tuple[str, str, str]]
    broken: set[str]

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path, self.headers.get("Range", "")))
        resolved = f"/{ID}/resolve/{COMMIT}/"
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send_json({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif path.startswith(f"/api/models/{ID}/tree/"):
            self.send_json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in self.files.items()
                ]
            )
        elif path.startswith(resolved) and (name := path.removeprefix(resolved)) in self.files:
            self.send_file(name, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, name: str, body: bool) -> None:
        data, start = self.files[name], 0
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body and len(data) > 100_000 and name not in self.broken:
            self.broken.add(name)
            self.wfile.write(data[start : start + len(data) // 2])
            self.wfile.flush()
            self.connection.close()
        elif body:
            self.wfile.write(data[start:])


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """A running server's address, and its handler with what was asked of it."""
    files = {
        "model_index.json": b'{"_class_name": "X", "unet": ["diffusers", "U"]}',
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
        "unet/diffusion_pytorch_model.fp16.safetensors": WEIGHTS,
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/modeling.py": b"raise SystemExit",
        "scheduler/scheduler_config.json": b"{}",
        "v1.ckpt": b"pickle",
        "README.md": b"words",
    }
    handler = type("Handler", (Hub,), {"files": files, "asked": [], "broken": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from sfumato.checkpoints import hub
from sfumato.errors import SfumatoError
for name in sys.argv[1:]:
    try:
        print(hub.fetch(hub.parse(name)))
    except SfumatoError as e:
        print(f"{type(e).__name__}: {e}")
"""


def fetch(models: list[str], cache: Path, endpoint: str, offline: str = "0") -> list[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FETCH, *models]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_a_model_is_fetched_once_resumed_and_read_offline(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    said, missing = fetch([ID, "someone/other"], tmp_path, endpoint)
    folder = Path(said)
    assert commit_of(folder) == COMMIT, said
    got = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert got == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert (folder / got[-1]).read_bytes() == WEIGHTS
    starts = [a[2] for a in handler.asked if a[0] == "GET" and a[1].endswith("model.safetensors")]
    assert len(starts) == 2, "it broke off once"
    assert int(starts[1].removeprefix("bytes=").split("-")[0]) > 0, "what had come was not asked for again"
    assert missing.startswith("BadRequest: no model 'someone/other'")

    asked = len(handler.asked)
    first, second, absent = fetch([ID, f"{ID}@{COMMIT}", "someone/other"], tmp_path, endpoint, offline="1")
    assert Path(first) == Path(second) == folder
    assert "cannot be fetched" in absent
    assert len(handler.asked) == asked

    nowhere = "http://127.0.0.1:9"
    first, unreachable = fetch([ID, "someone/other"], tmp_path, nowhere)
    assert Path(first) == folder, "without a network the cache is read"
    assert unreachable.startswith("NoResources: ")
    assert "connect to a network" in unreachable


@pytest.mark.parametrize("text", ["a/../b", "../a/b", "a/b/../../c", "a..b/c", "a/b@../c"])
def test_an_id_cannot_climb(text: str) -> None:
    with pytest.raises(BadRequest, match=r"'\.\.'"):
        parse(text)


def test_what_an_id_is() -> None:
    assert parse("stabilityai/sd-turbo") == HubId("stabilityai/sd-turbo")
    assert parse("a/b@v1.0") == HubId("a/b", revision="v1.0")
    assert parse("a/b/x/model.safetensors@main") == HubId("a/b", "x/model.safetensors")
    for text in ("model", "/a/b", "a//b", "a/b/", "https://x/y", ".hidden/b", "a/b@", "a b/c", "~/b", "a/b\n"):
        assert parse(text) is None, text


def test_of_a_repository_only_what_is_read_is_chosen() -> None:
    shards = [f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [f"transformer/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [
        "model_index.json", "x.py", "flux1-dev.safetensors", "transformer/config.json", *shards, *halves,
        "transformer/diffusion_pytorch_model.safetensors.index.json", "text_encoder/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json", "text_encoder/config.json",
        "text_encoder/pytorch_model.bin", "text_encoder/model.onnx", "tokenizer/vocab.json", "tokenizer/evil.py",
    ]  # fmt: skip
    common = {"model_index.json", "transformer/config.json", "text_encoder/config.json", "tokenizer/vocab.json"}
    common |= {"text_encoder/model.fp16.safetensors"}
    index = "transformer/diffusion_pytorch_model.safetensors.index{}.json"
    assert set(choose(HubId("a/b"), names)) == common | {*shards, index.format("")}
    assert set(choose(HubId("a/b"), names, "fp16")) == common | {*halves, index.format(".fp16")}
    assert choose(HubId("a/b", "flux1-dev.safetensors"), names) == ["flux1-dev.safetensors"]
    with pytest.raises(BadCheckpoint, match="no safetensors"):
        choose(HubId("a/b"), ["model_index.json", "unet/diffusion_pytorch_model.bin"])
    with pytest.raises(BadCheckpoint, match=r"a/b/one\.safetensors"):
        choose(HubId("a/b"), ["one.safetensors"])
    with pytest.raises(BadRequest, match="no file"):
        choose(HubId("a/b", "none.safetensors"), names)
