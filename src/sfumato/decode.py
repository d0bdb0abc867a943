"""Encoded pictures of any kind into RGB, safely: a picture's size is judged before a pixel is decoded."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

T = TypeVar("T")

MAX_BYTES = 256 << 20
MAX_PIXELS = 100_000_000
MAX_ASPECT = 32
ORIENTATION = 0x0112  # EXIF's tag
# Formats with pixels in them; others that Pillow can open run programs (EPS) or have no signature (TGA).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
SUFFIXES = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm"]
    + [".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".qoi"]
)
UNSUPPORTED = frozenset(
    [".heic", ".heif", ".svg", ".svgz", ".psd", ".eps", ".tga", ".ico", ".jxl", ".exr", ".hdr", ".dng", ".cr2"]
    + [".nef", ".arw", ".raw"]
)


class PictureError(Exception):
    """A picture that cannot be used; the message is the reason."""


def decode(data: bytes, background: str = "white") -> Image.Image:
    """Return the first frame of an encoded picture as upright RGB, transparency laid on a background.

    Raises PictureError, with the reason, for anything that is no whole picture of at most ``MAX_PIXELS`` pixels.
    """
    return decode_and_tell(data, background)[0]


def decode_and_tell(data: bytes, background: str = "white") -> tuple[Image.Image, tuple[str, ...]]:
    """As ``decode``, with what was done to the picture that its owner may not expect, in a few words each."""

    def finish(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
        upright = _upright(image)
        told = {
            "turned upright as its EXIF says": upright is not image,
            f"transparency laid on {background}": _transparent(image),
            "first frame taken": getattr(image, "is_animated", False),
        }
        return _rgb(upright, background), tuple(what for what, done in told.items() if done)

    return _decoded(data, _formats(), MAX_PIXELS, finish)


def decode_still(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """Return an encoded picture upright, as RGB or, where it is transparent, RGBA.

    Raises PictureError, with the reason, for anything but one whole picture of these formats and so many pixels.
    """

    def finish(image: Image.Image) -> Image.Image:
        if image.format != "MPO" and getattr(image, "is_animated", False):  # a camera's JPEG with a second view
            raise PictureError("it is animated")
        upright = _upright(image)
        return upright.convert("RGBA") if _transparent(upright) else _rgb(upright, "white")

    return _decoded(data, formats, max_pixels, finish)


def _decoded(data: bytes, formats: tuple[str, ...], max_pixels: int, finish: Callable[[Image.Image], T]) -> T:
    """Decode and finish a picture; what goes wrong is told as PictureError."""
    if not data:
        raise PictureError("the file is empty")
    if len(data) > MAX_BYTES:
        raise PictureError(f"{len(data) >> 20} MiB is more than the {MAX_BYTES >> 20} MiB a picture may have")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on sizes and metadata; ours follow
            image = Image.open(io.BytesIO(data), formats=formats)
            _check_size(*image.size, max_pixels)
            image.load()
            _check_size(*image.size, max_pixels)
            return finish(image)
    except PictureError:
        raise
    except Image.UnidentifiedImageError:
        raise PictureError(_what_else(data)) from None
    except Image.DecompressionBombError:
        raise PictureError(f"it has more than {max_pixels // 1_000_000} million pixels") from None
    except Exception as e:  # damaged files make decoders raise errors of every type
        text = str(e) or type(e).__name__
        raise PictureError(f"damaged or cut off ({text[:100]})") from None


def fit(image: Image.Image, size: int | tuple[int, int], crop: str, background: str = "white") -> Image.Image:
    """Bring an RGB picture to ``size``, the side of a square or (height, width).

    With crop ``random`` it only comes to cover that, and is cut later.
    """
    check_proportions(image)
    height, width = (size, size) if isinstance(size, int) else size
    w, h = image.size
    if (w, h) == (width, height):
        return image
    lanczos = Image.Resampling.LANCZOS
    if crop == "pad":
        scale = min(1.0, width / w, height / h)
        if scale < 1:
            image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), lanczos)
        canvas = Image.new("RGB", (width, height), ImageColor.getrgb(background))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    wide = w * height > h * width
    if crop == "random" and w * height != h * width:
        cover = (max(width, round(w * height / h)), height) if wide else (width, max(height, round(h * width / w)))
        return image.resize(cover, lanczos)
    part_w, part_h = (max(1, round(h * width / height)), h) if wide else (w, max(1, round(w * height / width)))
    left, top = (w - part_w) // 2, (h - part_h) // 2
    return image.crop((left, top, left + part_w, top + part_h)).resize((width, height), lanczos)


def check_proportions(image: Image.Image) -> None:
    """Raise PictureError for a picture that is too long and narrow to be brought to a size."""
    w, h = image.size
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise PictureError(f"{w}×{h} is too long and narrow")


def to_array(image: Image.Image, channels: int = 3) -> np.ndarray:
    """Return an RGB picture as uint8 (channels, H, W), with 3 channels or grey as 1."""
    if channels == 1:
        return np.array(image.convert("L"))[None]
    return np.array(image).transpose(2, 0, 1)


def _check_size(w: int, h: int, most: int) -> None:
    if w * h > most:
        raise PictureError(f"{w}×{h} is more than the {most // 1_000_000} million pixels a picture may have")
    if w < 1 or h < 1:
        raise PictureError(f"{w}×{h} has no pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except Exception:  # a picture with broken EXIF is a picture without EXIF
        return image


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    elif image.mode == "La":
        image = image.convert("LA")
    if _transparent(image):
        canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or image.has_transparency_data


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of unsaid range: up to 1 (fractions alone), 255 or 65535, whichever is the first to hold them all."""
    top = float(values.max(initial=0.0))
    if not np.isfinite(values).all():
        raise PictureError("its pixels are not finite numbers")
    white = next((w for w in ((1.0,) if values.dtype.kind == "f" and top <= 1 else (255.0, 65535.0)) if top <= w), top)
    return (values.astype(np.float64).clip(0, white) * (255 / white)).round().astype(np.uint8)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _what_else(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    for mark, kind in ((b"<svg", "an SVG drawing"), (b"<?xml", "an XML file"), (b"<", "an HTML page"),
                       (b"%pdf", "a PDF"), (b"pk\x03\x04", "a zip file"), (b"{", "JSON text")):  # fmt: skip
        if start.startswith(mark):
            return f"not a picture but {kind}"
    if data[4:8] == b"ftyp":
        return "a HEIC picture or a video: convert it to PNG or JPEG"
    if not any(data[:512]):
        return "not a picture: its bytes are zero"
    return "not a picture of a known kind, or damaged at its start"
