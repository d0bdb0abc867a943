"""Load on the server: pictures per second and waiting at 1, 4, 16, 64 clients, with and without batching.

    python bench/server.py [--steps 8] [--seconds 20] [--memory 1000] [--clients 1 4 16 64]

Each client asks for one picture after the other, each of another prompt, seed, sampler and guidance. ``--memory N``
also compares the resident memory of server and worker after N jobs with that after N/10.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx

SAMPLERS = ("dpmpp-2m", "ddim", "ddpm", "unipc")
THINGS = ("heart", "house", "cat", "tree", "moon", "car", "apple", "boat")


@contextmanager
def server(batch: int, folder: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    argv = [sys.executable, "-m", "sfumato", "serve", "--port", "0", "--folder", folder, "--batch", str(batch)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    end = time.monotonic() + 120
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < end, "the server did not become ready"
        time.sleep(0.1)
    yield url, process
    process.terminate()
    process.wait(90)


def request(i: int, steps: int) -> dict[str, object]:
    return {
        "prompt": f"a red {THINGS[i % len(THINGS)]}", "seed": i, "steps": steps + i % 3,
        "sampler": SAMPLERS[i % len(SAMPLERS)], "guidance": 2.0 + i % 4,
    }  # fmt: skip


async def load(url: str, clients: int, steps: int, seconds: float) -> tuple[float, list[float]]:
    """Pictures per second, and how long each took from asking to having it."""
    waited: list[float] = []
    began = time.monotonic()

    async def client(k: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300, headers={"X-Client-Id": f"c{k}"}) as http:
            i = k
            while time.monotonic() - began < seconds:
                start = time.monotonic()
                body = {**request(i, steps), "response_format": "url"}
                (await http.post("/v1/images/generations", json=body)).raise_for_status()
                waited.append(time.monotonic() - start)
                i += clients

    await asyncio.gather(*(client(k) for k in range(clients)))
    return len(waited) / (time.monotonic() - began), sorted(waited)


def resident(pid: int) -> float:
    """MiB of a process and its children."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    total = 0
    for p in (str(pid), *children):
        with open(f"/proc/{p}/status") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return total / 1024


async def many(url: str, number: int, at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def one(i: int) -> None:
            async with gate:
                body = {**request(i, 1), "response_format": "url"}
                (await http.post("/v1/images/generations", json=body)).raise_for_status()

        await asyncio.gather(*(one(i) for i in range(number)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    args = parser.parse_args()
    print(f"{'clients':>8} {'batch':>6} {'pictures/s':>11} {'p50 s':>7} {'p99 s':>7} {'against batch 1':>16}")
    alone: dict[int, float] = {}
    for batch in (1, 16) if args.clients else ():
        with tempfile.TemporaryDirectory() as folder, server(batch, folder) as (url, _):
            asyncio.run(load(url, 2, args.steps, 2))  # warm
            for clients in args.clients:
                rate, waited = asyncio.run(load(url, clients, args.steps, args.seconds))
                p50, p99 = waited[len(waited) // 2], waited[min(len(waited) - 1, int(len(waited) * 0.99))]
                alone.setdefault(clients, rate)
                ratio = f"{rate / alone[clients]:16.2f}"
                print(f"{clients:8} {batch:6} {rate:11.2f} {p50:7.2f} {p99:7.2f} {ratio}", flush=True)
    if args.memory:
        with tempfile.TemporaryDirectory() as folder, server(16, folder) as (url, process):
            asyncio.run(many(url, args.memory // 10, 16))
            early = resident(process.pid)
            asyncio.run(many(url, args.memory - args.memory // 10, 16))
            late = resident(process.pid)
            print(f"resident: {early:.1f} MiB after {args.memory // 10} jobs, {late:.1f} after {args.memory}: ", end="")
            print(f"{100 * (late / early - 1):+.2f} %")


if __name__ == "__main__":
    main()
