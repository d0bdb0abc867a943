"""What all routes share: the queue, the gallery, the workers, and the news of jobs on their way to whoever watches."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.exc import DatabaseError

from sfumato.errors import BadRequest, SfumatoError, TooLarge, nearest
from sfumato.files import sweep
from sfumato.pipeline.request import Request
from sfumato.server.errors import code_of, fail
from sfumato.server.gallery import Gallery, iso
from sfumato.server.inputs import take_pictures, with_pictures
from sfumato.server.logs import log
from sfumato.server.queue import Full, Job, Queue, reason_of
from sfumato.server.settings import Settings
from sfumato.server.supervisor import Pace, Supervisor, Worker, WorkerDied
from sfumato.server.uploads import Uploads
from sfumato.server.wire import ModelFacts

if TYPE_CHECKING:
    from sfumato.families.model import Model

T = TypeVar("T")

POLL = 0.5  # seconds between looks at what other servers changed
RECOVER_EVERY, PRUNE_EVERY = 10.0, 60.0  # seconds
SAVE_TRIES = 5
COMPUTATIONS = 8  # at once, for each worker: they go between the steps of pictures


class Mailbox:
    """The news of one job for one watcher: of each kind only the newest, so that slow readers cost nothing."""

    def __init__(self, previews: bool) -> None:
        self.previews = previews
        self._news: dict[Any, tuple[str, dict[str, Any]]] = {}
        self._some = asyncio.Event()

    def put(self, kind: str, data: dict[str, Any]) -> None:
        """Leave a piece of news in place of an older one of its kind."""
        self._news[kind, data.get("picture")] = (kind, data)
        self._some.set()

    async def take(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Wait for news for some time at most, and take all there are."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._some.wait(), seconds)
        self._some.clear()
        news, self._news = list(self._news.values()), {}
        return news


class Context:
    """A server's state. Made before the event loop runs; ``start`` and ``stop`` run in it.

    Raises BadRequest for settings that cannot be served, NoResources for a queue that cannot be opened.
    """

    def __init__(self, settings: Settings) -> None:
        from sfumato.families import DEFAULT_MODEL, embedded_models

        self.settings = settings
        names = settings.models or tuple(sorted(embedded_models(), key=lambda name: name != DEFAULT_MODEL))
        self.sources: dict[str, str] = {}  # the name that clients use → what the loader takes
        for source in names:
            name = source if source in embedded_models() else Path(source).stem
            if name in self.sources:
                raise BadRequest(f"two models are called {name!r}: rename one of the files")
            self.sources[name] = source
        self.default_model = next(iter(self.sources))
        self.models: dict[str, ModelFacts] = {}
        self.draining = False
        self.failure: SfumatoError | None = None  # why the models cannot be served
        self.gallery = Gallery(settings.pictures)
        self.queue = Queue(settings.database_url, settings.folder, settings.limits.queue, settings.lease)
        self.uploads = Uploads(settings.uploads, settings.limits.uploads, self.queue.pictures_needed)
        self.supervisor = Supervisor(settings, self._heard, self._bereaved)
        self.pace = Pace()
        self.seconds_of_jobs: Callable[[float, float], None] = lambda waited, ran: None
        self._thread = ThreadPoolExecutor(1, "database")
        self._boxes: dict[str, set[Mailbox]] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._saved: dict[str, list[dict[str, Any]]] = {}
        self._wake = asyncio.Event()
        self._waiting: tuple[float, list[tuple[str, int]]] = (-1.0, [])
        self._computing = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.on_failure: Callable[[], None] = lambda: None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Take up what an earlier server left, and start the workers."""
        found = await self.db(self.queue.recover)
        if found:
            log("jobs taken up again", jobs=found)
        self.supervisor.start()
        for work in (self._learn_models, self._dispatch, self._maintain):
            self._tasks.append(asyncio.create_task(work()))

    async def drain(self) -> None:
        """Take nothing new and let running jobs finish, within bounds; what does not is kept for later."""
        self.draining = True
        end = time.monotonic() + self.settings.drain
        while time.monotonic() < end and any(w.jobs for w in self.supervisor.workers):
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the workers and let go of the database."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.supervisor.stop()
        with suppress(DatabaseError):
            await self.db(self.queue.release)
        await self.db(self.queue.close)
        self._thread.shutdown()

    @property
    def ready(self) -> str | None:
        """None if pictures can be made, else the reason why not."""
        if self.draining:
            return "the server is shutting down"
        if not any(w.ready for w in self.supervisor.workers):
            return "no worker is ready"
        return None if len(self.models) == len(self.sources) else "the model is being loaded"

    async def db(self, call: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        """Run a call that touches the database, one after the other, outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(*arguments, **settings))

    # ── for routes ───────────────────────────────────────────────────────────────────────────────────

    def facts(self, model: Any) -> ModelFacts:
        """What is known of a model by the name that a client gave, or of the default; raises ApiError."""
        name = self.default_model if model is None else model
        if not isinstance(name, str):
            fail(422, "model must be a name", setting="model")
        if name not in self.sources:
            fail(
                422,
                f"no model {name[:60]!r}{nearest(name[:60], list(self.sources))}; there are {', '.join(self.sources)}",
                setting="model",
            )
        if name not in self.models:
            fail(503, "the model is being loaded", retry_after=2)
        return self.models[name]

    async def submit(self, origin: str, client: str, settings: dict[str, Any], model: Any = None) -> Job:
        """Check a request and accept it as a job; raises ApiError or BadRequest."""
        if self.draining:
            fail(503, "the server is shutting down", retry_after=10)
        facts = self.facts(model)
        request = await asyncio.to_thread(self._resolved, settings, facts)
        self._check_limits(request, facts.multiple)
        cost = request.work((facts.defaults.width, facts.defaults.height), facts.multiple)
        places = self.settings.workers * self.settings.batch
        try:
            job = await self.db(self.queue.submit, origin, client, facts.name, request.to_dict(), cost, places)
        except Full:
            seconds = self.pace.seconds(sum(c for _, c in await self.waiting()) / self.settings.limits.queue)
            fail(429, "too many jobs wait already", retry_after=max(1, min(60, round(seconds or 1))))
        self._forget_places()
        return job

    def _resolved(self, settings: dict[str, Any], facts: ModelFacts) -> Request:
        request = Request.from_dict(take_pictures(self.uploads, self.gallery, settings))
        return request.resolve(cast("Model", facts))  # which asks a model for no more than these facts

    def _check_limits(self, request: Request, unit: int) -> None:
        """Raise TooLarge for a request of more than is served."""
        assert request.steps is not None
        limits = self.settings.limits
        pixels = max(math.prod(size) for size, _ in request.rounds(unit))  # that the network draws
        for name, setting, value, most in (
            ("width × height", "width", pixels * (request.upscale or 1) ** 2, limits.pixels),
            ("steps", "steps", request.steps, limits.steps),
            ("n", "n", request.n, limits.n),
            ("width × height × steps × n × best_of", None, pixels * request.steps * request.drawn, limits.work),
        ):
            if value > most:
                raise TooLarge(f"{name} is {value}; this server takes at most {most}", setting)

    async def cancel(self, id: str) -> Job:
        """Cancel a job wherever it stands; raises ApiError if there is none, or it had ended."""
        before = await self.db(self.queue.find, id)
        if before is None:
            fail(404, "there is no such job")
        if before.ended:
            fail(409, f"the job is {before.state} already")
        job = await self.db(self.queue.cancel, id)
        assert job is not None
        for worker in self.supervisor.workers:
            if id in worker.jobs:
                worker.send({"do": "cancel", "id": id})
        self._forget_places()
        self._tell(id, "changed", {})
        return job

    async def waiting(self) -> list[tuple[str, int]]:
        """Ids and costs of the waiting jobs in the order of their turns, at most a moment old."""
        if time.monotonic() - self._waiting[0] > POLL / 2:
            self._waiting = (time.monotonic(), await self.db(self.queue.waiting))
        return self._waiting[1]

    async def describe(self, job: Job) -> dict[str, Any]:
        """A job as the API gives it."""
        progress = self._progress.get(job.id, {})
        place, seconds = await self.place(job.id) if job.state == "queued" else (None, progress.get("seconds_left"))
        return {
            "id": job.id,
            "state": job.state,
            "place": place,
            "seconds_left": seconds,
            "model": job.model,
            "request": job.request,
            "step": job.request["steps"] if job.state == "done" else progress.get("step", 0),
            "steps": progress.get("steps", job.request["steps"]),
            "created": iso(job.created),
            "started": iso(job.started),
            "finished": iso(job.finished),
            "pictures": [
                {k: v for k, v in p.items() if k != "warnings"}
                | {"url": f"{self.settings.prefix}/pictures/{p['id']}.png"}
                for p in job.pictures
            ],
            "warnings": job.warnings,
            "cancelling": job.cancelling,
            "error": job.error,
        }

    async def place(self, id: str) -> tuple[int | None, float | None]:
        """A waiting job's place, 0 for the next, and the seconds until it is done, as far as they can be known."""
        ahead = self._work_at_hand()
        for place, (other, cost) in enumerate(await self.waiting()):
            ahead += cost
            if other == id:
                return place, self.pace.seconds(ahead)
        return None, None

    async def watch(self, id: str, previews: bool = False) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Follow a job: its present state, then what happens; ends with ``done``, ``failed`` or ``cancelled``.

        An empty event, ("", {}), now and then tells that nothing happened.
        """
        box = Mailbox(previews)
        self._boxes.setdefault(id, set()).add(box)
        try:
            self._look(id)
            place, started = (-1, None), False
            while True:
                job = await self.db(self.queue.find, id)
                if job is None:
                    return
                if job.ended:
                    yield job.state, await self.describe(job)
                    return
                if job.state == "queued" and self.draining:
                    return  # it is kept
                if job.state == "queued":
                    now = await self.place(id)
                    if now[0] is not None and now != place:
                        place = now
                        yield "place", {"place": now[0], "seconds_left": now[1]}
                elif not started:
                    started = True
                    self._look(id)
                    if id in self._progress:
                        yield "step", self._progress[id]
                again = time.monotonic() + (POLL if job.state == "queued" else 4 * POLL)
                while (left := again - time.monotonic()) > 0:
                    news = await box.take(left)
                    for kind, data in news:
                        if kind != "changed":
                            yield kind, data
                    if any(kind == "changed" for kind, _ in news) or (job.state == "queued" and news):
                        break
                yield "", {}
        finally:
            self._boxes[id].discard(box)
            if not self._boxes[id]:
                del self._boxes[id]
            self._look(id)

    async def wait(self, id: str) -> Job:
        """Wait until a job has ended."""
        async for _ in self.watch(id):
            pass
        job = await self.db(self.queue.find, id)
        assert job is not None
        return job

    async def compute(
        self, function: str, model: str | None, arguments: dict[str, Any]
    ) -> AsyncGenerator[tuple[dict[str, Any], bytes], None]:
        """Run a generator of the package with a model, in a worker, between the steps of pictures.

        Args:
            function: ``sfumato.module:name`` of ``(pipe, arguments) → Iterator[(JSON, bytes)]``.

        It stops when it is closed. Raises what it raises, if it is a SfumatoError; NoResources if the worker dies;
        ApiError where too many run already.
        """
        facts = self.facts(model)
        if self._computing >= COMPUTATIONS * self.settings.workers:
            fail(429, "too many pictures are looked into already", retry_after=5)
        self._computing += 1
        try:
            async with aclosing(self._compute(function, self.sources[facts.name], arguments)) as answers:
                async for answer in answers:
                    yield answer
        except SfumatoError as e:
            raise type(e)(self._public(str(e))) from None
        finally:
            self._computing -= 1

    async def _compute(
        self, function: str, source: str, arguments: dict[str, Any]
    ) -> AsyncGenerator[tuple[dict[str, Any], bytes], None]:
        for _ in range(600):  # until a worker has this model, or nothing to do
            able = [w for w in self.supervisor.workers if w.ready and (w.model == source or not (w.jobs or w.answers))]
            if able:
                break
            await asyncio.sleep(0.1)
        else:
            fail(503, "all workers are busy with other models", retry_after=10)
        worker = min(able, key=lambda w: len(w.jobs))
        worker.model = source
        order = {"do": "compute", "function": function, "model": source, "arguments": arguments}
        async with aclosing(self.supervisor.ask(worker, order)) as answers:
            async for answer in answers:
                yield answer

    # ── between queue and workers ────────────────────────────────────────────────────────────────────

    async def _learn_models(self) -> None:
        """Have every model loaded once, the default last, to know what requests it takes."""
        tries = 0
        while len(self.models) < len(self.sources):
            worker = next((w for w in self.supervisor.workers if w.ready), None)
            if worker is None:
                await asyncio.sleep(0.02)
                continue
            name = next(n for n in reversed(self.sources) if n not in self.models)
            try:
                worker.model = self.sources[name]
                async for facts, _ in self.supervisor.ask(worker, {"do": "load", "model": self.sources[name]}):
                    self.models[name] = ModelFacts.from_message(name, facts)
                log("model loaded", model=name)
            except WorkerDied as e:
                tries += 1
                if tries == 3:
                    return self._give_up(e)
            except SfumatoError as e:
                return self._give_up(e)
        self._wake.set()
        return None

    def _give_up(self, error: SfumatoError) -> None:
        self.failure = error
        log("a model cannot be loaded", level=logging.ERROR, code=code_of(error))
        self.on_failure()

    async def _dispatch(self) -> None:
        """Hand jobs to workers as long as there are both."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL)
            self._wake.clear()
            try:
                while not self.draining and await self._hand_out():
                    pass
            except DatabaseError as e:
                log("the queue cannot be read", level=logging.ERROR, reason=reason_of(e))

    async def _hand_out(self) -> bool:
        """Give the job whose turn it is to the worker with the least to do that can have it."""
        if len(self.models) < len(self.sources):
            return False
        open = [w for w in self.supervisor.workers if w.ready and len(w.jobs) < self.settings.batch]
        chosen: list[Worker] = []

        def suits(job: Job) -> bool:
            fit = [w for w in open if self._fits(w, job)]
            chosen[:] = [min(fit, key=lambda w: len(w.jobs))] if fit else []
            return bool(fit)

        job = await self.db(self.queue.claim, suits) if open else None
        if job is None:
            if not any(w.jobs for w in self.supervisor.workers):
                self.pace.idle()
            return False
        worker = chosen[0]
        self._forget_places()
        if not worker.ready:  # it died meanwhile
            await self.db(self.queue.release, [job.id])
            return True
        worker.jobs[job.id] = job
        if job.model not in self.sources:
            await self._end(
                worker,
                job.id,
                "failed",
                {"code": "bad_request", "message": f"model {job.model!r} is no longer served here"},
            )
            return True
        worker.model = self.sources[job.model]
        watched = any(b.previews for b in self._boxes.get(job.id, ()))
        try:
            request = await asyncio.to_thread(with_pictures, self.uploads, job.request)
        except OSError:
            error = {"code": "bad_request", "message": "the picture to start from is not here any more"}
            await self._end(worker, job.id, "failed", error)
            return True
        worker.send({"do": "run", "id": job.id, "model": worker.model, "request": request, "watched": watched})
        return True

    def _fits(self, worker: Worker, job: Job) -> bool:
        """A worker takes company of one model; a job that may be deadly is tried again alone."""
        if not worker.jobs and not worker.answers:
            return True
        same = worker.model == self.sources.get(job.model)
        return same and not job.attempts and not any(other.attempts for other in worker.jobs.values())

    async def _heard(self, worker: Worker, message: dict[str, Any], blob: bytes) -> None:
        """A worker's report."""
        kind, id = message["is"], message.get("id", "")
        job = worker.jobs.get(id)
        if kind == "ready":
            self._wake.set()
        if job is None:
            return
        if kind == "step":
            self._note_step(job, message)
        elif kind == "preview":
            self._tell(id, "preview", {k: message[k] for k in ("step", "picture", "image")})
        elif kind == "picture":
            await self._save(worker, job, message, blob)
        elif kind in ("done", "cancelled"):
            await self._end(worker, id, kind)
        elif kind == "failed":
            error = {"code": message["code"], "message": self._public(message["message"])}
            await self._end(worker, id, "failed", error)

    def _note_step(self, job: Job, message: dict[str, Any]) -> None:
        before = self._work_left(job)
        self._progress[job.id] = {k: message[k] for k in ("step", "steps", "level")}
        left = self._work_left(job)
        if left < before:
            self.pace.add(before - left)
        pictures = min(
            self.settings.batch, sum(j.request["n"] for w in self.supervisor.workers for j in w.jobs.values())
        )
        company = max(1.0, pictures / job.request["n"])
        self._progress[job.id]["seconds_left"] = self.pace.seconds(left * company)
        self._tell(job.id, "step", self._progress[job.id])

    async def _save(self, worker: Worker, job: Job, message: dict[str, Any], blob: bytes) -> None:
        picture = {"id": f"{job.id}-{message['index']}", **message["seeds"], "warnings": message["warnings"]}
        try:
            await asyncio.to_thread(self.gallery.save, picture["id"], blob)
        except SfumatoError as e:
            log("a picture cannot be saved", level=logging.ERROR, job=job.id, code=code_of(e))
            worker.send({"do": "cancel", "id": job.id})
            await self._end(
                worker, job.id, "failed", {"code": "no_space", "message": "the picture could not be written to disk"}
            )
            return
        self._saved.setdefault(job.id, []).append(picture)

    async def _end(self, worker: Worker, id: str, state: str, error: dict[str, str] | None = None) -> None:
        """A job has ended: write it down, tell it, and go on with the next."""
        started = worker.jobs.pop(id)
        pictures = sorted(self._saved.pop(id, []), key=lambda p: int(p["id"].rpartition("-")[2]))
        for attempt in range(SAVE_TRIES):
            try:
                job = await self.db(self.queue.finish, id, state, error=error, pictures=pictures)
            except DatabaseError as e:  # `_maintain` finds a job that nobody runs, should it stay so
                log("a job's end cannot be written", level=logging.ERROR, job=id, reason=reason_of(e))
                await asyncio.sleep(0.2 * 2**attempt)
            else:
                if job is not None and job.finished is not None and started.started is not None:
                    self.seconds_of_jobs(started.started - started.created, job.finished - started.started)
                break
        log(f"job {state}", job=id, code="" if error is None else error["code"])
        self._progress.pop(id, None)
        self._tell(id, "changed", {})
        self._wake.set()

    async def _bereaved(self, worker: Worker, jobs: list[Job], reason: str) -> None:
        """A worker died over its jobs."""
        for job in jobs:
            self._progress.pop(job.id, None)
            self._saved.pop(job.id, None)
            try:
                await self.db(self.queue.lost, job.id, reason)
            except DatabaseError as e:
                log("a lost job cannot be written", level=logging.ERROR, job=job.id, reason=reason_of(e))
            self._tell(job.id, "changed", {})
        self._forget_places()

    async def _maintain(self) -> None:
        """Keep leases, hear of cancelling by other servers, take up what others left."""
        renewed = recovered = time.monotonic()
        pruned = renewed - PRUNE_EVERY  # at once
        orphans: set[str] = set()
        folders = (self.settings.pictures, self.settings.uploads)
        unfinished: list[set[str]] = [set(), set()]
        while True:
            await asyncio.sleep(POLL)
            now = time.monotonic()
            try:
                held = {id: w for w in self.supervisor.workers for id in w.jobs}
                if held or orphans:
                    for id, cancelling in (running := await self.db(self.queue.running)).items():
                        if cancelling and id in held:
                            held[id].send({"do": "cancel", "id": id})
                    still = set(running) - {id for w in self.supervisor.workers for id in w.jobs} - held.keys()
                    if still & orphans:  # twice in a row: nobody is about to end it
                        await self.db(self.queue.release, still & orphans)
                        self._forget_places()
                    orphans = still
                if now - renewed > self.settings.lease / 3:
                    renewed = now
                    await self.db(self.queue.renew)
                if now - recovered > RECOVER_EVERY:
                    recovered = now
                    if await self.db(self.queue.recover):
                        self._wake.set()
                if now - pruned > PRUNE_EVERY:
                    pruned = now
                    unfinished = [await asyncio.to_thread(sweep, *f) for f in zip(folders, unfinished, strict=True)]
                    await self.db(self.queue.prune)
            except (DatabaseError, OSError) as e:
                reason = reason_of(e) if isinstance(e, DatabaseError) else type(e).__name__
                log("the queue cannot be kept", level=logging.ERROR, reason=reason)

    # ── small things ─────────────────────────────────────────────────────────────────────────────────

    def _tell(self, id: str, kind: str, data: dict[str, Any]) -> None:
        for box in self._boxes.get(id, ()):
            if kind != "preview" or box.previews:
                box.put(kind, data)

    def _look(self, id: str) -> None:
        """Have previews made while someone looks."""
        on = any(box.previews for box in self._boxes.get(id, ()))
        for worker in self.supervisor.workers:
            if id in worker.jobs:
                worker.send({"do": "watch", "id": id, "on": on})

    def _forget_places(self) -> None:
        self._waiting = (-1.0, [])
        self._wake.set()

    def _work_at_hand(self) -> float:
        return sum(self._work_left(job) for worker in self.supervisor.workers for job in worker.jobs.values())

    def _work_left(self, job: Job) -> float:
        """A begun job's cost by the share of its steps that are left, each taken for as dear as another."""
        now = self._progress.get(job.id)
        return job.cost * (1 - now["step"] / now["steps"]) if now else float(job.cost)

    def _public(self, message: str) -> str:
        """A message without the places of this machine's files."""
        for name, source in self.sources.items():
            message = message.replace(source, name)
        return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", message)


def model_json(facts: ModelFacts, default: bool) -> dict[str, Any]:
    """A model as ``GET /models`` gives it."""
    return {**asdict(facts), "default": default}
