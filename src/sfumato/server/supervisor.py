"""Worker processes: started, fed with jobs, listened to, restarted when they die."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import NoResources, SfumatoError
from sfumato.server import wire
from sfumato.server.errors import KINDS
from sfumato.server.logs import log
from sfumato.server.queue import Job
from sfumato.server.settings import Settings

RESTART = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before the k-th start in a row that came to nothing
DYING = 2.0  # seconds for a worker that says nothing more to end by itself
LINE = 500  # characters of a worker's own output that are logged

Reports = Callable[["Worker", dict[str, Any], bytes], Awaitable[None]]


class WorkerDied(NoResources):
    """The process that made a picture is no more."""


@dataclass(eq=False)
class Worker:
    """One worker process, over as many lives as it takes."""

    index: int
    ready: bool = False
    model: str | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    lives: int = 0
    answers: dict[str, asyncio.Queue[tuple[dict[str, Any], bytes] | Exception]] = field(default_factory=dict)

    def send(self, order: dict[str, Any]) -> None:
        """Give an order; to a dead worker it is lost, as its jobs are."""
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(wire.pack(order))


class Supervisor:
    """All workers of a server.

    Args:
        report: called with what a worker says of its jobs.
        died: called with a worker's jobs and the reason when it is gone.
    """

    def __init__(
        self, settings: Settings, report: Reports, died: Callable[[Worker, list[Job], str], Awaitable[None]]
    ) -> None:
        self._settings, self._report, self._died = settings, report, died
        self.workers = [Worker(i) for i in range(settings.workers)]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._serial = 0

    def start(self) -> None:
        """Start every worker."""
        self._tasks = [asyncio.create_task(self._keep(w)) for w in self.workers]

    async def stop(self) -> None:
        """End every worker."""
        self._stopping = True
        for worker in self.workers:
            if worker.process is not None and worker.process.returncode is None:
                with suppress(ProcessLookupError):
                    worker.process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, worker: Worker, order: dict[str, Any]) -> AsyncGenerator[tuple[dict[str, Any], bytes], None]:
        """Give an order that is answered, perhaps more than once; raises what went wrong with it."""
        self._serial += 1
        id = f"ask-{self._serial}"
        answers: asyncio.Queue[tuple[dict[str, Any], bytes] | Exception] = asyncio.Queue()
        worker.answers[id] = answers
        worker.send({**order, "id": id})
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, Exception):
                    raise answer
                if answer[0].get("end"):
                    return
                yield answer[0]["value"], answer[1]
                worker.send({"do": "more", "id": id})  # one that is not taken holds up the next
        finally:
            worker.answers.pop(id, None)
            worker.send({"do": "stop", "id": id})

    async def _keep(self, worker: Worker) -> None:
        """Keep a worker alive; starts that come to nothing are tried ever more slowly."""
        in_vain = 0
        while not self._stopping:
            await asyncio.sleep(RESTART[min(in_vain, len(RESTART) - 1)])
            in_vain += 1
            try:
                if await self._live(worker):
                    in_vain = 0
            except OSError as e:
                log("a worker could not be started", level=logging.ERROR, worker=worker.index, error=type(e).__name__)

    async def _live(self, worker: Worker) -> bool:
        """One life of a worker; returns whether it got as far as being ready."""
        s = self._settings
        worker.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sfumato.server.worker", s.loader, str(s.batch), str(s.threads_per_worker),
            json.dumps(s.additions.to_dict()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if k != "SFUMATO_TOKEN"}, limit=1 << 20,
        )  # fmt: skip
        worker.lives += 1
        assert worker.process.stdout is not None
        assert worker.process.stderr is not None
        repeating = asyncio.create_task(_repeat(worker, worker.process.stderr))
        was_ready = False
        try:
            while (frame := await wire.receive(worker.process.stdout)) is not None:
                message, blob = frame
                if message["is"] == "ready":
                    worker.ready = was_ready = True
                    log("worker ready", worker=worker.index, pid=worker.process.pid)
                if message.get("id") in worker.answers:
                    worker.answers[message["id"]].put_nowait(_answer(message, blob))
                else:
                    await self._report(worker, message, blob)
        finally:
            worker.ready, worker.model = False, None
            # `kill` looks first whether it has ended, and so takes the reason of its death from who waits for it.
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(worker.process.wait()), DYING)
            if worker.process.returncode is None:
                with suppress(ProcessLookupError):
                    worker.process.kill()
            code = await worker.process.wait()
            repeating.cancel()
            reason, jobs = _reason(code), list(worker.jobs.values())
            worker.jobs.clear()
            for answers in worker.answers.values():
                answers.put_nowait(WorkerDied(f"the worker died: {reason}"))
            if not self._stopping:
                log("worker died", level=logging.ERROR, worker=worker.index, reason=reason, jobs=len(jobs))
                await self._died(worker, jobs, reason)
        return was_ready


def _answer(message: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes] | Exception:
    if message["is"] == "failed":
        return KINDS.get(message["code"], SfumatoError)(message["message"])
    return message, blob


async def _repeat(worker: Worker, stream: asyncio.StreamReader) -> None:
    """Log what a worker writes to its standard error."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than the stream's limit
            continue
        if not line:
            return
        text = line.decode(errors="replace").rstrip()[:LINE]
        log("worker says", level=logging.WARNING, worker=worker.index, text=text)


def _reason(code: int) -> str:
    """Why a process ended, in words without its output."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"signal {name}" + (" (killed, perhaps for want of memory)" if name == "SIGKILL" else "")
    return f"exit code {code}"


class Pace:
    """How much work is done in a second, from what was lately done: for estimates of the time left."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._since, self._done = time.monotonic(), 0.0

    def add(self, work: float) -> None:
        """Note work done."""
        self._done += work
        now = time.monotonic()
        if now - self._since >= 1.0:
            rate = self._done / (now - self._since)
            self._rate = rate if self._rate is None else 0.6 * self._rate + 0.4 * rate
            self._since, self._done = now, 0.0

    def idle(self) -> None:
        """Nothing is being done: time that passes is not slowness."""
        self._since, self._done = time.monotonic(), 0.0

    def seconds(self, work: float) -> float | None:
        """How long work will take, if that can be known."""
        return None if not self._rate else round(work / self._rate, 1)
