"""``sfumato search``: the pictures of a folder, parquet file or tar shard that words describe best, by our own CLIP.

A picture's vector is kept under the SHA-256 of its bytes and of the CLIP's weights, so that the next search looks at
new pictures alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.console import Parser, printable
from sfumato.data.captions import several, text_problem
from sfumato.errors import BadData, BadRequest
from sfumato.files import check_target, make_folder, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sfumato.data.report import Bad
    from sfumato.data.sources import Record, Source
    from sfumato.evaluation.cache import Cache
    from sfumato.families.clip import CLIP

PART = 256  # pictures between two times that vectors are kept
SHOWN = 5  # pictures that cannot be read, named one by one


@dataclass(frozen=True, eq=False)
class Index:
    """Readable pictures and their unit vectors (N, D), and what could not be read."""

    records: Sequence[Record]
    vectors: Tensor
    bad: Sequence[Bad]

    def best(self, words: Tensor, count: int) -> list[tuple[Record, float]]:
        """The records nearest to a unit vector (D,) with their cosines, the nearest first; in order among equals."""
        scores = self.vectors @ words
        order = scores.argsort(descending=True, stable=True)[:count]
        return [(self.records[int(i)], float(scores[i])) for i in order]


def index(source: Source, clip: CLIP, cache: Cache) -> Index:
    """Look at every picture of a source that was not looked at before."""
    import numpy as np
    import torch

    from sfumato.data.pictures import watched
    from sfumato.data.report import Bad
    from sfumato.decode import PictureError, decode, fit, to_array

    known = _known(cache, clip)
    good: list[tuple[Record, str]] = []
    bad: list[Bad] = []
    waiting: list[tuple[str, np.ndarray]] = []

    def embed() -> None:
        if waiting:
            images = torch.from_numpy(np.stack([pixels for _, pixels in waiting]))
            known.update(zip([key for key, _ in waiting], clip.embed_pictures(images), strict=True))
            waiting.clear()
            _keep(cache, clip, known)

    for record in watched(source.records):
        try:
            if record.problem:
                raise PictureError(record.problem)
            data = record.read()
            key = hashlib.sha256(data).hexdigest()
            if key not in known and all(key != k for k, _ in waiting):
                waiting.append((key, to_array(fit(decode(data), clip.towers.config.size, "pad"))))
        except PictureError as e:
            bad.append(Bad(record.name, str(e)))
            continue
        good.append((record, key))
        if len(waiting) == PART:
            embed()
    embed()
    if not good:
        raise BadData(f"{source.path}: no picture that can be read" + (f" ({bad[0].reason})" if bad else ""))
    return Index([r for r, _ in good], torch.stack([known[k] for _, k in good]), bad)


def _known(cache: Cache, clip: CLIP) -> dict[str, Tensor]:
    """Vectors by the SHA-256 of pictures' bytes."""
    found: Mapping[str, Tensor] = cache.get("search", clip.hash) or {}
    if "keys" not in found or "vectors" not in found:
        return {}
    keys = [bytes(key.tolist()).hex() for key in found["keys"]]
    return dict(zip(keys, found["vectors"].float(), strict=True))


def _keep(cache: Cache, clip: CLIP, known: Mapping[str, Tensor]) -> None:
    import torch

    keys = torch.tensor([list(bytes.fromhex(key)) for key in known], dtype=torch.uint8)
    cache.put("search", clip.hash, {"keys": keys, "vectors": torch.stack(list(known.values()))})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sfumato search",
        description="Find pictures by words. What was looked at is kept, so that the next search is quick.",
    )
    parser.add_argument("pictures", metavar="PICTURES", help="folder, .parquet or .tar; or 'sample'")
    parser.add_argument("words", metavar="WORDS", help="what the pictures should show")
    parser.add_argument("-k", type=int, default=10, metavar="K", help="how many to find (default: 10)")
    parser.add_argument("--model", metavar="FILE", help="a CLIP trained with task: clip (default: the one built in)")
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw them on one sheet")
    parser.add_argument("--force", action="store_true", help="replace the sheet if it exists")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cache", metavar="DIR", help="where vectors are kept (default: below ~/.cache/sfumato)")
    return parser


def main(argv: list[str]) -> int:
    """Run ``sfumato search`` with its arguments and return the exit code; raises SfumatoError for bad input."""
    args = _parser().parse_args(argv)
    if args.k < 1:
        raise BadRequest(f"-k must be at least 1, not {args.k}")
    if not args.words.strip():
        raise BadRequest("the words are empty: say what to look for")
    if problem := text_problem(args.words):
        raise BadRequest(f"WORDS {problem}")
    if args.force and args.sheet is None:
        raise BadRequest("--force replaces a sheet, and none is asked for: leave it out, or add --sheet FILE.png")
    sheet = None if args.sheet is None else Path(args.sheet)
    if sheet is not None:
        check_target(sheet, ".png", overwrite=args.force)

    from sfumato.data.config import DataConfig
    from sfumato.data.sources import open_source
    from sfumato.evaluation.cache import Cache, default_folder
    from sfumato.families.clip import load_clip

    source = open_source(DataConfig(path=args.pictures).resolve(Path()))
    clip = load_clip(None if args.model is None else Path(args.model))
    if left := clip.towers.text.truncated(args.words):
        sys.stderr.write(f"WORDS: too long for this model: its last {left} tokens are left out\n")
    cache = Cache(Path(args.cache).expanduser() if args.cache else default_folder())
    found = index(source, clip, cache)
    best = found.best(clip.embed_words([args.words])[0], args.k)
    if found.bad:
        first = "; ".join(f"{printable(b.name)}: {b.reason}" for b in found.bad[:SHOWN])
        sys.stderr.write(f"{len(found.bad)} of {len(source.records)} pictures cannot be read ({first})\n")
    if sheet is not None:
        make_folder(sheet.parent)
        write_atomically(sheet, _sheet(best))
    rows = [{"path": r.name, "score": score, "caption": _caption(r)} for r, score in best]
    if args.json:
        import json

        print(json.dumps(rows, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"{row['score']:+.3f}  {printable(row['path'])}  {printable(row['caption'])}".rstrip())
    return 0


def _caption(record: Record) -> str:
    """A picture's words; of several captions, all."""
    return ", ".join(several(record.row.get("caption")))


def _sheet(best: Sequence[tuple[Record, float]]) -> bytes:
    from sfumato.data.check import CELL, contact_sheet
    from sfumato.decode import PictureError, decode, fit

    def picture(record: Record) -> Image:
        try:
            return fit(decode(record.read()), CELL, "pad")
        except PictureError as e:
            raise BadData(f"{record.name} cannot be drawn on the sheet, though it was read before: {e}") from e

    def label(record: Record, score: float) -> str:
        return f"{score:+.2f} {_caption(record) or record.name}"

    return contact_sheet([(picture(r), label(r, score)) for r, score in best])
