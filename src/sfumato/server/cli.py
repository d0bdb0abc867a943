"""``sfumato serve``: flags, the socket, signals."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import Parser
from sfumato.errors import BadRequest, NoResources
from sfumato.families.flags import add_addition_flags, additions_of
from sfumato.server.settings import PORT, Limits, Settings

if TYPE_CHECKING:
    from sfumato.server.context import Context

TOKEN = "SFUMATO_TOKEN"
INSTALL = 'the server is not installed: pip install "sfumato[server]"'
HELP = {
    "pixels": "width × height of a picture",
    "steps": "steps from noise to picture",
    "n": "pictures of one request",
    "work": "pixels × steps × n of one request",
    "queue": "jobs that wait",
    "uploads": "bytes of kept pictures that clients sent",
}


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop."""
    args = _parser().parse_args(argv)
    settings = settings_of(args)
    settings.additions.check()
    try:
        from sfumato.server.app import build_app
        from sfumato.server.context import Context
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("sfumato"):
            raise
        raise NoResources(f"{INSTALL} ({e.name} is missing)") from None
    if args.ray:
        from sfumato.server import on_ray

        return on_ray.main(settings)
    from sfumato.server import logs

    logs.set_up()
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadRequest(f"cannot use the folder {settings.folder}: {e.strerror}") from None
    listener = _listen(settings)
    context = Context(settings)
    for source in context.sources.values():
        from sfumato.families import locate

        if settings.loader == Settings.loader:
            locate(source)
    return asyncio.run(_serve(build_app(context), context, listener))


def settings_of(args: argparse.Namespace) -> Settings:
    """Read the settings from parsed flags and the environment; raises BadRequest."""
    return Settings(
        folder=Path(args.folder),
        models=tuple(args.model),
        additions=additions_of(args),
        host=args.host,
        port=args.port,
        hosts=tuple(args.allow_host),
        origins=tuple(args.allow_origin),
        public_url=args.public_url,
        token=_token(args.token_file),
        database=args.database,
        limits=Limits(**{f.name: getattr(args, f"max_{f.name}") for f in fields(Limits)}),
        batch=args.batch,
        workers=args.workers,
        threads=args.threads,
        drain=args.drain,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sfumato serve", description="Serve pictures over HTTP.")
    add = parser.add_argument
    add("--model", metavar="M", action="append", default=[], help="weight file or name of a model; may be given again")
    add_addition_flags(add)
    add(
        "--folder",
        metavar="DIR",
        default="outputs/serve",
        help="where pictures and queue live (default: outputs/serve)",
    )
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", metavar="P", type=int, default=PORT, help=f"port to listen on, 0 for any (default: {PORT})")
    add("--allow-host", metavar="NAME", action="append", default=[], help="a further name of this server")
    add("--allow-origin", metavar="URL", action="append", default=[], help="pages of it may use the API (CORS)")
    add("--public-url", metavar="URL", help="where clients find this server behind a proxy")
    add("--token-file", metavar="FILE", help=f"file with the token that clients must show (or set {TOKEN})")
    add("--database", metavar="URL", help="SQLAlchemy URL of the queue (default: SQLite in the folder)")
    add(
        "--batch",
        metavar="N",
        type=int,
        default=Settings.batch,
        help=f"pictures of all jobs in one call of the network (default: {Settings.batch})",
    )
    add("--workers", metavar="N", type=int, default=1, help="worker processes (default: 1)")
    add("--threads", metavar="N", type=int, default=0, help="threads of each worker (default: the cores shared evenly)")
    add(
        "--drain",
        metavar="S",
        type=float,
        default=Settings.drain,
        help=f"seconds for running jobs when told to stop (default: {Settings.drain:g})",
    )
    add("--ray", action="store_true", help="deploy on a Ray cluster, --workers replicas of one worker each")
    for f in fields(Limits):
        default: Any = f.default
        add(f"--max-{f.name}", metavar="N", type=int, default=default, help=f"{HELP[f.name]} (default: {default})")
    return parser


def _token(file: str | None) -> str | None:
    """The token from a file or the environment, never from the command line, which others can read."""
    if file is None:
        source, token = TOKEN, os.environ.get(TOKEN, "").strip()
        if not token:
            return None
    else:
        source = f"the token file {file}"
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise BadRequest(f"{source} cannot be read") from None
    if not 16 <= len(token) <= 1000 or not token.isascii() or not token.isprintable():
        raise BadRequest(f"{source} must hold one token of 16 to 1000 printable ASCII characters")
    return token


def _listen(settings: Settings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as e:
        raise BadRequest(f"cannot listen on {settings.host} port {settings.port}: {e.strerror or e}") from None


async def _serve(app: Any, context: Context, listener: socket.socket) -> int:
    import uvicorn

    from sfumato.server.connection import Connection
    from sfumato.server.logs import log
    from sfumato.server.settings import HEADER_BYTES

    config = uvicorn.Config(
        app, log_config=None, access_log=False, http=Connection, ws="none", lifespan="on", server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=5,
        timeout_keep_alive=context.settings.idle,
    )  # fmt: skip
    server = uvicorn.Server(config)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    loop, signals = asyncio.get_running_loop(), 0

    async def drain() -> None:
        await context.drain()
        server.should_exit = True

    def stop() -> None:
        nonlocal signals
        signals += 1
        log("told to stop", times=signals)
        if signals == 1:
            draining.append(asyncio.ensure_future(drain()))
        else:
            server.should_exit = server.force_exit = True

    def give_up() -> None:
        server.should_exit = True

    draining: list[asyncio.Future[None]] = []
    context.on_failure = give_up
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    print(f"sfumato serves on {url}", flush=True)
    log("listening", url=url, batch=context.settings.batch, workers=context.settings.workers)
    await server._serve([listener])  # `serve` would take the signals for itself
    if context.failure is not None:
        raise context.failure
    return 0
