"""What ``sfumato data check`` finds in a data set: counts, sizes, duplicates, bad files, captions, a contact sheet."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato.console import printable
from sfumato.data.captions import MAX_CHARACTERS
from sfumato.data.pictures import problem, watched
from sfumato.data.report import Bad, Report
from sfumato.data.sources import Source
from sfumato.decode import PictureError, check_proportions, decode, fit

FEW = 20  # columns of at most so many values are worth counting
CELL, COLUMNS, CELLS = 96, 10, 100  # of a contact sheet


@dataclass(frozen=True)
class Findings:
    """All that was found; ``same_file`` and ``same_pixels`` group the names of pictures that are equal."""

    report: Report
    sizes: Counter[tuple[int, int]]
    same_file: list[list[str]]
    same_pixels: list[list[str]]
    captions: dict[str, Any]
    columns: dict[str, dict[str, int]]
    ignored: Counter[str]
    cells: list[tuple[Image.Image, str]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pictures as plain data."""
        report = self.report
        return {
            "path": str(report.path),
            "total": report.total,
            "ok": report.ok,
            "bad": [{"file": b.name, "reason": b.reason} for b in report.bad],
            "ignored": dict(self.ignored),
            "sizes": _spread(self.sizes),
            "duplicates": {"same_file": self.same_file, "same_pixels": self.same_pixels},
            "captions": self.captions,
            "columns": self.columns,
        }


def check(source: Source, captions: str, background: str = "white") -> Findings:
    """Decode every picture of a source and count what there is to know; ``captions`` as in ``DataConfig``."""
    bad: list[Bad] = []
    sizes: Counter[tuple[int, int]] = Counter()
    files: dict[bytes, list[str]] = defaultdict(list)
    pixels: dict[bytes, list[str]] = defaultdict(list)
    texts: list[str] = []
    cells: list[tuple[Image.Image, str]] = []
    stride = max(1, len(source.records) // CELLS)
    for i, record in enumerate(watched(source.records)):
        try:
            if reason := problem(record, captions):
                raise PictureError(reason)
            data = record.read()
            image = decode(data, background)
            check_proportions(image)
            cell = fit(image, CELL, "pad", background) if i % stride == 0 and len(cells) < CELLS else None
        except PictureError as e:
            bad.append(Bad(record.name, str(e)))
            continue
        sizes[image.size] += 1
        files[hashlib.sha256(data).digest()].append(record.name)
        pixels[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(record.name)
        words = _words(record.row, captions)
        texts += words
        if cell is not None:
            cells.append((cell, words[0] if words else ""))
    same_file = [names for names in files.values() if len(names) > 1]
    known = {tuple(names) for names in same_file}
    same_pixels = [names for names in pixels.values() if len(names) > 1 and tuple(names) not in known]
    report = Report(source.path, len(source.records), tuple(bad))
    return Findings(
        report, sizes, same_file, same_pixels, _caption_facts(texts), _columns(source), source.ignored, cells
    )


def contact_sheet(cells: list[tuple[Image.Image, str]]) -> bytes:
    """Draw pictures with their captions on one sheet, and return it as PNG."""
    columns = min(COLUMNS, max(1, len(cells)))
    rows = -(-max(1, len(cells)) // columns)
    sheet = Image.new("RGB", (columns * (CELL + 8) + 8, rows * (CELL + 28) + 8), "#e8e8e8")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, caption) in enumerate(cells):
        left, top = 8 + i % columns * (CELL + 8), 8 + i // columns * (CELL + 28)
        sheet.paste(image, (left, top))
        for line, part in enumerate(textwrap.wrap(printable(caption[:200]), 18)[:2]):
            pen.text((left, top + CELL + 1 + 11 * line), part, fill="#202020", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _words(row: dict[str, Any], captions: str) -> list[str]:
    column = captions.removeprefix("field:") if captions.startswith("field:") else "caption"
    value = row.get(column)
    return [str(v)[:MAX_CHARACTERS] for v in (value if isinstance(value, list) else [value]) if v is not None]


def _spread(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    expanded = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0)  # (N, 2) of width, height
    low, middle, high = np.percentile(expanded, [0, 50, 100], axis=0).round().astype(int).tolist()
    return {
        "width": {"min": low[0], "median": middle[0], "max": high[0]},
        "height": {"min": low[1], "median": middle[1], "max": high[1]},
        "square": sum(n for (w, h), n in sizes.items() if w == h),
        "commonest": [[w, h, n] for (w, h), n in sizes.most_common(5)],
    }


def _caption_facts(texts: list[str]) -> dict[str, Any]:
    words = [re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", t.lower()) for t in texts]
    lengths = np.array([len(w) for w in words] or [0])
    vocabulary = Counter(w for ws in words for w in ws)
    return {
        "count": len(texts),
        "different": len(set(texts)),
        "empty": sum(not t.strip() for t in texts),
        "words": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "longest_characters": max(map(len, texts), default=0),
        "vocabulary": len(vocabulary),
        "commonest_words": [[w, n] for w, n in vocabulary.most_common(12)],
        "commonest": [[t[:80], n] for t, n in Counter(texts).most_common(3) if n > 1],
    }


def _columns(source: Source) -> dict[str, dict[str, int]]:
    """Count the values of columns that have few, which is what where, exclude and weights choose by."""
    counted: dict[str, dict[str, int]] = {}
    for column in source.columns:
        values: Iterable[Any] = [r.row.get(column) for r in source.records]
        counts = Counter(str(v) for v in values if isinstance(v, (str, int, bool)))
        if 0 < len(counts) <= FEW and len(counts) < max(2, len(source.records)):
            counted[column] = dict(counts.most_common())
    return counted
