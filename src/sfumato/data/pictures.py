"""Captioned pictures behind one random-access index.

Which picture comes when, with which words and which crop, is a pure function of (seed, epoch, place):
the same for any number of workers, and free to be taken up anywhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.console import printable
from sfumato.data.buckets import Buckets, Shape, join_small, nearest_shape, rng, shapes_within
from sfumato.data.captions import TEXT_COLUMNS, caption_problem, check_columns, write_caption
from sfumato.data.config import DataConfig
from sfumato.data.report import Bad, Report
from sfumato.data.sources import Record, Source, open_source
from sfumato.decode import PictureError, decode, fit, to_array
from sfumato.errors import BadData, NoResources, nearest
from sfumato.pixels import signed

Row = Mapping[str, Any]


class Images(Protocol):
    """Pictures by index, uint8 (C, H, W): a tensor, a list, or ``LazyImages``."""

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Pictures (B, C, H, W) in [−1, 1], or their latents, their captions, and their indices where these are of use."""

    x0: Tensor
    captions: list[str]
    indices: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """All pictures of a data set at training size: uint8 (N, C, H, W), rows of columns, draw weights (N,).

    Under random crops pictures are longer or wider than they should be until they are drawn. Under buckets ``shapes``
    holds every picture's height and width, and a batch is ``step_size`` pictures of one shape.
    """

    images: Images
    rows: Sequence[Row]
    weights: np.ndarray
    config: DataConfig
    report: Report | None = None
    shapes: Sequence[Shape] | None = None
    step_size: int = 1
    _orders: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int, rng: random.Random) -> str:
        """Write the words for one picture, or draw them from its variants."""
        c = self.config
        if not c.variants:
            return write_caption(self.rows[index], c.captions, c.dropout, rng)
        return "" if rng.random() < c.dropout else self.variant(index, rng.randrange(c.variants))

    def variant(self, index: int, k: int) -> str:
        """Return one of a picture's ``data.variants`` captions."""
        return write_caption(self.rows[index], self.config.captions, 0.0, random.Random(f"{index}/{k}"))

    def order(self, seed: int, epoch: int, bucket: int = 0) -> np.ndarray:
        """Return the indices of one epoch of a bucket: a permutation in which weights set how often each is drawn.

        Systematic sampling keeps every epoch at round(Σ weights) pictures, each drawn ⌊w⌋ or ⌈w⌉ times.
        """
        members = self._members[bucket]
        draw = rng(seed, epoch, stream=2 * bucket)
        edges = np.cumsum(self.weights[members])
        count = self._lengths[bucket]
        points = (np.arange(count) + draw.random()) * edges[-1] / count
        chosen = np.searchsorted(edges, points, side="right").clip(max=len(members) - 1)
        return draw.permutation(members[chosen])

    @property
    def epoch_length(self) -> int:
        """Pictures in one epoch, over all buckets."""
        return sum(self._lengths)

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """The pictures of each bucket; one that draws nothing is none."""
        if self.shapes is None:
            return [np.arange(len(self))]
        kinds = sorted(set(self.shapes))
        place = {shape: i for i, shape in enumerate(kinds)}
        of = np.array([place[shape] for shape in self.shapes])
        members = [np.flatnonzero(of == i) for i in range(len(kinds))]
        return [m for m in members if self.weights[m].sum() > 0]

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Pictures in an epoch of each bucket."""
        return tuple(max(1, round(float(self.weights[members].sum()))) for members in self._members)

    @cached_property
    def _buckets(self) -> Buckets | None:
        if len(self._members) == 1:
            return None
        return Buckets(self._lengths, self.step_size)

    def index(self, seed: int, place: int) -> int:
        """Return which picture stands at a place of the endless order."""
        bucket, own = (0, place) if self._buckets is None else self._buckets.locate(seed, place)
        epoch, within = divmod(own, self._lengths[bucket])
        return int(self._order(seed, epoch, bucket)[within])

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Return the pictures and captions of one training step."""
        return self.take(seed, range(step * size, (step + 1) * size))

    def take(self, seed: int, places: Iterable[int]) -> Batch:
        """Return what stands at some places of the endless order; ranks of one step take a slice of its range each."""
        images: list[Tensor] = []
        captions: list[str] = []
        for index, own in self.drawn(seed, places):
            captions.append(self.caption(index, own))
            image = self.images[index]
            if self.config.flip and own.random() < 0.5:
                image = image.flip(-1)
            images.append(_window(image, self._shape(index), partial(own.randint, 0)))
        return Batch(signed(torch.stack(images)), captions)

    def at(self, indices: Iterable[int]) -> Tensor:
        """Return pictures (B, C, H, W) in [−1, 1] as they are, without flip; of what crops vary, the middle."""
        return signed(torch.stack([_window(self.images[i], self._shape(i), lambda spare: spare // 2) for i in indices]))

    def _shape(self, index: int) -> Shape | None:
        return None if self.shapes is None else self.shapes[index]

    def spread(self, count: int) -> list[int]:
        """Return so many indices, evenly spread over all pictures."""
        return [i * len(self) // count for i in range(count)]

    def drawn(self, seed: int, places: Iterable[int]) -> Iterable[tuple[int, random.Random]]:
        """Yield the index of the picture at each place, and the random numbers that go with the visit."""
        for place in places:
            yield self.index(seed, place), random.Random(f"{seed}/{place}")

    def fingerprint(self) -> str:
        """SHA-256 of all pictures, columns and weights, to tell whether data have changed since a run began.

        Pictures that are decoded when they are drawn count by their columns alone.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.weights.tobytes())
        for i, row in enumerate(self.rows):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            if not self.config.lazy:
                digest.update(self.images[i].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _order(self, seed: int, epoch: int, bucket: int) -> np.ndarray:
        known = self._orders
        if (seed, epoch, bucket) not in known:  # a new dict each time, as threads may read the old one
            last = [*known.items()][-2 * len(self._members) + 1 :]
            known = dict(last) | {(seed, epoch, bucket): self.order(seed, epoch, bucket)}
            object.__setattr__(self, "_orders", known)
        return known[seed, epoch, bucket]


class LazyImages:
    """Pictures that are decoded when they are drawn."""

    def __init__(self, records: Sequence[Record], config: DataConfig, shapes: Sequence[Shape], channels: int):
        self.records, self.config, self.shapes, self.channels = records, config, shapes, channels

    def __getitem__(self, index: int) -> Tensor:
        try:
            image = _decoded(self.records[index], self.config)
            return _fitted(image, self.shapes[index], self.config, self.channels)
        except PictureError as e:
            name = printable(self.records[index].name)
            raise BadData(f"{name} was whole when the run began, and is not any more: {e}") from None


def load_pictures(
    config: DataConfig,
    size: int,
    root: Path,
    *,
    channels: int = 3,
    multiple: int = 1,
    step_size: int = 1,
    on_report: Callable[[Report], None] = lambda _: None,
) -> Pictures:
    """Read a data set's pictures at a square size, or in shapes of at most as many pixels.

    Args:
        config: which pictures, and how.
        size: side of the square in pixels.
        root: where a relative path starts.
        channels: 3, or 1 for grey.
        multiple: under ``max_aspect``, what every side must be a multiple of.
        step_size: under ``max_aspect``, pictures of a step, which have one shape.
        on_report: is told what was found and what is bad.

    Bad pictures and captions are listed in a report, which is handed to ``on_report`` before any of it is refused.
    Raises BadData where nothing usable is left or too much is bad; NoResources if the pictures do not fit in memory.
    """
    path = config.resolve(root)
    source = open_source(path)
    records = _choose(source, config)
    if config.lazy and not source.seekable:
        raise BadData(f"{printable(str(path))}: data.lazy needs a folder of pictures or tar shards, not parquet")
    if not config.lazy:
        _check_memory(len(records) * channels * size * size, len(records), size, config)

    bad: list[Bad] = []
    good: list[Record] = []
    images: list[Tensor] = []
    kinds = shapes_within(size, multiple, config.max_aspect) if config.max_aspect > 1 else [(size, size)]
    kind_of: list[int] = []
    one_size = len(kinds) == 1 and config.crop != "random"
    whole = torch.empty((len(records) if one_size and not config.lazy else 0, channels, size, size), dtype=torch.uint8)
    for record in watched(records):
        try:
            if reason := problem(record, config.captions):
                raise PictureError(reason)
            decoded = _decoded(record, config)
            kind = nearest_shape(kinds, decoded.height, decoded.width)
            image = _fitted(decoded, kinds[kind], config, channels)
        except PictureError as e:
            bad.append(Bad(record.name, str(e)))
            continue
        if len(whole):
            whole[len(good)] = image
        elif not config.lazy:
            images.append(image)
        good.append(record)
        kind_of.append(kind)
    report = Report(path, len(records), tuple(bad), len(source.records) - len(records))
    on_report(report)
    report.require(config.bad_limit)

    rows = [_words_alone(record.row, config.captions) for record in good]
    weights = np.array([_weight(row, config) for row in rows], dtype=np.float64)
    if not weights.sum() > 0:
        raise BadData(f"{printable(str(path))}: data.weights leave nothing to draw")
    joined = join_small(kind_of, kinds, step_size)
    shapes = [kinds[kind] for kind in joined]
    lazy = LazyImages(good, config, shapes, channels)
    if not config.lazy:
        for i, (before, after) in enumerate(zip(kind_of, joined, strict=True)):
            if before != after:
                images[i] = lazy[i]
    found: Images = lazy if config.lazy else images or whole[: len(good)]
    return Pictures(found, rows, weights, config, report, shapes if len(kinds) > 1 else None, step_size)


def problem(record: Record, captions: str) -> str | None:
    """Return what is wrong with a record that does not show in its pixels, or None."""
    if record.problem:
        return record.problem
    found = caption_problem(record.row, captions)
    if found and record.caption_problem and "caption" not in record.row:
        return f"no caption: {record.caption_problem}"
    return found


def _words_alone(row: dict[str, Any], how: str) -> dict[str, Any]:
    """Let ``caption`` hold the words that are used, and nothing be left of those that are not."""
    if how == "none":
        return {k: v for k, v in row.items() if k not in TEXT_COLUMNS} | {"caption": ""}
    return {**row, "caption": row[how.removeprefix("field:")]} if how.startswith("field:") else row


def _decoded(record: Record, config: DataConfig) -> Image.Image:
    return decode(record.read(), config.background)


def _fitted(image: Image.Image, shape: Shape, config: DataConfig, channels: int) -> Tensor:
    return torch.from_numpy(to_array(fit(image, shape, config.crop, config.background), channels))


def _window(image: Tensor, shape: Shape | None, place: Callable[[int], int]) -> Tensor:
    """Cut a shape out of (C, H, W), by default a square of the shorter side's length.

    ``place`` says how many of the rows, or columns, to spare lie before it.
    """
    h, w = image.shape[-2:]
    height, width = shape or (min(h, w), min(h, w))
    top, left = place(h - height), place(w - width)
    return image[:, top : top + height, left : left + width]


def _check_memory(size: int, count: int, side: int, config: DataConfig) -> None:
    if size > config.memory * 1e9:
        raise NoResources(
            f"{count:,} pictures at {side}×{side} take {size / 1e9:.1f} GB of memory, more than data.memory="
            f"{config.memory:g}: raise it, choose fewer with data.where, or set data.lazy=true"
        )


def watched(records: list[Record]) -> Iterable[Record]:
    """Show on a terminal how far the reading of many records is."""
    if not sys.stderr.isatty() or len(records) < 1000:
        return records
    from rich.console import Console
    from rich.progress import track

    return track(records, "reading pictures", console=Console(stderr=True), transient=True)


# ── choosing ───────────────────────────────────────────────────────────────────────────────────────────


def _choose(source: Source, config: DataConfig) -> list[Record]:
    """Return the records that where and exclude leave; a record that is bad already stays, so that it is counted."""
    where = printable(str(source.path))
    for setting in ("where", "exclude", "weights"):
        for column in getattr(config, setting):
            _check_column(source, setting, column)
    for column, value in config.where.items():
        _check_values(source, "where", column, value if isinstance(value, list) else [value])
    for setting, named in (("exclude", config.exclude), ("weights", config.weights)):
        for column, values in named.items():
            _check_values(source, setting, column, list(values))
    records = [r for r in source.records if r.problem or is_wanted(r.row, config)]
    if not any(not r.problem for r in records) and (config.where or config.exclude):
        raise BadData(f"{where}: no picture is left after where={dict(config.where)} exclude={dict(config.exclude)}")
    if not records:
        raise BadData(f"{where}: no pictures")
    usable = [r for r in records if not r.problem]
    if usable and not any(r.caption_problem for r in usable):
        check_columns(source.columns, config.captions, where)
    return records


def _check_column(source: Source, setting: str, column: str) -> None:
    if column not in source.columns:
        raise BadData(
            f"{printable(str(source.path))}: data.{setting} names the column {column!r}, which is missing"
            f"{nearest(column, source.columns)}; there are {', '.join(source.columns) or 'none'}"
        )


def _check_values(source: Source, setting: str, column: str, values: list[Any]) -> None:
    """Raise BadData for a value that no row has: any that is wanted; of others, one that looks like a slip of the pen.

    A recipe for many data sets may well leave out, or weigh, what this one does not have.
    """
    present = [v for r in source.records if (v := r.row.get(column)) is not None]
    for value in values:
        if value in (map(str, present) if setting == "weights" else present):
            continue
        known = sorted({str(v) for v in present})
        near = nearest(str(value), known)
        if near or setting == "where":
            listing = f"; there are {', '.join(known)}" if len(known) <= 12 else ""
            where = printable(str(source.path))
            raise BadData(f"{where}: data.{setting}: no row has {column}={value!r}{near}{listing}")


def is_wanted(row: Row, config: DataConfig) -> bool:
    """Whether a row is among those that ``where`` and ``exclude`` leave."""
    return all(
        row.get(k) in v if isinstance(v, list) else row.get(k) == v for k, v in config.where.items()
    ) and not any(row.get(k) in values for k, values in config.exclude.items())


def _weight(row: Row, config: DataConfig) -> float:
    weight = 1.0
    for column, table in config.weights.items():
        weight *= table.get(str(row.get(column)), 1.0)
    return weight
