"""The process that holds a model and makes pictures: reads orders from its standard input, reports on its output.

Orders: ``load``, ``run``, ``cancel``, ``watch``, ``compute``, ``more``, ``stop``. It ends with its input: a server that
was killed leaves no worker behind. One model is loaded at a time; the server sends no order for another one before this
worker is idle.
"""

from __future__ import annotations

import base64
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from sfumato.errors import BadRequest, SfumatoError
from sfumato.families.additions import Additions
from sfumato.server import wire
from sfumato.server.errors import code_of

if TYPE_CHECKING:
    from sfumato.diffusion import Step
    from sfumato.pipeline.lockstep import Lockstep, Run
    from sfumato.pipeline.request import Request

PREVIEW_EVERY = 0.08  # seconds between previews of a job, and no more than
PREVIEW_SHARE = 0.1  # of the time is spent on them
PREVIEW_SIDE = 384  # pixels
AHEAD = 4  # answers of a computation that may be on their way to whoever asked


@dataclass
class Task:
    """A job's pictures: those that wait for a place in the batch, and those that are being made."""

    id: str
    steps: int
    n: int
    waiting: deque[tuple[int, Request]]
    runs: dict[Run, int] = field(default_factory=dict)
    taken: int = 0  # steps, of all pictures
    told: int = -1
    watched: bool = False
    due: dict[int, float] = field(default_factory=dict)  # picture → when it may be shown again
    left: int = 0


@dataclass
class Computation:
    """A generator that goes on as its answers are taken."""

    answers: Iterator[tuple[dict[str, Any], bytes]]
    wanted: int = AHEAD


class Worker:
    """Orders in, reports out.

    Args:
        loader: model's name → model.
        batch: pictures that share a call of the network.
        send: (message, blob) → to the server.
    """

    def __init__(self, loader: Callable[[str], Any], batch: int, send: Callable[..., None]) -> None:
        self._load, self._batch, self._send = loader, batch, send
        self._name: str | None = None
        self._lockstep: Lockstep | None = None
        self._tasks: dict[str, Task] = {}
        self._computations: dict[str, Computation] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self._tasks) or any(c.wanted for c in self._computations.values())

    def obey(self, order: dict[str, Any]) -> None:
        """Take one order; what goes wrong with it is reported, not raised."""
        kind, id = order["do"], order.get("id", "")
        try:
            if kind == "load":
                self._send({"is": "computed", "id": id, "value": wire.facts_of(self._model(order["model"]))})
                self._send({"is": "computed", "id": id, "end": True})
            elif kind == "run":
                self._begin(order)
            elif kind == "cancel":
                self._cancel(id)
            elif kind == "watch" and id in self._tasks:
                self._tasks[id].watched = order["on"]
            elif kind == "compute":
                self._computations[id] = Computation(self._computation(order))
            elif kind == "more" and id in self._computations:
                self._computations[id].wanted += 1
            elif kind == "stop":
                self._computations.pop(id, None)
        except Exception as e:
            if kind == "run":
                self._tasks.pop(id, None)
            self._send({"is": "failed", "what": kind, "id": id, "model": order.get("model"), **_told(e)})

    def go_on(self) -> None:
        """One call of the network for all pictures, and one slice of each computation."""
        self._admit()
        if self._lockstep is not None:
            for run, event in self._lockstep.advance():
                self._report(run, event)
        for id, computation in list(self._computations.items()):
            if not computation.wanted:
                continue
            computation.wanted -= 1
            try:
                message, blob = next(computation.answers)
                self._send({"is": "computed", "id": id, "value": message}, blob)
            except StopIteration:
                del self._computations[id]
                self._send({"is": "computed", "id": id, "end": True})
            except Exception as e:
                del self._computations[id]
                self._send({"is": "failed", "what": "compute", "id": id, **_told(e)})

    # ── models ───────────────────────────────────────────────────────────────────────────────────────

    def _model(self, name: str) -> Any:
        """The model of a name; another one makes room first."""
        from sfumato.pipeline.lockstep import Lockstep

        if self._name != name or self._lockstep is None:
            if self._tasks or self._computations:
                raise BadRequest(f"the worker is busy with model {self._name!r}")
            self._lockstep, self._name = None, None
            _give_memory_back()
            self._lockstep = Lockstep(self._load(name), self._batch)
            self._name = name
        return self._lockstep.pipe.model

    # ── pictures ─────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, order: dict[str, Any]) -> None:
        from sfumato.pipeline.request import Request

        self._model(order["model"])
        request = Request.from_dict(order["request"])
        assert self._lockstep is not None
        rows = deque((i, request.nth(i)) for i in range(request.n))
        task = Task(
            order["id"], self._lockstep.pipe.steps(request), request.n, rows, watched=order["watched"], left=request.n
        )
        self._tasks[task.id] = task
        self._tell_step(task, None)

    def _admit(self) -> None:
        """Give free places in the batch to the jobs by turns."""
        assert self._lockstep is not None or not self._tasks
        while self._lockstep is not None and len(self._lockstep) < self._batch:
            hungry = [t for t in self._tasks.values() if t.waiting]
            if not hungry:
                return
            task = min(hungry, key=lambda t: len(t.runs))
            index, request = task.waiting.popleft()
            task.runs[self._lockstep.start(request)] = index

    def _cancel(self, id: str) -> None:
        task = self._tasks.pop(id, None)
        if task is not None:
            self._drop(task)
            self._send({"is": "cancelled", "id": id})

    def _drop(self, task: Task) -> None:
        for run in task.runs:
            if self._lockstep is not None:
                self._lockstep.cancel(run)

    def _report(self, run: Run, event: Any) -> None:
        from sfumato.pipeline.picture import Picture

        task = next((t for t in self._tasks.values() if run in t.runs), None)
        if task is None:  # another picture of its job has failed in this round
            return
        if isinstance(event, Exception):
            del self._tasks[task.id]
            self._drop(task)
            self._send({"is": "failed", "what": "run", "id": task.id, **_told(event)})
        elif isinstance(event, Picture):
            index = task.runs.pop(run)
            event = replace(event, made_with={**event.made_with, "batch": self._batch})
            blob = event.encode(event.viewing_scale)
            seeds = {"seed": event.request.seed, "variation_seed": event.request.variation_seed}
            told = {"seeds": seeds, "warnings": event.warnings}
            self._send({"is": "picture", "id": task.id, "index": index, **told}, blob)
            task.left -= 1
            if task.left == 0:
                del self._tasks[task.id]
                self._send({"is": "done", "id": task.id})
        else:
            task.taken += 1
            self._tell_step(task, event)
            self._preview(task, task.runs[run], event)

    def _tell_step(self, task: Task, event: Step | None) -> None:
        step = task.taken // task.n
        if step > task.told:
            task.told = step
            level = None if event is None else {k: float(v) for k, v in event.level._asdict().items()}
            self._send({"is": "step", "id": task.id, "step": step, "steps": task.steps, "level": level})

    def _preview(self, task: Task, index: int, event: Step) -> None:
        """Show a watched job's picture as it is foreseen, unless the last showing was too dear or too near."""
        now = time.monotonic()
        if not task.watched or self._lockstep is None or now < task.due.get(index, 0.0):
            return
        with suppress(SfumatoError):  # what cannot be shown half-way may still become a picture
            image = data_url(self._lockstep.pipe.glimpse(event.preview[:1])[0])
            self._send({"is": "preview", "id": task.id, "step": task.told, "picture": index, "image": image})
        cost = time.monotonic() - now
        task.due[index] = now + max(PREVIEW_EVERY, cost * task.n / PREVIEW_SHARE)

    # ── computations ─────────────────────────────────────────────────────────────────────────────────

    def _computation(self, order: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
        module, _, name = order["function"].partition(":")
        if module.split(".")[0] != "sfumato":
            raise BadRequest("a computation is a function of this package")
        self._model(order["model"])
        assert self._lockstep is not None
        from sfumato.pipeline.pipeline import Pipeline

        model = self._lockstep.model
        return iter(getattr(importlib.import_module(module), name)(Pipeline(model), order["arguments"]))


def data_url(pixels: Any) -> str:
    """Pixels (H, W, 3) as a small picture inside a URL: PNG for tiny ones, else JPEG."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    form = "PNG" if max(image.size) <= 64 else "JPEG"
    image.save(file, form, **({"compress_level": 1} if form == "PNG" else {"quality": 80}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _told(error: Exception) -> dict[str, str]:
    """An error as it may leave the process: our own say what is wrong; others only what kind they are."""
    code = code_of(error)
    if isinstance(error, SfumatoError):
        message = " ".join(str(error).split())
    elif code == "no_resources":
        message = "not enough memory"
    else:
        message = f"an unexpected {type(error).__name__} in the worker; its log says more"
        import traceback  # where it happened, and not its words: they may be a prompt's

        print(type(error).__name__, *traceback.format_tb(error.__traceback__)[-6:], file=sys.stderr, flush=True)
    return {"code": code, "message": message}


def _give_memory_back() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def _read_orders(file: BinaryIO, orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    while (frame := wire.read(file)) is not None:
        orders.put(frame[0])
    os._exit(0)  # the server is gone: nobody waits for what is being made


def main() -> None:
    """Run a worker as ``python -m sfumato.server.worker LOADER BATCH THREADS ADDITIONS``."""
    loader, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    additions = Additions.from_dict(json.loads(sys.argv[4]))
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C is for the server to handle
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("800")  # if memory runs out, rather the worker than the server
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no report
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(sys.stdin.buffer, orders), daemon=True).start()

    faulthandler.enable()
    import torch

    torch.set_num_threads(threads)
    module, _, name = loader.partition(":")

    def send(message: wire.Message, blob: bytes = b"") -> None:
        frame = memoryview(wire.pack(message, blob))
        while frame:
            frame = frame[output.write(frame) :]

    load = getattr(importlib.import_module(module), name)
    worker = Worker(partial(load, additions=additions) if additions else load, batch, send)
    send({"is": "ready"})
    while True:
        while not orders.empty() or not worker.busy:
            worker.obey(orders.get())
        worker.go_on()


if __name__ == "__main__":
    main()
