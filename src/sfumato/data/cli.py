"""``sfumato data``: look at a data set, or rebuild the corpus from public packages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import Parser, print_json, printable
from sfumato.errors import BadData, BadRequest

if TYPE_CHECKING:
    from sfumato.data.check import Findings

SHOWN = 20  # bad files and duplicates that are printed; --json lists all


def main(argv: list[str]) -> int:
    """Run ``sfumato data`` with its arguments and return the exit code; raises SfumatoError for bad input."""
    parser = Parser(prog="sfumato data", description="Look at data, or prepare them.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    sub = commands.add_parser("check", help="count, and list what is bad", description=_check.__doc__)
    sub.add_argument("path", metavar="PATH", help="folder of captioned pictures, .parquet or .tar; or: sample")
    sub.add_argument(
        "--captions", default="auto", help="plain, template, none or field:COLUMN (default: what there is)"
    )
    sub.add_argument("--sheet", metavar="FILE.png", help="also draw a contact sheet")
    sub.add_argument("--force", action="store_true", help="replace the sheet if it exists")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.set_defaults(run=_check)

    sub = commands.add_parser("prepare", help="rebuild a corpus from public packages", description=_prepare.__doc__)
    sub.add_argument("recipe", metavar="RECIPE", help="such as recipes/emoji.yaml")
    sub.add_argument("--out", metavar="DIR", required=True, help="where packages, corpus and manifest go")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes that render (default: 1)")
    sub.set_defaults(run=_prepare)
    args = parser.parse_args(argv)
    return args.run(args)


def _check(args: argparse.Namespace) -> int:
    """Look at every picture and caption. Exit code 0 if all are well, 4 if any is bad."""
    from sfumato.data.check import check, contact_sheet
    from sfumato.data.config import DataConfig
    from sfumato.data.sources import open_source
    from sfumato.files import check_target, make_folder, write_atomically

    sheet = None if args.sheet is None else Path(args.sheet)
    if sheet is not None:
        check_target(sheet, ".png", overwrite=args.force)
    config = DataConfig(path=args.path, captions="plain" if args.captions == "auto" else args.captions)
    source = open_source(config.resolve(Path()))
    captions = args.captions
    if captions == "auto":
        words = "caption" in source.columns or any(r.unreadable for r in source.records)
        captions = "plain" if words else "none"
    findings = check(source, captions)
    if sheet is not None:
        make_folder(sheet.parent)
        write_atomically(sheet, contact_sheet(findings.cells))
    if args.json:
        print_json(findings.to_dict())
    else:
        _print(findings, captions)
        if sheet is not None:
            print(f"sheet         {sheet}")
    return BadData.exit_code if findings.report.bad else 0


def _print(findings: Findings, captions: str) -> None:
    facts = findings.to_dict()
    print(f"pictures      {facts['total']}: {facts['ok']} good, {len(facts['bad'])} bad")
    if facts["ignored"]:
        print(f"ignored       {', '.join(f'{n} {printable(s)}' for s, n in findings.ignored.most_common(8))}")
    if sizes := facts["sizes"]:
        for side in ("width", "height"):
            print(f"{side:<14}{sizes[side]['min']}–{sizes[side]['max']}, median {sizes[side]['median']}")
        print(f"square        {sizes['square']}")
    for title, groups in (("same file", findings.same_file), ("same pixels", findings.same_pixels)):
        more = sum(len(g) - 1 for g in groups)
        print(f"{title:<14}{more} repeat another" if more else f"{title:<14}none twice")
        for group in groups[:SHOWN]:
            print(f"              {', '.join(map(printable, group[:4]))}" + (" …" if len(group) > 4 else ""))
    words: dict[str, Any] = facts["captions"]
    if captions == "none":
        print("captions      none")
    else:
        spread = words["words"]
        print(f"captions      {words['count']}, {words['different']} different, {words['empty']} empty")
        print(
            f"words         {spread['min']}–{spread['max']}, median {spread['median']:g}, "
            f"{words['vocabulary']} different"
        )
        print(f"commonest     {', '.join(f'{printable(w)} {n}' for w, n in words['commonest_words'])}")
    for column, values in facts["columns"].items():
        print(f"{printable(column):<14}{', '.join(f'{printable(v)} {n}' for v, n in values.items())}")
    for b in findings.report.bad[:SHOWN]:
        print(f"bad           {printable(b.name)}: {printable(b.reason)}")
    if len(findings.report.bad) > SHOWN:
        print(f"              … and {len(findings.report.bad) - SHOWN} more (--json lists all)")


def _prepare(args: argparse.Namespace) -> int:
    """Fetch pinned packages by npm, render and join them, and compare the result with what the recipe expects."""
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext

    from sfumato.data.emoji.build import load_config, prepare

    if args.workers < 1:
        raise BadRequest(f"--workers must be at least 1, not {args.workers}")
    config, out = load_config(Path(args.recipe)), Path(args.out)
    if out.exists() and not out.is_dir():
        raise BadRequest(f"{out} is a file: --out names a folder")
    with ProcessPoolExecutor(args.workers) if args.workers > 1 else nullcontext() as pool:
        manifest = prepare(config, out, lambda text: print(text, file=sys.stderr, flush=True), pool)
    print(out / manifest["file"]["name"])
    print(f"file          sha256 {manifest['file']['sha256']}")
    differing = []
    for what in ("columns_sha256", "pixels_sha256"):
        wanted = config.expect.get(what)
        verdict = (
            "as expected" if manifest[what] == wanted else "nothing to compare with" if wanted is None else "differs"
        )
        differing += [what] if verdict == "differs" else []
        print(f"{what.split('_')[0]:<14}sha256 {manifest[what]}  {verdict}")
    if differing:
        raise BadData(f"{out} is whole, but its {' and '.join(differing)} are not those that {args.recipe} expects")
    return 0
