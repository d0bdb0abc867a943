"""``sfumato explain``: a picture explained in one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.cli.flags import add_recorded_flags
from sfumato.cli.loading import load_recorded
from sfumato.cli.output import Target
from sfumato.console import Parser, printable
from sfumato.errors import BadRequest
from sfumato.pipeline.inputs import PictureFile


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato explain`` and return the exit code; raises SfumatoError for bad input."""
    parser = Parser(
        prog="sfumato explain",
        usage="%(prog)s [flags] PICTURE.png",
        description="Draw a picture again and explain it in one HTML file: its path out of the noise, where its words "
        "looked, what guidance and samplers do to it, and its noise schedule.",
    )
    add_recorded_flags(parser)
    parser.add_argument("--out", metavar="FILE.html", help="file to write (default: beside the picture)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--noise", metavar="PICTURE", help="another picture to send down into the noise")
    parser.add_argument("--steps", metavar="K,K,…", help="steps in which samplers are compared (default: 5,10,20,50)")
    args = parser.parse_args(argv)
    if args.critic:
        raise BadRequest("--critic chooses among several pictures, and explain draws one: leave it out")
    steps = _steps(args.steps)

    from sfumato.pipeline.picture import read

    stored = read(args.picture)
    beside = str(Path(args.picture).with_suffix(".html"))
    target = Target.plan_file(beside if args.out is None else args.out, args.force, ".html")
    if stored.picture.request.n != 1:
        raise BadRequest(f"{args.picture} is a grid of {stored.picture.request.n} pictures: explain one of them")
    if stored.picture.request.best_of != 1:
        raise BadRequest(f"{args.picture} is of an old form that does not tell its seed: replay it, and explain that")

    from sfumato.inside.compute import fitted
    from sfumato.inside.report import report

    source = None if args.noise is None else PictureFile.open("noise", args.noise).image("noise")
    pipe, request = load_recorded(args, stored.picture)
    if source is not None and not pipe.model.takes_pictures:
        raise BadRequest(f"--noise has no effect: model {pipe.model.name!r} has no encoder for pictures: leave it out")
    picture = replace(stored.picture, request=request)
    pixels = fitted(source or picture.image, request.resolve(pipe.model))  # it may have been enlarged at the end
    more: dict[str, Any] = {} if steps is None else {"steps": steps}
    try:
        page = report(pipe, picture, pixels, tell=_tell, **more)
    finally:  # what went wrong is told on a line of its own
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
    target.write_bytes(page.encode())
    print(printable(str(target.path())))
    return 0


def _tell(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what}: {done} of {total} steps")
        sys.stderr.flush()


def _steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(p.strip().isdecimal() and 1 <= int(p.strip()[:9]) <= 500 for p in parts) or len(parts) > 8:
        raise BadRequest(f"--steps must be up to 8 whole numbers from 1 to 500 with commas between, not {text[:60]!r}")
    return tuple(sorted({int(p) for p in parts}))
