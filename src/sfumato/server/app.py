"""The app: every dialect's routes over one context, behind one guard."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DatabaseError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from sfumato.errors import BadRequest, SfumatoError
from sfumato.server import reference, routes
from sfumato.server.answers import error_response
from sfumato.server.context import Context
from sfumato.server.errors import ApiError
from sfumato.server.guard import Guard
from sfumato.server.metrics import Metrics

STATIC = Path(__file__).parent / "static"
PAGE = "sfumato.server.studio"  # the page's own routes


def build_app(context: Context) -> Any:
    """Return the ASGI app of a context; its life begins and ends with the app's."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await context.start()
        try:
            yield
        finally:
            await context.stop()

    from sfumato import __version__

    prefix = context.settings.prefix
    servers = [{"url": prefix}] if prefix else None
    app = FastAPI(
        title="Sfumato", version=__version__, docs_url=None, redoc_url=None, lifespan=life, servers=servers,
        redirect_slashes=not prefix,  # they would leave it out
    )  # fmt: skip
    metrics = Metrics(
        context.queue.counts,
        lambda: (sum(w.ready for w in context.supervisor.workers), sum(w.lives for w in context.supervisor.workers)),
    )
    context.seconds_of_jobs = metrics.job
    app.include_router(routes.routes(context))
    for name in ("openai", "a1111"):
        app.include_router(importlib.import_module(f"sfumato.server.{name}").routes(context))
    if importlib.util.find_spec(PAGE) is not None:
        app.include_router(importlib.import_module(PAGE).routes(context))

    @app.get("/metrics", summary="Prometheus metrics", tags=["operations"])
    async def scrape() -> Response:
        return Response(await context.db(metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference.page(app))

    @app.get("/docs/style.css", include_in_schema=False)
    async def docs_style() -> Response:
        return Response(reference.STYLE, media_type="text/css")

    if (STATIC / "index.html").is_file():
        app.mount("/static", StaticFiles(directory=STATIC), "static")

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    if prefix:
        taken = {"docs", "openapi.json", "static"} | {path.split("/")[1] for path in app.openapi()["paths"]}
        if (first := prefix.split("/")[1]) in taken:
            raise BadRequest(
                f"--public-url: its path may not begin with /{first}, which is a route of the server's own"
            )

        @app.get(prefix, include_in_schema=False)
        async def front() -> Response:
            return RedirectResponse(f"{prefix}/")  # the page's addresses are below its own

    # Each by its kind: what is left to `Exception` is raised again after its answer.
    kinds = (ApiError, SfumatoError, DatabaseError, OSError, ClientDisconnect, HTTPException, RequestValidationError)
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, _answer)
    guard = Guard(app, context.settings, metrics.seen)
    if not context.settings.origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=[o.lower() for o in context.settings.origins], allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"], expose_headers=["Location", "Retry-After", "X-Request-Id"],
    )  # fmt: skip


def _methods(request: Request) -> list[str]:
    """What an address takes, of all its routes; the framework names that of the first alone."""
    asked = {m: {**request.scope, "method": m} for m in ("DELETE", "GET", "PATCH", "POST", "PUT")}
    return [m for m, scope in asked.items() if any(r.matches(scope)[0] is Match.FULL for r in request.app.routes)]


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):  # of a query; its values are not repeated
        first = error.errors()[0]
        error = ApiError(422, f"{'.'.join(str(p) for p in first['loc'][1:])}: {first['msg']}")
    if isinstance(error, HTTPException) and error.status_code == 405:
        error.headers = {"Allow": ", ".join(_methods(request))}
    return error_response(request.url.path, error)
