"""Sizes as other programs ask for them: of the picture that comes out, enlarged by the model's upscaler or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from sfumato.errors import BadRequest, TooLarge
from sfumato.pipeline.request import UPSCALES, Request
from sfumato.server.wire import ModelFacts


def drawn(facts: ModelFacts, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose ``width`` and ``height`` are the picture's as those that the network draws.

    Where ``upscale`` is not asked for, it is the model's own or 1, whichever has the network draw nearer to the number
    of pixels that the model is made for; the model's own, if they are equally near. One side alone goes with the
    model's other one. Raises BadRequest for sides that can be reached by neither.
    """
    own = facts.defaults
    asked, upscale = [settings.get("width"), settings.get("height")], settings.get("upscale")
    if asked == [None, None] or upscale not in (None, *UPSCALES):
        return dict(settings)
    whole = (own.width * own.upscale, own.height * own.upscale)
    sides = [w if a is None else a for a, w in zip(asked, whole, strict=True)]
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides):
        return dict(settings)  # which is refused with the reason
    scales = [own.upscale, 1] if upscale is None else [upscale]

    def strangeness(scale: int) -> float:
        return abs(math.log(sides[0] * sides[1] / scale**2 / (own.width * own.height)))

    fit = [k for k in scales if not any(s % (k * facts.multiple) for s in sides)]
    small = [k for k in fit if sides[0] * sides[1] <= facts.max_pixels * k**2]
    if not small:
        _refuse(facts, sides, scales, bool(fit))
    scale = min(small, key=strangeness)
    return {**settings, "width": sides[0] // scale, "height": sides[1] // scale, "upscale": scale}


def _refuse(facts: ModelFacts, sides: list[int], scales: list[int], fit: bool) -> NoReturn:
    """Say which size would do."""
    most = facts.max_pixels * max(scales) ** 2
    large = fit or sides[0] * sides[1] > most
    if large:
        unit = max(scales) * facts.multiple
        side = int(most**0.5) // unit * unit
        what = f"is too large: model {facts.name!r} makes at most {most} pixels, such as {side}x{side}"
    else:
        unit = min(k for k in scales if sides[0] * sides[1] <= facts.max_pixels * k**2) * facts.multiple
        nearest = "x".join(str(max(1, round(s / unit)) * unit) for s in sides)
        rules = ", or ".join(
            f"{k * facts.multiple}" + (f" enlarged by {k}" if k > 1 else "") for k in sorted({*scales})
        )
        what = f"does not fit: model {facts.name!r} makes sides that are multiples of {rules}; the nearest is {nearest}"
    raise (TooLarge if large else BadRequest)(f"size {sides[0]}x{sides[1]} {what}", "width")


def finished(request: Mapping[str, Any], facts: ModelFacts) -> tuple[int, int]:
    """Width and height of the picture that a resolved request makes."""
    asked = Request("", width=request["width"], height=request["height"], hires=request["hires"])
    width, height = (side * request["upscale"] for side in asked.enlarged(facts.multiple))
    return width, height
