"""The same app on a Ray cluster: replicas that share one queue and one gallery.

Every replica answers for every job, whoever runs it: what they know of each other's is in the queue. So the queue must
be within reach of all, SQLite in a folder of one machine or Postgres, and so must the folder of pictures.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import Any

from sfumato.errors import BadRequest, NoResources
from sfumato.server.settings import Settings


class App:
    """An ASGI app that travels as its settings, and is built where it runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Build the app when its life begins, and hand over to it."""
        if self._app is None:
            from sfumato.server import logs
            from sfumato.server.app import build_app
            from sfumato.server.context import Context

            logs.set_up()
            self._settings.folder.mkdir(parents=True, exist_ok=True)
            self._app = build_app(Context(self._settings))
        await self._app(scope, receive, send)


def deploy(settings: Settings, replicas: int) -> str:
    """Deploy on the cluster that ``RAY_ADDRESS`` names, or on a local one; returns the URL.

    Raises NoResources without Ray, BadRequest where other machines could not reach the queue.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by which Ray would tell its makers
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as e:
        raise NoResources(f'Ray is not installed: pip install "sfumato[ray]" ({e.name} is missing)') from None
    from dataclasses import replace

    if not settings.folder.is_absolute():
        raise BadRequest("with --ray, --folder must be an absolute path that every machine of the cluster has")
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, logging_level=logging.WARNING)
    except Exception as e:  # of many kinds: no such cluster, no memory for one, processes that do not answer
        raise NoResources(f"no Ray cluster could be reached or started ({type(e).__name__}: {_first_line(e)})") from e
    machines = sum(node["Alive"] for node in ray.nodes())
    if machines > 1 and settings.database is None:
        raise BadRequest(f"the cluster has {machines} machines: name a Postgres queue that all reach with --database")
    serve.start(http_options={"host": settings.host, "port": settings.port})

    threads = settings.threads or 1

    @serve.deployment(name="sfumato", num_replicas=replicas, ray_actor_options={"num_cpus": threads})
    @serve.ingress(App(replace(settings, workers=1, threads=threads)))
    class Sfumato:
        pass

    serve.run(
        Sfumato.bind(),  # pyright: ignore[reportAttributeAccessIssue]
        name="sfumato",
        route_prefix="/",
    )
    return f"http://{settings.host}:{settings.port}"


def main(settings: Settings) -> int:
    """Deploy, and stay until interrupted; the deployment ends with this process only if it started the cluster."""
    url = deploy(settings, settings.workers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # not by Ray's handler, whose code is 15
    print(f"sfumato serves on {url}", flush=True)
    while True:
        time.sleep(3600)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
