"""Pictures that clients send: checked before they are decoded, kept as plain RGB or RGBA PNG files."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from PIL import Image, ImageOps

from sfumato.errors import BadData
from sfumato.files import write_atomically
from sfumato.server.settings import Settings

FORMATS = ["PNG", "JPEG", "WEBP"]
MAX_PIXELS = 1 << 24
PICTURES = tuple((f"image/{f.lower()}", {"type": "string", "format": "binary"}) for f in FORMATS)


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture, upright, as RGB or RGBA; raises BadData for what is damaged, foreign, animated or a bomb."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadData(f"the picture has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are taken")
            if getattr(image, "n_frames", 1) != 1:
                raise BadData("the picture is animated")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, OverflowError, Image.DecompressionBombError):
        raise BadData("the body is not a whole PNG, JPEG or WebP picture") from None


def read_upload(settings: Settings, data: bytes) -> dict[str, Any]:
    """Keep a picture and return its id and size; raises BadData, NoResources."""
    image = open_picture(data)
    return {"id": _write(settings, image), "width": image.width, "height": image.height}


def keep(settings: Settings, data: bytes) -> str:
    """Keep a picture and return its id; raises BadData, NoResources."""
    return _write(settings, open_picture(data))


def _write(settings: Settings, image: Image.Image) -> str:
    """Write a picture under the hash of its file, so that the same one is kept once."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    data = file.getvalue()
    id = hashlib.sha256(data).hexdigest()
    path = settings.uploads / f"{id}.png"
    if not path.is_file():
        write_atomically(path, data)
    return id
