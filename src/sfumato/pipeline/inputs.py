"""Pictures that a request starts from: how they travel, and how they come to the size of the picture to be made.

A request knows a picture by its bytes' SHA-256, so that requests can be compared, hashed and kept in a PNG of
ordinary size. The bytes go along in memory, and in JSON that asks for them; a PNG keeps only the hash and the name,
since a picture that is passed on should not carry somebody's photograph inside.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadRequest

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 32 << 20
MAX_NAME = 4096  # characters; a path's, as systems have it


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture, equal to another if their bytes are.

    Args:
        sha256: of the bytes, in hexadecimal.
        name: the file's name, to be found again by; a path only if it leads down from the working folder.
        data: the bytes; None where only a record of the picture was read, until ``with_data`` brings them.
    """

    sha256: str
    name: str = field(default="", compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, what: str, value: Any) -> PictureFile:
        """Take a picture in any of the forms that a caller may have.

        Args:
            what: the setting's name, for errors.
            value: a PictureFile, bytes, a ``pathlib.Path``, a Pillow image; or what JSON has: base64 text, a data URL,
                or ``{"sha256", "name", "data"}`` with or without the data. JSON never names a path to be opened.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, os.PathLike):
            return cls.open(what, value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return cls.from_bytes(what, bytes(value))
        if isinstance(value, str):
            return cls.from_bytes(what, _base64(what, value))
        if isinstance(value, Mapping):
            return _from_record(what, value)
        if hasattr(value, "save") and hasattr(value, "getexif"):  # Pillow's, which is not imported for it
            return cls.from_bytes(what, _png(what, value))
        raise BadRequest(f"{what} must be a picture: bytes, base64 text, a Pillow image or a pathlib.Path", what)

    @classmethod
    def from_bytes(cls, what: str, data: bytes, name: str = "") -> PictureFile:
        """Take the bytes of an encoded picture."""
        if not data:
            raise BadRequest(f"{_called(what, name)} is empty", what)
        if len(data) > MAX_BYTES:
            raise BadRequest(f"{_called(what, name)} is larger than {MAX_BYTES >> 20} MiB: save it smaller", what)
        return cls(hashlib.sha256(data).hexdigest(), name, data)

    @classmethod
    def open(cls, what: str, path: str | os.PathLike[str]) -> PictureFile:
        """Read a picture's file; BadRequest if there is none."""
        path = Path(path)
        try:
            if not path.is_file():
                kind = "a folder, not a picture" if path.is_dir() else "no such file"
                raise BadRequest(f"{what} {path}: {kind}", what)
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except BadRequest:  # which is a ValueError
            raise
        except (OSError, ValueError) as e:
            raise BadRequest(f"{what} {path}: {getattr(e, 'strerror', None) or e}", what) from None
        local = not path.is_absolute() and ".." not in path.parts
        name = path.as_posix() if local and len(path.as_posix()) <= MAX_NAME else path.name
        return cls.from_bytes(what, data, "".join("?" if _unnamable(c) else c for c in name))

    def to_json(self, data: bool) -> dict[str, str]:
        """A record of the picture, with its bytes as base64 if asked for; ``of`` is the way back."""
        record = {"sha256": self.sha256, "name": self.name}
        if data and self.data is not None:
            record["data"] = base64.b64encode(self.data).decode()
        return record

    def with_data(self, what: str, found: PictureFile) -> PictureFile:
        """This picture with the bytes of one that was found; BadRequest if they are other bytes."""
        if found.sha256 != self.sha256:
            raise BadRequest(
                f"{_called(what, found.name)} is not the picture that was used: its SHA-256 is {found.sha256[:12]}…, "
                f"that of {self.name or 'the one used'} was {self.sha256[:12]}…; it was changed, or is another",
                what,
            )
        return replace(self, data=found.data)

    def image(self, what: str, background: str = "white") -> Image.Image:
        """The picture as upright RGB on a background; BadRequest with the reason if it is none, or not at hand."""
        return self._decoded(what, background)[0]

    def told(self, what: str, background: str = "white") -> tuple[str, ...]:
        """What was done to make it upright RGB."""
        return self._decoded(what, background)[1]

    def _decoded(self, what: str, background: str) -> tuple[Image.Image, tuple[str, ...]]:
        from sfumato.decode import PictureError, decode_and_tell

        if background not in self._on:
            try:
                if self.data is None:
                    raise PictureError(f"not at hand (SHA-256 {self.sha256[:12]}…): say where the file is")
                self._on[background] = decode_and_tell(self.data, background)
            except PictureError as e:
                raise BadRequest(f"{_called(what, self.name)}: {e}", what) from None
        return self._on[background]

    @cached_property
    def _on(self) -> dict[str, tuple[Image.Image, tuple[str, ...]]]:
        return {}  # by the background


_IN_PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # modes


def _png(what: str, image: Any) -> bytes:
    """A Pillow image as PNG with its orientation."""
    file = io.BytesIO()
    try:
        exif = image.getexif()
        if image.mode not in _IN_PNG:
            image = image.convert({"La": "LA", "RGBa": "RGBA", "I": "I;16"}.get(image.mode, "RGB"))
        image.save(file, "PNG", **({"exif": exif} if len(exif) else {}))
    except (OSError, ValueError, SyntaxError) as e:
        raise BadRequest(f"{what} is a Pillow image that cannot be read: {e}", what) from None
    return file.getvalue()


def _unnamable(c: str) -> bool:
    """Whether a character cannot be kept in a file's name: controls, and halves of characters."""
    return unicodedata.category(c) in ("Cc", "Cs")


def _from_record(what: str, record: Mapping[str, Any]) -> PictureFile:
    sha256, name, data = record.get("sha256"), record.get("name", ""), record.get("data")
    if not set(record) <= {"sha256", "name", "data"} or not (
        isinstance(name, str) and len(name) <= MAX_NAME and not any(map(_unnamable, name))
    ):
        raise BadRequest(f"{what} must have sha256, name and data as text, and nothing else", what)
    if data is not None:
        found = PictureFile.from_bytes(what, _base64(what, data), name)
        return found if sha256 is None else PictureFile(str(sha256), name).with_data(what, found)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise BadRequest(f"{what} must have its SHA-256 in 64 hexadecimal digits, or its data", what)
    return PictureFile(sha256, name)


def _base64(what: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise BadRequest(f"{what}'s data must be base64 text", what)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRequest(f"{what} must be a data URL in base64", what)
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadRequest(f"{what} is larger than {MAX_BYTES >> 20} MiB: save it smaller", what)
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # in lines, as many programs write it
    except (binascii.Error, ValueError):
        raise BadRequest(
            f"{what} is text that is no base64; in Python, give bytes, a Pillow image or a pathlib.Path", what
        ) from None


def _called(what: str, name: str) -> str:
    return f"{what} {PurePath(name).name}" if name else what
