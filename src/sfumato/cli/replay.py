"""``sfumato replay``: a picture made again from the request inside its PNG, and compared."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sfumato.cli.drawing import draw
from sfumato.cli.flags import add_output_flags, add_recorded_flags, scale_of
from sfumato.cli.loading import load_recorded
from sfumato.cli.output import Target, report
from sfumato.console import Parser
from sfumato.errors import BadRequest


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato replay`` and return the exit code, 1 if the pixels differ; raises SfumatoError for bad input."""
    started = time.perf_counter()
    parser = Parser(
        prog="sfumato replay",
        usage="%(prog)s [flags] PICTURE.png",
        description="Make a picture again from the request inside its PNG, and compare.",
    )
    add_recorded_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)

    import numpy as np

    from sfumato.pipeline.picture import check_readable, enlarge, grid, read

    stored = read(args.picture)
    old = stored.picture
    scale = scale_of(args.scale) or stored.scale
    target = Target.plan(args.out, args.force, files=1)
    if args.critic and old.request.best_of == 1:
        raise BadRequest(f"--critic chooses among several pictures, and {args.picture} was the only one: leave it out")
    pipe, request = load_recorded(args, old)
    request = request.resolve(pipe.model)
    check_readable(request, pipe.model.multiple, scale=scale, together=True)
    pictures, _ = draw(pipe, request)
    new = pictures[0] if request.n == 1 else grid(pictures, request)
    same = np.array_equal(enlarge(new.pixels, stored.scale), stored.pixels)
    path = target.write(new, 0, scale)
    changes = [
        f"{what} {was} is now {new.made_with.get(what, 'not known')}"
        for what, was in old.made_with.items()
        if new.made_with.get(what) != was
    ]
    verdict = "pixels equal" if same else "pixels differ" + (f" ({', '.join(changes)})" if changes else "")
    report([new], [path], started, as_json=args.json, note=verdict, more={"equal": same, "changes": changes})
    return 0 if same else 1
