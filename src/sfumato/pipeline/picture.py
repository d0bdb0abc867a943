"""A picture with the request that made it, as one PNG file that can be made again.

The PNG holds two text chunks: "sfumato", a JSON record of request and model, and "parameters", the line that
other tools read (AUTOMATIC1111's). A picture may be stored enlarged, each pixel as a square, so that small
ones can be looked at; its own pixels are then every scale-th one of the file.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from sfumato.errors import BadData, BadRequest, SfumatoError
from sfumato.families.additions import Ingredient
from sfumato.files import write_atomically
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels

FORMAT = 1  # of the JSON record
MAX_PIXELS = 1 << 27
MAX_FILE = 3 * MAX_PIXELS + (16 << 20)  # bytes: pixels that cannot be compressed, and the record
MAX_SCALE = 64
OTHER_KINDS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
SHOWN = 256  # pixels of the longer side, at least, for a picture that is to be looked at


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels, and all it takes to make them again.

    Args:
        pixels: uint8 (H, W, 3); of a grid, all of its pictures side by side.
        request: the resolved request; n = 1, or the number of pictures in a grid.
        model: name of the model that made it; ``model_hash`` is its file's SHA-256.
        made_with: versions and threads that the bits may depend on.
        ingredients: the files beside the model: LoRAs, learned words, an autoencoder, ControlNets.
        warnings: what went in otherwise than it was given: words that did not fit, a picture that was cut.
    """

    pixels: Pixels
    request: Request
    model: str
    model_hash: str
    made_with: Mapping[str, str | int] = field(default_factory=dict)
    ingredients: tuple[Ingredient, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.pixels)

    @property
    def viewing_scale(self) -> int:
        """The smallest whole factor at which a small picture can be looked at; 1 for others."""
        return _viewing_scale(*self.pixels.shape[:2])

    def encode(self, scale: int = 1) -> bytes:
        """Return the PNG file as bytes, each pixel drawn as a square of scale × scale."""
        info = PngImagePlugin.PngInfo()
        record = {
            "format": FORMAT,
            "request": self.request.to_dict(),
            "model": {"name": self.model, "hash": self.model_hash},
            "made_with": dict(self.made_with),
            "scale": scale,
        }
        if self.ingredients:
            record["ingredients"] = [i.to_dict() for i in self.ingredients]
        if self.warnings:
            record["warnings"] = list(self.warnings)
        info.add_text("sfumato", json.dumps(record))
        info.add_itxt("parameters", self.parameters())
        file = io.BytesIO()
        Image.fromarray(enlarge(self.pixels, scale)).save(file, "PNG", pnginfo=info)
        return file.getvalue()

    def save(self, path: str | os.PathLike[str], *, scale: int = 1, overwrite: bool = True) -> Path:
        """Write the PNG all at once or not at all, and return its path.

        Raises BadRequest for a path that cannot be written, is named as another kind of picture or, without
        ``overwrite``, exists.
        """
        path = Path(path)
        if path.suffix.lower() in OTHER_KINDS:
            raise BadRequest(f"cannot write {path}: a picture keeps its request in a PNG; its name must end in .png")
        write_atomically(path, self.encode(scale), overwrite=overwrite)
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Picture:
        """Read a PNG that ``save`` wrote, at its own size.

        Raises BadData for any other file, and for one whose pixels are no longer an exact enlargement.
        """
        stored = read(path)
        if not np.array_equal(enlarge(stored.picture.pixels, stored.scale), stored.pixels):
            raise BadData(f"{path}: its pixels were changed after it was made")
        return stored.picture

    def parameters(self) -> str:
        """Return the request as the text that AUTOMATIC1111's web UI writes, which many tools read."""
        r = self.request
        settings = {
            "Steps": r.steps,
            "Sampler": _their_sampler(r.sampler),
            "Schedule type": (r.spacing or "").capitalize(),
            "CFG scale": r.guidance,
            "Seed": r.seed,
            "Size": f"{r.width}x{r.height}",
            "Model hash": self.model_hash[:10],
            "Model": self.model,
            **_more_parameters(r),
            "Version": f"sfumato {self.made_with.get('sfumato', '')}".strip(),
        }
        if loras := [i for i in self.ingredients if i.kind == "lora"]:
            settings["Lora hashes"] = '"' + ", ".join(f"{Path(i.name).stem}: {i.hash[:12]}" for i in loras) + '"'
        lines = [r.prompt, f"Negative prompt: {r.negative}"] if r.negative else [r.prompt]
        return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in settings.items())])

    def _repr_png_(self) -> bytes:
        """Show in notebooks."""
        return self.encode(self.viewing_scale)


@dataclass(frozen=True, eq=False)
class Stored:
    """What a PNG file holds: the picture, the file's own pixels (H·scale, W·scale, 3), and the scale."""

    picture: Picture
    pixels: Pixels
    scale: int


def enlarge(pixels: Pixels, scale: int) -> Pixels:
    """Draw each pixel (H, W, 3) as a square of scale × scale."""
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= MAX_SCALE:
        raise BadRequest(f"scale must be a whole number from 1 to {MAX_SCALE}, not {scale!r}")
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _viewing_scale(*sides: int) -> int:
    return max(1, -(-SHOWN // max(sides)))


def _layout(n: int, columns: int | None = None) -> tuple[int, int]:
    """Columns and rows of a sheet of n pictures, without ``columns`` as near to a square as can be."""
    columns = columns or math.ceil(math.sqrt(n))
    return columns, math.ceil(n / columns)


def sheet(pixels: Sequence[Pixels], columns: int | None = None) -> Pixels:
    """Lay pictures (H, W, 3) of one size out in rows, as near to a square as can be; empty places are white."""
    columns, rows = _layout(len(pixels), columns)
    h, w, _ = pixels[0].shape
    page = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, p in enumerate(pixels):
        y, x = i // columns * h, i % columns * w
        page[y : y + h, x : x + w] = p
    return page


def grid(pictures: Sequence[Picture], request: Request | None = None) -> Picture:
    """Make one picture of all pictures of a request; saved, it can be replayed as one.

    Args:
        request: the resolved request that drew them, which ``best_of`` needs; else it is read off the first.

    Raises BadRequest if they do not follow each other by seed with settings alike.
    """
    if not pictures:
        raise BadRequest("a grid needs at least one picture")
    first = pictures[0]
    if len(pictures) == 1:
        return first
    whole = request or replace(first.request, n=len(pictures))
    for i, p in enumerate(pictures):
        of = range(i * whole.best_of, (i + 1) * whole.best_of)
        follows = whole.seed is not None and any(p.request == whole.draw(j) for j in of)
        if not follows or (p.model_hash, p.ingredients) != (first.model_hash, first.ingredients):
            raise BadRequest("a grid is made of the pictures of one request: the same settings, seed after seed")
    return replace(first, pixels=sheet([p.pixels for p in pictures]), request=whole)


def check_readable(request: Request, unit: int, *, scale: int | None = None, together: bool = False) -> None:
    """Raise BadRequest for a resolved request whose file would have more pixels than ``read`` takes.

    Args:
        unit: the model's, for ``hires``.
        scale: of the file; None for the one at which a picture can be looked at.
        together: whether all its pictures go into one file.
    """
    layout = _layout(request.n if together else 1)
    one = request.enlarged(unit)
    width, height = (n * side * (request.upscale or 1) for n, side in zip(layout, one, strict=True))
    factor = scale or _viewing_scale(width, height)
    if width * height * factor**2 > MAX_PIXELS:
        raise BadRequest(
            f"the file would have {width * factor}x{height * factor} pixels, and {MAX_PIXELS} are the most that can be "
            "read again: fewer pictures in a grid or film, a smaller scale, or less upscale"
        )


def read(path: str | os.PathLike[str]) -> Stored:
    """Read a PNG that ``Picture.save`` wrote; raises BadData, with the reason, for any other file."""
    pixels, text = read_png(path)
    if "sfumato" not in text:
        raise BadData(f"{path}: no request inside; it was not made by sfumato, or its text was stripped")
    try:
        record = json.loads(text["sfumato"])
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise BadData(f"its record is of another format than {FORMAT}; a newer sfumato may read it")
        model, scale, made_with = record["model"], record["scale"], record.get("made_with", {})
        if not (isinstance(model["name"], str) and isinstance(model["hash"], str) and _flat(made_with)):
            raise BadData("its record of the model is damaged")
        if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= MAX_SCALE:
            raise BadData("its record of the scale is damaged")
        request = Request.from_dict(record["request"])
        ingredients = tuple(Ingredient.from_dict(i) for i in record.get("ingredients", ()))
        warnings = read_warnings(record)
        if pixels.shape[0] % scale or pixels.shape[1] % scale:
            raise BadData(f"its sides are no multiples of its scale {scale}")
    except SfumatoError as e:
        raise BadData(f"{path}: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadData(f"{path}: its record is damaged") from e
    own = pixels[::scale, ::scale].copy()
    picture = Picture(own, request, model["name"], model["hash"], made_with, ingredients, warnings)
    return Stored(picture, pixels, scale)


def read_warnings(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The warnings of a stored record; raises BadData for what are none."""
    warnings = record.get("warnings", [])
    if not isinstance(warnings, list) or not all(isinstance(w, str) for w in warnings):
        raise BadData("its record of warnings is damaged")
    return tuple(warnings)


def _flat(made_with: Any) -> bool:
    return isinstance(made_with, dict) and all(isinstance(v, (str, int)) for v in made_with.values())


def is_png(path: str | os.PathLike[str]) -> bool:
    """Tell by its first bytes whether a file is a PNG."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def read_png(path: str | os.PathLike[str]) -> tuple[Pixels, dict[str, str]]:
    """Return the pixels (H, W, 3) and text chunks of an RGB PNG.

    Sizes are checked before anything is decoded. Raises BadData for what is damaged, foreign or a bomb.
    """
    try:
        if os.path.getsize(path) > MAX_FILE:
            raise BadData(f"{path}: larger than {MAX_FILE >> 20} MiB")
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadData(f"{path}: {image.width}x{image.height} pixels are more than are read")
            if image.mode != "RGB" or getattr(image, "is_animated", False):
                raise BadData(f"{path}: not a plain RGB picture")
            image.load()
            text: dict[str, Any] = getattr(image, "text", {})
            return np.array(image), {k: str(v) for k, v in text.items()}
    except FileNotFoundError as e:
        raise BadData(f"{path}: no such file") from e
    except IsADirectoryError as e:
        raise BadData(f"{path}: a folder, not a picture") from e
    except PermissionError as e:
        raise BadData(f"{path}: not readable") from e
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise BadData(f"{path}: not a whole PNG ({e})") from e


def _more_parameters(r: Request) -> dict[str, Any]:
    """What was asked for besides, under AUTOMATIC1111's names where it has them."""
    more: dict[str, Any] = {}
    if r.init is not None:
        more |= {"Denoising strength": r.strength, "Init image hash": r.init.sha256[:10]}
    if r.variation_strength > 0:
        more |= {"Variation seed": r.variation_seed, "Variation seed strength": r.variation_strength}
    if r.hires is not None:
        which = "Denoising strength" if r.init is None else "Hires denoising strength"
        more |= {"Hires upscale": r.hires, which: r.hires_strength}
    if r.upscale not in (None, 1):
        more["Postprocess upscale by"] = r.upscale
    return more


def _their_sampler(name: str | None) -> str:
    """The name by which other programs know a sampler, or our own."""
    from sfumato.diffusion import find_sampler

    if name is None:
        return ""
    aliases = [a for a in find_sampler(name).aliases if not a.endswith("Scheduler")]
    return aliases[0] if aliases else name.upper() if len(name) < 5 else name.capitalize()
