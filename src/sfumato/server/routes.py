"""Our own dialect: jobs, pictures, and what there is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import FileResponse, JSONResponse, Response

from sfumato.errors import nearest
from sfumato.pipeline.picture import Picture
from sfumato.server.answers import read_json, read_picture
from sfumato.server.context import Context, model_json
from sfumato.server.errors import fail
from sfumato.server.following import EventStream
from sfumato.server.gallery import NAME
from sfumato.server.queue import STATES
from sfumato.server.schema import body_of, job_body
from sfumato.server.settings import JSON_BYTES, UPLOAD_BYTES
from sfumato.server.uploads import PICTURES

PAGE = 500  # entries of a list at most
WAIT = 60.0  # seconds that an answer may be put off at most


def client_of(request: Request) -> str:
    """By whom a request is, for fairness: what the client calls itself, or its address."""
    given = request.headers.get("x-client-id", "")
    return given if NAME.fullmatch(given) else request.client.host if request.client else "-"


def routes(context: Context) -> APIRouter:
    """The routes of our own dialect."""
    router, prefix = APIRouter(dependencies=[Depends(_known)]), context.settings.prefix

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────────

    @router.post("/jobs", status_code=202, summary="Ask for pictures", tags=["jobs"], openapi_extra=body_of(job_body()))
    async def submit(request: Request) -> JSONResponse:
        settings = await read_json(request)
        model = settings.pop("model", None)
        settings = {k: v for k, v in settings.items() if v is not None}
        job = await context.submit("jobs", client_of(request), settings, model)
        return JSONResponse(await context.describe(job), 202, {"Location": f"{prefix}/jobs/{job.id}"})

    @router.get("/jobs", summary="Jobs, the newest first", tags=["jobs"])
    async def list_jobs(state: str | None = None, limit: int = 50, before: str | None = None) -> JSONResponse:
        if before is not None and await context.db(context.queue.find, before) is None:
            fail(422, "before: there is no such job, any more: begin anew")
        states = STATES if state is None else tuple(state.split(","))
        if not set(states) <= set(STATES):
            fail(422, f"state must be some of {', '.join(STATES)}, with commas between")
        _check_page(limit)
        jobs = await context.db(context.queue.list, states, limit + 1, before)
        more = jobs[limit - 1].id if len(jobs) > limit else None
        return JSONResponse({"jobs": [await context.describe(job) for job in jobs[:limit]], "next": more})

    @router.get("/jobs/{id}", summary="A job, at once or when it has ended", tags=["jobs"])
    async def get_job(id: str, wait: float = 0.0) -> JSONResponse:
        if not 0 <= wait <= WAIT:
            fail(422, f"wait must be a number of seconds from 0 to {WAIT:g}")
        if wait:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    async for _ in context.watch(id):
                        pass
        job = await context.db(context.queue.find, id)
        return JSONResponse(await context.describe(job or fail(404, "there is no such job")))

    @router.delete("/jobs/{id}", summary="Cancel a job", tags=["jobs"])
    async def cancel(id: str) -> JSONResponse:
        return JSONResponse(await context.describe(await context.cancel(id)))

    @router.get("/jobs/{id}/events", summary="Follow a job: server-sent events", tags=["jobs"])
    async def events(id: str) -> EventStream:
        if await context.db(context.queue.find, id) is None:
            fail(404, "there is no such job")
        return EventStream(_named(context.watch(id, previews=True)))

    # ── pictures ─────────────────────────────────────────────────────────────────────────────────────

    @router.get("/pictures", summary="The gallery, the newest first", tags=["pictures"])
    async def list_pictures(
        q: str = "", model: str | None = None, limit: int = 50, before: str | None = None
    ) -> JSONResponse:
        _check_page(limit)
        found, total = await asyncio.to_thread(context.gallery.search, q[:1000], model, limit + 1, before)
        more = found[limit - 1].id if len(found) > limit else None
        return JSONResponse({"pictures": [e.to_json(prefix) for e in found[:limit]], "total": total, "next": more})

    @router.get("/pictures/{id}.png", summary="A picture's file", tags=["pictures"])
    async def picture_file(id: str, scale: int | None = None) -> Response:
        path = context.gallery.path(id) or fail(404, "there is no such picture")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        if scale is None:
            return FileResponse(path, media_type="image/png", headers=headers)
        if scale != 1:
            fail(422, "scale can only be 1: the picture at its own size")
        data = await asyncio.to_thread(lambda: Picture.open(path).encode())
        return Response(data, media_type="image/png", headers=headers)

    @router.get("/pictures/{id}", summary="What is known of a picture", tags=["pictures"])
    async def picture(id: str) -> JSONResponse:
        entry = await asyncio.to_thread(context.gallery.get, id)
        return JSONResponse((entry or fail(404, "there is no such picture")).to_json(prefix))

    @router.delete("/pictures/{id}", status_code=204, summary="Delete a picture", tags=["pictures"])
    async def delete_picture(id: str) -> Response:
        if not await asyncio.to_thread(context.gallery.delete, id):
            fail(404, "there is no such picture")
        return Response(status_code=204)

    @router.post(
        "/pictures/info", summary="Read the request inside a PNG", tags=["pictures"], openapi_extra=body_of(*PICTURES)
    )
    async def info(request: Request) -> JSONResponse:
        from sfumato.server.metadata import describe_png

        data = await read_picture(request)
        return JSONResponse(await asyncio.to_thread(describe_png, data))

    @router.post(
        "/uploads",
        status_code=201,
        summary="Send a picture to start from",
        tags=["pictures"],
        openapi_extra=body_of(*PICTURES),
    )
    async def upload(request: Request) -> JSONResponse:
        data = await read_picture(request)
        return JSONResponse(await asyncio.to_thread(context.uploads.receive, data), 201)

    @router.get("/uploads/{id}.png", summary="A picture that was sent", tags=["pictures"])
    async def upload_file(id: str) -> FileResponse:
        path = context.uploads.path(id) or fail(404, "there is no such upload")
        return FileResponse(path, media_type="image/png")

    # ── what there is ────────────────────────────────────────────────────────────────────────────────

    @router.get("/models", summary="Models, the default first", tags=["what there is"])
    async def models() -> JSONResponse:
        known = [context.models[name] for name in context.sources if name in context.models]
        return JSONResponse({"models": [model_json(m, m.name == context.default_model) for m in known]})

    @router.get("/samplers", summary="Samplers, spacings, guidance", tags=["what there is"])
    async def samplers() -> JSONResponse:
        from sfumato.pipeline.menu import menu

        return JSONResponse(menu())

    @router.get("/limits", summary="What one request may ask for at most", tags=["what there is"])
    async def limits() -> JSONResponse:
        return JSONResponse({**vars(context.settings.limits), "upload_bytes": UPLOAD_BYTES, "json_bytes": JSON_BYTES})

    @router.get("/livez", summary="Whether the server is alive", tags=["operations"])
    async def livez() -> JSONResponse:
        return JSONResponse({"live": True})

    @router.get("/readyz", summary="Whether pictures can be made", tags=["operations"])
    async def readyz() -> JSONResponse:
        reason = context.ready
        return JSONResponse({"ready": reason is None, **({"reason": reason} if reason else {})}, 503 if reason else 200)

    return router


async def _named(events: AsyncGenerator[tuple[str, dict[str, Any]], None]) -> AsyncGenerator[str, None]:
    try:
        async for event, data in events:
            yield f"event: {event}\ndata: {json.dumps(data)}\n\n" if event else ""
    finally:
        await events.aclose()


async def _known(request: Request) -> None:
    """Refuse parameters of a query that would be ignored."""
    known = [p.alias for p in request.scope["route"].dependant.query_params]
    for name, values in groupby(sorted(name for name, _ in request.query_params.multi_items())):
        if name not in known:
            fail(422, f"unknown parameter {name[:40]!r}{nearest(name[:40], known)}")
        if len(list(values)) > 1:
            fail(422, f"{name} is given more than once; one is taken")


def _check_page(limit: int) -> None:
    if not 1 <= limit <= PAGE:
        fail(422, f"limit must be a whole number from 1 to {PAGE}")
