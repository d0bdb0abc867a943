"""ACCEPTANCE 16: whatever is sent, no 5xx and no death; and memory that does not grow."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import socket
import string
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from serving import Serve, Server

PATHS = [
    ("POST", "/jobs"), ("POST", "/v1/images/generations"), ("POST", "/sdapi/v1/txt2img"), ("POST", "/sdapi/v1/img2img"),
    ("POST", "/sdapi/v1/png-info"), ("GET", "/jobs"), ("GET", "/pictures"), ("GET", "/jobs/{}"), ("DELETE", "/jobs/{}"),
    ("GET", "/jobs/{}/events"), ("GET", "/pictures/{}.png"), ("DELETE", "/pictures/{}"), ("GET", "/uploads/{}.png"),
    ("POST", "/v1/images/edits"), ("POST", "/uploads"), ("POST", "/pictures/info"), ("POST", "/inside/path"),
    ("POST", "/v1/images/variations"), ("POST", "/sdapi/v1/options"), ("GET", "/jobs/{}?wait=0.1"),
]  # fmt: skip
FIELDS = [
    "prompt", "negative", "seed", "n", "steps", "sampler", "spacing", "guidance", "guidance_interval", "eta", "width",
    "height", "init", "mask", "strength", "model", "size", "stream", "partial_images", "quality", "user", "batch_size",
    "cfg_scale", "init_images", "override_settings", "image", "hires", "upscale", "outpaint", "prompt_to", "mix",
    "image[]",
]  # fmt: skip
PNG = io.BytesIO()
Image.new("RGBA", (16, 16)).save(PNG, "PNG")
BASE64 = base64.b64encode(PNG.getvalue()).decode()
RIGHT = {
    "prompt": "rain", "negative": "snow", "seed": 3, "n": 2, "steps": 2, "sampler": "ddim", "spacing": "karras",
    "guidance": 3.0, "width": 32, "height": 16, "init": BASE64, "mask": BASE64, "strength": 0.5, "size": "16x32",
    "stream": True, "partial_images": 2, "quality": "low", "user": "u", "batch_size": 2, "cfg_scale": 2, "hires": 2.0,
    "init_images": [BASE64], "image": BASE64, "upscale": 1, "outpaint": [0, 8, 0, 8], "prompt_to": "sun", "mix": 0.5,
}  # fmt: skip
MIB_PER_1000 = 1.0


def value(pick: random.Random, depth: int = 0) -> Any:
    """Any JSON, mostly near what is wanted."""
    kind = pick.randrange(12)
    if kind < 3 and depth < 3:
        return [value(pick, depth + 1) for _ in range(pick.randrange(4))]
    if kind == 3 and depth < 3:
        return {pick.choice(FIELDS): value(pick, depth + 1) for _ in range(pick.randrange(4))}
    texts = ["a", "", "ddim", "auto", "16x16", "\0", "\ud800", "../../etc/passwd", "a" * 5000, "'; DROP TABLE jobs--"]
    numbers = [0, 1, -1, 3, 16, 2**31, 2**63, 2**200, 1.5, -0.0, 1e308, True, False, None]
    return pick.choice(texts if kind < 8 else numbers)


def form(pick: random.Random) -> bytes:
    """A form, whole or cut off."""
    parts: list[bytes] = []
    for _ in range(pick.randrange(5)):
        content = pick.choice([b"1", b"auto", PNG.getvalue(), pick.randbytes(20), json.dumps(value(pick)).encode()])
        name = f'name="{pick.choice(FIELDS)}"' + pick.choice(["", '; filename="a.png"', "; filename*=x", ' ; name="n"'])
        parts += [f"--x\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode(), content, b"\r\n"]
    return b"".join(parts) + pick.choice([b"--x--\r\n", b"--x--\r\n", b"--x", b""])


def settings(pick: random.Random) -> dict[str, Any]:
    """A body that is mostly right, so that what is wrong in it gets far."""
    names = pick.sample(FIELDS, pick.choice([0, 0, 1, 1, 2, 5]))
    some = {name: RIGHT[name] if name in RIGHT and pick.random() < 0.7 else value(pick) for name in names}
    return ({"prompt": "a red apple", "steps": 1} if pick.random() < 0.8 else {"steps": 1}) | some


def request_of(pick: random.Random) -> bytes:
    """A request: of the schema's fields with other values, or of bytes that are hardly HTTP."""
    method, path = pick.choice(PATHS)
    name = "".join(pick.choices(string.ascii_letters + "%./\\?#&-_", k=pick.randrange(1, 30)))
    path = path.replace("{}", name)
    if method == "GET" and pick.random() < 0.3:
        path += "&" if "?" in path else "?"
        path += f"limit={pick.choice(['1', '0', 'x', '9' * 40])}&before={name}&q={name}&state={name}"
    body = json.dumps(settings(pick)).encode()
    kind = pick.choice(
        ["application/json"] * 6 + ["image/png", "multipart/form-data; boundary=x", "multipart/form-data"]
    )
    if kind.endswith("=x") or path in ("/v1/images/edits", "/v1/images/variations"):
        kind, body = "multipart/form-data; boundary=x", form(pick)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if pick.random() < 0.4:
        data = bytearray(data)
        for _ in range(pick.randrange(1, 8)):
            at = pick.randrange(len(data))
            data[at : at + pick.randrange(3)] = pick.randbytes(pick.randrange(4))
    return bytes(data)


def send(server: Server, data: bytes) -> int:
    """Send it, and return the status, 0 for none."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname or "", at.port or 0), timeout=0.5) as s:
        try:
            s.sendall(data)
            answer = s.recv(4096)
        except (TimeoutError, ConnectionError):  # it waits for the rest of a body, or makes a picture
            return 0
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_no_request_is_too_strange(shared: Server, serve: Serve, soak: bool) -> None:
    server, requests, clients = (serve(), 100_000, 4) if soak else (shared, 150, 1)
    sent, sizes = itertools.count(), {}

    def client(k: int) -> None:
        pick = random.Random(16 + k)
        for i in range(requests // clients):
            data = request_of(pick)
            status = send(server, data)
            assert status < 500 or status == 503, (k, i, data)
            assert server.process.poll() is None, (k, i, data)
            if (n := next(sent)) % 500 == 0:
                sizes[n] = resident(server)
                print(f"{n} requests, {sizes[n]:.1f} MiB", flush=True)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    assert server.http.get("/livez").status_code == 200
    for job in server.http.get("/jobs", params={"state": "queued,running", "limit": 500}).json()["jobs"]:
        server.http.delete(f"/jobs/{job['id']}")
        server.ended(job["id"])
    assert server.ended(server.submit(steps=1)["id"])["state"] == "done"
    server.check_sum()
    lines = server.lines()
    assert [line for line in lines if line["level"] == "error"] == []
    assert {line["status"] for line in lines if line.get("status", 0) >= 500} <= {503}  # of answers not waited for, too
    late = sorted(n for n in sizes if n >= requests // 2)
    assert not soak or growth([sizes[n] for n in late], 500) < MIB_PER_1000


def growth(sizes: list[float], every: int) -> float:
    """MiB in 1,000 requests, by a line through sizes that were taken every so many."""
    return float(np.polyfit(np.arange(len(sizes)) * every / 1000, sizes, 1)[0])


def slope(server: Server, jobs: int) -> float:
    """MiB that server and worker grow by in 1,000 jobs, by a line through the resident memory's second half."""
    server.http.timeout = None  # a machine that stands still for minutes is no leak
    sizes: list[float] = []
    waiting: deque[str] = deque()
    for i in range(jobs):
        waiting.append(server.submit(f"prompt {i}", seed=i, steps=1)["id"])
        if len(waiting) > 32:
            _done(server, waiting.popleft())
        if i % 50 == 0 and i >= jobs // 2:
            sizes.append(resident(server))
            print(f"{i} jobs, {sizes[-1]:.1f} MiB", flush=True)
    for id in waiting:
        _done(server, id)
    return growth(sizes, 50)


def _done(server: Server, id: str) -> None:
    while (state := server.http.get(f"/jobs/{id}", params={"wait": 60}).json()["state"]) != "done":
        assert state in ("queued", "running"), state


def resident(server: Server) -> float:
    """MiB of the server and its worker."""
    pids = (server.process.pid, server.worker_pid())
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.parametrize(("engine", "leaks"), [("sfumato.families:load", False), ("engines:leaky", True)])
def test_memory_does_not_grow_and_a_leak_would_be_seen(serve: Serve, soak: bool, engine: str, leaks: bool) -> None:
    if not soak:
        pytest.skip("a slope needs thousands of requests: --soak")
    assert (slope(serve(engine), 6000) > MIB_PER_1000) is leaks
