"""``sfumato generate``: pictures from words."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sfumato.cli.drawing import draw, warn
from sfumato.cli.flags import add_model_flags, add_output_flags, add_request_flags, request_of, scale_of
from sfumato.cli.loading import load_pipeline
from sfumato.cli.output import Target, report
from sfumato.console import Parser
from sfumato.errors import BadRequest


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
    pictures, frames = draw(pipe, request, film=film is not None)
    if args.grid:
        from sfumato.pipeline.picture import grid

        pictures = [grid(pictures, request)]
    paths = [target.write(p, i, scale) for i, p in enumerate(pictures)]
    if film is not None:
        film.write_film(frames, scale or pictures[0].viewing_scale)
    report(pictures, paths, started, as_json=args.json, film=film and film.path())
    return 0
