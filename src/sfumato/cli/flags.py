"""Flags that several commands share, and what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from sfumato.errors import BadRequest
from sfumato.families.flags import add_addition_flags
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.request import PICTURES, SEVERAL, Request

GROUPS = {  # of fields of a request under one title in a command's help; the others are under the first
    "picture": (),
    "sampling": ("steps", "sampler", "spacing", "guidance", "guidance_rescale", "guidance_interval", "eta"),
    "from pictures": (*PICTURES, "strength", "outpaint", "control_scale", "control_range", "image_prompt_scale"),
    "variations and mixes": ("variation_seed", "variation_strength", "prompt_to", "mix"),
    "enlargement": ("hires", "hires_strength", "upscale"),
}


def add_request_flags(parser: argparse.ArgumentParser, refused: Collection[str] = ()) -> None:
    """Add one flag for each field of ``Request``; ``request_of`` reads them. Help is silent about those ``refused``."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    titles = {name: title for title, names in GROUPS.items() for name in names}
    for f in fields(Request):
        add, flags = groups[titles.get(f.name, "picture")].add_argument, f.metadata["flags"]
        if f.name == "prompt":
            parser.add_argument("prompt", metavar="PROMPT", help=f.metadata["help"])
        elif f.name == "width":
            add("--size", metavar="WxH", help="width and height in pixels, before --upscale")
        elif flags:
            again: dict[str, Any] = {"action": "append"} if f.name in SEVERAL else {}
            help = argparse.SUPPRESS if f.name in refused else f.metadata["help"]
            add(*flags, dest=f.name, metavar=f.metadata["metavar"], help=help, **again)


def request_of(args: argparse.Namespace) -> Request:
    """Read the request from parsed flags; raises BadRequest."""
    settings: dict[str, Any] = {}
    for f in fields(Request):
        text: str | list[str] | None = getattr(args, f.name, None)
        if text is None:
            continue
        values = [
            PictureFile.open(f.name, one) if f.name in PICTURES else _value(str(f.type), one)
            for one in ([text] if isinstance(text, str) else text)
        ]
        settings[f.name] = values[0] if len(values) == 1 else values
    if args.size is not None:
        width, x, height = args.size.lower().partition("x")
        if not (x and width.isdecimal() and height.isdecimal() and len(args.size) < 20):
            raise BadRequest(f"size must be WxH in pixels, such as 32x32, not {args.size!r}")
        settings |= {"width": int(width), "height": int(height)}
    return Request.from_dict(settings)


def _value(kind: str, text: str) -> Any:
    """Give a flag's text its field's type; text that cannot have it is left for the request to refuse."""
    if "_" in text:  # Python would read 1_0 as 10
        return text
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
        if kind.startswith("tuple"):
            number = int if kind.startswith("tuple[int") else float
            return tuple(number(part) for part in text.split(","))
    except ValueError:
        pass
    return text


def add_model_flags(parser: argparse.ArgumentParser, default: str = "the one built in") -> None:
    """Add the flags that ``load_pipeline`` reads."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="M", help=f"weight file, folder or name of a model (default: {default})")
    add_addition_flags(add)
    add("--critic", metavar="FILE", help="a CLIP of `task: clip`, for --best-of (default: embedded models' own)")
    _add_reading_flags(add)
    add("--tile", metavar="PIXELS", help="decode in tiles so wide, 0 in none (default: 1024 above 2048x2048 pixels)")
    add("--partial", action="store_true", help="let weights pass that are missing, too many or misshaped")
    add("--dtype", metavar="fp32|bf16", help="type to compute in (default: fp32)")
    add(
        "--memory",
        default="auto",
        metavar="auto|normal|low",
        help="low leaves weights in their file, for the same pictures (default: low if they would not fit)",
    )


def add_recorded_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``load_recorded`` reads, for what a picture's record does not tell."""
    parser.add_argument("picture", metavar="PICTURE.png", help="a picture that sfumato made")
    for f in fields(Request):
        if f.name in PICTURES:
            again: dict[str, Any] = {"action": "append"} if f.name in SEVERAL else {}
            help = f"where its {f.name.replace('_', ' ')} lies now"
            parser.add_argument(*f.metadata["flags"], metavar="PICTURE", help=help, **again)
    add_model_flags(parser, default="the one that made it")


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how files of weights are read."""
    _add_reading_flags(parser.add_argument)


def _add_reading_flags(add: Callable[..., Any]) -> None:
    add("--variant", metavar="NAME", help="which files of a folder to take, such as fp16")
    add("--allow-pickle", action="store_true", help="read .ckpt, .pt and .bin too, in a process that can do little")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where pictures go, and how large."""
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="PATH", help="file or folder to write to (default: a new file in outputs/)")
    add("--force", action="store_true", help="replace files that exist")
    add("--scale", metavar="N", help="draw each pixel N times as large (default: until 256 wide)")
    add("--json", action="store_true", help="print JSON")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def scale_of(text: str | None) -> int | None:
    """Read what ``--scale`` says; raises BadRequest."""
    if text is None:
        return None
    from sfumato.pipeline.picture import MAX_SCALE

    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_SCALE):
        raise BadRequest(f"scale must be a whole number from 1 to {MAX_SCALE}, not {text!r}")
    return int(text)
