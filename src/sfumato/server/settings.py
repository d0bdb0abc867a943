"""What a server is started with."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sfumato.errors import BadRequest
from sfumato.families.additions import Additions

PORT = 7860  # where programs look for a server of pictures
JSON_BYTES = 1 << 20
UPLOAD_BYTES = 32 << 20
JSON_PICTURE_BYTES = 44 << 20  # an upload in base64, and its request
HEADER_BYTES = 16 << 10
NESTING = 32
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")
PUBLIC = re.compile(ORIGIN.pattern + r"(/[A-Za-z0-9._~-]+)*/?")


@dataclass(frozen=True)
class Limits:
    """What may be asked for at most.

    Args:
        pixels: width × height of one picture of a request; a model's own bound may be lower.
        steps: steps from noise to picture.
        n: pictures.
        work: pixels × steps × n.
        queue: jobs that wait.
        uploads: bytes of the pictures that clients sent and the server keeps.
    """

    pixels: int = 1 << 22
    steps: int = 200
    n: int = 32
    work: int = 1 << 31
    queue: int = 256
    uploads: int = 2 << 30


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    Args:
        folder: where pictures, uploads and the queue live.
        models: names or files of the models to serve, the default first; empty: the embedded ones.
        additions: what to add to the one model, such as LoRAs and ControlNets.
        host, port: where to listen; port 0 takes any free one.
        hosts: further names under which the server may be addressed.
        origins: pages of other servers, as ``https://host``, whose scripts may use the API.
        public_url: where clients find the server behind a proxy, for URLs in answers; its name is one of ``hosts`` too,
            and its path stands before every route, whether the proxy passes it on or not.
        database: SQLAlchemy's URL of the queue; None: SQLite in the folder.
        batch: pictures of all jobs that share a call of the network; 1 makes them bitwise what they are alone.
        workers: worker processes; ``threads`` each, 0: the cores shared evenly.
        loader: ``module:function`` that turns a model's name into a model, in the worker.
        lease: seconds after which another server may take a job whose server is silent.
        drain: seconds that running jobs get to finish when the server is told to stop.
        idle: seconds after which a connection is closed whose client neither sends nor takes anything.
    """

    folder: Path
    models: tuple[str, ...] = ()
    additions: Additions = field(default_factory=Additions)
    host: str = "127.0.0.1"
    port: int = PORT
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    public_url: str | None = None
    token: str | None = field(default=None, repr=False)
    database: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    batch: int = 16
    workers: int = 1
    threads: int = 0
    loader: str = "sfumato.families:load"
    lease: float = 30.0
    drain: float = 60.0
    idle: int = 75

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise BadRequest(
                f"{self.host} can be reached by other machines: set a token, by SFUMATO_TOKEN or --token-file"
            )
        if self.additions and len(self.models) != 1:
            n = len(self.models) or "none"
            raise BadRequest(f"LoRAs, ControlNets and the like are added to one model: name one (--model M), not {n}")
        for url in self.origins:
            if not ORIGIN.fullmatch(url):
                raise BadRequest(f"--allow-origin must be an address such as https://pictures.example.org, not {url!r}")
        url = self.public_url
        if url is not None and (not PUBLIC.fullmatch(url) or {".", ".."} & set(urlsplit(url).path.split("/"))):
            raise BadRequest(f"--public-url must be an address such as https://example.org/pictures, not {url!r}")
        for name, low, high in (("batch", 1, 256), ("workers", 1, 64), ("threads", 0, 1024), ("port", 0, 65535)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadRequest(f"{name} must be a whole number from {low} to {high}, not {value}")
        for name, value in vars(self.limits).items():
            if value < 1:
                raise BadRequest(f"the limit on {name} must be at least 1, not {value}")

    @property
    def names(self) -> set[str]:
        """The names under which the server answers."""
        public = None if self.public_url is None else urlsplit(self.public_url).hostname
        names = ("localhost", "127.0.0.1", "::1", self.host, *self.hosts, *([public] if public else ()))
        return {name.lower() for name in names}

    @property
    def prefix(self) -> str:
        """The path before every route, as clients see them: "" or "/…", without an end slash."""
        return "" if self.public_url is None else urlsplit(self.public_url).path.rstrip("/")

    @property
    def public_origin(self) -> str | None:
        """``public_url`` without its path."""
        return None if self.public_url is None else "/".join(self.public_url.split("/")[:3])

    @property
    def pictures(self) -> Path:
        """The gallery's folder."""
        return self.folder / "pictures"

    @property
    def uploads(self) -> Path:
        """The folder of pictures that clients sent."""
        return self.folder / "uploads"

    @property
    def database_url(self) -> str:
        """The queue's URL."""
        return self.database or f"sqlite:///{self.folder / 'queue.db'}"

    @property
    def threads_per_worker(self) -> int:
        """Threads for one worker's arithmetic."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores // self.workers)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
