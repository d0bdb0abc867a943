"""``sfumato samplers``: samplers, spacings and guidance, with other tools' names for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfumato.cli.flags import add_json_flag
from sfumato.console import Parser, print_json


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato samplers`` and return the exit code."""
    parser = Parser(
        prog="sfumato samplers",
        description="List samplers, spacings and guidance, with other tools' names for them.",
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)

    from sfumato.pipeline.menu import menu

    choices = menu()
    if args.json:
        print_json(choices)
        return 0
    print("samplers            order  calls  noise  what it does (other names)")
    for s in choices["samplers"]:
        noise = "yes" if s["stochastic"] else ""
        print(f"  {s['name']:<18} {s['order'] or '-':>3} {s['calls']:>6}    {noise:<4} {_described(s)}")
    print("\nspacings")
    for s in choices["spacings"]:
        print(f"  {s['name']:<18} {_described(s)}")
    print("\nguidance")
    for g in choices["guidance"]:
        print(f"  {g['name']:<18} {g['summary']}")
    return 0


def _described(thing: dict[str, Any]) -> str:
    return thing["summary"] + (f" ({', '.join(thing['aliases'])})" if thing["aliases"] else "")
