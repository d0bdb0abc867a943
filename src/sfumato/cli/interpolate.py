"""``sfumato interpolate``: pictures on the way from one prompt to another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from sfumato.cli.drawing import draw, warn
from sfumato.cli.flags import add_model_flags, add_output_flags, add_request_flags, request_of, scale_of
from sfumato.cli.loading import load_pipeline
from sfumato.cli.output import Target, report
from sfumato.console import Parser
from sfumato.errors import BadRequest
from sfumato.pipeline.request import MAX_PICTURES


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato interpolate`` and return the exit code; raises SfumatoError for bad input."""
    started = time.perf_counter()
    parser = Parser(
        prog="sfumato interpolate",
        usage="%(prog)s [flags] PROMPT",
        description="Make pictures on the way from one prompt to another, of one seed.",
    )
    add_request_flags(parser, refused=("n", "mix", "best_of"))
    add_model_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--frames", metavar="N", default="9", help="number of pictures, both ends too (default: 9)")
    parser.add_argument("--film", metavar="FILE.gif", help="also write them as a film")
    args = parser.parse_args(argv)
    request = request_of(args)
    if args.critic:
        raise BadRequest("--critic chooses among several pictures, which interpolate does not draw: leave it out")
    if not (args.frames.isdecimal() and 2 <= int(args.frames[:9]) <= MAX_PICTURES):
        raise BadRequest(f"frames must be a whole number from 2 to {MAX_PICTURES}, not {args.frames[:40]!r}")
    if request.prompt_to is None:
        raise BadRequest("interpolate needs --prompt-to, the words to go towards")
    if request.mix is not None or request.n != 1:
        raise BadRequest("interpolate goes through every mix with one seed: leave out --mix and -n")
    frames, scale = int(args.frames), scale_of(args.scale)
    target = Target.plan(args.out, args.force, files=frames)
    film = None if args.film is None else Target.plan_file(args.film, args.force, ".gif")
    pipe = load_pipeline(args)
    request = request.resolve(pipe.model)
    warn(request, pipe)
    from sfumato.pipeline.picture import check_readable

    check_readable(request, pipe.model.multiple, scale=scale)
    pictures, paths = [], []
    for i in range(frames):  # each is written when it is ready: an interrupted run loses none
        pictures += draw(pipe, replace(request, mix=i / (frames - 1)))[0]
        paths.append(target.write(pictures[i], i, scale))
    if film is not None:
        film.write_film([p.pixels for p in pictures], scale or pictures[0].viewing_scale)
    report(pictures, paths, started, as_json=args.json, films=film and {"film": film.path()})
    return 0
