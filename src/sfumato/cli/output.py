"""Where a command's files go, and what it says of them."""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import print_json, printable
from sfumato.errors import BadRequest
from sfumato.files import cannot_write, write_atomically

if TYPE_CHECKING:
    from sfumato.pipeline.picture import Picture
    from sfumato.pipeline.request import Request
    from sfumato.pixels import Pixels


@dataclass(frozen=True)
class Target:
    """Where files will go; that they can be written is known before the work starts."""

    folder: Path
    name: str | None  # None: named after prompt and seed
    files: int
    overwrite: bool

    @classmethod
    def plan(cls, out: str | None, force: bool, *, files: int, suffix: str = ".png") -> Target:
        """Choose folder and name; raises BadRequest if they cannot be written or exist without ``force``."""
        if out is not None and (not out or "\0" in out):
            raise BadRequest("the output path is empty or no path")
        path = Path("outputs" if out is None else out)
        named = out is not None and not os.path.isdir(path) and (path.suffix != "" or suffix != ".png")
        if named and (path.suffix.lower() != suffix or str(out).endswith(("/", os.sep))):
            raise BadRequest(f"cannot write {path}: its name must end in {suffix}")
        target = cls(path.parent, path.stem, files, force) if named else cls(path, None, files, False)
        for file in [target._path(path.stem, i, suffix) for i in range(files if named else 0)]:
            if _exists(file) and not force:
                raise BadRequest(f"{file} exists already; --force replaces it")
        _check_writable(target.folder)
        return target

    @property
    def file(self) -> Path:
        """The trajectory's file."""
        return self.folder / f"{self.name}.gif"

    def _path(self, stem: str, i: int, suffix: str = ".png") -> Path:
        return self.folder / (f"{stem}{suffix}" if self.files == 1 else f"{stem}-{i + 1}{suffix}")

    def write(self, picture: Picture, i: int, scale: int | None) -> Path:
        """Write picture i; a name of our own choice never meets an existing file."""
        self._make_folder()
        scale = scale or picture.viewing_scale
        if self.name is not None:
            return picture.save(self._path(self.name, i), scale=scale, overwrite=self.overwrite)
        stem, again = _stem(picture.request), 1
        while True:
            path = self.folder / (f"{stem}.png" if again == 1 else f"{stem}-{again}.png")
            if not os.path.lexists(path):
                return picture.save(path, scale=scale, overwrite=False)
            again += 1

    def write_film(self, frames: Sequence[Pixels], scale: int) -> None:
        """Write frames (H, W, 3) as an animated GIF that rests on the last."""
        from PIL import Image

        from sfumato.pipeline.picture import enlarge

        self._make_folder()
        images = [Image.fromarray(enlarge(f, scale)) for f in frames]
        durations = [max(40, min(200, 4000 // len(images)))] * (len(images) - 1) + [2000]
        data = io.BytesIO()
        images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
        write_atomically(self.file, data.getvalue(), overwrite=self.overwrite)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise cannot_write(self.folder, e) from e


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as e:  # a name that is too long, a folder that is a file
        raise cannot_write(path, e) from e
    return True


def _check_writable(folder: Path) -> None:
    """Try to create a file where the folder is, or where it would be made."""
    place = folder
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        trial = place / f".sfumato-{secrets.token_hex(4)}.part"
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as e:
        raise cannot_write(folder, e) from e


def _stem(request: Request) -> str:
    words = "".join(c if c.isalnum() else " " for c in request.prompt.lower()).split()
    slug = "-".join(words)[:40].strip("-") or "picture"
    variation = f"-{request.variation_seed}" if request.variation_strength > 0 else ""
    return f"{slug}-{request.seed}{variation}" + (f"-grid-{request.n}" if request.n > 1 else "")


def report(
    pictures: Sequence[Picture],
    paths: Sequence[Path],
    started: float,
    *,
    as_json: bool,
    film: Path | None = None,
    note: str = "",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print what was written, by which model and in how many seconds since ``started``; ``more`` goes into the JSON."""
    seconds = time.perf_counter() - started
    first = pictures[0]
    if as_json:
        rows = [{"path": str(path), "seed": p.request.seed} for path, p in zip(paths, pictures, strict=True)]
        facts = {
            "pictures": rows,
            "model": {"name": first.model, "hash": first.model_hash},
            "request": first.request.to_dict(),
            "seconds": round(seconds, 3),
        }
        print_json(facts | ({} if film is None else {"trajectory": str(film)}) | dict(more or {}))
        return
    for path, p in zip(paths, pictures, strict=True):
        variation = f", variation {p.request.variation_seed}" if p.request.variation_strength > 0 else ""
        print(printable(f"{path}  seed {p.request.seed}{variation}"))
    if film is not None:
        print(printable(str(film)))
    parts = [f"model {first.model} ({first.model_hash[:12]})", f"{seconds:.1f} s", note]
    print(printable(", ".join(p for p in parts if p)))
