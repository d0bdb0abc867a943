"""The pipeline that a command's flags name, or the one that made a picture."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import printable
from sfumato.errors import BadCheckpoint, BadData, BadRequest
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.request import PICTURES, each

if TYPE_CHECKING:
    from sfumato.families.additions import Additions, Ingredient
    from sfumato.pipeline.picture import Picture
    from sfumato.pipeline.pipeline import Pipeline
    from sfumato.pipeline.request import Request


def load_pipeline(args: argparse.Namespace) -> Pipeline:
    """Load the model that the flags name, with what they add to it; raises BadRequest or BadCheckpoint."""
    from sfumato.families.flags import additions_of

    return _load(args, additions_of(args))


def load_recorded(args: argparse.Namespace, old: Picture) -> tuple[Pipeline, Request]:
    """Load the model that made the picture ``args.picture``, and find the pictures that it was made from.

    What its record does not tell the flags do; raises BadRequest or BadCheckpoint if something is another or missing.
    """
    from sfumato.families import keeping, recorded

    for name in PICTURES:
        if getattr(args, name) is not None and getattr(old.request, name) is None:
            raise BadRequest(f"{args.picture} was made without {name}: leave out --{name.replace('_', '-')}")
    given = {name: _given_pictures(name, old.request, args) for name in PICTURES}
    request = old.request.map_pictures(lambda name, picture: _picture_again(name, picture, args, given[name]))
    args.model = args.model or recorded(old.model)
    args.dtype = args.dtype or _recorded(args.picture, old.made_with, "dtype", lambda v: v in keeping.DTYPES)
    args.tile = args.tile or _recorded(args.picture, old.made_with, "tile", lambda v: _is_tile(str(v)))
    pipe = _load(args, _ingredients_again(old.ingredients, args), old.made_with.get("threads"))
    if pipe.model.hash != old.model_hash:
        raise BadCheckpoint(
            f"{args.picture} was made by model {old.model!r} with hash {old.model_hash[:12]}, but "
            f"{pipe.model.name!r} has {pipe.model.hash[:12]}: point at the right file with --model"
        )
    return pipe, request


def _load(args: argparse.Namespace, additions: Additions, threads: object = None) -> Pipeline:
    from sfumato import families

    how: dict[str, Any] = {"dtype": args.dtype or "fp32", "memory": args.memory}
    families.keeping.check(**how)
    if args.tile is not None and not _is_tile(args.tile):
        raise BadRequest(f"--tile must be a whole number of pixels, or 0, not {args.tile[:40]!r}")
    families.locate(args.model, args.variant)  # a wrong name is told at once, torch takes seconds
    additions.check()  # as is a missing file
    with _status(f"loading {args.model or 'the model'}"):
        from sfumato.pipeline.pipeline import Pipeline

        if isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 256:
            import torch

            torch.set_num_threads(threads)  # the order of sums, and so the last bits, may depend on it
        how |= {
            "critic": args.critic,
            "variant": args.variant,
            "allow_pickle": args.allow_pickle,
            "partial": args.partial,
        }
        tile = None if args.tile is None else int(args.tile)
        return Pipeline(families.load(args.model, additions, **how), tile=tile)


def _is_tile(text: str) -> bool:
    return text.isdecimal() and len(text) < 7


def _recorded(
    picture: str, made_with: Mapping[str, str | int], what: str, good: Callable[[object], bool]
) -> str | None:
    """What a picture's record says that it was made with, None if it is silent; BadData if that is none."""
    value = made_with.get(what)
    if value is not None and not good(value):
        raise BadData(f"{picture}: its record of the {what} is damaged ({str(value)[:40]!r}): say it with --{what}")
    return None if value is None else str(value)


def _given_pictures(name: str, request: Request, args: argparse.Namespace) -> dict[str, PictureFile]:
    """The pictures whose places flags tell, by their SHA-256; BadRequest for one that the request did not use."""
    given: str | list[str] | None = getattr(args, name)
    found = [PictureFile.open(name, path) for path in each(given)]
    used = each(getattr(request, name))
    for file in found:
        if file not in used:
            used[0].with_data(name, file)  # raises what is wrong
    return {file.sha256: file for file in found}


def _picture_again(
    name: str, picture: PictureFile, args: argparse.Namespace, given: Mapping[str, PictureFile]
) -> PictureFile:
    """The picture that a request started from: where it was said to lie, where it lay, or beside the result."""
    if picture.sha256 in given:
        return picture.with_data(name, given[picture.sha256])
    known = Path(picture.name)
    inside = not known.is_absolute() and ".." not in known.parts and picture.name != ""
    places = [known, Path(args.picture).parent / known.name] if inside else []
    here = [place for place in places if os.path.isfile(place)]  # a name may be too long
    for place in here:
        last = place is here[-1]
        try:
            found = PictureFile.open(name, place)
        except BadRequest:
            if last:
                raise
            continue
        if found == picture or last:
            return picture.with_data(name, found)  # raises what is wrong with the last
    raise BadRequest(
        f"{args.picture} was made from a picture that is not here: {known.name or 'one without a name'}, "
        f"SHA-256 {picture.sha256[:12]}…; say where it lies with --{name.replace('_', '-')}"
    )


def _ingredients_again(ingredients: Sequence[Ingredient], args: argparse.Namespace) -> Additions:
    """The files of a picture's ingredients, known by their content: those that flags name, and those of the same name
    beside the picture, beside the model, or here. Raises BadCheckpoint for those that are not there.
    """
    from sfumato.families.additions import NETWORKS, Additions, content_hash
    from sfumato.families.flags import additions_of

    given = additions_of(args)
    named = [path for path, _ in given.loras] + list(given.embeddings.values())
    named += [path for _, path in given.named]
    beside = [Path(), Path(args.picture).parent, Path(args.model or "").parent]
    beside += [] if given.ip_adapter is None else [given.ip_adapter.parent]
    hashes = {path: content_hash(path) for path in named}
    places: list[tuple[Ingredient, Path]] = []
    for it in ingredients:
        for folder in beside:
            place = folder / it.name
            if it.name == Path(it.name).name and os.path.exists(place) and place not in hashes:  # or it is too long
                hashes[place] = content_hash(place)
        found = next((path for path, hash in hashes.items() if hash == it.hash), None)
        if found is None:
            flag = {"lora": "--lora FILE", "embedding": f"--embedding {it.word}=FILE", "controlnet": "--control FILE"}
            usual = f"--{it.kind.replace('_', '-')} FILE"
            raise BadCheckpoint(
                f"{args.picture} was made with the {it} (sha256 {it.hash[:12]}), which is not here: "
                f"name it with {flag.get(it.kind, usual)}"
            )
        places.append((it, found))
    if unused := [p for p in named if p not in dict(places).values()]:
        raise BadRequest(f"{args.picture} was not made with {unused[0]}: leave it out")
    for path, weight in given.loras:
        if weight not in (1.0, *(it.weight for it, place in places if place == path)):
            raise BadRequest(f"{args.picture} tells itself how strongly {path} was applied: leave out :{weight:g}")
    parts: dict[str, Any] = dict.fromkeys(NETWORKS) | {it.kind: path for it, path in places}
    parts["controlnet"] = [path for it, path in places if it.kind == "controlnet"]
    return Additions.of(
        [(path, it.weight or 0.0) for it, path in places if it.kind == "lora"],
        {it.word or "": path for it, path in places if it.kind == "embedding"},
        **{kind: parts[kind] for kind in NETWORKS},
    )


@contextmanager
def _status(text: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(printable(text))):  # as it is: brackets in a name are no markup
        yield
