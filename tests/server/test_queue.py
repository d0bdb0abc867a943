"""The queue, on SQLite and on Postgres: each job ends once, whoever dies, and nobody waits for ever."""

from __future__ import annotations

import getpass
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.errors import BadRequest, NoResources
from sfumato.server.queue import STATES, Full, Job, Queue

Open = Callable[..., Queue]
FOLDERS = [Path(p) for p in ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt/postgresql")]


def any_job(job: Job) -> bool:
    return True


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A Postgres of the tests' own, on a socket in a folder of its own."""
    programs = [p for folder in FOLDERS for p in folder.glob("*/bin/initdb")]
    found = max(map(str, programs), default=None) or shutil.which("initdb")
    if found is None:
        pytest.skip("Postgres is not installed")
    bin = Path(found).parent
    folder = Path(tempfile.mkdtemp(prefix="sfumato-pg-"))  # pytest's own folders are closed to other users
    prefix: list[str] = []
    if os.getuid() == 0:  # Postgres refuses to run as root
        if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("Postgres cannot run as root, and there is no user postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    user = "postgres" if prefix else getpass.getuser()
    data = folder / "data"
    subprocess.run(
        [*prefix, found, "-D", str(data), "-A", "trust", "-U", user, "--no-sync"], check=True, capture_output=True
    )
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=40"
    control = [*prefix, str(bin / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], check=True, capture_output=True)
    yield f"postgresql+psycopg://{user}@/postgres?host={folder}"
    stopped = subprocess.run([*control, "-m", "immediate", "stop"], capture_output=True, text=True)
    shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(params=["sqlite", "postgres"])
def queues(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open queues on one database, as several servers do."""
    opened: list[Queue] = []
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres")
        import sqlalchemy

        with sqlalchemy.create_engine(url).begin() as db:
            db.exec_driver_sql("DROP TABLE IF EXISTS jobs, totals")

    def open(limit: int = 100, lease: float = 30.0) -> Queue:
        opened.append(Queue(url, tmp_path, limit, lease))
        return opened[-1]

    yield open
    for queue in opened:
        queue.close()


def submit(queue: Queue, client: str = "a", cost: int = 1, prompt: str = "p") -> Job:
    return queue.submit("jobs", client, "m", {"prompt": prompt}, cost)


def test_a_job_goes_its_way_once(queues: Open) -> None:
    queue = queues()
    job = submit(queue)
    assert (job.state, job.request, job.attempts) == ("queued", {"prompt": "p"}, 0)
    taken = queue.claim(any_job)
    assert taken is not None
    assert (taken.id, taken.state, taken.owner) == (job.id, "running", queue.owner)
    assert queue.claim(any_job) is None
    done = queue.finish(job.id, "done", pictures=[{"id": "x", "seed": 1}])
    assert done is not None
    assert (done.state, done.pictures, done.owner) == ("done", [{"id": "x", "seed": 1}], None)
    assert queue.finish(job.id, "failed") is None, "it ended twice"
    cancelled = queue.cancel(job.id)
    assert cancelled is not None
    assert cancelled.state == "done"
    assert queue.find("other") is None
    assert queue.cancel("other") is None
    assert queue.counts() == dict.fromkeys(STATES, 0) | {"done": 1}


def test_pictures_of_jobs_that_have_not_ended_are_needed(queues: Open) -> None:
    queue = queues()
    records = [{"sha256": name * 64, "name": ""} for name in "abc"]
    queue.submit("jobs", "a", "m", {"init": records[0], "control_image": records[1:], "control_scale": [1, 2]}, 1)
    assert queue.pictures_needed() == {name * 64 for name in "abc"}
    taken = queue.claim(any_job)
    assert taken is not None
    assert len(queue.pictures_needed()) == 3
    queue.finish(taken.id, "done")
    assert queue.pictures_needed() == set()


def test_it_is_bounded(queues: Open) -> None:
    queue = queues(limit=3)
    for _ in range(3):
        submit(queue)
    with pytest.raises(Full):
        submit(queue)
    assert queue.submit("jobs", "a", "m", {}, 1, places=1)
    queue.claim(any_job)
    with pytest.raises(Full):
        queue.submit("jobs", "a", "m", {}, 1, places=1)
    assert queue.submit("jobs", "a", "m", {}, 1, places=2)
    assert sum(queue.counts().values()) == 5


def test_a_client_with_much_does_not_keep_the_others_waiting(queues: Open) -> None:
    queue = queues(limit=1000)
    for _ in range(50):
        submit(queue, "greedy", 10)
    queue.claim(any_job)
    for client in ("b", "c"):
        for _ in range(3):
            submit(queue, client, 10)
    served = [job.client for _ in range(12) if (job := queue.claim(any_job))]
    assert Counter(served[:9]) == {"greedy": 3, "b": 3, "c": 3}
    assert set(served[9:]) == {"greedy"}
    late = submit(queue, "late", 10)
    assert [id for id, _ in queue.waiting()].index(late.id) <= 2, "time that passed gives no credit"


def test_what_does_not_suit_is_not_overtaken(queues: Open) -> None:
    queue = queues()
    first = submit(queue, prompt="first")
    submit(queue, "b", 5)
    assert queue.claim(lambda job: job.id != first.id) is None
    taken = queue.claim(any_job)
    assert taken is not None
    assert taken.id == first.id


def test_a_job_whose_worker_died_is_tried_once_more(queues: Open) -> None:
    queue = queues()
    job = submit(queue)
    queue.claim(any_job)
    again = queue.lost(job.id, "signal SIGSEGV")
    assert again is not None
    assert (again.state, again.attempts) == ("queued", 1)
    queue.claim(any_job)
    failed = queue.lost(job.id, "signal SIGSEGV")
    assert failed is not None
    assert failed.state == "failed"
    assert failed.error == {"code": "worker_died", "message": "the worker died over it 2 times: signal SIGSEGV"}
    assert queue.lost(job.id, "again") is None

    other = submit(queue)
    queue.claim(any_job)
    assert queue.running() == {other.id: False}
    queue.cancel(other.id)
    assert queue.running() == {other.id: True}
    gone = queue.lost(other.id, "signal SIGSEGV")
    assert gone is not None
    assert gone.state == "cancelled", "who wanted it cancelled does not want it tried again"


def test_a_dead_servers_jobs_are_taken_up_and_a_living_ones_are_not(queues: Open) -> None:
    dead, living, other = queues(), queues(), queues()
    jobs = [submit(dead) for _ in range(3)]
    for queue in (dead, living, dead):
        queue.claim(any_job)
    dead.cancel(jobs[2].id)
    assert other.recover() == 0
    dead._lock.close()  # as the kernel does for a process that was killed
    assert other.recover() == 2
    assert [other.find(j.id).state for j in jobs] == ["queued", "running", "cancelled"]  # type: ignore[union-attr]
    assert dead.finish(jobs[0].id, "done") is None, "the dead has no say"
    assert living.finish(jobs[1].id, "done")
    assert other.recover() == 0


def test_leases_that_run_out_free_the_jobs_of_a_server_far_away(queues: Open, tmp_path: Path) -> None:
    far, near = queues(lease=-1.0), queues()
    far.owner = "far-1-abc"  # whose lock file is on another machine
    job = submit(near)
    assert far.claim(any_job)
    assert near.recover() == 1
    assert near.claim(any_job)
    assert near.recover() == 0
    assert far.finish(job.id, "done") is None
    assert near.finish(job.id, "done")


def test_release_puts_back_untouched(queues: Open) -> None:
    queue = queues()
    job = submit(queue)
    queue.claim(any_job)
    assert queue.release(["other"]) == 0
    assert queue.release() == 1
    back = queue.find(job.id)
    assert back is not None
    assert (back.state, back.attempts) == ("queued", 0)


def test_many_servers_never_take_the_same_job(queues: Open, soak: bool) -> None:
    first = queues(limit=1000)
    number = 600 if soak else 40
    ids = {submit(first, f"c{i % 7}").id for i in range(number)}
    servers, taken = [first, queues(), queues(), queues()], []

    def work(queue: Queue) -> None:
        while (job := queue.claim(any_job)) is not None:
            taken.append(job.id)
            queue.finish(job.id, "done")

    threads = [threading.Thread(target=work, args=(s,)) for s in servers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    assert len(taken) == len(ids)
    assert set(taken) == ids
    assert first.counts()["done"] == number


def test_lists_and_pruning(queues: Open) -> None:
    queue = queues()
    jobs = [submit(queue, cost=i) for i in range(6)]
    for _ in range(4):
        job = queue.claim(any_job)
        assert job is not None
        queue.finish(job.id, "done")
    assert [j.id for j in queue.list()] == [j.id for j in reversed(jobs)]
    assert [j.id for j in queue.list(limit=2, before=jobs[3].id)] == [jobs[2].id, jobs[1].id]
    assert [j.id for j in queue.list(["queued"])] == [jobs[5].id, jobs[4].id]
    assert queue.newest("jobs", "a").id == jobs[5].id  # type: ignore[union-attr]
    assert queue.newest("openai", "a") is None
    before = queue.counts()
    queue.prune(keep=1)
    assert queue.counts() == before
    assert [j.id for j in queue.list(["done"])] == [jobs[3].id]


OPERATIONS = st.lists(
    st.sampled_from(["submit", "claim", "done", "failed", "cancel", "lost", "release", "kill", "prune"]), max_size=30
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_whatever_happens_each_job_is_in_one_state_and_ends_once(
    tmp_path_factory: pytest.TempPathFactory, operations: list[str], seed: int
) -> None:
    folder, pick = tmp_path_factory.mktemp("queue"), random.Random(seed)
    queue = Queue(f"sqlite:///{folder / 'q.db'}", folder, 8)
    accepted: set[str] = set()
    ended: dict[str, str] = {}
    for operation in operations:
        id = pick.choice(sorted(accepted)) if accepted else "none"
        if operation == "submit":
            try:
                accepted.add(submit(queue, pick.choice("ab")).id)
            except Full:
                assert queue.counts()["queued"] == 8
        elif operation == "claim":
            queue.claim(any_job)
        elif operation in ("done", "failed"):
            if queue.finish(id, operation):
                assert id not in ended
                ended[id] = operation
        elif operation == "cancel":
            queue.cancel(id)
        elif operation == "lost":
            queue.lost(id, "signal")
        elif operation == "release":
            queue.release()
        elif operation == "prune":
            queue.prune(keep=3)
        else:
            queue._lock.close()
            queue = Queue(f"sqlite:///{folder / 'q.db'}", folder, 8)
            queue.recover()
            assert queue.counts()["running"] == 0
        assert sum(queue.counts().values()) == len(accepted)
        for id, state in ended.items():
            job = queue.find(id)
            assert job is None or job.state == state
    queue.close()


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    with pytest.raises(NoResources, match="not a database"):
        Queue(f"sqlite:///{tmp_path / 'bad.db'}", tmp_path, 1)
    for url in ("nonsense", "oracle+none://x"):
        with pytest.raises(BadRequest, match="URL"):
            Queue(url, tmp_path, 1)
