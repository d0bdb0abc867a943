"""A figure and all that decided it; a report as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.evaluation.bootstrap import Interval

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        metric: such as ``KID`` or ``R@1``; ``split`` and ``style`` say of which pictures ('' is every style).
        value, interval: the figure and its 95 % interval over pictures (docs/metrics.md says over which).
        n: pictures that it is made of; ``reference`` is the content hash of what they are compared with.
        real, real_interval: the same figure of real pictures: the ceiling, None where there are too few.
        detail: what else is worth knowing, such as baselines.
    """

    metric: str
    split: str
    style: str
    value: float
    interval: Interval
    n: int
    extractor: str
    reference: str
    real: float | None = None
    real_interval: Interval | None = None
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Figures, with the model, data and settings behind them; settings are empty when real pictures are measured."""

    model: str
    model_hash: str
    data: str
    data_hash: str
    size: int
    settings: Mapping[str, Any]
    figures: Sequence[Figure]
    skipped: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str | int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in which each figure stands for itself, with model, data and settings."""
        shared = {
            "model": self.model, "model_hash": self.model_hash, "data_hash": self.data_hash, "size": self.size,
            **self.settings,
        }  # fmt: skip
        return {
            "format": FORMAT,
            "data": self.data,
            "made_with": dict(self.made_with),
            "skipped": dict(self.skipped),
            "figures": [
                {
                    **asdict(f),
                    "interval": list(f.interval),
                    "real_interval": f.real_interval and list(f.real_interval),
                    "detail": dict(f.detail),
                    **shared,
                }
                for f in self.figures
            ],
        }

    def print(self, console: Console) -> None:
        """Print two tables, of every style and style by style, under a line with what they share."""
        from rich.table import Table
        from rich.text import Text

        said = [f"{k} {v}" for k, v in self.settings.items()]
        head = f"{self.model} {self.model_hash[:12]}".strip()
        console.print(Text(f"{head}: {', '.join([*said, f'compared at {self.size}×{self.size}'])}"))
        console.print(Text(f"data {self.data} {self.data_hash[:12]}; brackets are 95 % intervals over pictures"))
        for styled in (False, True):
            figures = [f for f in self.figures if bool(f.style) == styled]
            if not figures:
                continue
            table = Table(box=None, pad_edge=False)
            for column in ("metric", "split", *(["style"] if styled else [])):
                table.add_column(column, no_wrap=True)
            columns = ("value", "interval", *(["real pictures"] if self.settings else []), "N")
            for column in columns:
                table.add_column(column, justify="right", no_wrap=True)
            table.add_column("extractor")
            table.add_column("reference")
            table.add_column("beside it")
            for f in figures:
                beside = ", ".join(f"{k} {_show(v)}" for k, v in f.detail.items())
                row = [f.metric, f.split, *([f.style] if styled else []), _show(f.value), _span(f.interval)]
                if self.settings:
                    row.append(
                        "" if f.real is None or f.real_interval is None else f"{_show(f.real)} {_span(f.real_interval)}"
                    )
                row.append(str(f.n))
                table.add_row(*(Text(cell) for cell in [*row, f.extractor, f.reference[:8], beside]))
            console.print()
            console.print(table)
        for metric, reason in self.skipped.items():
            console.print(Text(f"left out: {metric}: {reason}"))


def _show(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _span(interval: Interval) -> str:
    return f"[{_show(interval.low)}, {_show(interval.high)}]"
