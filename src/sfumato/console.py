"""What commands share: flags whose faults are told in one line, and text that no terminal obeys."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from sfumato.errors import BadRequest


class Parser(argparse.ArgumentParser):
    """A parser that takes no flag by a part of its name, and for which wrong flags are bad requests like any other."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise BadRequest with what argparse has to say."""
        raise BadRequest(f"{message}; see `{self.prog} --help`")


def printable(text: str) -> str:
    """Text from a file or a user with its control characters shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value))
