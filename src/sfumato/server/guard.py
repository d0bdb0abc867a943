"""What stands before every route: request ids, who may ask, from where, and how much; one log line per request."""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.answers import error_response
from sfumato.server.errors import ApiError
from sfumato.server.logs import log, request_id
from sfumato.server.settings import HEADER_BYTES, JSON_BYTES, JSON_PICTURE_BYTES, UPLOAD_BYTES, Settings, is_loopback

OPEN = {"/livez", "/readyz"}  # without a token
SAFE = {"GET", "HEAD", "OPTIONS"}
JSON_WITH_PICTURES = {"/sdapi/v1/img2img", "/sdapi/v1/png-info"}
ID = re.compile(r"[A-Za-z0-9-]{1,64}")
DISCARD_SECONDS = 1.0
FORM_OVERHEAD = 64 << 10  # bytes of a multipart body beside the upload

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware; answers for the app where a request is refused.

    Args:
        seen: (route, method, status, seconds) of every answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings, seen: Callable[[str, str, int, float], None]) -> None:
        self._app, self._settings, self._seen = app, settings, seen
        self._names = settings.names
        self._origins = {url.lower() for url in (*settings.origins, settings.public_origin) if url}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        scope = _without(self._settings.prefix, scope)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(id)
        began, status, started, ended = time.perf_counter(), 500, False, False

        async def answer(message: Message) -> None:
            nonlocal status, started, ended
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                if status == 413:
                    await _discard(receive)
                out = MutableHeaders(scope=message)
                out["x-request-id"] = id
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                out.setdefault("cache-control", "no-store")
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, _limited(receive, self._limit(scope, headers)), answer)
        except Exception as e:
            if ended:  # the answer to an unexpected error, which was logged with it
                return
            if started:
                raise
            await error_response(scope["path"], e)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in (*SAFE, "POST", "DELETE") else "other"
            self._seen(route, method, status, seconds)
            log("request", method=method, route=route, status=status, ms=round(1000 * seconds, 1))
            request_id.reset(token)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Who asks, by which name, and from which page; raises ApiError."""
        if sum(len(name) + len(value) for name, value in headers.raw) > HEADER_BYTES:
            raise ApiError(431, f"the headers have more than {HEADER_BYTES} bytes")
        host = self._host(headers)
        if scope["path"] not in OPEN and not self._authorized(headers):
            raise ApiError(401, "a token is needed, as `Authorization: Bearer TOKEN` or as a Basic password")
        if scope["method"] in SAFE:
            return
        origin = headers.get("origin")
        friend = (origin or "").lower() in self._origins
        if not friend and origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "a page of another origin may not change anything here")
        if not friend and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise ApiError(403, "a page of another site may not change anything here")
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            kind = media_type(headers)
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(415, "the body must be sent as it is, without a Content-Encoding")
            if kind not in ("application/json", "multipart/form-data") and not kind.startswith("image/"):
                raise ApiError(415, "the body must be application/json, multipart/form-data or a picture")

    def _host(self, headers: Headers) -> str:
        given = headers.getlist("host")
        if len(given) != 1:
            raise ApiError(400, "exactly one Host header is needed")
        host = given[0].lower()
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in self._names and not (not is_loopback(self._settings.host) and _is_address(name)):
            raise ApiError(421, "this server does not answer under that name; --allow-host adds one")
        return host

    def _authorized(self, headers: Headers) -> bool:
        token = self._settings.token
        if not token:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode(), token.encode())

    def _limit(self, scope: Scope, headers: Headers) -> int:
        """How many bytes a body may have; raises ApiError if it announces more."""
        kind = media_type(headers)
        if kind == "application/json":
            limit = JSON_PICTURE_BYTES if scope["path"] in JSON_WITH_PICTURES else JSON_BYTES
        else:
            limit = UPLOAD_BYTES + (FORM_OVERHEAD if kind == "multipart/form-data" else 0)
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
            raise ApiError(413, f"the body has {announced} bytes; at most {limit} are taken")
        return limit


def _without(prefix: str, scope: Scope) -> Scope:
    """A request as if it came without the path that stands before every route; some proxies leave it out themselves."""
    path, raw = scope["path"], scope.get("raw_path") or b""
    if not prefix or not path.startswith(f"{prefix}/"):
        return scope
    raw = raw[len(prefix) :] if raw.startswith(prefix.encode() + b"/") else b""
    return {**scope, "path": path[len(prefix) :], "raw_path": raw}


def media_type(headers: Headers) -> str:
    """A body's type without its parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _limited(receive: Receive, limit: int) -> Receive:
    """Count a body's bytes as they come; raises ApiError beyond the limit."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > limit:
                raise ApiError(413, f"the body has more than {limit} bytes")
        return message

    return counted


async def _discard(receive: Receive) -> None:
    """Let some of a body that is not wanted pass, for clients that only read an answer when they have sent it."""
    left = 2 * UPLOAD_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0 and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                left -= len(message.get("body", b""))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
