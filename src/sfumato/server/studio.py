"""Routes of the studio's page: looking inside pictures of the gallery, as lines of JSON while they are computed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from sfumato.errors import SfumatoError
from sfumato.pipeline.picture import read
from sfumato.pixels import digest
from sfumato.server.answers import as_api_error, read_json
from sfumato.server.context import Context
from sfumato.server.errors import ApiError, fail
from sfumato.server.following import EventStream
from sfumato.server.inputs import with_pictures

MAX_STEPS, MAX_LISTED = 100, 16  # of a comparison: steps of one run, entries of a list

FIELDS: dict[str, set[str]] = {  # what each may be asked beside the picture
    "path": set(),
    "guidance": {"weights"},
    "samplers": {"samplers", "steps"},
    "forward": {"upload"},
}


def routes(context: Context) -> APIRouter:
    """The page's routes."""
    router = APIRouter(prefix="/inside", tags=["look inside"])

    def add(kind: str, summary: str) -> None:
        @router.post(f"/{kind}", summary=summary, name=kind)
        async def inside(request: Request) -> EventStream:
            asked = await read_json(request)
            arguments, model = await asyncio.to_thread(_arguments, context, kind, asked)
            answers = context.compute(f"sfumato.inside.compute:{kind}", model, arguments)
            first = await anext(answers, None)  # what is refused is refused by its status
            return EventStream(_lines(first, answers), "application/x-ndjson")

    add("path", "A picture's way out of the noise, and where its words looked")
    add("guidance", "The same noise under other guidance scales")
    add("samplers", "The same noise by other samplers, and their distance to the converged solution")
    add("forward", "The noise schedule, and a picture on its way into the noise")
    return router


async def _lines(first: Any, answers: AsyncGenerator[tuple[dict[str, Any], bytes], None]) -> AsyncGenerator[str, None]:
    try:
        if first is not None:
            yield json.dumps(first[0]) + "\n"
        async for answer, _ in answers:
            yield json.dumps(answer) + "\n"
    except (ApiError, SfumatoError) as e:  # too late for a status
        told = as_api_error(e)
        yield json.dumps({"kind": "error", "code": told.code, "message": told.message}) + "\n"
    finally:
        await answers.aclose()


def _arguments(context: Context, kind: str, asked: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Read and check what a route was asked: arguments for the worker, and the model; raises ApiError."""
    id = asked.get("picture")
    for name in asked:
        if name not in FIELDS[kind] | {"picture"}:
            fail(422, f"unknown field {name[:40]!r}")
    path = context.gallery.path(id) if isinstance(id, str) else None
    entry = None if path is None else context.gallery.get(str(id))
    if path is None or entry is None:
        fail(404, "there is no such picture")
    facts = next((m for m in context.models.values() if m.hash == entry.model["hash"]), None)
    if facts is None:
        context.facts(None)  # which tells of models that are still being loaded
        fail(409, f"the picture was made by model {entry.model['name'][:60]!r}, whose weights are not served here")
    arguments: dict[str, Any] = {"request": _request(context, entry.request)}
    if kind == "path":
        arguments["pixels"] = _digest(path)
    if kind == "forward":
        arguments["source"] = base64.b64encode(_source(context, path, asked.get("upload"))).decode()
    if kind == "guidance":
        arguments["weights"] = _numbers("weights", asked.get("weights"), 0, 100)
    if kind == "samplers":
        steps = _numbers("steps", asked.get("steps"), 1, MAX_STEPS) or []
        if any(k % 1 for k in steps):
            fail(422, "steps must be whole numbers")
        arguments["steps"] = [int(k) for k in steps]
        arguments["samplers"] = _names(asked.get("samplers"))
    return arguments, facts.name


def _request(context: Context, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored request as it can be made again, with the pictures that it started from, which uploads keep by hash."""
    try:
        return with_pictures(context.uploads, {k: v for k, v in stored.items() if v is not None})
    except FileNotFoundError:
        fail(409, "the picture that this one started from is not here any more")


def _digest(path: Path) -> str:
    return digest(read(path).picture.pixels)


def _source(context: Context, picture: Path, upload: Any) -> bytes:
    """The picture to be noised as a PNG: an upload, or the one that is looked at, at its own size."""
    if upload is None:
        return read(picture).picture.encode()
    return (context.uploads.path(upload) or fail(404, "there is no such upload")).read_bytes()


def _numbers(what: str, values: Any, low: float, high: float) -> list[float] | None:
    if values is None:
        return None
    fits = isinstance(values, list) and 0 < len(values) <= MAX_LISTED
    if not fits or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high for v in values
    ):
        fail(422, f"{what} must be a list of at most {MAX_LISTED} numbers from {low:g} to {high:g}")
    return values


def _names(values: Any) -> list[str] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not 0 < len(values) <= MAX_LISTED or not all(isinstance(v, str) for v in values):
        fail(422, f"samplers must be a list of at most {MAX_LISTED} names")
    return values
