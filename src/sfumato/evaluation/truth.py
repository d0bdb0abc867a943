"""Real pictures: which captions a model is given, and what its pictures are compared with.

Data with a column ``split`` have rows to learn from (``train``) and held-out ones, by any other names; captions
are drawn from each held-out split, and as many from ``train`` as ``seen``. Data without one are a single
split, ``all``. Columns ``concept``, ``name`` and ``style`` are used where they exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.config import DataConfig
from sfumato.data.pictures import Row, load_pictures
from sfumato.data.report import Report
from sfumato.errors import BadRequest
from sfumato.evaluation.bootstrap import generator
from sfumato.evaluation.cache import content_hash

SEEN, ALL, TRAIN = "seen", "all", "train"
MIN_PICTURES = 10  # in any split: below it no figure says anything
MAX_PLAIN = 1000  # captions drawn by default from data without splits


@dataclass(frozen=True, eq=False)
class Truth:
    """Real pictures uint8 (N, 3, S, S) with their columns, and what is drawn from them.

    Args:
        drawn: split → the rows whose captions a model is given, in order.
        train: the rows that a model may have learned from.
        others: those of them that are neither drawn nor siblings of a drawn one (same concept, same family):
            the judge learns from these, and they stand for a perfect model in real-against-real figures.
    """

    images: Tensor
    rows: Sequence[Row]
    drawn: Mapping[str, tuple[int, ...]]
    train: tuple[int, ...]
    others: tuple[int, ...]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all pictures and columns."""
        return content_hash(self.images, list(self.rows))

    @property
    def held_out(self) -> tuple[int, ...]:
        """The rows drawn that no model has learned from, or all if the data have no splits."""
        return tuple(i for split, rows in self.drawn.items() if split != SEEN for i in rows)

    def captions(self, rows: Sequence[int]) -> list[str]:
        """Return the captions of rows."""
        return [str(self.rows[i]["caption"]) for i in rows]

    def concepts(self, rows: Sequence[int]) -> list[str]:
        """Return what rows show: their concept, or else their name, or else their caption."""
        return [str(_first(self.rows[i], ("concept", "name", "caption"))) for i in rows]

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return the words for what rows show, without style."""
        return [str(_first(self.rows[i], ("name", "caption"))) for i in rows]

    def styles(self, rows: Sequence[int]) -> list[str]:
        """Return the styles of rows, '' where there are none."""
        return [str(self.rows[i].get("style") or "") for i in rows]

    def like(self, rows: Sequence[int]) -> tuple[int, ...] | None:
        """Return as many of ``others`` as rows, of like style and group if there are any; None if too few."""
        if len(self.others) < len(rows):
            return None
        left = [int(i) for i in generator(1).permutation(self.others)]
        wanted, found = list(rows), []
        for columns in (("style", "group"), ("style",), ()):  # as alike as can be, then less so
            kinds: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i in left:
                kinds[self._kind(i, columns)].append(i)
            unmet = []
            for i in wanted:
                kind = kinds[self._kind(i, columns)]
                (found if kind else unmet).append(kind.pop() if kind else i)
            taken = set(found)
            left, wanted = [i for i in left if i not in taken], unmet
        return tuple(found)

    def lean(self, n: int) -> Truth:
        """Keep what is drawn and n of ``others``: enough to compare sets, not to train a judge or find copies."""
        others = [self.others[i] for i in np.sort(generator(3).permutation(len(self.others))[:n])]
        kept = sorted({i for of in self.drawn.values() for i in of} | set(others))
        place = {i: k for k, i in enumerate(kept)}
        return Truth(
            self.images[kept],
            [self.rows[i] for i in kept],
            {split: tuple(place[i] for i in of) for split, of in self.drawn.items()},
            tuple(place[i] for i in self.train if i in place),
            tuple(place[i] for i in others),
        )

    def _kind(self, i: int, columns: Sequence[str]) -> tuple[str, ...]:
        return tuple(str(self.rows[i].get(c) or "") for c in columns)


def load_truth(
    config: DataConfig,
    size: int,
    n: int | None = None,
    root: Path = Path(),
    on_report: Callable[[Report], None] = lambda _: None,
    *,
    choosing: bool = False,
) -> Truth:
    """Read real pictures at size × size and draw captions, the same ones for the same data and n.

    Args:
        config: which pictures; their plain captions are used.
        size: side at which pictures are compared.
        n: captions per split at most; by default all of a held-out split, as many seen ones as the largest of
            these has, or half of data without splits (at most 1,000).
        root: where a relative path starts.
        on_report: is told what was found and what is bad.
        choosing: whether something will be chosen by the figures, as a run's end is: then test splits are left alone
            where there are validation splits (names that begin with ``val`` or ``dev``).

    Raises:
        BadData: for data that cannot be used.
        BadRequest: if fewer than 10 captions can be drawn from a split.
    """
    from dataclasses import replace

    if n is not None and n < MIN_PICTURES:
        raise BadRequest(f"n must be at least {MIN_PICTURES}: fewer pictures say nothing of a model")
    config = replace(config, captions="plain", dropout=0.0, flip=False, lazy=False, crop="center", max_aspect=1.0)
    pictures = load_pictures(config, size, root, on_report=on_report)
    images = pictures.images if isinstance(pictures.images, Tensor) else torch.stack(list(pictures.images))  # type: ignore[call-overload]
    rows = pictures.rows
    splits = {str(row.get("split") or "") for row in rows}
    if choosing and any(split.startswith(("val", "dev")) for split in splits):
        kept = [i for i, row in enumerate(rows) if not str(row.get("split") or "").startswith("test")]
        images, rows = images[kept], [rows[i] for i in kept]
    return draw(images, rows, n)


def draw(images: Tensor, rows: Sequence[Row], n: int | None = None) -> Truth:
    """Draw captions from pictures that are in memory; see ``load_truth``."""
    splits: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        splits[str(row.get("split") or TRAIN)].append(i)
    held_out = {split: of for split, of in sorted(splits.items()) if split != TRAIN}
    train, drawn = splits.get(TRAIN, []), {}
    if held_out and train:
        drawn[SEEN] = _sample(train, n or max(MIN_PICTURES, *map(len, held_out.values())), SEEN)
        drawn |= {split: _sample(of, n or len(of), split) for split, of in held_out.items()}
    else:
        train = list(range(len(rows)))
        drawn[ALL] = _sample(train, n or min(MAX_PLAIN, max(MIN_PICTURES, len(rows) // 2)), ALL)
    for split, of in drawn.items():
        if len(of) < MIN_PICTURES:
            raise BadRequest(
                f"split {split!r} has {len(of)} pictures and at least {MIN_PICTURES} are needed: "
                "give more data, or leave it out with --exclude"
            )
    taken = {_sibling(rows[i], i) for of in drawn.values() for i in of}
    return Truth(images, rows, drawn, tuple(train), tuple(i for i in train if _sibling(rows[i], i) not in taken))


def _sample(rows: Sequence[int], n: int, name: str) -> tuple[int, ...]:
    """Up to n of some rows; which ones depends on their number, n and the split's name alone."""
    if n >= len(rows):
        return tuple(rows)
    rng = generator(int(content_hash(name, len(rows), n)[:12], 16))
    return tuple(int(i) for i in np.sort(rng.choice(rows, n, replace=False)))


def _sibling(row: Row, i: int) -> Any:
    """What near-copies share: one thing, drawn by one hand."""
    return (row["concept"], row["family"]) if "concept" in row and "family" in row else i


def _first(row: Row, columns: Sequence[str]) -> Any:
    return next((row[c] for c in columns if row.get(c) is not None), "")
