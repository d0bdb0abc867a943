"""``sfumato info``: what a picture or a weight file says of itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli.flags import add_json_flag, add_reading_flags
from sfumato.console import Parser, print_json, printable
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.files import climbs

if TYPE_CHECKING:
    from sfumato.checkpoints.tensors import Header


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato info`` and return the exit code; raises SfumatoError for bad input."""
    parser = Parser(prog="sfumato info", description="Show what a picture or a weight file says of itself.")
    parser.add_argument("what", metavar="MODEL|PICTURE")
    add_reading_flags(parser)
    add_json_flag(parser)
    args = parser.parse_args(argv)

    from sfumato.pipeline.picture import read

    path = Path(args.what)
    if _is_picture(path):
        if args.variant is not None or args.allow_pickle:
            flag = "--allow-pickle" if args.variant is None else "--variant"
            raise BadRequest(f"{flag} says how weights are read, and {path} is a picture: leave it out")
        stored = read(path)
        p = stored.picture
        facts: dict[str, Any] = {
            "picture": str(path),
            "size": f"{p.pixels.shape[1]}x{p.pixels.shape[0]}",
            "scale": stored.scale,
            "model": p.model,
            "model_hash": p.model_hash,
            "request": p.request.to_dict(),
            "made_with": dict(p.made_with),
            **({"ingredients": {str(i): i.hash for i in p.ingredients}} if p.ingredients else {}),
            **({"warnings": list(p.warnings)} if p.warnings else {}),
        }
    else:
        facts = _model_facts(args)
    if args.json:
        print_json(facts)
    else:
        _print_facts(facts)
    return 0


def _is_picture(path: Path) -> bool:
    from sfumato.pipeline.picture import is_png

    if climbs(path) and path.suffix.lower() != ".png":
        return False
    try:
        return path.is_file() and is_png(path)
    except (OSError, ValueError):  # a name may be too long for a file's, or hold a zero byte
        return False


def _model_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the headers of weight files say; no weights are read."""
    from sfumato.checkpoints.formats import weights_header
    from sfumato.families import describe, locate

    path = locate(args.what, args.variant)
    how = {"variant": args.variant, "allow_pickle": args.allow_pickle}
    if path.is_dir():
        return {"model": str(path), **describe(path, **how)}
    header = weights_header(path, allow_pickle=args.allow_pickle)
    facts = {"model": str(path), **_header_facts(header)}
    if not any(key.startswith("sfumato-") for key in header.metadata):
        try:
            facts |= describe(path, **how)
        except BadCheckpoint as e:  # any file of tensors may be looked at
            facts["family"] = str(e)
    for key, text in header.metadata.items():
        if key.startswith("sfumato-"):
            facts["format"] = key
            try:
                own = json.loads(text)
                facts |= {"card": own["card"], "config": own["config"]}
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise BadCheckpoint(f"{path}: its configuration cannot be read") from e
        else:
            facts.setdefault("metadata", {})[key] = text if len(text) <= 200 else text[:200] + "..."
    return facts


def _header_facts(header: Header) -> dict[str, Any]:
    return {
        "bytes": header.size,
        "tensors": len(header.tensors),
        "parameters": header.parameters,
        "dtypes": ", ".join(sorted({t.dtype for t in header.tensors.values()})),
    }


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(indent + printable(str(key)))
            _print_facts(value, indent + "  ")
        elif value not in (None, "", {}):
            print(indent + printable(f"{key:<{max(1, 18 - len(indent))}} {value}"))
