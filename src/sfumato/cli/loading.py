"""The pipeline that a command's flags name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadRequest

if TYPE_CHECKING:
    from sfumato.families.additions import Additions
    from sfumato.pipeline.pipeline import Pipeline


def load_pipeline(args: argparse.Namespace, additions: Additions | None = None, threads: object = None) -> Pipeline:
    """Load the model that the flags name, with the additions that they name unless others are given."""
    from sfumato import families

    additions = additions or additions_of(args)
    how: dict[str, Any] = {"dtype": args.dtype or "fp32", "memory": args.memory}
    families.keeping.check(**how)
    if args.tile is not None and not (args.tile.isdecimal() and len(args.tile) < 7):
        raise BadRequest(f"--tile must be a whole number of pixels, or 0, not {args.tile[:40]!r}")
    families.locate(args.model, args.variant)  # a wrong name is told at once, torch takes seconds
    additions.check()  # as is a missing file
    with _status(f"loading {args.model or 'the model'}"):
        from sfumato.pipeline.pipeline import Pipeline

        if isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 256:
            import torch

            torch.set_num_threads(threads)  # the order of sums, and so the last bits, may depend on it
        how |= {"variant": args.variant, "allow_pickle": args.allow_pickle, "partial": args.partial}
        tile = None if args.tile is None else int(args.tile)
        return Pipeline(families.load(args.model, additions, **how), tile=tile)


def additions_of(args: argparse.Namespace) -> Additions:
    """What the flags ask to add to the model; raises BadRequest."""
    from sfumato.families.additions import Additions

    embeddings: dict[str, str] = {}
    for text in args.embedding:
        word, sign, file = text.partition("=")
        if not (word and sign and file):
            raise BadRequest(f"--embedding must be WORD=FILE, such as <cat>=cat.safetensors, not {text!r}")
        if word in embeddings:
            raise BadRequest(f"--embedding names the word {word!r} twice")
        embeddings[word] = file
    networks = (args.vae, args.control, args.denoiser, args.ip_adapter, args.image_encoder)
    return Additions.of([_lora(text) for text in args.lora], embeddings, *networks)


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon that belongs to the file's name is left alone."""
    file, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        if os.path.exists(file):
            raise BadRequest(f"the weight in --lora {text} is no number") from None
        return text, 1.0


@contextmanager
def _status(text: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
