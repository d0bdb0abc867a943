"""What a picture starts from besides noise: pixels at the size to be made, and where they are to be repainted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.decode import MAX_ASPECT
from sfumato.errors import BadRequest
from sfumato.pixels import Pixels

if TYPE_CHECKING:
    from sfumato.families.model import Model
    from sfumato.pipeline.inputs import PictureFile
    from sfumato.pipeline.request import Request

KEPT = 4  # a picture of up to so many times the model's own number of pixels, or that part of it, keeps its size

MASKS_GROUND = "black"  # strokes on a transparent layer, as editors save them, are the mask
BLACK = "the mask is all black: paint white what is to be repainted"


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture to start from.

    Args:
        pixels: uint8 (H, W, 3).
        mask: float32 (H, W) in [0, 1], 1 where to repaint; None for all of it.
        told: what was done to the given picture, for its owner to read.
    """

    pixels: Pixels
    mask: NDArray[np.float32] | None
    told: tuple[str, ...]

    def cells(self, factor: int) -> NDArray[np.float32]:
        """The mask over cells of factor × factor pixels, float32 (H/factor, W/factor): 1 if any pixel is to change."""
        h, w = self.pixels.shape[:2]
        mask = np.ones((h, w), np.float32) if self.mask is None else self.mask
        return (mask.reshape(h // factor, factor, w // factor, factor).max((1, 3)) > 0).astype(np.float32)

    def keep(self, painted: Pixels) -> Pixels:
        """Lay a painted picture over this one where the mask says; what it leaves alone stays as it is, to the bit."""
        if self.mask is None:
            return painted
        m = self.mask[..., None]
        return (m * painted + (1 - m) * self.pixels).round().astype(np.uint8)


def size_for(init: PictureFile, margins: tuple[int, int, int, int], model: Model) -> tuple[int, int]:
    """Width and height to make from a picture where none are asked for: its own, in the model's multiples.

    One that is much larger or smaller than what the model is made for comes to the model's own number of pixels.
    """
    w, h = upright("init", init).size
    unit, own = model.multiple, model.defaults.width * model.defaults.height
    if own / KEPT <= w * h <= min(own * KEPT, model.max_pixels) and min(w, h) >= unit:
        sides = [side // unit * unit for side in (w, h)]
    else:
        scale = math.sqrt(own / (w * h)) / unit
        near, below = ([max(1, whole(side * scale)) * unit for side in (w, h)] for whole in (round, int))
        sides = near if math.prod(near) <= model.max_pixels else below
    left, top, right, bottom = margins
    return sides[0] + left + right, sides[1] + top + bottom


def upright(what: str, picture: PictureFile) -> Image.Image:
    """A request's picture as RGB; BadRequest for what is none, or so narrow that bringing it to a size would burst."""
    image = picture.image(what)
    if max(image.size) > MAX_ASPECT * min(image.size):
        called = f"{what} {picture.name}".rstrip()
        raise BadRequest(f"{called}: {image.width}x{image.height} is too long and narrow: crop it", what)
    return image


def mask_of(mask: PictureFile, init: PictureFile, margins: bool) -> Image.Image:
    """A mask as grey, white where to repaint; what is transparent in it is left alone.

    Raises BadRequest for one that is not as large as its picture, or black where no margins are to be painted either.
    """
    image, size = mask.image("mask", MASKS_GROUND).convert("L"), init.image("init").size
    if image.size != size:
        what = f"the mask is {image.width}x{image.height}, but the picture {size[0]}x{size[1]}"
        raise BadRequest(f"{what}: a mask is as large as its picture", "mask")
    if not margins and image.getextrema() == (0, 0):
        raise BadRequest(BLACK, "mask")
    return image


def canvas_of(request: Request, model: Model) -> Canvas | None:
    """The canvas of a resolved request; None if it starts from noise alone.

    The picture covers the size that is asked for, without its margins, and what sticks out is cut off evenly. Margins
    are filled with its border's pixels, and are to be repainted. Raises BadRequest for a mask that asks for nothing.
    """
    if request.init is None:
        return None
    width, height = request.size
    margins = left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    size = width - left - right, height - top - bottom
    if min(size) < 1:
        raise BadRequest(
            f"outpaint's margins leave no room for the picture: the whole is to be {width}x{height}", "outpaint"
        )
    image = request.init.image("init")
    pixels = np.asarray(cover(image, size, model.multiple))
    mask: NDArray[np.float32] | None = None
    if request.mask is not None:
        given = mask_of(request.mask, request.init, any(margins))
        mask = np.asarray(cover(given, size, model.multiple), np.float32) / np.float32(255)
    if any(margins):
        around = ((top, bottom), (left, right))
        pixels = np.pad(pixels, (*around, (0, 0)), mode="edge")
        inner = np.zeros(size[::-1], np.float32) if mask is None else mask
        mask = np.pad(inner, around, constant_values=1.0)
    if mask is not None and not mask.any():  # its white was cut off with what sticks out
        raise BadRequest(BLACK, "mask")
    told = (*request.init.told("init"), *covering(image.size, size, model.multiple))
    return Canvas(pixels, mask, told)


def cover(image: Image.Image, size: tuple[int, int], unit: int = 1) -> Image.Image:
    """Bring a picture to a size without distortion: enlarged or shrunk to cover it, then cut evenly on both sides.

    Only cut, no pixel changed, where it is less than ``unit`` pixels larger.
    """
    w, h = size
    scale = 1.0 if _only_cut(image.size, size, unit) else max(w / image.width, h / image.height)
    if scale != 1:
        larger = max(w, round(image.width * scale)), max(h, round(image.height * scale))
        image = image.resize(larger, Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def covering(given: tuple[int, int], size: tuple[int, int], unit: int = 1) -> list[str]:
    """What ``cover`` does to a picture of a given size, for its owner to read; nothing if it has the size."""
    done = "cut" if _only_cut(given, size, unit) else "brought"
    return [] if given == size else [f"{given[0]}x{given[1]} {done} to {size[0]}x{size[1]}"]


def _only_cut(given: tuple[int, int], size: tuple[int, int], unit: int) -> bool:
    return all(0 <= a - b < max(unit, 1) for a, b in zip(given, size, strict=True))
