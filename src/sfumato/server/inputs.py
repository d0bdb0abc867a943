"""Pictures that a request starts from: by the id of an upload or of the gallery, or inline; kept by their hash.

A job's request names its pictures by their SHA-256, under which their bytes lie among the uploads. So a picture of the
gallery can be made again from the request inside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from sfumato.errors import BadData, BadRequest
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.request import PICTURES, SEVERAL
from sfumato.server.errors import fail
from sfumato.server.gallery import NAME, Gallery
from sfumato.server.uploads import Uploads

BASE64 = ("iVBORw0KGgo", "UklGR")  # of a PNG or WebP so small that its text might be an id


def take_pictures(uploads: Uploads, gallery: Gallery, given: dict[str, Any]) -> dict[str, Any]:
    """Settings whose pictures are at hand, and kept; raises ApiError, BadRequest for one that is not there."""
    taken = dict(given)
    for name in PICTURES:
        if isinstance(value := given.get(name), list) and name in SEVERAL:
            taken[name] = [_take(uploads, gallery, name, one) for one in value]
        elif value is not None:
            taken[name] = _take(uploads, gallery, name, value)
    return taken


def _take(uploads: Uploads, gallery: Gallery, name: str, value: Any) -> PictureFile:
    if isinstance(value, str) and NAME.fullmatch(value) and not value.startswith(BASE64):
        return PictureFile.from_bytes(name, _by_id(uploads, gallery, name, value), f"{value[:12]}.png")
    try:
        picture = PictureFile.of(name, value)
    except BadRequest:
        if isinstance(value, Mapping):  # a picture's own record: what is wrong with it was said
            raise
        what = f"{name} must be a picture: the id of an upload or of one in the gallery, base64 text, or a data URL"
        fail(422, what, setting=name)
    try:
        if picture.data is None:
            return picture.with_data(name, PictureFile.from_bytes(name, uploads.read(picture.sha256)))
        uploads.keep_as_it_is(picture.sha256, picture.data)
    except FileNotFoundError:
        fail(422, f"{name} is not here any more: send it again", setting=name)
    except BadData as e:
        raise BadData(f"{name}: {e}") from None
    return picture


def _by_id(uploads: Uploads, gallery: Gallery, name: str, id: str) -> bytes:
    """The bytes of an upload, or of a picture of the gallery at its own size, which becomes an upload."""
    if uploads.path(id) is None:
        path = gallery.path(id) or fail(422, f"{name}: there is no upload and no picture of that id", setting=name)
        file = io.BytesIO()
        try:
            image = Picture.open(path).image
        except BadData:  # put there by hand, perhaps
            image = Image.open(path, formats=["PNG"])
        image.save(file, "PNG")
        id = uploads.keep(file.getvalue())
    return uploads.read(id)


def with_pictures(uploads: Uploads, request: dict[str, Any]) -> dict[str, Any]:
    """A job's request with its pictures' bytes, for the worker; raises FileNotFoundError if one is gone."""

    def whole(record: Mapping[str, Any]) -> dict[str, Any]:
        return {**record, "data": base64.b64encode(uploads.read(record["sha256"])).decode()}

    full = dict(request)
    for name in PICTURES:
        if isinstance(value := request.get(name), list):
            full[name] = [whole(record) for record in value]
        elif isinstance(value, Mapping):
            full[name] = whole(value)
    return full
