"""The ``sfumato`` command: one module per command, imported when it is called, so that help is quick.

Exit codes: 0 done, 1 replayed pixels differ, 2 bad request, 3 bad checkpoint, 4 bad data, 5 no resources,
130 and 143 interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

from sfumato.console import Parser, printable
from sfumato.errors import BadRequest, NoResources, SfumatoError, nearest

COMMANDS = {  # name → module whose ``main(argv) -> int`` reads the command's flags, and what it does
    "generate": ("sfumato.cli.generate", "make pictures from words"),
    "interpolate": ("sfumato.cli.interpolate", "make pictures on the way from one prompt to another"),
    "replay": ("sfumato.cli.replay", "make a picture again from the request inside its PNG, and compare"),
    "info": ("sfumato.cli.info", "show what a picture or a weight file says of itself"),
    "explain": (
        "sfumato.cli.explain",
        "look inside a picture: its path, its words, guidance, samplers",
    ),
    "samplers": ("sfumato.cli.samplers", "list samplers, spacings and guidance, with other tools' names for them"),
    "search": ("sfumato.search", "find pictures by words"),
    "train": ("sfumato.training.cli", "train a model by a recipe, or on a folder of pictures"),
    "evaluate": ("sfumato.evaluation.cli", "measure a model against real pictures"),
    "data": ("sfumato.data.cli", "check a data set, or rebuild the corpus"),
    "convert": ("sfumato.cli.convert", "turn a published folder into a single file, or the other way"),
    "serve": ("sfumato.server.cli", "serve pictures over HTTP"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = _take_flag(argv, "--debug")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt's letters never stop a terminal that lacks them
            stream.reconfigure(errors="backslashreplace")
    with _terminable():
        try:
            code = _run(argv)
            sys.stdout.flush()
            return code
        except SfumatoError as e:
            if debug:
                raise
            return _fail(str(e), e.exit_code)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except _Terminated:
            return _fail("terminated", 143)
        except BrokenPipeError:  # the reader of our output has seen enough
            _close_output()
            return 0
        except Exception as e:
            if debug:
                raise
            if isinstance(e, MemoryError):
                return _fail("out of memory", NoResources.exit_code)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                _close_output()
                return _fail(str(e.strerror), NoResources.exit_code)
            return _fail(f"unexpected {type(e).__name__}: {e} (--debug shows where)", 1)


def _run(argv: list[str]) -> int:
    try:
        if argv and argv[0] in COMMANDS:
            return import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        return _without_command(argv)
    except SystemExit as e:  # argparse ends so after help
        return e.code if isinstance(e.code, int) else 0


def _without_command(argv: list[str]) -> int:
    """Help, the version, or what is wrong."""
    if argv and not argv[0].startswith("-"):
        raise BadRequest(f"no command {argv[0][:40]!r}{nearest(argv[0][:40], list(COMMANDS))}; see `sfumato --help`")
    parser = Parser(prog="sfumato", description="Words into pictures by diffusion.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show where an error came from (with any command)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if not parser.parse_args(argv).version:
        parser.error("a command is missing")
    import sfumato

    print(f"sfumato {sfumato.__version__}")
    return 0


def _close_output() -> None:
    """Send what is left to nowhere, lest the interpreter stumble over it on its way out."""
    with suppress(OSError, ValueError):  # it may be no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"sfumato: {printable(' '.join(message.split()))}\n")
    return code


def _take_flag(argv: list[str], flag: str) -> bool:
    end = argv.index("--") if "--" in argv else len(argv)
    taken = flag in argv[:end]
    argv[:end] = [a for a in argv[:end] if a != flag]
    return taken


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files and the terminal are cleaned up."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
