"""The request inside a picture's file: our own record, or the line of text that AUTOMATIC1111's web UI writes."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from PIL import Image

from sfumato.errors import BadData, BadRequest, SfumatoError
from sfumato.pipeline.request import UPSCALES, Request

MAX_TEXT = 1 << 20
SETTING = re.compile(r'([\w/-][\w /-]{0,60}):\s*("(?:\\.|[^"\\])+"|[^,]*)(?:,|$)')  # names bounded: linear in the text


def text_of(data: bytes) -> tuple[dict[str, str], int, int]:
    """The text chunks of a PNG, and its width and height; no pixels are decoded. Raises BadData."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}
            info = {k: v for k, v in text.items() if len(v) <= MAX_TEXT}
            return info, image.width, image.height
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, OverflowError, Image.DecompressionBombError):
        raise BadData("the body is not a PNG") from None


def describe_png(data: bytes) -> dict[str, Any]:
    """What ``POST /pictures/info`` answers; raises BadData if there is no request inside."""
    text, width, height = text_of(data)
    if "sfumato" in text:
        try:
            record = json.loads(text["sfumato"])
            request, scale = Request.from_dict(record["request"]), max(1, int(record["scale"]))
            model = {"name": str(record["model"]["name"]), "hash": str(record["model"]["hash"])}
        except (SfumatoError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError):
            raise BadData("the record inside is damaged, or of a newer version") from None
        return {
            "source": "sfumato", "request": request.to_dict(), "model": model, "ignored": {},
            "width": width // scale, "height": height // scale,
        }  # fmt: skip
    if text.get("parameters"):
        settings, ignored = parse_parameters(text["parameters"])
        name = ignored.get("Model")
        model = None if name is None else {"name": name, "hash": ignored.get("Model hash", "")}
        return {
            "source": "a1111", "request": settings, "model": model, "ignored": ignored,
            "width": width, "height": height,
        }  # fmt: skip
    raise BadData("no request inside: it was not made by sfumato or AUTOMATIC1111, or its text was stripped")


def parse_parameters(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read AUTOMATIC1111's text into settings of ``Request``; returns them, and what has no place there.

    The last line holds ``Name: value`` pairs, the part from ``Negative prompt:`` on what should not be shown.
    """
    lines = text.strip().split("\n")
    pairs = dict(SETTING.findall(lines[-1]))
    if len(pairs) >= 3 and "Steps" in pairs:
        lines = lines[:-1]
    else:
        pairs = {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    settings: dict[str, Any] = {"prompt": prompt.strip(), "negative": negative.strip()}
    ignored: dict[str, str] = {}
    for name, value in pairs.items():
        taken = _setting(name.strip(), value.strip().strip('"'))
        if taken is None:
            ignored[name.strip()] = value.strip().strip('"')
        settings |= taken or {}
    return {k: v for k, v in settings.items() if v not in ("", None)}, ignored


def _setting(name: str, value: str) -> dict[str, Any] | None:
    """One of the pairs as settings, or None if it has no place in a request."""
    try:
        if name == "Steps":
            return {"steps": int(value)}
        if name == "Seed":
            return {"seed": int(value)}
        if name == "CFG scale":
            return {"guidance": float(value)}
        if name == "Size":
            width, height = value.split("x")
            return {"width": int(width), "height": int(height)}
        if name == "Postprocess upscale by" and float(value) in UPSCALES:
            return {"upscale": int(float(value))}
        if name == "Sampler":
            return read_sampler(value)
        if name == "Schedule type" and value not in ("", "Automatic"):
            from sfumato.diffusion import find_spacing

            return {"spacing": find_spacing(value).name}
    except (ValueError, BadRequest):
        return None
    return None


def read_sampler(value: Any) -> dict[str, Any]:
    """A sampler's name; older versions wrote the spacing behind it."""
    from sfumato.diffusion import find_sampler, find_spacing

    if not isinstance(value, str) or len(value) > 100:
        raise BadRequest("a sampler must be a name")
    try:
        return {"sampler": find_sampler(value).name}
    except BadRequest as e:
        name, _, spacing = value.rpartition(" ")
        try:
            return {"sampler": find_sampler(name).name, "spacing": find_spacing(spacing).name}
        except BadRequest:
            raise e from None
