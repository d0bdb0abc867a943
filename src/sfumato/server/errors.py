"""Errors as the API gives them: a status, a code that programs read, one line that people read."""

from __future__ import annotations

from typing import NoReturn

from sfumato.errors import BadCheckpoint, BadData, BadRequest, NoResources, SfumatoError

CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "bad_request",
    409: "conflict",
    413: "bad_request",
    415: "bad_request",
    421: "bad_request",
    422: "bad_request",
    429: "busy",
    431: "bad_request",
    503: "unavailable",
    507: "no_space",
}
KINDS: dict[str, type[SfumatoError]] = {
    "bad_request": BadRequest,
    "bad_checkpoint": BadCheckpoint,
    "bad_data": BadData,
    "no_resources": NoResources,
}


class ApiError(Exception):
    """An answer other than the wanted one.

    Args:
        retry_after: seconds after which it may be worth while to ask again.
        setting: the name of the setting that is wrong, where it is one.
        too_large: whether the request is right, and only more than is served.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        retry_after: int | None = None,
        setting: str | None = None,
        too_large: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.setting, self.too_large = setting, too_large
        self.code = code or CODES.get(status, "internal")


def fail(
    status: int, message: str, code: str | None = None, retry_after: int | None = None, setting: str | None = None
) -> NoReturn:
    """Raise an ApiError."""
    raise ApiError(status, message, code, retry_after, setting)


def code_of(error: Exception) -> str:
    """The code of an error that ended a job: its place in the tree of errors, or ``internal``."""
    if isinstance(error, MemoryError):
        return "no_resources"
    return next((code for code, kind in KINDS.items() if isinstance(error, kind)), "internal")
