"""Pictures drawn with a bar of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sfumato.console import printable

if TYPE_CHECKING:
    from sfumato.pipeline.picture import Picture
    from sfumato.pipeline.pipeline import Pipeline
    from sfumato.pipeline.request import Request
    from sfumato.pixels import Pixels


def warn(request: Request, pipe: Pipeline) -> None:
    """Say on stderr what goes in otherwise than it was given."""
    for warning in pipe.warnings(request):
        sys.stderr.write(printable(warning) + "\n")


def draw(
    pipe: Pipeline, request: Request, ready: Callable[[Picture], None] = lambda _: None, *, film: bool = False
) -> tuple[list[Picture], list[Pixels]]:
    """Return a resolved request's pictures and, if asked for, a frame for each step.

    Args:
        ready: told of each picture when it is done, before the next one is.
    """
    from sfumato.pipeline.picture import Picture, sheet

    pictures: list[Picture] = []
    steps: list[list[Pixels]] = []  # of each, all that are drawn
    with _progress(pipe.steps(request)) as advance:
        for event in pipe.run(request):
            if isinstance(event, Picture):
                ready(event)
                pictures.append(event)
                continue
            advance()
            if film:
                steps.append(pipe.pixels(event.preview))
    if not film:
        return pictures, []
    kept = [j for j in range(request.drawn) if any(p.request == request.draw(j) for p in pictures)]
    last = sheet([p.pixels for p in pictures])
    return pictures, [*(_as_large(sheet([of[j] for j in kept]), last) for of in steps), last]


def _as_large(frame: Pixels, other: Pixels) -> Pixels:
    """A frame of the size of another, for films of pictures that are enlarged on their way."""
    from sfumato.pipeline.canvas import cover

    if frame.shape == other.shape:
        return frame
    import numpy as np
    from PIL import Image

    return np.asarray(cover(Image.fromarray(frame), (other.shape[1], other.shape[0])))


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=steps)
        yield lambda: bar.advance(task)
