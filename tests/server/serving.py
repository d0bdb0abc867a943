"""A real server in a process of its own, with one of the engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

HERE = Path(__file__).parent
START, END = 300.0, 120.0  # seconds within which things happen on a busy machine
Json = dict[str, Any]

# The command, but for the loader and what else is no flag: nothing but tests has others.
COMMAND = """
import json, os, socket, sys, time
if "SFUMATO_TEST_CLOCK" in os.environ:  # a file that says by how much the clock is wrong
    def now(right=time.time):
        with open(os.environ["SFUMATO_TEST_CLOCK"]) as file:
            return right() + float(file.read() or 0)
    time.time = now
from sfumato.server import settings, cli
loader, buffer = sys.argv.pop(1), os.environ.get("SFUMATO_TEST_SEND_BUFFER")
of, listen = cli.settings_of, cli._listen
def with_loader(args):
    import dataclasses
    settings = json.loads(os.environ.get("SFUMATO_TEST_SETTINGS", "{}"))
    return dataclasses.replace(of(args), loader=loader, **settings)
def with_buffer(settings):
    listener = listen(settings)
    if buffer is not None:  # of every connection that it accepts
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(buffer))
    return listener
cli.settings_of, cli._listen = with_loader, with_buffer
from sfumato.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    log: Path
    token: str | None = None
    clients: list[httpx.Client] = field(default_factory=list)

    @property
    def http(self) -> httpx.Client:
        if not self.clients:
            headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
            once = httpx.Limits(max_keepalive_connections=0)  # none that the server may close just when it is used
            self.clients.append(httpx.Client(base_url=self.url, headers=headers, timeout=END, limits=once))
        return self.clients[0]

    def submit(self, prompt: str = "a red apple", **settings: Any) -> Json:
        answer = self.http.post("/jobs", json={"prompt": prompt, **settings})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, id: str) -> Json:
        return self.http.get(f"/jobs/{id}").json()

    def ended(self, id: str, seconds: float = END) -> Json:
        return until(lambda: (j := self.job(id))["state"] in ("done", "failed", "cancelled") and j, seconds)

    def running(self, id: str) -> Json:
        return until(lambda: (j := self.job(id))["state"] != "queued" and j["step"] >= 1 and j)

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def check_sum(self) -> dict[str, float]:
        """accepted = done + failed + cancelled + queued + running."""
        seen = self.metrics()
        states = {s: seen[f'sfumato_jobs{{state="{s}"}}'] for s in STATES}
        assert seen["sfumato_jobs_accepted_total"] == sum(states.values())
        return states

    def lines(self) -> list[Json]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def worker_pid(self) -> int:
        return [line["pid"] for line in self.lines() if line["message"] == "worker ready"][-1]

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(END)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(END)


STATES = ("done", "failed", "cancelled", "queued", "running")
Serve = Callable[..., Server]


def until(condition: Callable[[], Any], seconds: float = END) -> Any:
    """Wait for a condition, and return what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def start(folder: Path, model: Path, loader: str, *flags: str, token: str | None = None, **environment: str) -> Server:
    """Start a server on a free port; returns when it listens."""
    log = folder.parent / f"{folder.name}.log"
    source = str(HERE.parents[1] / "src")
    paths = os.pathsep.join([source, str(HERE), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    env.pop("SFUMATO_TOKEN", None)
    if token is not None:
        env["SFUMATO_TOKEN"] = token
    argv = [sys.executable, "-c", COMMAND, loader, "--folder", str(folder), "--port", "0", "--threads", "1", "--model"]
    with open(log, "a") as errors:
        process = subprocess.Popen(
            [*argv, str(model), *flags], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("sfumato serves on "), (line, log.read_text()[-2000:])
    return Server(process, line.split()[-1], folder, log, token)


@contextmanager
def serving(*arguments: Any, **settings: Any) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it."""
    server = start(*arguments, **settings)
    try:
        until(lambda: server.http.get("/readyz").status_code == 200, START)
        yield server
    finally:
        server.close()
