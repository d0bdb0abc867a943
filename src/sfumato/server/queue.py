"""The queue of jobs, in a database: SQLite beside the pictures, or Postgres between several servers.

    queued ── claim ──► running ── finish ──► done | failed
      │  ▲                 │
      │  └── release, lost ┤ (a worker died: once more, then failed)
      └──── cancel ──► cancelled ◄─┘

A job is in exactly one state, and each change is one transaction that names the state it starts from, so that a job
ends once. Who runs a job holds a lease on it. Jobs leave by start-time fair queueing (Goyal et al. 1996): a job's turn
is its cost after the later of its client's last turn and the turn that is being served.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, String, Text, and_, event, func, or_, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError

from sfumato.errors import BadRequest, NoResources
from sfumato.pipeline.request import each

STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = ("done", "failed", "cancelled")
ATTEMPTS = 2  # a job whose worker died is tried once more
KEPT = 10_000  # jobs that have ended; older ones are only counted
BUSY = 10.0  # seconds to wait for another process's lock on the database

_metadata = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("origin", String(16), nullable=False),
    Column("client", String(100), nullable=False),
    Column("model", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("cost", Integer, nullable=False),
    Column("turn", Float, nullable=False),
    Column("state", String(10), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("cancelling", Boolean, nullable=False, default=False),
    Column("owner", String(100)),
    Column("lease", Float),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("finished", Float),
    Column("error", Text),
    Column("pictures", Text, nullable=False, default="[]"),
    sa.Index("jobs_by_turn", "state", "turn", "seq"),
    sa.Index("jobs_by_client", "client", "turn"),
)
_totals = sa.Table(  # of jobs that are no longer kept; its rows are also what submissions lock
    "totals", _metadata, Column("state", String(10), primary_key=True), Column("number", BigInteger, nullable=False)
)


class Full(Exception):
    """As many jobs wait as may."""


@dataclass(frozen=True)
class Job:
    """A row of the queue."""

    seq: int
    id: str
    origin: str
    client: str
    model: str
    request: dict[str, Any]
    cost: int
    turn: float
    state: str
    attempts: int
    cancelling: bool
    owner: str | None
    lease: float | None
    created: float
    started: float | None
    finished: float | None
    error: dict[str, str] | None
    pictures: list[dict[str, Any]]

    @property
    def warnings(self) -> list[str]:
        """What went into its pictures otherwise than it was given, each thing once."""
        return list(dict.fromkeys(w for p in self.pictures for w in p.get("warnings", ())))

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in ENDED


def new_id() -> str:
    """A new name that sorts by time, for jobs and uploads."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


class Queue:
    """Jobs of all servers that share a database.

    Args:
        url: SQLAlchemy's URL.
        folder: where this server's lock file lies, by which others on this machine see that it is alive.
        limit: jobs that may wait.
        lease: seconds that a claim holds without ``renew``.

    Raises BadRequest for a URL that cannot be used, NoResources for a database that cannot be opened.
    """

    def __init__(self, url: str, folder: Path, limit: int, lease: float = 30.0) -> None:
        self.limit, self.lease = limit, lease
        self._turn = threading.Lock()
        self.owner = f"{os.uname().nodename[:40]}-{os.getpid()}-{secrets.token_hex(6)}"
        self._owners = folder / "owners"
        self._owners.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._owners / self.owner, "w")  # noqa: SIM115 - held while this process lives
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            parsed = make_url(url)
            self._sqlite = parsed.get_backend_name() == "sqlite"
            arguments = {"timeout": BUSY, "check_same_thread": False} if self._sqlite else {}
            arguments = {k: v for k, v in arguments.items() if k not in parsed.query}
            self._engine = sa.create_engine(parsed, connect_args=arguments, pool_pre_ping=not self._sqlite)
        except (ArgumentError, NoSuchModuleError, ImportError) as e:
            raise BadRequest(
                f"the database's URL cannot be used ({type(e).__name__}): see SQLAlchemy's database URLs"
            ) from None
        if self._sqlite:
            _tune_sqlite(self._engine)
        self._open()

    def _open(self) -> None:
        try:
            with self._engine.begin() as connection:
                _metadata.create_all(connection)
                known = set(connection.scalars(select(_totals.c.state)))
                for state in STATES:
                    if state not in known:
                        connection.execute(sa.insert(_totals).values(state=state, number=0))
        except DatabaseError as e:
            help = "; moved away, an empty one takes its place, and the pictures stay" if self._sqlite else ""
            raise NoResources(f"the queue's database cannot be used: {reason_of(e)}{help}") from None

    def close(self) -> None:
        """Let go of the database, and of the sign that this server lives."""
        self._engine.dispose()
        with contextlib.suppress(OSError):
            os.unlink(self._owners / self.owner)
        self._lock.close()

    # ── in ───────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, origin: str, client: str, model: str, request: dict[str, Any], cost: int, places: int = 0) -> Job:
        """Accept a job, on disk when this returns; raises Full.

        Args:
            places: jobs that this server's workers can have at once; these do not count as waiting.
        """
        with self._writing(durable=True) as db:
            open = or_(_jobs.c.state == "queued", and_(_jobs.c.state == "running", _jobs.c.owner == self.owner))
            if (db.scalar(select(func.count()).where(open)) or 0) >= self.limit + places:
                raise Full
            served = db.scalar(select(func.max(_jobs.c.turn)).where(_jobs.c.started.is_not(None))) or 0.0
            last = db.scalar(select(func.max(_jobs.c.turn)).where(_jobs.c.client == client)) or 0.0
            row = {
                "id": new_id(), "origin": origin, "client": client, "model": model,
                "request": json.dumps(request), "cost": cost,
                "turn": max(served, last) + cost, "state": "queued", "attempts": 0,
                "cancelling": False, "created": time.time(), "pictures": "[]",
            }  # fmt: skip
            db.execute(sa.insert(_jobs).values(row))
            return _get(db, row["id"])

    def cancel(self, id: str) -> Job | None:
        """Cancel a waiting job, or ask its runner to; returns the job, or None if there is none."""
        with self._writing(durable=True) as db:
            now = time.time()
            db.execute(
                update(_jobs).where(_jobs.c.id == id, _jobs.c.state == "queued").values(state="cancelled", finished=now)
            )
            db.execute(update(_jobs).where(_jobs.c.id == id, _jobs.c.state == "running").values(cancelling=True))
            return _find(db, id)

    # ── at work ──────────────────────────────────────────────────────────────────────────────────────

    def claim(self, suits: Callable[[Job], bool]) -> Job | None:
        """Take the job whose turn it is, if it suits; others never overtake it."""
        with self._writing() as db:
            query = select(_jobs).where(_jobs.c.state == "queued").order_by(_jobs.c.turn, _jobs.c.seq).limit(1)
            row = db.execute(query.with_for_update(skip_locked=True)).first()
            if row is None or not suits(job := _job(row)):
                return None
            now = time.time()
            values: dict[str, Any] = {
                "state": "running",
                "owner": self.owner,
                "started": now,
            }
            db.execute(update(_jobs).where(_jobs.c.seq == job.seq).values(**values, lease=self._now() + self.lease))
            return _get(db, job.id)

    def finish(
        self, id: str, state: str, *, error: dict[str, str] | None = None, pictures: list[dict[str, Any]] | None = None
    ) -> Job | None:
        """End a job that this server runs; None if it is no longer ours to end."""
        with self._writing() as db:
            values = {"state": state, "finished": time.time(), "owner": None, "lease": None, "cancelling": False}
            values |= {"error": None if error is None else json.dumps(error), "pictures": json.dumps(pictures or [])}
            done = db.execute(update(_jobs).where(self._ours(id)).values(values))
            return _find(db, id) if done.rowcount else None

    def lost(self, id: str, reason: str) -> Job | None:
        """The worker died over a job: let it be tried again, or fail it; a cancelled one is done with."""
        with self._writing() as db:
            job = _find(db, id)
            if job is None or job.owner != self.owner or job.state != "running":
                return None
            values: dict[str, Any] = {
                "owner": None,
                "lease": None,
                "attempts": job.attempts + 1,
                "state": "queued",
                "cancelling": False,
            }
            if job.cancelling:
                values |= {"state": "cancelled", "finished": time.time()}
            elif job.attempts + 1 >= ATTEMPTS:
                error = {"code": "worker_died", "message": f"the worker died over it {ATTEMPTS} times: {reason}"}
                values |= {"state": "failed", "finished": time.time(), "error": json.dumps(error)}
            db.execute(update(_jobs).where(_jobs.c.id == id).values(values))
            return _get(db, id)

    def release(self, ids: Iterable[str] | None = None) -> int:
        """Put what this server runs, or some of it, back into the queue, untouched; returns how many."""
        which = _jobs.c.owner == self.owner
        with self._writing() as db:
            return _requeue(db, which if ids is None else and_(which, _jobs.c.id.in_(list(ids))))

    def renew(self) -> None:
        """Hold on to this server's jobs for another lease."""
        with self._writing() as db:
            mine = and_(_jobs.c.owner == self.owner, _jobs.c.state == "running")
            db.execute(update(_jobs).where(mine).values(lease=self._now() + self.lease))

    def running(self) -> dict[str, bool]:
        """Ids of the jobs that this server holds, and whether someone wants them cancelled."""
        mine = and_(_jobs.c.owner == self.owner, _jobs.c.state == "running")
        with self._engine.connect() as db:
            return {row.id: row.cancelling for row in db.execute(select(_jobs.c.id, _jobs.c.cancelling).where(mine))}

    def recover(self) -> int:
        """Put jobs of servers that are no more back into the queue; returns how many.

        A server of this machine is gone when its lock file is free; one of another machine when its leases ran out.
        """
        gone = [owner for owner in os.listdir(self._owners) if owner != self.owner and self._is_gone(owner)]
        with self._writing() as db:
            host = self.owner.rsplit("-", 2)[0]
            here = _jobs.c.owner.like(f"{host}-%")
            known = set(os.listdir(self._owners)) - set(gone)
            orphaned = or_(
                _jobs.c.owner.in_(gone),
                and_(here, _jobs.c.owner.not_in(known)) if self._sqlite else sa.false(),
                and_(_jobs.c.lease < self._now(), _jobs.c.owner != self.owner, _jobs.c.owner.not_in(known)),
            )
            number = _requeue(db, orphaned)
        for owner in gone:
            with contextlib.suppress(OSError):
                os.unlink(self._owners / owner)
        return number

    def _now(self) -> Any:
        """The time by which leases run: one clock for all servers, so that none of theirs may jump or disagree."""
        return time.time() if self._sqlite else func.extract("epoch", func.clock_timestamp())

    def _is_gone(self, owner: str) -> bool:
        try:
            with open(self._owners / owner) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return False  # it is being cleared away by another
        return True

    def _ours(self, id: str) -> Any:
        return and_(_jobs.c.id == id, _jobs.c.state == "running", _jobs.c.owner == self.owner)

    # ── out ──────────────────────────────────────────────────────────────────────────────────────────

    def find(self, id: str) -> Job | None:
        """The job of an id."""
        with self._engine.connect() as db:
            return _find(db, id)

    def list(self, states: Iterable[str] = STATES, limit: int = 50, before: str | None = None) -> list[Job]:
        """Jobs in some states, the newest first, older than another if wanted."""
        query = select(_jobs).where(_jobs.c.state.in_(list(states))).order_by(_jobs.c.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(_jobs.c.seq < select(_jobs.c.seq).where(_jobs.c.id == before).scalar_subquery())
        with self._engine.connect() as db:
            return [_job(row) for row in db.execute(query)]

    def newest(self, origin: str, client: str) -> Job | None:
        """A client's newest job that has not ended, of those that came by one dialect."""
        query = (
            select(_jobs)
            .where(_jobs.c.origin == origin, _jobs.c.client == client, _jobs.c.state.in_(("queued", "running")))
            .order_by(_jobs.c.seq.desc())
            .limit(1)
        )
        with self._engine.connect() as db:
            row = db.execute(query).first()
            return None if row is None else _job(row)

    def waiting(self) -> list[tuple[str, int]]:
        """Ids and costs of the waiting jobs, in the order of their turns."""
        query = select(_jobs.c.id, _jobs.c.cost).where(_jobs.c.state == "queued").order_by(_jobs.c.turn, _jobs.c.seq)
        with self._engine.connect() as db:
            return [(row.id, row.cost) for row in db.execute(query)]

    def pictures_needed(self) -> set[str]:
        """SHA-256 of the pictures that jobs which have not ended start from."""
        open = _jobs.c.state.in_(("queued", "running"))
        with self._engine.connect() as db:
            requests = [json.loads(text) for text in db.scalars(select(_jobs.c.request).where(open))]
        given = (v for request in requests for value in request.values() for v in each(value))
        return {v["sha256"] for v in given if isinstance(v, dict) and "sha256" in v}

    def counts(self) -> dict[str, int]:
        """Number of jobs in each state since the database was made."""
        with self._engine.begin() as db:  # one transaction: the numbers belong together
            numbers = {row.state: row.number for row in db.execute(select(_totals))}
            for state, number in db.execute(select(_jobs.c.state, func.count()).group_by(_jobs.c.state)):
                numbers[state] += number
        return {state: numbers[state] for state in STATES}

    def prune(self, keep: int = KEPT) -> None:
        """Forget old jobs that have ended; they stay counted."""
        with self._writing() as db:
            last = db.scalar(
                select(_jobs.c.seq).where(_jobs.c.state.in_(ENDED)).order_by(_jobs.c.seq.desc()).offset(keep).limit(1)
            )
            if last is None:
                return
            old = and_(_jobs.c.state.in_(ENDED), _jobs.c.seq <= last)
            for state, number in db.execute(
                select(_jobs.c.state, func.count()).where(old).group_by(_jobs.c.state)
            ).all():
                db.execute(update(_totals).where(_totals.c.state == state).values(number=_totals.c.number + number))
            db.execute(sa.delete(_jobs).where(old))

    @contextmanager
    def _writing(self, durable: bool = False) -> Iterator[sa.Connection]:
        """One transaction at a time among all that write.

        Args:
            durable: whether it must outlive a loss of power, as what a client was promised must. All others outlive
                the death of every process, and a job whose end was lost is made again, to the same bytes.
        """
        with self._turn, self._engine.connect() as db:
            if self._sqlite:
                level = "FULL" if durable else "NORMAL"
                db.connection.driver_connection.execute(f"PRAGMA synchronous={level}")  # type: ignore[union-attr]
            with db.begin():
                if not self._sqlite:  # whose transactions take its only lock when they begin
                    db.execute(select(_totals).where(_totals.c.state == "queued").with_for_update())
                yield db


def reason_of(error: DatabaseError) -> str:
    """What a database says, without the statement and its values."""
    return str(error.orig).splitlines()[0] if error.orig is not None and str(error.orig) else type(error).__name__


def _requeue(db: sa.Connection, which: Any) -> int:
    """Put running jobs back; those that were to be cancelled are."""
    running = and_(which, _jobs.c.state == "running")
    free = {"owner": None, "lease": None}
    cancelled = (
        update(_jobs)
        .where(running, _jobs.c.cancelling)
        .values(state="cancelled", finished=time.time(), cancelling=False, **free)
    )
    return (
        db.execute(cancelled).rowcount
        + db.execute(update(_jobs).where(running).values(state="queued", **free)).rowcount
    )


def _find(db: sa.Connection, id: str) -> Job | None:
    row = db.execute(select(_jobs).where(_jobs.c.id == id)).first()
    return None if row is None else _job(row)


def _get(db: sa.Connection, id: str) -> Job:
    job = _find(db, id)
    assert job is not None
    return job


def _job(row: Any) -> Job:
    values: dict[str, Any] = dict(row._mapping)
    error = values["error"]
    values |= {"request": json.loads(values["request"]), "pictures": json.loads(values["pictures"])}
    values["error"] = None if error is None else json.loads(error)
    return Job(**values)


def _tune_sqlite(engine: Any) -> None:
    """WAL, and transactions that take the lock when they begin."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the module's own way of beginning transactions is too late
        connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
