"""Load on the server: pictures per second and waiting at 1, 4, 16, 64 clients, with and without batching.

    python bench/server.py [--steps 8] [--seconds 20] [--rounds 2] [--clients 1 4 16 64] [--memory 1000] [--switches 40]
                           [--recovery 5]

Each client asks for one picture after the other, each of another seed, sampler and guidance, of eight prompts. Two
servers, with ``--batch 1`` and with ``--batch 16``, run at once and are loaded in turn, so that whatever else the
machine does meets both; what it does for moments is not in the median, p50. CPU seconds are those of server and
worker. ``--memory N`` also compares the resident memory of server and worker after N jobs with that after N/10,
``--switches N`` after N changes between two models with that after N/10; ``--recovery N`` takes N times how long it is
from asking to cancel to the job's end, from there to the next one's start, and from a worker's death until there is
another. With the settings above: some eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx2 as httpx

SAMPLERS = ("dpmpp-2m", "ddim", "ddpm", "unipc")
THINGS = ("heart", "house", "cat", "tree", "moon", "car", "apple", "boat")
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A server under load, and what is known of it by its number of clients."""

    url: str
    pid: int
    batch: int
    seconds: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    waited: dict[int, list[float]] = field(default_factory=dict)

    def processes(self) -> list[int]:
        """The server, and its worker."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def cpu_seconds(self) -> float:
        stats = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in self.processes()]
        return sum(int(s[11]) + int(s[12]) for s in stats) / TICK

    def resident(self) -> dict[str, float]:
        """MiB by process."""
        sizes = {}
        for name, p in zip(("server", "worker"), self.processes(), strict=True):
            lines = Path(f"/proc/{p}/status").read_text().splitlines()
            sizes[name] = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
        return sizes

    def rate(self, clients: int) -> float:
        """Pictures per second."""
        return len(self.waited[clients]) / self.seconds[clients]


@contextmanager
def serving(batch: int, *models: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "sfumato", "serve", "--port", "0", "--folder", folder, "--batch", str(batch)]
        argv += [word for model in models for word in ("--model", model)]
        log = Path(folder) / "log"
        with log.open("w") as told:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=told, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the server did not start: {log.read_text()}")
            url = line.split()[-1]
            end = time.monotonic() + 120
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < end, "the server did not become ready"
                time.sleep(0.1)
            yield Server(url, process.pid, batch)
        finally:
            process.terminate()
            process.wait(90)


def request(i: int, steps: int) -> dict[str, object]:
    return {
        "prompt": f"a red {THINGS[i % len(THINGS)]}", "seed": i, "steps": steps + i % 3, "response_format": "url",
        "sampler": SAMPLERS[i % len(SAMPLERS)], "guidance": 2.0 + i % 4,
    }  # fmt: skip


async def load(server: Server, clients: int, steps: int, seconds: float) -> None:
    """Note how long each picture took from asking to having it."""
    waited, cpu, began = server.waited.setdefault(clients, []), server.cpu_seconds(), time.monotonic()

    async def client(k: int) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=300, headers={"X-Client-Id": f"c{k}"}) as http:
            i = k
            while time.monotonic() - began < seconds:
                start = time.monotonic()
                (await http.post("/v1/images/generations", json=request(i, steps))).raise_for_status()
                waited.append(time.monotonic() - start)
                i += clients

    await asyncio.gather(*(client(k) for k in range(clients)))
    server.seconds[clients] = server.seconds.get(clients, 0.0) + time.monotonic() - began
    server.cpu[clients] = server.cpu.get(clients, 0.0) + server.cpu_seconds() - cpu


async def many(server: Server, jobs: range, at_once: int, models: tuple[str, ...] = ()) -> None:
    """Small jobs as fast as they go, of each model in turn."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:

        async def one(i: int) -> None:
            async with gate:
                body = {**request(i, 1), "upscale": 1, **({"model": models[i % len(models)]} if models else {})}
                (await http.post("/v1/images/generations", json=body)).raise_for_status()

        await asyncio.gather(*(one(i) for i in jobs))


def measure_load(args: argparse.Namespace) -> None:
    with serving(1) as alone, serving(16) as together:
        for server in (alone, together):
            asyncio.run(load(server, 2, args.steps, 2))  # warm
            server.waited.clear()
        head = (
            "clients",
            "batch",
            "pictures/s",
            "p50 s",
            "p99 s",
            "CPU s/picture",
            "against batch 1",
            "by CPU",
            "by p50",
        )
        print("".join(f"{h:>{len(h) + 3}}" for h in head), flush=True)
        for clients in args.clients:
            for i in range(args.rounds):
                for server in (alone, together) if i % 2 == 0 else (together, alone):
                    asyncio.run(load(server, clients, args.steps, args.seconds / args.rounds))
            first = alone.rate(clients), alone.cpu[clients] / len(alone.waited[clients]), median(alone.waited[clients])
            for server in (alone, together):
                waited, rate = sorted(server.waited[clients]), server.rate(clients)
                p50, p99 = median(waited), waited[min(len(waited) - 1, int(len(waited) * 0.99))]
                cpu = server.cpu[clients] / len(waited)
                row = (clients, server.batch, f"{rate:.2f}", f"{p50:.3f}", f"{p99:.2f}", f"{cpu:.3f}",
                       f"{rate / first[0]:.2f}", f"{first[1] / cpu:.2f}", f"{first[2] / p50:.2f}")  # fmt: skip
                print("".join(f"{v:>{len(h) + 3}}" for v, h in zip(row, head, strict=True)), flush=True)


def measure_switching(number: int) -> None:
    from sfumato.families import locate

    with tempfile.TemporaryDirectory() as folder:
        names = ("one", "two")
        for name in names:
            shutil.copy(locate(None), f"{folder}/{name}.safetensors")
        with serving(16, *(f"{folder}/{name}.safetensors" for name in names)) as server:
            measure_memory(server, number, 1, "changes of the model", names)


def measure_memory(server: Server, number: int, at_once: int, what: str, models: tuple[str, ...] = ()) -> None:
    first = number // 10
    asyncio.run(many(server, range(first), at_once, models))
    early = server.resident()
    asyncio.run(many(server, range(first, number), at_once, models))
    late = server.resident()
    print(f"resident MiB after {first} and {number} {what}: ", end="")
    parts = [*((k, early[k], late[k]) for k in early), ("both", sum(early.values()), sum(late.values()))]
    print(", ".join(f"{k} {a:.1f} → {b:.1f} ({100 * (b / a - 1):+.2f} %)" for k, a, b in parts))


def measure_recovery(number: int) -> None:
    def when(text: str) -> float:
        return datetime.fromisoformat(text).timestamp()

    def until(http: httpx.Client, id: str, *states: str) -> dict[str, Any]:
        while (job := http.get(f"/jobs/{id}").json())["state"] not in states or (
            states == ("running",) and not job["step"]
        ):
            time.sleep(0.005)
        return job

    stops, steps, gaps, lives = [], [], [], []
    with serving(1) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(number):
            first, second = (http.post("/jobs", json={"prompt": "a", "steps": k}).json()["id"] for k in (100, 1))
            seen, asked = until(http, first, "running"), time.time()
            steps.append((asked - when(seen["started"])) / seen["step"])
            http.delete(f"/jobs/{first}")
            ended = when(until(http, first, "cancelled")["finished"])
            stops.append(ended - asked)
            gaps.append(when(until(http, second, "done")["started"]) - ended)
        for _ in range(number):
            worker, began = server.processes()[1], time.monotonic()
            os.kill(worker, signal.SIGKILL)
            while worker in server.processes() or http.get("/readyz").status_code != 200:
                time.sleep(0.01)
            lives.append(time.monotonic() - began)
    print(f"from asking to cancel to the job's end, ms: {', '.join(f'{1000 * s:.0f}' for s in stops)}", end="")
    print(f" (its steps so far took {1000 * min(steps):.0f} to {1000 * max(steps):.0f} each)")
    print(f"from a cancelled job's end to the next one's start, ms: {', '.join(f'{1000 * g:.0f}' for g in gaps)}")
    print(f"from a worker's death to its successor's readiness, s: {', '.join(f'{s:.1f}' for s in lives)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20, help="for each number of clients and each server")
    parser.add_argument("--rounds", type=int, default=2, help="turns in which these seconds are taken")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--recovery", type=int, default=0)
    parser.add_argument("--switches", type=int, default=0)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    args = parser.parse_args()
    if args.clients:
        measure_load(args)
    if args.memory:
        with serving(16) as server:
            measure_memory(server, args.memory, 16, "jobs")
    if args.recovery:
        measure_recovery(args.recovery)
    if args.switches:
        measure_switching(args.switches)


if __name__ == "__main__":
    main()
