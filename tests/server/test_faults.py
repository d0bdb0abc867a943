"""What goes bad under a running server: it stays up, says so in the API's own form, and loses nothing."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image
from serving import END, START, Serve, Server, until

from sfumato.files import sweep
from sfumato.server.errors import ApiError
from sfumato.server.uploads import Uploads


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The server's folder on a disk of three megabytes."""
    folder = tmp_path / "serve"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert "/" not in answer.json()["error"]["message"], "no path"


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_a_full_disk(small_disk: Path, serve: Serve) -> None:
    server = serve("engines:sleepy")
    jobs = [server.submit(steps=20)["id"]]
    server.running(jobs[0])
    _fill(small_disk / "filler")
    upload = server.http.post("/uploads", content=png((256, 256)), headers={"content-type": "image/png"})
    refused(upload, 507, "no_space")
    for _ in range(3):  # the queue's own file may have room left inside
        answer = server.http.post("/jobs", json={"prompt": "a", "steps": 1})
        if answer.status_code == 202:
            jobs.append(answer.json()["id"])
        else:
            refused(answer, 507, "no_space")
    assert server.http.get("/livez").status_code == 200
    until(lambda: "cannot be saved" in server.log.read_text())
    (small_disk / "filler").unlink()
    for id in jobs:
        ended = server.ended(id)
        assert ended["state"] == "done" or ended["error"]["code"] == "no_space"
    assert server.ended(server.submit(steps=1)["id"])["state"] == "done"
    assert sum(server.check_sum().values()) == len(jobs) + 1
    assert not list((small_disk / "pictures").glob(".*")), "nothing half-written"


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        deque(map(file.write, repeat(bytes(4096))), 0)


def test_clock_model_and_database_that_go_bad(serve: Serve, tmp_path: Path, model_file: Path) -> None:
    clock, model = tmp_path / "clock", tmp_path / "own.safetensors"
    clock.write_text("0")
    shutil.copy(model_file, model)
    flags = ("--model", str(model), "--database", f"sqlite:///{tmp_path / 'serve' / 'queue.db'}?timeout=0.5")
    server = serve("engines:sleepy", *flags, SFUMATO_TEST_CLOCK=str(clock))
    _jump(server, clock)
    _vanish(server, model)
    _lock(server)
    seen = server.check_sum()
    assert seen["failed"] == 1
    _break(server)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(END)
    server.close()

    with pytest.raises(AssertionError):
        serve("engines:sleepy", *flags, SFUMATO_TEST_CLOCK=str(clock))
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("sfumato: the queue's database cannot be used: file is not a database; moved away")
    for file in (tmp_path / "serve").glob("queue.db*"):
        file.unlink()
    server = serve("engines:sleepy", *flags, SFUMATO_TEST_CLOCK=str(clock))
    assert server.http.get("/pictures").json()["total"] == seen["done"], "pictures outlive the queue"


def _jump(server: Server, clock: Path) -> None:
    """An hour and more to and fro: nothing runs out, runs twice or takes less than no time."""
    job = server.submit("as if nothing had happened", steps=60)
    server.running(job["id"])
    for wrong in ("100000", "-100000", "0"):
        clock.write_text(wrong)
        time.sleep(0.6)  # some looks at what jobs there are
    ended = server.ended(job["id"])
    assert ended["state"] == "done"
    assert len(ended["pictures"]) == 1
    assert ended["step"] == 60
    assert server.metrics()["sfumato_job_run_seconds_sum"] >= 0
    assert [line["message"] for line in server.lines()].count("job done") == 1


def _vanish(server: Server, model: Path) -> None:
    """A model's file is gone when the worker, which has another one loaded, wants it again."""
    aside = model.rename(model.with_suffix(".aside"))
    failed = server.ended(server.submit(steps=1, model="own")["id"], START)
    assert failed["state"] == "failed"
    assert failed["error"]["code"] == "bad_request"
    assert "own" in failed["error"]["message"]
    assert str(model.parent) not in failed["error"]["message"]
    aside.rename(model)
    assert server.ended(server.submit(steps=1, model="own")["id"], START)["state"] == "done"


def _lock(server: Server) -> None:
    with sqlite3.connect(server.folder / "queue.db", isolation_level=None) as db:
        db.execute("BEGIN EXCLUSIVE")
        seen: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: seen.append(server.http.post("/jobs", json={"prompt": "a"})))
            for _ in range(2)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join(END)
        db.execute("ROLLBACK")
    for answer in seen:
        refused(answer, 503, "unavailable")
    assert len(seen) == 2
    assert server.http.get("/livez").status_code == 200
    assert server.ended(server.submit(steps=2)["id"])["state"] == "done"


def _break(server: Server) -> None:
    """The database's file is overwritten with nonsense."""
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        size = (server.folder / name).stat().st_size
        with open(server.folder / name, "r+b") as file:  # its index is emptied, so that all is read again
            file.write(bytes(size) if name.endswith("shm") else os.urandom(size))
    for _ in range(3):
        refused(server.http.post("/jobs", json={"prompt": "a"}), 503, "unavailable")
    theirs = server.http.post("/v1/images/generations", json={"prompt": "a"})
    assert theirs.status_code == 503
    assert theirs.json()["error"]["type"] == "server_error"
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/pictures").json()["total"] >= 1


@pytest.mark.parametrize(
    ("init", "mask", "message"),
    [
        (png((16, 16)), png((8, 16)), "a mask is as large as its picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', None, "an SVG drawing"),
        (png((16, 16))[:-40], None, "damaged or cut off"),
        (b"GIF89a" + bytes(20), None, "PNG, JPEG or WebP"),
    ],
)
def test_pictures_that_cannot_be_started_from(shared: Server, init: bytes, mask: bytes | None, message: str) -> None:
    """In the body of a job, where they come as base64."""
    body: dict[str, Any] = {"prompt": "a", "init": base64.b64encode(init).decode()}
    if mask is not None:
        body["mask"] = base64.b64encode(mask).decode()
    answer = shared.http.post("/jobs", json=body)
    if answer.status_code == 202:  # what only drawing shows
        ended = shared.ended(answer.json()["id"])
        assert ended["state"] == "failed"
        said = ended["error"]
    else:
        assert answer.status_code == 422
        said = answer.json()["error"]
    assert said["code"] in ("bad_request", "bad_data")
    assert message in said["message"]


def test_a_bomb_is_refused_before_it_is_decoded(shared: Server) -> None:
    file = io.BytesIO()
    Image.new("1", (12_000, 8_000)).save(file, "PNG")  # 96 million pixels in a few kilobytes
    answer = shared.http.post("/jobs", json={"prompt": "a", "init": base64.b64encode(file.getvalue()).decode()})
    assert answer.status_code == 422
    assert "12000×8000 is more than the 16 million pixels" in answer.json()["error"]["message"]


def test_what_a_crash_left_half_written_is_swept_away_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    def write(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch()

    write("a.png", ".a.png.01.part", ".b.png.02.part")
    seen = sweep(tmp_path, set())
    (tmp_path / ".b.png.02.part").rename(tmp_path / "b.png")
    write(".c.png.03.part")
    assert sweep(tmp_path, seen) == {".c.png.03.part"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", ".c.png.03.part"}


def test_uploads_are_bounded_and_what_a_job_needs_is_kept(tmp_path: Path) -> None:
    pictures = [png((40, 40 + i)) for i in range(12)]
    needed: set[str] = set()
    Uploads(tmp_path / "scratch", 1 << 30, set).keep(pictures[-1])
    most = 5 * next((tmp_path / "scratch").iterdir()).stat().st_size + 200
    folder = tmp_path / "uploads"
    uploads = Uploads(folder, most, lambda: needed)

    def kept() -> list[str]:
        return [id for id in ids if uploads.path(id)]

    ids: list[str] = []
    for i, data in enumerate(pictures):
        ids.append(uploads.keep(data))
        os.utime(folder / f"{ids[-1]}.png", ns=(i, i))
        if i == 0:
            needed.add(ids[0])
        assert sum(f.stat().st_size for f in folder.iterdir()) <= most
    assert kept()[0] == ids[0], "a job needs it"
    assert 3 <= len(kept()) <= 5
    assert kept()[1:] == ids[-len(kept()) + 1 :], "of the others the newest"
    oldest = kept()[1]
    uploads.read(oldest)
    uploads.keep(png((40, 39)))
    assert uploads.path(oldest), "what was just used is not the next to go"
    needed |= set(kept()) | {p.stem for p in folder.iterdir()}
    with pytest.raises(ApiError, match="too many pictures wait") as full:
        uploads.keep(png((40, 38)))
    assert full.value.status == 507
