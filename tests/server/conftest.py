"""Servers for the tests: one that they share, and those of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import START, Serve, Server, serving, start, until


@pytest.fixture(scope="session")
def model_file(make_tiny_file: Callable[[int], Path]) -> Path:
    return make_tiny_file(0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Iterator[Server]:
    """A tiny server for tests that leave it as it was."""
    with serving(tmp_path_factory.mktemp("shared") / "serve", model_file, "sfumato.families:load") as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path, model_file: Path) -> Iterator[Serve]:
    """Start servers of a test's own: serve(engine, *flags, again=...)."""
    servers: list[Server] = []

    def run(
        engine: str = "sfumato.families:load",
        *flags: str,
        model: Path = model_file,
        ready: bool = True,
        **settings: Any,
    ) -> Server:
        server = start(tmp_path / "serve", model, engine, *flags, **settings)
        servers.append(server)
        if ready:
            until(lambda: server.http.get("/readyz").status_code == 200, START)
        return server

    yield run
    for server in servers:
        server.close()
