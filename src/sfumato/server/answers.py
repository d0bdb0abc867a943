"""Bodies in and errors out, for every dialect."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
from typing import Any, NoReturn

from sqlalchemy.exc import DatabaseError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sfumato.errors import BadData, BadRequest, NoResources, SfumatoError, TooLarge
from sfumato.server.errors import ApiError, fail
from sfumato.server.logs import logger, request_id
from sfumato.server.queue import reason_of
from sfumato.server.settings import JSON_BYTES, NESTING

FILES, FIELDS = 4, 64  # of a form
BODY_SECONDS = 60.0  # for a body to arrive
# Strings, one without an end up to the text's (else each of its quotes would be tried anew), and brackets between.
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


async def read_body(request: Request) -> bytes:
    """The body of a request, which the guard keeps within bounds; raises ApiError if it comes too slowly."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        fail(408, "the body did not arrive in time", "bad_request")


async def read_picture(request: Request) -> bytes:
    """The body as a picture's file; raises ApiError for what is sent as anything else."""
    if not request.headers.get("content-type", "").strip().lower().startswith("image/"):
        fail(415, "the body must be the picture's file itself, as image/png, image/jpeg or image/webp")
    return await read_body(request)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; raises ApiError for what is none, too deep, or holds numbers that JSON has not."""
    body = await read_body(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        fail(415, "the body must be application/json")
    try:
        text = body.decode()
        if not check_nesting(text):
            fail(400, f"the body's JSON is nested more than {NESTING} deep")
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        fail(400, "the body is not valid JSON in UTF-8")
    if not isinstance(value, dict):
        fail(422, "the body must be a JSON object")
    if "\\ud" in text.lower():  # half of a pair, which no answer could repeat
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            fail(422, "the body holds half a character, a lone surrogate")
    return value


async def read_form(request: Request) -> dict[str, Any]:
    """The fields of a form, files as ``UploadFile``; raises ApiError for what is none."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        fail(415, "the body must be multipart/form-data")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            form = await request.form(max_files=FILES, max_fields=FIELDS, max_part_size=JSON_BYTES)
    except TimeoutError:
        fail(408, "the body did not arrive in time", "bad_request")
    except (MultiPartException, HTTPException, ValueError, KeyError):
        fail(400, "the body is no whole form")
    if len(form.multi_items()) > len(form):
        twice = next(name for name in form if len(form.getlist(name)) > 1)
        fail(422, f"{twice[:60]!r} is given more than once; one is taken")
    return dict(form)


def check_nesting(text: str) -> bool:
    """Whether brackets outside of strings nest no deeper than the limit."""
    depth = 0
    for match in TOKEN.finditer(text):
        if (c := match[0]) in "[{":
            depth += 1
            if depth > NESTING:
                return False
        elif c in "]}":
            depth -= 1
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            fail(422, f"{name[:60]!r} is given more than once; one is taken")
        fields[name] = value
    return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def as_api_error(error: Exception) -> ApiError:
    """Any error as what the client is told of it; what is not the client's affair is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (BadRequest, BadData)):
        return ApiError(
            422,
            " ".join(str(error).split()),
            setting=getattr(error, "setting", None),
            too_large=isinstance(error, TooLarge),
        )
    if isinstance(error, HTTPException):
        allowed = (error.headers or {}).get("Allow", "")
        said = {404: "there is no such thing here", 405: f"this address takes only {allowed}"}
        return ApiError(error.status_code, said.get(error.status_code, error.detail))
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "the client went away")
    if _disk_is_full(error):
        return ApiError(507, "the server's disk is full", retry_after=30)
    if isinstance(error, DatabaseError):
        logger.error("database", extra={"facts": {"reason": reason_of(error)}})
        return ApiError(503, "the queue's database cannot be used at the moment", retry_after=5)
    if isinstance(error, SfumatoError):
        logger.error("no resources", exc_info=error)
        return ApiError(503, "the server lacks what this needs; its log says more", retry_after=10)
    logger.log(logging.ERROR, "unexpected", exc_info=error)
    return ApiError(500, "something unexpected happened; the server's log says what, under this request's id")


def _disk_is_full(error: Exception) -> bool:
    """Whether an error is that of a full disk, in our words, the system's or SQLite's."""
    cause = error.__cause__ if isinstance(error, NoResources) else error
    if isinstance(cause, DatabaseError):
        return "disk is full" in reason_of(cause)
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


OPENAI_CODES = {"bad_request": None, "unauthorized": "invalid_api_key", "busy": "rate_limit_exceeded"}


def openai_error(e: ApiError) -> tuple[int, dict[str, Any]]:
    """An error as OpenAI gives it: its status, and its body.

    What is wrong about a request is a 400 with them; 422 remains for what is right and more than is served.
    """
    status = 400 if e.status == 422 and not e.too_large else e.status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    code = OPENAI_CODES.get(e.code, e.code)
    if code is None and e.setting is not None:
        code = "invalid_value"
    return status, {"error": {"message": e.message, "type": kind, "param": e.setting, "code": code}}


def error_response(path: str, error: Exception) -> Response:
    """An error in the form of the dialect that a path belongs to."""
    e = as_api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}  # of a 405, what is allowed
    if e.retry_after is not None:
        headers["Retry-After"] = str(e.retry_after)
    if e.status == 413:  # the rest of the body is not waited for
        headers["Connection"] = "close"
    if e.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="sfumato", charset="UTF-8"'
    if path.startswith("/v1/"):
        status, body = openai_error(e)
        return JSONResponse(body, status, headers)
    if path.startswith("/sdapi/"):
        body: dict[str, Any] = {"error": e.code, "detail": e.message, "body": "", "errors": e.message}
    else:
        body = {"error": {"code": e.code, "message": e.message, "request_id": request_id.get()}}
    return JSONResponse(body, e.status, headers)
