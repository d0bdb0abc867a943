"""Drawings' names and code points → emoji, with labels, tags and groups by emojibase."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.data.emoji.packages import read_members

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points joined by ``-``, and what emojibase says of it."""

    code: str
    label: str
    tags: list[str]
    group: str
    subgroup: str


def normal_code(code: str) -> str:
    """Lower-case code points joined by ``-``, variation selectors left out."""
    return "-".join(p for p in re.split(r"[-_ ]", code.lower()) if p not in ("fe0f", "fe0e"))


def has_skin_tone(code: str) -> bool:
    """Whether an emoji is another one in a skin tone (the five tones by themselves are not)."""
    code = normal_code(code)
    return code not in SKIN_TONES and any(p in SKIN_TONES for p in code.split("-"))


def fold(name: str) -> str:
    """Letters and digits of a name, without accents and case."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name.lower()))


class Names:
    """Finds emoji by code point or by any of their names; of two emoji of one name the first found keeps it.

    ``drawings`` are Iconify sets whose own names for code points are taken as further names.
    """

    def __init__(self, emojibase: Path, drawings: Iterable[Mapping[str, Any]]):
        files = {k: json.loads(v) for k, v in read_members(emojibase, r"en/.*\.json").items()}
        messages = files["en/messages.json"]
        groups = {g["order"]: g["key"] for g in messages["groups"]}
        subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
        self.emoji: dict[str, Emoji] = {}
        for e in files["en/data.json"]:
            code = normal_code(e["hexcode"])
            group, subgroup = groups.get(e.get("group"), ""), subgroups.get(e.get("subgroup"), "")
            self.emoji[code] = Emoji(code, e["label"], e.get("tags", []), group, subgroup)
        self._codes: dict[str, str] = {}
        shortcodes = [files[f"en/shortcodes/{name}.json"] for name in SHORTCODES]
        for name, code in self._names(drawings, shortcodes):
            if (folded := fold(name)) and code in self.emoji:
                self._codes.setdefault(folded, code)

    def find(self, name: str) -> Emoji | None:
        """Return the emoji of a name, or None."""
        code = self._codes.get(fold(name))
        return None if code is None else self.emoji[code]

    def _names(
        self, drawings: Iterable[Mapping[str, Any]], shortcodes: list[dict[str, Any]]
    ) -> Iterator[tuple[str, str]]:
        flags = [(e.label.removeprefix("flag: "), e.code) for e in self.emoji.values() if e.label.startswith("flag: ")]
        yield from ((e.label, e.code) for e in self.emoji.values())
        for country, code in flags:
            yield from ((form, code) for form in (f"flag for {country}", f"flag {country}", f"{country} flag"))
        for icons in drawings:
            codes: dict[str, str] = {}
            for code, name in icons["chars"].items():
                if not has_skin_tone(code):
                    yield name, normal_code(code)
                    codes.setdefault(name, normal_code(code))
            for alias, target in icons.get("aliases", {}).items():
                if target["parent"] in codes and len(target) == 1:  # a mere other name, not a turned drawing
                    yield alias, codes[target["parent"]]
        for code in self.emoji:
            if "-" not in code and (name := unicodedata.name(chr(int(code, 16)), "")):
                yield name, code
        for table in shortcodes:
            for code, names in table.items():
                if not has_skin_tone(code):
                    for name in [names] if isinstance(names, str) else names:
                        yield name, normal_code(code)
        yield from flags
