"""``sfumato replay``: a picture made again from the request inside its PNG, and compared."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.drawing import draw
from sfumato.cli.flags import add_model_flags, add_output_flags, scale_of
from sfumato.cli.loading import additions_of, load_pipeline
from sfumato.cli.output import Target, report
from sfumato.console import Parser
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.request import Request

if TYPE_CHECKING:
    from sfumato.families.additions import Additions, Ingredient


def main(argv: Sequence[str]) -> int:
    """Run ``sfumato replay`` and return the exit code, 1 if the pixels differ; raises SfumatoError for bad input."""
    started = time.perf_counter()
    parser = Parser(
        prog="sfumato replay", description="Make a picture again from the request inside its PNG, and compare."
    )
    parser.add_argument("picture", metavar="PICTURE.png")
    for f in fields(Request):
        if str(f.type).startswith("PictureFile"):
            parser.add_argument(*f.metadata["flags"], metavar="PICTURE", help=f"where its {f.name} lies now")
    add_model_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)

    import numpy as np

    from sfumato.families import recorded
    from sfumato.pipeline.picture import enlarge, grid, read

    stored = read(args.picture)
    old = stored.picture
    scale = scale_of(args.scale) or stored.scale
    target = Target.plan(args.out, args.force, files=1)
    request = old.request.map_pictures(lambda name, picture: _picture_again(name, picture, args))
    args.model = args.model or recorded(old.model)
    args.dtype = args.dtype or str(old.made_with.get("dtype", "fp32"))
    args.tile = args.tile or (str(old.made_with["tile"]) if "tile" in old.made_with else None)
    pipe = load_pipeline(args, _found(old.ingredients, args), old.made_with.get("threads"))
    if pipe.model.hash != old.model_hash:
        raise BadCheckpoint(
            f"{args.picture} was made by model {old.model!r} with hash {old.model_hash[:12]}, but "
            f"{pipe.model.name!r} has {pipe.model.hash[:12]}: point at the right file with --model"
        )
    pictures, _ = draw(pipe, request)
    new = pictures[0] if request.n == 1 else grid(pictures)
    same = np.array_equal(enlarge(new.pixels, stored.scale), stored.pixels)
    path = target.write(new, 0, scale)
    changes = [
        f"{what} {old.made_with[what]} is now {now}"
        for what, now in new.made_with.items()
        if old.made_with.get(what, now) != now
    ]
    verdict = "pixels equal" if same else "pixels differ" + (f" ({', '.join(changes)})" if changes else "")
    report([new], [path], started, as_json=args.json, note=verdict, more={"equal": same, "changes": changes})
    return 0 if same else 1


def _picture_again(name: str, picture: PictureFile, args: argparse.Namespace) -> PictureFile:
    """The picture that a request started from: where it was said to lie, where it lay, or beside the result."""
    given: str | None = getattr(args, name)
    if given is not None:
        return picture.with_data(name, PictureFile.open(name, given))
    known = Path(picture.name)
    inside = not known.is_absolute() and ".." not in known.parts and picture.name != ""
    places = [known, Path(args.picture).parent / known.name] if inside else []
    for place in places:
        if place.is_file():
            return picture.with_data(name, PictureFile.open(name, place))
    raise BadRequest(
        f"{args.picture} was made from a picture that is not here: {known.name or 'one without a name'}, "
        f"SHA-256 {picture.sha256[:12]}…; say where it lies with --{name.replace('_', '-')}"
    )


def _found(ingredients: Sequence[Ingredient], args: argparse.Namespace) -> Additions:
    """The files of a picture's ingredients, known by their content: those that flags name, and those of the same name
    beside the picture, beside the model, or here. Raises BadCheckpoint for those that are not there.
    """
    from sfumato.families.additions import NETWORKS, Additions, content_hash

    given = additions_of(args)
    named = [path for path, _ in given.loras] + list(given.embeddings.values())
    named += [path for kind in NETWORKS if (path := getattr(given, kind)) is not None]
    beside = [Path(), Path(args.picture).parent, Path(args.model or "").parent]
    beside += [] if given.ip_adapter is None else [given.ip_adapter.parent]
    hashes = {path: content_hash(path) for path in named}
    places: dict[Ingredient, Path] = {}
    for it in ingredients:
        for folder in beside:
            if it.name == Path(it.name).name and (folder / it.name).exists() and folder / it.name not in hashes:
                hashes[folder / it.name] = content_hash(folder / it.name)
        found = next((path for path, hash in hashes.items() if hash == it.hash), None)
        if found is None:
            flag = {"lora": "--lora FILE", "embedding": f"--embedding {it.word}=FILE", "controlnet": "--control FILE"}
            usual = f"--{it.kind.replace('_', '-')} FILE"
            raise BadCheckpoint(
                f"{args.picture} was made with the {it} (sha256 {it.hash[:12]}), which is not here: "
                f"name it with {flag.get(it.kind, usual)}"
            )
        places[it] = found
    if unused := [p for p in named if p not in places.values()]:
        raise BadRequest(f"{args.picture} was not made with {unused[0]}: leave it out")
    parts = {it.kind: path for it, path in places.items()}
    return Additions.of(
        [(path, it.weight or 0.0) for it, path in places.items() if it.kind == "lora"],
        {it.word or "": path for it, path in places.items() if it.kind == "embedding"},
        **{kind: parts.get(kind) for kind in NETWORKS},
    )
