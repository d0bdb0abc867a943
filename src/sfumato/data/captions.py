"""Captions written anew at every visit, from a picture's name, style and tags.

The shares of ``template``: no words at all (for classifier-free guidance), the name alone, the style alone, and
otherwise the name (or another name, or with tags) joined with the style in one of a few ways.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

from sfumato.errors import BadData, nearest

MAX_CHARACTERS = 10_000
TEXT_COLUMNS = ("caption", "name", "style_phrase", "alt_names", "tags")  # what a tokenizer may be made from

PATTERNS = ("{name}, {style}", "{name} in {style}", "{style} {name}", "{name}", "a picture of {name}, {style}")
NAME_ONLY, STYLE_ONLY, WITH_TAGS, OTHER_NAME, TAG_AS_NAME = 0.10, 0.05, 0.20, 0.25, 0.10


def template_caption(row: Mapping[str, Any], dropout: float, rng: random.Random) -> str:
    """Write one caption for a row with ``name``, ``style_phrase``, ``alt_names``, ``tags``; '' with dropout's odds."""
    if rng.random() < dropout:
        return ""
    style, tags = row["style_phrase"], several(row.get("tags"))
    name = row["name"]
    if (names := several(row.get("alt_names"))) and rng.random() < OTHER_NAME:
        name = rng.choice(names)
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


def several(value: Any) -> list[str]:
    """Return a column of a text or a list of them as a list, without what is empty."""
    return [str(v) for v in (value if isinstance(value, list) else [value]) if v not in (None, "")]


def plain_caption(caption: str, dropout: float, rng: random.Random) -> str:
    """Keep a caption as it is, or drop it with dropout's odds."""
    return "" if rng.random() < dropout else caption


def write_caption(row: Mapping[str, Any], how: str, dropout: float, rng: random.Random) -> str:
    """Write the words for one visit of a row, ``how`` as in ``DataConfig.captions``; of a list, one is drawn."""
    if how == "template":
        return template_caption(row, dropout, rng)
    if how == "none":
        return ""
    value = row[_column(how)]
    if isinstance(value, list):
        value = rng.choice(value)
    return plain_caption(str(value), dropout, rng)


def check_columns(columns: Collection[str], how: str, where: str) -> None:
    """Raise BadData if rows with these columns can give no captions of this kind."""
    needed = {"template": ["name", "style_phrase"], "none": []}.get(how, [_column(how)])
    for column in needed:
        if column not in columns:
            near = nearest(column, sorted(columns)) if how != "plain" else ""
            raise BadData(
                f"{where}: captions={how} needs a column {column!r}, and there are "
                f"{', '.join(sorted(columns)) or 'none'}{near}; choose one with "
                "data.captions=field:NAME, or train without words by data.captions=none"
            )


def caption_problem(row: Mapping[str, Any], how: str) -> str | None:
    """Return why a row's words cannot be used, or None."""
    if how == "none":
        return None
    required = {"template": ["name", "style_phrase"]}.get(how, [_column(how)])
    for column in {*required, *TEXT_COLUMNS}:
        value = row.get(column)
        for text in value if isinstance(value, list) else [value]:
            if problem := text_problem(text):
                return f"{column} {problem}"
    for column in required:
        value = row.get(column)
        if value is None or value == []:
            return f"no {column}"
        if not all(str(text).strip() for text in (value if isinstance(value, list) else [value])):
            return f"empty {column}"
    return None


def text_problem(text: Any) -> str | None:
    """Return what makes a text unfit to be read: its length, NUL, or bytes that are not Unicode."""
    if not isinstance(text, str):
        return None
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, more than {MAX_CHARACTERS:,}"
    if "\0" in text:
        return "holds a NUL character"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "is not valid Unicode"
    return None


def _column(how: str) -> str:
    return "caption" if how == "plain" else how.removeprefix("field:")
