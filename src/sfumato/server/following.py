"""Answers that wait for a job: a client that goes away takes its job with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sfumato.server.context import Context
from sfumato.server.errors import ApiError, fail
from sfumato.server.queue import Job

T = TypeVar("T")

KEEP_ALIVE = 10.0  # seconds of silence before a comment is sent


class EventStream(Response):
    """Server-sent events, or other lines, as a generator makes them; it is closed at once when the client goes away.

    Args:
        parts: events as text; an empty one tells that nothing happened.
    """

    def __init__(self, parts: AsyncGenerator[str, None], media_type: str = "text/event-stream") -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        self._parts = parts
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone, last = asyncio.ensure_future(_gone(receive)), loop.time()
        try:
            while (part := await _unless(gone, anext(self._parts, None))) is not None:
                if part or loop.time() - last > KEEP_ALIVE:
                    last = loop.time()
                    body = (part or ": still here\n\n").encode()
                    await _unless(gone, send({"type": "http.response.body", "body": body, "more_body": True}))
            await send({"type": "http.response.body", "body": b""})
        except ClientDisconnect:
            pass
        finally:
            gone.cancel()
            await self._parts.aclose()


async def outcome(context: Context, request: Request, job: Job) -> Job:
    """Wait for a job's end; raises ApiError for one that failed. A client that goes away cancels it."""
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        ended = await _unless(gone, context.wait(job.id))
    except (ClientDisconnect, asyncio.CancelledError):
        with suppress(ApiError):
            await asyncio.shield(context.cancel(job.id))
        raise
    finally:
        gone.cancel()
    return succeeded(ended)


def succeeded(job: Job) -> Job:
    """A job that is done or was cancelled; raises ApiError for others."""
    if job.state == "failed":
        error = job.error or {"code": "internal", "message": "it failed"}
        status = {"bad_request": 422, "bad_data": 422, "no_space": 507, "no_resources": 503}.get(error["code"], 500)
        fail(status, error["message"], error["code"])
    if not job.ended:
        fail(503, f"the server is shutting down; job {job.id} is kept and will be done later", retry_after=30)
    return job


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future[None], work: Awaitable[T]) -> T:
    """Do some work, or raise ClientDisconnect as soon as the client is gone."""
    doing: asyncio.Future[Any] = asyncio.ensure_future(work)
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        if not doing.done():
            doing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await doing
