"""Captions written anew at every visit, from a picture's name, style and tags.

The shares: no words at all (for classifier-free guidance), the name alone, the style alone, and
otherwise the name (or another name, or with tags) joined with the style in one of a few ways.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

PATTERNS = ("{name}, {style}", "{name} in {style}", "{style} {name}", "{name}", "a picture of {name}, {style}")
NAME_ONLY, STYLE_ONLY, WITH_TAGS, OTHER_NAME, TAG_AS_NAME = 0.10, 0.05, 0.20, 0.25, 0.10


def template_caption(row: Mapping[str, Any], dropout: float, rng: random.Random) -> str:
    """Write one caption for a row with ``name``, ``style_phrase``, ``alt_names`` and ``tags``; '' with dropout's odds."""
    if rng.random() < dropout:
        return ""
    style, tags = row["style_phrase"], list(row.get("tags") or [])
    name = row["name"]
    if row.get("alt_names") and rng.random() < OTHER_NAME:
        name = rng.choice(row["alt_names"])
    draw = rng.random()
    if draw < NAME_ONLY:
        return name
    if draw < NAME_ONLY + STYLE_ONLY:
        return style
    if tags and draw < NAME_ONLY + STYLE_ONLY + TAG_AS_NAME:
        name = ", ".join(rng.sample(tags, min(len(tags), 2)))
    elif tags and draw < NAME_ONLY + STYLE_ONLY + TAG_AS_NAME + WITH_TAGS:
        name = ", ".join([name, *rng.sample(tags, min(len(tags), rng.randint(1, 3)))])
    return rng.choice(PATTERNS).format(name=name, style=style)


def plain_caption(caption: str, dropout: float, rng: random.Random) -> str:
    """Keep a caption as it is, or drop it with dropout's odds."""
    return "" if rng.random() < dropout else caption
