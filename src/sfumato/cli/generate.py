"""``sfumato generate``: pictures from words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.drawing import draw, warn
from sfumato.cli.flags import add_model_flags, add_output_flags, add_request_flags, request_of, scale_of
from sfumato.cli.loading import load_pipeline
from sfumato.cli.output import Target, report
from sfumato.console import Parser
from sfumato.errors import BadRequest

if TYPE_CHECKING:
    from sfumato.pipeline.picture import Picture


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato generate`` and return the exit code; raises SfumatoError for bad input."""
    started = time.perf_counter()
    parser = Parser(prog="sfumato generate", usage="%(prog)s [flags] PROMPT", description="Make pictures from words.")
    add_request_flags(parser)
    add_model_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--grid", action="store_true", help="one file with all n pictures instead of n files")
    parser.add_argument("--trajectory", metavar="FILE.gif", help="also write how the pictures came out of the noise")
    args = parser.parse_args(argv)
    request = request_of(args)
    scale = scale_of(args.scale)
    target = Target.plan(args.out, args.force, files=1 if args.grid else request.n)
    film = None if args.trajectory is None else Target.plan_file(args.trajectory, args.force, ".gif")
    if args.critic and request.best_of == 1:
        raise BadRequest("--critic chooses among several pictures: ask for them with --best-of K")
    pipe = load_pipeline(args)
    request = request.resolve(pipe.model)
    warn(request, pipe)
    from sfumato.pipeline.picture import check_readable, grid

    check_readable(request, pipe.model.multiple, scale=scale, together=args.grid or film is not None)
    paths: list[Path] = []

    def ready(picture: Picture) -> None:  # each is written when it is ready: an interrupted run loses none
        if not args.grid:
            paths.append(target.write(picture, len(paths), scale))

    pictures, frames = draw(pipe, request, ready, film=film is not None)
    if args.grid:
        pictures = [grid(pictures, request)]
        paths = [target.write(pictures[0], 0, scale)]
    if film is not None:
        film.write_film(frames, scale or pictures[0].viewing_scale)
    report(pictures, paths, started, as_json=args.json, films=film and {"trajectory": film.path()})
    return 0
