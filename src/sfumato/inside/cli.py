"""``sfumato explain``: a picture explained in one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.console import Parser
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.files import write_atomically


def main(argv: Sequence[str]) -> int:
    """Explain a picture."""
    parser = Parser(
        prog="sfumato explain",
        description="Draw a picture again and explain it in one HTML file: its path out of the noise, where its words "
        "looked, what guidance and samplers do to it, and its noise schedule.",
    )
    parser.add_argument("picture", metavar="PICTURE.png", help="a picture that sfumato made")
    parser.add_argument("--out", metavar="FILE.html", help="file to write (default: beside the picture)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--model", metavar="M", help="weight file or name of the model (default: the picture's own)")
    parser.add_argument("--noise", metavar="PICTURE", help="another picture to send down into the noise")
    parser.add_argument("--steps", metavar="K,K,…", help="steps in which samplers are compared (default: 5,10,20,50)")
    args = parser.parse_args(argv)
    out = Path(args.out) if args.out else Path(args.picture).with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise BadRequest(f"cannot write {out}: its name must end in .html")
    if out.exists() and not args.force:
        raise BadRequest(f"{out} exists already; --force replaces it")
    steps = _steps(args.steps)

    from sfumato.pipeline.picture import read

    stored = read(args.picture)
    if stored.picture.request.n != 1:
        raise BadRequest(f"{args.picture} is a grid of {stored.picture.request.n} pictures: explain one of them")

    from sfumato.inside.compute import fitted
    from sfumato.inside.report import report
    from sfumato.pipeline.pipeline import load

    pipe = load(args.model or Path(stored.picture.model).name)
    if pipe.model.hash != stored.picture.model_hash:
        raise BadCheckpoint(
            f"{args.picture} was made by model {stored.picture.model!r} with hash {stored.picture.model_hash[:12]}, "
            f"but {pipe.model.name!r} has {pipe.model.hash[:12]}: point at the right file with --model"
        )
    source = stored.picture.pixels
    if args.noise:
        source = fitted(_open(args.noise), stored.picture.request.resolve(pipe.model))
    more: dict[str, Any] = {} if steps is None else {"steps": steps}
    page = report(pipe, stored.picture, source, tell=_tell, **more)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    write_atomically(out, page.encode(), overwrite=args.force)
    print(out)
    return 0


def _tell(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what}: {done} of {total} steps")
        sys.stderr.flush()


def _steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(p.strip().isdecimal() and 1 <= int(p) <= 500 for p in parts) or len(parts) > 8:
        raise BadRequest(f"--steps must be up to 8 whole numbers from 1 to 500 with commas between, not {text!r}")
    return tuple(sorted({int(p) for p in parts}))


def _open(path: str) -> Any:
    from PIL import Image

    from sfumato.pipeline.picture import MAX_PIXELS

    try:
        image = Image.open(path, formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise BadRequest(f"{path}: {image.width}x{image.height} pixels are more than are read")
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, BadRequest):
            raise
        raise BadRequest(f"{path}: no picture that can be read") from None
    return image
