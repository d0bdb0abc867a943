"""What happens to jobs when clients leave, workers die, and servers are killed: each ends once, with its own prompt."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
from PIL import Image
from serving import END, START, Serve, Server, until

from sfumato.families import load
from sfumato.server.context import COMPUTATIONS, Mailbox
from sfumato.server.worker import AHEAD, Worker

ENDED = {"done", "failed", "cancelled"}


def pictures(server: Server) -> list[dict[str, Any]]:
    return server.http.get("/pictures", params={"limit": 500}).json()["pictures"]


def test_a_storm_of_requests_is_bounded_and_nobody_gets_anothers_picture(serve: Serve, tmp_path: Path) -> None:
    """ACCEPTANCE 9: 500 at once on a queue of 32; and 11: whoever is cancelled or leaves stops, and no one else."""
    gate = tmp_path / "gate"
    gate.touch()
    server = serve("engines:gated", "--batch", "1", "--max-queue", "32", SFUMATO_TEST_GATE=str(gate))

    async def storm() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=START) as client:
            bodies = ({"prompt": f"prompt {i}", "seed": i, "steps": 60 if i == 0 else 1} for i in range(500))
            first = await client.post("/jobs", json=next(bodies))
            return [first, *await asyncio.gather(*(client.post("/jobs", json=b) for b in bodies))]

    answers = asyncio.run(storm())
    accepted = [a.json() for a in answers if a.status_code == 202]
    refused = [a for a in answers if a.status_code != 202]
    assert len(accepted) == 33
    assert {a.status_code for a in refused} == {429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert all(a.json()["error"]["code"] == "busy" for a in refused)
    server.check_sum()

    head, second = accepted[0]["id"], accepted[1]["id"]
    assert server.http.delete(f"/jobs/{second}").json()["state"] == "cancelled"
    cancelled = server.http.delete(f"/jobs/{head}").json()
    assert cancelled["state"] == "running"
    assert cancelled["cancelling"]
    gate.unlink()
    assert server.ended(head)["state"] == "cancelled"
    assert server.job(head)["step"] <= 1
    ends = {j["id"]: server.ended(j["id"]) for j in accepted}
    assert all(j["state"] == "done" for id, j in ends.items() if id not in (head, second))
    for picture in pictures(server):
        job = ends[picture["id"].rpartition("-")[0]]
        assert picture["request"]["prompt"] == job["request"]["prompt"] == f"prompt {picture['request']['seed']}"
    assert server.check_sum() == {"done": 31, "cancelled": 2, "failed": 0, "queued": 0, "running": 0}


def test_who_hangs_up_takes_his_job_with_him(serve: Serve) -> None:
    server = serve("engines:slow", "--batch", "4")
    at = urlsplit(server.url)
    body = json.dumps({"prompt": "left alone", "steps": 100}).encode()
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        stays = server.submit("stays", steps=100)
        with socket.create_connection((at.hostname or "", at.port or 0)) as s:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            jobs = until(
                lambda: [
                    j
                    for j in _jobs(server)
                    if j["request"]["prompt"] == "left alone" and j["step"] >= 1 and j["state"] == "running"
                ]
            )
        assert server.ended(jobs[0]["id"])["state"] == "cancelled"
        assert server.job(stays["id"])["state"] == "running"
        server.http.delete(f"/jobs/{stays['id']}")
        server.ended(stays["id"])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.images.generate(prompt="streamed", stream=True, partial_images=3, extra_body={"steps": 100})
        next(iter(stream))
        stream.close()
    job = next(j for j in _jobs(server) if j["request"]["prompt"] == "streamed")
    assert server.ended(job["id"])["state"] == "cancelled"
    watched = server.submit("watched", steps=3)
    with server.http.stream("GET", f"/jobs/{watched['id']}/events") as stream:
        next(stream.iter_lines())
    assert server.ended(watched["id"])["state"] == "done", "who only looks on takes nothing with him"
    server.check_sum()


def _jobs(server: Server) -> list[dict[str, Any]]:
    return server.http.get("/jobs", params={"limit": 100}).json()["jobs"]


def test_clients_that_never_read_cost_little_and_are_let_go(serve: Serve) -> None:
    """The kernel's buffers and the server's own are full; nobody else waits, nothing piles up, and it ends."""
    settings = {"SFUMATO_TEST_SETTINGS": '{"idle": 6}', "SFUMATO_TEST_SEND_BUFFER": "8192"}
    server = serve("engines:loud", "--batch", "4", **settings)
    noise = io.BytesIO()
    Image.frombytes("RGB", (2000, 1500), random.Random(0).randbytes(9_000_000)).save(noise, "PNG", compress_level=0)
    upload = server.http.post("/uploads", content=noise.getvalue(), headers={"content-type": "image/png"}).json()["id"]
    made = server.ended(server.submit("looked into", steps=20, width=48, height=48)["id"])
    job = server.submit(steps=200, n=2)
    server.running(job["id"])
    peak, open_files = _peak(server), len(_files(server))
    paths = [f"/uploads/{upload}.png"] * 20 + [f"/jobs/{job['id']}/events"] * 10
    whole = [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in paths]
    body = json.dumps({"picture": f"{made['id']}-0"})
    head = "POST /inside/path HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
    whole += [f"{head} {len(body)}\r\n\r\n{body}".encode()] * COMPUTATIONS
    with ExitStack() as stack:
        for data in (*whole, b"", b"GET /jobs HTTP/1.1\r\nHost: loc"):
            s = stack.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect((urlsplit(server.url).hostname or "", urlsplit(server.url).port or 0))
            s.sendall(data)
        assert server.ended(server.submit("other", steps=2)["id"])["state"] == "done"
        until(lambda: _looked_into(server, body) == 429)
        until(lambda: _let_go(server) == {"takes no answer": len(whole), "sends no headers": 2})
        assert server.job(job["id"])["state"] == "running", "whoever looks on keeps no job waiting"
    assert _peak(server) - peak < 64, "MiB; 180 were asked for, and as much again in previews"
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text(), "that is for the worker to load"
    until(lambda: len(_files(server)) <= open_files + 1)
    assert _looked_into(server, body) == 200, "there is room again"
    assert len([line for line in server.lines() if line.get("route") == "/jobs/{id}/events"]) == 10, "each has ended"
    server.http.delete(f"/jobs/{job['id']}")
    assert server.ended(job["id"])["state"] == "cancelled"
    server.check_sum()


def _looked_into(server: Server, body: str) -> int:
    with server.http.stream("POST", "/inside/path", content=body, headers={"content-type": "application/json"}) as s:
        return s.status_code


def _let_go(server: Server) -> dict[str, int]:
    """How many clients were let go, and why."""
    told = re.findall(r"a client that ([a-z ]+) is let go", server.log.read_text())
    return {why: told.count(why) for why in told}


def _peak(server: Server) -> float:
    """The most memory that the server's own process ever had, in MiB."""
    with open(f"/proc/{server.process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def _files(server: Server) -> list[str]:
    return os.listdir(f"/proc/{server.process.pid}/fd")


def test_news_that_nobody_takes_do_not_pile_up() -> None:
    box = Mailbox(previews=True)
    for i in range(10_000):
        box.put("step", {"step": i})
        box.put("preview", {"step": i, "picture": i % 2})
    news = asyncio.run(box.take(0))
    assert sorted((kind, data["step"]) for kind, data in news) == [
        ("preview", 9998), ("preview", 9999), ("step", 9999)
    ]  # fmt: skip


def test_a_computation_goes_on_as_its_answers_are_taken(tiny_file: Path) -> None:
    told: list[dict[str, Any]] = []
    worker = Worker(load, 4, lambda message, blob=b"": told.append(message))
    arguments = {"request": {"prompt": "a red apple", "seed": 1, "steps": 20}}
    order = {"do": "compute", "function": "sfumato.inside.compute:path", "arguments": arguments}
    worker.obey({**order, "id": "c", "model": str(tiny_file)})
    for taken in (0, 1, 40):
        for _ in range(taken):
            worker.obey({"do": "more", "id": "c"})
        while worker.busy:
            worker.go_on()
        assert taken == 40 or len(told) == AHEAD + taken
    assert [m["value"]["kind"] for m in told[:-1]] == ["start", *["frame"] * 21, "end"]
    assert told[-1] == {"is": "computed", "id": "c", "end": True}


def test_workers_that_die(serve: Serve) -> None:
    """ACCEPTANCE 12: the job fails with its reason, the server stays up, a worker is back, no one else is hurt."""
    server = serve("engines:deadly", "--batch", "4")
    for fates in (
        {"raise": ("internal", "RuntimeError"), "exhaust": ("no_resources", "not enough memory")},
        {"segfault": ("worker_died", "SIGSEGV"), "kill": ("worker_died", "SIGKILL")},
    ):
        good = server.submit("a blue house", steps=40)
        server.running(good["id"])
        ids = {fate: server.submit(fate, steps=40)["id"] for fate in fates}
        for fate, (code, words) in fates.items():
            bad = server.ended(ids[fate], START)
            assert bad["state"] == "failed"
            assert bad["error"]["code"] == code
            assert words in bad["error"]["message"]
            assert "secret" not in json.dumps(bad)
        assert server.ended(good["id"], START)["state"] == "done"
        assert server.http.get("/livez").status_code == 200
    until(lambda: server.http.get("/readyz").status_code == 200, START)
    assert server.check_sum()["failed"] == 4
    log = server.log.read_text()
    assert "a prompt or a token may stand here" not in log
    assert all(json.loads(line) for line in log.splitlines())


def test_killed_again_and_again_every_job_ends_once(serve: Serve, soak: bool) -> None:
    """ACCEPTANCE 10: ``kill -9`` at random moments, then SIGTERM."""
    number, kills = (200, 20) if soak else (20, 1)
    flags = ("--max-queue", "300", "--batch", "4")
    pick = random.Random(0)
    server = serve("engines:sleepy", *flags)
    ids = [server.submit(f"prompt {i}", seed=i, steps=4, n=1 + i % 2)["id"] for i in range(number)]
    for _ in range(kills):
        until(lambda server=server: any(j["state"] == "done" for j in _jobs(server)))
        time.sleep(pick.random() / 5)
        worker = server.worker_pid()
        server.kill()
        server.close()
        until(lambda worker=worker: not _alive(worker), END)  # nobody is left behind
        server = serve("engines:sleepy", *flags)
    for id in ids:
        job = server.ended(id, START)
        assert job["state"] == "done", job
        assert len(job["pictures"]) == job["request"]["n"]
    made = pictures(server)
    assert len(made) == len({p["id"] for p in made}) == sum(1 + i % 2 for i in range(number))
    assert server.check_sum() == {"done": number, "failed": 0, "cancelled": 0, "queued": 0, "running": 0}
    until(lambda: not list((server.folder / "pictures").glob(".*")), START)  # what was half-written is swept away

    running, waiting = server.submit("runs", steps=40, n=4), [server.submit("waits", steps=8) for _ in range(6)]
    server.running(running["id"])
    told: list[str] = []

    def stream() -> None:
        asked = {"prompt": "streams", "steps": 8, "stream": True}
        told.append(server.http.post("/v1/images/generations", json=asked, timeout=START).text)

    listener = threading.Thread(target=stream)
    listener.start()
    waiting.append(until(lambda: next((j for j in _jobs(server) if j["request"]["prompt"] == "streams"), None)))
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.http.get("/readyz").status_code == 503)
    refused = server.http.post("/jobs", json={"prompt": "late"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert server.http.get("/livez").status_code == 200
    assert server.process.wait(START) == 0
    listener.join(START)
    assert "is kept and will be done later" in told[0]
    server.close()
    server = serve("engines:sleepy", *flags)
    assert server.job(running["id"])["state"] == "done"
    for job in waiting:
        assert server.ended(job["id"], START)["state"] == "done"
    assert server.check_sum()["done"] == number + 8


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
