"""The flags that say what to add to a published model, and what they say."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from sfumato.errors import BadRequest
from sfumato.families.additions import Additions


def add_addition_flags(add: Callable[..., Any]) -> None:
    """Add the flags that ``additions_of`` reads."""
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--lora", metavar="FILE[:W]", **several, help="add a LoRA, with weight W (default: 1); may be given again")
    add("--embedding", metavar="WORD=FILE", **several, help="teach prompts a learned word; may be given again")
    add("--vae", metavar="FILE", help="use another autoencoder, such as a tiny one, or another decoder")
    add("--denoiser", metavar="FILE", help="use another denoiser, such as a GGUF file, with the model's other parts")
    add("--control", metavar="FILE", **several, help="add a ControlNet, for --control-image; may be given again")
    add("--ip-adapter", metavar="FILE", help="add an IP-Adapter, which follows --image-prompt")
    add("--image-encoder", metavar="FOLDER", help="the IP-Adapter's (default: image_encoder beside it or in the model)")


def additions_of(args: argparse.Namespace) -> Additions:
    """What the flags ask to add to the model; raises BadRequest."""
    embeddings: dict[str, str] = {}
    for text in args.embedding:
        word, sign, file = text.partition("=")
        if not (word and sign and file):
            raise BadRequest(f"--embedding must be WORD=FILE, such as <cat>=cat.safetensors, not {text!r}")
        if word in embeddings:
            raise BadRequest(f"--embedding names the word {word!r} twice")
        embeddings[word] = file
    networks = (args.vae, tuple(args.control), args.denoiser, args.ip_adapter, args.image_encoder)
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
