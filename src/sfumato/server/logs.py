"""Logs as lines of JSON: when, how grave, what, and the request's id. No prompt and no token gets here."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Any

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
logger = logging.getLogger("sfumato.server")


class JsonLines(logging.Formatter):
    """One record, one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record; of an exception its kind and place, not its words."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            import traceback

            line["error"] = record.exc_info[0].__name__
            line["where"] = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(record.exc_info[2])[-8:]]
        return json.dumps(line)


def set_up(level: str = "INFO") -> None:
    """Send all logs and warnings of this process, libraries' too, to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("sfumato", "uvicorn", "uvicorn.error", "py.warnings"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = ([handler] if name != "uvicorn.error" else []), name == "uvicorn.error"
        log.setLevel(level if name == "sfumato" else logging.WARNING)
    logging.captureWarnings(True)
    others = logging.StreamHandler(sys.stderr)  # whoever has no handler
    others.setFormatter(JsonLines())
    others.setLevel(logging.WARNING)
    logging.lastResort = others
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it quotes bodies; the answer's 400 says enough


def log(message: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log a line with facts of its own."""
    logger.log(level, message, extra={"facts": facts})
