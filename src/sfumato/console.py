"""What commands share: flags whose faults are told in one line, and text that no terminal obeys."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from sfumato.errors import BadRequest


class _Once(argparse.Action):
    """Store a value, and refuse a second one: which of them was meant?"""

    given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if self.given and self.option_strings:
            raise argparse.ArgumentError(self, "is given twice")
        self.given = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser that takes no flag by a part of its name or twice, and for which wrong flags are bad requests."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        for name in (None, "store"):
            self.register("action", name, _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as ``argparse`` does, with no flag given yet."""
        for action in self._actions:
            if isinstance(action, _Once):
                action.given = False
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise BadRequest with what argparse has to say."""
        raise BadRequest(f"{message}; see `{self.prog} --help`")


def printable(text: str) -> str:
    """Text from a file or a user with its control characters shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value))
