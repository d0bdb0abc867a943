"""The gallery: a folder of PNG files that carry their requests. The files are the truth, the rest an index."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.errors import BadData, BadRequest, SfumatoError
from sfumato.files import write_atomically
from sfumato.pipeline.picture import read_warnings
from sfumato.pipeline.request import Request

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
MAX_TEXT = 1 << 20  # bytes of a file's text chunks
UNREADABLE = (
    SfumatoError,
    ArithmeticError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    RecursionError,
    Image.DecompressionBombError,
)  # what a file that is no picture of ours may raise


@dataclass(frozen=True)
class Entry:
    """What is known of a picture from its file's head."""

    id: str
    bytes: int
    modified: int  # nanoseconds
    width: int
    height: int
    scale: int
    request: dict[str, Any]
    model: dict[str, str]
    made_with: dict[str, Any]
    warnings: list[str]
    words: str  # in which is searched

    def to_json(self, prefix: str) -> dict[str, Any]:
        """The picture as the API gives it, whose routes begin with a prefix."""
        return {
            "id": self.id,
            "url": f"{prefix}/pictures/{self.id}.png",
            "created": iso(self.modified / 1e9),
            "bytes": self.bytes,
            "width": self.width,
            "height": self.height,
            "scale": self.scale,
            "request": self.request,
            "model": self.model,
            "made_with": self.made_with,
            "warnings": self.warnings,
        }


class Gallery:
    """Pictures of a folder; threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, Entry] = {}
        self._foreign: dict[str, tuple[int, int]] = {}  # files that are no pictures of ours
        self._lock = threading.Lock()

    def path(self, id: str) -> Path | None:
        """The file of a picture, if there is one."""
        path = self._folder / f"{id}.png"
        return path if NAME.fullmatch(id) and path.is_file() else None

    def save(self, id: str, data: bytes) -> None:
        """Write a picture whole or not at all; the same id again replaces it."""
        write_atomically(self._folder / f"{id}.png", data)

    def delete(self, id: str) -> bool:
        """Remove a picture; tells whether there was one."""
        path = self.path(id)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def get(self, id: str) -> Entry | None:
        """One picture."""
        path = self.path(id)
        if path is None:
            return None
        stat = path.stat()
        with self._lock:
            return self._entry(path, stat)

    def search(
        self, words: str = "", model: str | None = None, limit: int = 50, before: str | None = None
    ) -> tuple[list[Entry], int]:
        """The newest pictures in which every word occurs, older than another if wanted; and how many in all.

        Raises BadRequest where that other one is not among them.
        """
        wanted = words.lower().split()
        with self._lock:
            found = [
                e
                for e in sorted(self._scan(), key=lambda e: (e.modified, e.id), reverse=True)
                if all(w in e.words for w in wanted) and model in (None, e.model["name"], Path(e.model["name"]).stem)
            ]
        total = len(found)
        if before is not None:
            places = [i for i, e in enumerate(found) if e.id == before]
            if not places:
                raise BadRequest("before: there is no such picture among these, any more: begin anew", "before")
            found = found[places[0] + 1 :]
        return found[:limit], total

    def _scan(self) -> Iterator[Entry]:
        """Every picture in the folder; only files that are new or changed are opened."""
        seen: set[str] = set()
        with os.scandir(self._folder) as files:
            for file in files:
                id, ending = os.path.splitext(file.name)
                if ending != ".png" or not NAME.fullmatch(id) or not file.is_file():
                    continue
                try:
                    entry = self._entry(Path(file.path), file.stat(follow_symlinks=False))
                except FileNotFoundError:  # deleted meanwhile
                    continue
                seen.add(id)
                if entry is not None:
                    yield entry
        for gone in [id for id in self._entries if id not in seen]:
            del self._entries[gone]
        for gone in [id for id in self._foreign if id not in seen]:
            del self._foreign[gone]

    def _entry(self, path: Path, stat: os.stat_result) -> Entry | None:
        id, now = path.stem, (stat.st_mtime_ns, stat.st_size)
        known = self._entries.get(id)
        if known is not None and (known.modified, known.bytes) == now:
            return known
        if self._foreign.get(id) == now:
            return None
        try:
            entry = self._entries[id] = _read_head(path, stat)
        except UNREADABLE:
            self._foreign[id] = now
            return None
        return entry


def _read_head(path: Path, stat: os.stat_result) -> Entry:
    """Read the text before a PNG's pixels, and no pixels; BadData for what is no picture of ours."""
    with Image.open(path, formats=["PNG"]) as image:  # reads chunks up to the first of pixels
        text: Any = image.info.get("sfumato", "")
        width, height = image.size
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
        raise BadData(f"{path.name}: no request inside")
    record = json.loads(text)
    request = Request.from_dict(record["request"])
    name, hash = str(record["model"]["name"]), str(record["model"]["hash"])
    scale = int(record["scale"])
    words = " ".join(str(w) for w in (request.prompt, request.negative, request.sampler, request.seed, name)).lower()
    return Entry(
        path.stem, stat.st_size, stat.st_mtime_ns, width // scale, height // scale, scale, request.to_dict(),
        {"name": name, "hash": hash}, dict(record.get("made_with", {})), list(read_warnings(record)), words,
    )  # fmt: skip


def iso(seconds: float | None) -> str | None:
    """A time as RFC 3339 has it."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
