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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

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
    with _stoppable() as (received, settle):
        try:
            code = _run(argv)
            sys.stdout.flush()
            return code
        except BaseException as e:
            settle()
            if received:  # whatever became of it on its way here
                return _fail(*STOPPED[received[0]])
            if debug and isinstance(e, Exception) and not isinstance(e, BrokenPipeError):
                raise
            return _told(e)


def _told(error: BaseException) -> int:
    """Say in one line what ended a command, and return the exit code."""
    if isinstance(error, SfumatoError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        _close_output()
        return 0
    if isinstance(error, KeyboardInterrupt):
        return _fail(*STOPPED[signal.SIGINT])
    if isinstance(error, MemoryError):
        return _fail("out of memory", NoResources.exit_code)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _close_output()
        return _fail(str(error.strerror), NoResources.exit_code)
    if not isinstance(error, Exception):
        raise error
    return _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


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


STOPPED: dict[int, tuple[str, int]] = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
AGAIN = 1.0  # seconds


class _Interrupted(KeyboardInterrupt):
    """SIGINT arrived. Of a plain one that left an ``exec`` Python dies at the end, though it was caught."""


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _stoppable() -> Iterator[tuple[list[int], Callable[[], None]]]:
    """Turn SIGINT and SIGTERM into exceptions, so that temporary files and the terminal are cleaned up.

    Yields the signals that arrived, and what to call when all is cleaned up: from then on they end the process without
    more words. An exception that lands in a callback, or in an import that tries something else then, is lost: it is
    raised again until it gets through. A signal that the caller had ignored stays so.
    """
    received: list[int] = []
    ours: list[int] = []
    kinds: dict[int, type[BaseException]] = {signal.SIGINT: _Interrupted, signal.SIGTERM: _Terminated}

    def stop(number: int, _: object) -> NoReturn:
        received.append(number)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise kinds[number]

    def again(*_: object) -> None:
        error = sys.exception()
        while error is not None:
            if isinstance(error, (_Interrupted, _Terminated)):
                return  # on its way: something is being cleaned up
            error = error.__context__
        raise kinds[received[0]]

    def settle() -> None:
        for number in ours:
            signal.signal(number, signal.SIG_IGN if number == getattr(signal, "SIGALRM", None) else signal.SIG_DFL)

    handlers: dict[int, Any] = dict.fromkeys(kinds, stop)
    if hasattr(signal, "setitimer"):
        handlers[signal.SIGALRM] = again
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            if before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
                ours.append(number)
    except ValueError:  # not in the main thread
        yield received, settle
        return
    try:
        yield received, settle
    finally:
        if received and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
