"""Pictures that a request starts from: by the id of an upload or of the gallery, or inline; kept by their hash.

A job's request names its pictures by their SHA-256, under which their bytes lie among the uploads. So a picture of the
gallery can be made again from the request inside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from PIL import Image

from sfumato.errors import BadData
from sfumato.files import write_atomically
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.request import Request
from sfumato.server.errors import fail
from sfumato.server.gallery import NAME, Gallery
from sfumato.server.settings import Settings


def picture_fields() -> list[str]:
    """The fields of a request that hold a picture."""
    hints = get_type_hints(Request)
    return [f.name for f in fields(Request) if "PictureFile" in str(hints[f.name])]


def take_pictures(settings: Settings, gallery: Gallery, given: dict[str, Any]) -> dict[str, Any]:
    """Settings whose pictures are at hand, and kept; raises ApiError, BadRequest for one that is not there."""
    taken = dict(given)
    for name in picture_fields():
        if (value := given.get(name)) is not None:
            taken[name] = _take(settings, gallery, name, value)
    return taken


def _take(settings: Settings, gallery: Gallery, name: str, value: Any) -> PictureFile:
    if isinstance(value, str) and NAME.fullmatch(value):
        return PictureFile.from_bytes(name, _by_id(settings, gallery, name, value), f"{value[:12]}.png")
    picture = PictureFile.of(name, value)
    path = settings.uploads / f"{picture.sha256}.png"
    if picture.data is None:
        if not path.is_file():
            fail(422, f"{name} is not here any more: send it again")
        return picture.with_data(name, PictureFile.from_bytes(name, path.read_bytes()))
    if not path.is_file():
        picture.image(name)  # what is no picture is not kept
        write_atomically(path, picture.data)
    return picture


def _by_id(settings: Settings, gallery: Gallery, name: str, id: str) -> bytes:
    """The bytes of an upload, or of a picture of the gallery at its own size, which becomes an upload."""
    from sfumato.server.uploads import keep

    if not (settings.uploads / f"{id}.png").is_file():
        path = gallery.path(id) or fail(422, f"{name}: there is no upload and no picture of that id")
        file = io.BytesIO()
        try:
            image = Picture.open(path).image
        except BadData:  # put there by hand, perhaps
            image = Image.open(path, formats=["PNG"])
        image.save(file, "PNG")
        id = keep(settings, file.getvalue())
    return (settings.uploads / f"{id}.png").read_bytes()


def with_pictures(settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    """A job's request with its pictures' bytes, for the worker; raises FileNotFoundError if one is gone."""
    full = dict(request)
    for name in picture_fields():
        if isinstance(record := request.get(name), Mapping):
            data = (settings.uploads / f"{record['sha256']}.png").read_bytes()
            full[name] = {**record, "data": base64.b64encode(data).decode()}
    return full
