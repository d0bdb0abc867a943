"""Which pictures, at which size, with which words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import BadData, nearest

CROPS = ("center", "random", "pad")
CAPTIONS = ("plain", "template", "none")
SAMPLE = Path(__file__).parent / "sample" / "sample.parquet"


@dataclass(frozen=True)
class DataConfig:
    """Which pictures, at which size, with which words.

    Args:
        path: folder, ``.parquet`` or ``.tar``, relative to the recipe's folder; ``sample`` is the one that ships.
        where, exclude: column → the value (or one of a list) a row must have, or values it must not have.
        weights: column → value → how often such a row is drawn, relative to 1.
        captions: ``plain`` takes the caption as it is; ``template`` writes it anew each time from name,
            style and tags; ``field:NAME`` takes a column; ``none`` trains without words.
        variants: so many captions of each picture are written once, and every visit draws one of them; 0: anew at
            every visit.
        dropout: share of captions left empty, for classifier-free guidance.
        flip: whether pictures may be mirrored.
        crop: how a picture becomes square: ``center``, ``random`` (another window at every visit), or ``pad``
            (shrunk if too large, never enlarged, and framed with ``background``).
        max_aspect: longest side by shortest up to which pictures keep about their own shape, in buckets of at most
            size² pixels (every step has one shape); 1: all are square.
        background: colour behind transparent and padded pictures, as a name or ``#rrggbb``.
        bad_limit: share of bad pictures above which data are refused; below it they are listed and left out.
        memory: gigabytes that the decoded pictures may take.
        lazy: decode each picture when it is drawn, instead of all at the start (folders and tar shards).
    """

    path: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    exclude: Mapping[str, list[Any]] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    captions: str = "plain"
    variants: int = 0
    dropout: float = 0.1
    flip: bool = False
    crop: str = "center"
    max_aspect: float = 1.0
    background: str = "white"
    bad_limit: float = 0.2
    memory: float = 4.0
    lazy: bool = False

    def __post_init__(self) -> None:
        from PIL import ImageColor

        if self.captions not in CAPTIONS and not self.captions.startswith("field:"):
            raise BadData(
                f"data.captions is {', '.join(CAPTIONS)} or field:COLUMN, not {self.captions!r}"
                f"{nearest(self.captions, list(CAPTIONS))}"
            )
        if self.crop not in CROPS:
            raise BadData(f"data.crop is one of {', '.join(CROPS)}, not {self.crop!r}{nearest(self.crop, list(CROPS))}")
        for name in ("dropout", "bad_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadData(f"data.{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.variants < 0:
            raise BadData(f"data.variants must not be negative, not {self.variants}")
        if not 1 <= self.max_aspect <= 4:
            raise BadData(f"data.max_aspect must lie in [1, 4], not {self.max_aspect}")
        if not self.memory > 0:
            raise BadData(f"data.memory must be positive, not {self.memory}")
        for column, table in self.weights.items():
            for value, weight in table.items():
                if not 0 <= weight < math.inf:
                    raise BadData(f"data.weights.{column}.{value} must be a finite number of at least 0, not {weight}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise BadData(f"data.background is a colour such as white or #000000, not {self.background!r}") from None

    def resolve(self, root: Path) -> Path:
        """Return where the data lie, reading a relative path from ``root``."""
        if not self.path:
            raise BadData("no data are named: give a folder, .parquet or .tar with data.path=… or --data")
        return SAMPLE if self.path == "sample" else root / Path(self.path).expanduser()
