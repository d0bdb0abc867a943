"""Where a command's files go, and what it says of them."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import print_json, printable
from sfumato.errors import BadRequest
from sfumato.files import check_target, check_writable, make_folder, write_atomically

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
    suffix: str = ".png"

    @classmethod
    def plan(cls, out: str | None, force: bool, *, files: int) -> Target:
        """Choose folder and name of pictures; BadRequest if they cannot be written or exist without ``force``."""
        path = Path("outputs") if out is None else _path(out)
        folder = path.suffix == "" or ((out or "").endswith(("/", os.sep)) and path.suffix.lower() != ".png")
        if out is None or os.path.isdir(path) or folder:
            if force:
                raise BadRequest(f"--force replaces a file, and in a folder ({path}) names are new: leave it out")
            check_writable(path)
            return cls(path, None, files, False)
        return cls._named(out, force, files, ".png")

    @classmethod
    def plan_file(cls, out: str, force: bool, suffix: str) -> Target:
        """The same for one file that its user names."""
        return cls._named(out, force, 1, suffix)

    @classmethod
    def _named(cls, out: str, force: bool, files: int, suffix: str) -> Target:
        path = _path(out)
        if path.suffix.lower() != suffix or out.endswith(("/", os.sep)):
            raise BadRequest(f"cannot write {path}: its name must end in {suffix}")
        target = cls(path.parent, path.stem, files, force, path.suffix)
        for i in range(files):
            check_target(target.path(i), suffix, overwrite=force)
        return target

    def path(self, i: int = 0) -> Path:
        """Where file i of a name that was given goes."""
        return self.folder / (f"{self.name}{self.suffix}" if self.files == 1 else f"{self.name}-{i + 1}{self.suffix}")

    def write(self, picture: Picture, i: int, scale: int | None) -> Path:
        """Write picture i; a name of our own choice never meets an existing file."""
        make_folder(self.folder)
        scale = scale or picture.viewing_scale
        if self.name is not None:
            return picture.save(self.path(i), scale=scale, overwrite=self.overwrite)
        stem, again = _stem(picture.request), 1
        while True:
            path = self.folder / (f"{stem}.png" if again == 1 else f"{stem}-{again}.png")
            if not os.path.lexists(path):
                try:
                    return picture.save(path, scale=scale, overwrite=False)
                except BadRequest:
                    if not os.path.lexists(path):  # else another run took the name meanwhile
                        raise
            again += 1

    def write_film(self, frames: Sequence[Pixels], scale: int) -> None:
        """Write frames (H, W, 3) as an animated GIF that rests on the last."""
        from PIL import Image

        from sfumato.pipeline.picture import enlarge

        images = (Image.fromarray(enlarge(f, scale)) for f in frames)  # one at a time, for memory
        durations = [max(40, min(200, 4000 // len(frames)))] * (len(frames) - 1) + [2000]
        data = io.BytesIO()
        next(images).save(data, "GIF", save_all=True, append_images=images, duration=durations, loop=0)
        self.write_bytes(data.getvalue())

    def write_bytes(self, data: bytes) -> None:
        """Write the one file that was named."""
        make_folder(self.folder)
        write_atomically(self.path(), data, overwrite=self.overwrite)


def _path(out: str) -> Path:
    if not out or "\0" in out:
        raise BadRequest("the output path is empty or no path")
    return Path(out)


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
    films: Mapping[str, Path] | None = None,
    note: str = "",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print what was written, by which model and in how many seconds since ``started``; ``more`` goes into the JSON.

    ``films`` were written besides, each under its flag's name.
    """
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
        print_json(facts | {name: str(path) for name, path in (films or {}).items()} | dict(more or {}))
        return
    for path, p in zip(paths, pictures, strict=True):
        variation = f", variation {p.request.variation_seed}" if p.request.variation_strength > 0 else ""
        print(printable(f"{path}  seed {p.request.seed}{variation}"))
    for film in (films or {}).values():
        print(printable(str(film)))
    parts = [f"model {first.model} ({first.model_hash[:12]})", f"{seconds:.1f} s", note]
    print(printable(", ".join(p for p in parts if p)))
