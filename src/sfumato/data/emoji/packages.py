"""npm packages of pinned version and checked integrity, read without being unpacked."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import BadData, NoResources

NAME = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]*")


@dataclass(frozen=True)
class Package:
    """A package by name, version and the registry's ``sha512-…`` of its archive."""

    name: str
    version: str
    integrity: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not VERSION.fullmatch(self.version):
            raise BadData(f"{self.name!r} {self.version!r} is no npm package and version")

    @property
    def file_name(self) -> str:
        """What ``npm pack`` calls the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's archive in a folder, fetched by the npm client unless it is there already.

    Raises NoResources if npm is missing or fails, BadData if the bytes are not those that were pinned.
    """
    path = folder / package.file_name
    if path.exists() and _integrity(path) == package.integrity:
        return path
    if shutil.which("npm") is None:
        raise NoResources(
            "npm is needed to fetch the drawings: install Node.js, or put the .tgz archives in " + str(folder)
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    command = [
        "npm",
        "pack",
        wanted,
        "--ignore-scripts",
        "--loglevel=error",
        "--pack-destination",
        str(folder.resolve()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.exists():
        lines = [re.sub(r"^npm (error|ERR!) ?", "", line).strip() for line in done.stderr.splitlines()]
        reason = "; ".join(line for line in lines if line and "complete log" not in line)[:300]
        raise NoResources(f"npm could not fetch {wanted}: {reason or 'no reason given'}")
    if (found := _integrity(path)) != package.integrity:
        path.unlink()
        raise BadData(f"{wanted} is not the package that was pinned: its integrity is {found}")
    return path


def read_members(archive: Path, pattern: str) -> dict[str, bytes]:
    """Return the files of an archive whose path inside the package matches a pattern."""
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes()), mode="r:gz") as tar:
        members = ((m.name.partition("/")[2], m) for m in tar if m.isfile())
        return {name: f.read() for name, m in members if re.fullmatch(pattern, name) and (f := tar.extractfile(m))}


def _integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
