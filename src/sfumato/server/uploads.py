"""Pictures that clients send: checked before they are decoded, kept under the hash of their file, within bounds."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.decode import PictureError, decode_still
from sfumato.errors import BadData
from sfumato.files import write_atomically
from sfumato.server.errors import fail
from sfumato.server.gallery import NAME

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 24
PICTURES = tuple((f"image/{f.lower()}", {"type": "string", "format": "binary"}) for f in FORMATS)


def open_picture(data: bytes, what: str = "") -> Image.Image:
    """Decode a picture, upright, as RGB or RGBA; raises BadData for what is damaged, foreign, animated or a bomb.

    Args:
        what: the setting's name, for errors.
    """
    try:
        return decode_still(data, FORMATS, MAX_PIXELS)
    except PictureError as e:
        raise BadData(f"{what and what + ': '}not a whole PNG, JPEG or WebP picture: {e}") from None


class Uploads:
    """A folder of pictures; threads, and servers that share it, may use it at once.

    Args:
        most: bytes that are kept at most. What was not used for longest makes room; what a job still needs stays.
        needed: → ids that jobs still need; asked only when there is too much.
    """

    def __init__(self, folder: Path, most: int, needed: Callable[[], set[str]]) -> None:
        self._folder, self._most, self._needed = folder, most, needed
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, id: Any) -> Path | None:
        """The file of a picture, if there is one."""
        path = self._folder / f"{id}.png"
        return path if isinstance(id, str) and NAME.fullmatch(id) and path.is_file() else None

    def read(self, id: str) -> bytes:
        """The bytes of a picture, which is then the last to make room; raises FileNotFoundError."""
        path = self.path(id)
        if path is None:
            raise FileNotFoundError(id)
        with suppress(OSError):
            os.utime(path)
        return path.read_bytes()

    def receive(self, data: bytes) -> dict[str, Any]:
        """Keep a picture and return its id and size; raises as ``keep``."""
        image = open_picture(data)
        return {"id": self._keep(image), "width": image.width, "height": image.height}

    def keep(self, data: bytes, what: str = "") -> str:
        """Keep a picture as plain RGB or RGBA and return its id; raises BadData, NoResources, ApiError when full."""
        return self._keep(open_picture(data, what))

    def keep_as_it_is(self, id: str, data: bytes) -> None:
        """Keep a picture's own bytes under their hash; raises as ``keep``."""
        if self.path(id) is None:
            open_picture(data)  # what is no picture is not kept
            self._write(id, data)

    def _keep(self, image: Image.Image) -> str:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=3)
        data = file.getvalue()
        id = hashlib.sha256(data).hexdigest()
        if (path := self.path(id)) is None:
            self._write(id, data)
        else:
            with suppress(OSError):
                os.utime(path)
        return id

    def _write(self, id: str, data: bytes) -> None:
        with self._lock:
            self._make_room(len(data))
            write_atomically(self._folder / f"{id}.png", data)

    def _make_room(self, bytes: int) -> None:
        """Remove the pictures that were not used for longest until so many bytes more fit."""
        kept: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as files:
            for file in files:
                with suppress(FileNotFoundError):  # removed by another server meanwhile
                    stat = file.stat(follow_symlinks=False)
                    kept.append((stat.st_mtime_ns, stat.st_size, file.path))
        over = sum(size for _, size, _ in kept) + bytes - self._most
        needed = self._needed() if over > 0 else set()
        for _, size, path in sorted(kept):
            if over <= 0:
                return
            if Path(path).stem not in needed:
                Path(path).unlink(missing_ok=True)
                over -= size
        if over > 0:
            fail(507, "too many pictures wait for their jobs: send this one again later", retry_after=30)
