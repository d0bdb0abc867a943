"""One client's connection: uvicorn's protocol, with an end to clients that neither send nor take."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sfumato.server.answers import error_response
from sfumato.server.errors import ApiError
from sfumato.server.logs import log


class Connection(H11Protocol):
    """A connection that is let go when its client stalls for ``timeout_keep_alive`` seconds.

    uvicorn itself waits without end for a client that does not read its answer, or does not end its headers: each would
    keep a socket, and what was written to it, for as long as it likes.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._head: asyncio.TimerHandle | None = None  # while headers are awaited
        self._look: asyncio.TimerHandle | None = None  # while the client takes nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first headers."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.timeout_keep_alive, self._let_go, "sends no headers")

    def data_received(self, data: bytes) -> None:
        """Wait on for the headers of the next request if it has begun, and no longer if they are there."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = _over(self._head)
        elif self._head is None and self.conn.trailing_data[0]:
            self._head = self.loop.call_later(self.timeout_keep_alive, self._let_go, "sends no headers")

    def pause_writing(self) -> None:
        """Begin to look whether the client takes any of what is written."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """All is well again."""
        self._look = _over(self._look)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no longer."""
        self._head, self._look = _over(self._head), _over(self._look)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the API's own form."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way
            self.transport.close()
            return
        path = self.scope["path"] if self.conn.our_state is h11.SEND_RESPONSE else ""
        answer = error_response(path, ApiError(400, "this is not HTTP, or its headers are too long"))
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._look = self.loop.call_later(self.timeout_keep_alive, self._compare, left)

    def _compare(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self._let_go("takes no answer")

    def _let_go(self, why: str) -> None:
        log(f"a client that {why} is let go", seconds=self.timeout_keep_alive)
        self.transport.abort()


def _over(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
