"""What the studio's page asks for, as generators that a worker steps through: (JSON, no bytes) pairs.

Each takes a pipeline and arguments: ``request`` as JSON, and what the function names.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sfumato.decode import MAX_ASPECT, decode
from sfumato.errors import BadRequest
from sfumato.inside import compare
from sfumato.inside import path as paths
from sfumato.inside.record import Json
from sfumato.pipeline.canvas import cover
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels, digest

Answers = Iterator[tuple[Json, bytes]]


def path(pipe: Pipeline, arguments: dict[str, Any]) -> Answers:
    """Frames of a picture's path; ``pixels``, their digest, tells whether the picture came out equal."""
    request = _request(pipe, arguments)
    words = [word.text for word in paths.words_of(pipe, request)]
    yield {"kind": "start", "words": words, "levels": pipe.steps(request) + 1}, b""
    for event in paths.trajectory(pipe, request):
        if isinstance(event, Picture):
            known = arguments.get("pixels")
            yield {"kind": "end", "equal": None if known is None else digest(event.pixels) == known}, b""
        else:
            yield {"kind": "frame", **event.to_dict()}, b""


def guidance(pipe: Pipeline, arguments: dict[str, Any]) -> Answers:
    """Pictures under guidance scales ``weights``."""
    for event in compare.guidance(pipe, _request(pipe, arguments), arguments.get("weights") or compare.WEIGHTS):
        yield _told(event, "guided"), b""


def samplers(pipe: Pipeline, arguments: dict[str, Any]) -> Answers:
    """The converged solution, and runs of ``samplers`` in ``steps``."""
    names, steps = arguments.get("samplers") or compare.COMPARED, arguments.get("steps") or compare.STEPS
    for event in compare.samplers(pipe, _request(pipe, arguments), names, steps):
        yield _told(event, "solution" if isinstance(event, compare.Solution) else "run"), b""


def forward(pipe: Pipeline, arguments: dict[str, Any]) -> Answers:
    """The schedule, and ``source``, a PNG as base64, under the noise of each level."""
    request = _request(pipe, arguments)
    yield (
        {"kind": "start", "schedule": paths.curve(pipe, request).to_dict(), "levels": len(pipe.path(request)) - 1},
        b"",
    )
    source = fitted(decode(base64.b64decode(arguments["source"])), request)
    for noised in paths.forward(pipe, request, source):
        yield {"kind": "noised", **noised.to_dict()}, b""


def fitted(image: Image.Image, request: Request) -> Pixels:
    """An RGB picture at the size of a resolved request, cropped to its proportions: uint8 (H, W, 3).

    Raises BadRequest where they are too far from its own.
    """
    (w, h), (width, height) = image.size, request.size
    if not 1 / MAX_ASPECT <= w * height / (h * width) <= MAX_ASPECT:  # what covers the size would burst
        raise BadRequest(f"{w}x{h} is too long and narrow to be noised at {width}x{height}: crop it")
    return np.asarray(cover(image, request.size))


def _request(pipe: Pipeline, arguments: dict[str, Any]) -> Request:
    return Request.from_dict(arguments["request"]).single().resolve(pipe.model)


def _told(event: Any, kind: str) -> Json:
    if isinstance(event, compare.Progress):
        return {"kind": "progress", "done": event.done, "total": event.total}
    return {"kind": kind, **event.to_dict()}
