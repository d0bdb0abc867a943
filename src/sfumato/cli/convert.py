"""``sfumato convert``: a published folder as a single file, or the other way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.flags import add_reading_flags
from sfumato.console import Parser, printable


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato convert`` and return the exit code; raises SfumatoError for bad input."""
    parser = Parser(prog="sfumato convert", description="Folder to single file, or the other way.")
    parser.add_argument("source", help="a published folder, a single file, or a model's id on the hub")
    parser.add_argument("target", help="where to write the other form; it must not exist")
    add_reading_flags(parser)
    args = parser.parse_args(argv)

    from sfumato.families import locate
    from sfumato.families.convert import convert

    source = locate(args.source, args.variant)
    print(printable(str(convert(source, Path(args.target), args.variant, allow_pickle=args.allow_pickle))))
    return 0
