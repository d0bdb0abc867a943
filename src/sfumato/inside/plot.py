"""Line charts as SVG, for a report that needs no script and no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

W, H = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 110, 18, 44


@dataclass(frozen=True)
class Series:
    """A named line; ``dots`` alone draws no line."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A named axis over some values, which a logarithmic one wants above 0."""

    name: str
    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the axis, at most about seven."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            all_ = [m * 10.0**e for e in powers for m in (1, 2, 5)]
            inside = [v for v in all_ if self.low * 0.999 <= v <= self.high * 1.001]
            if not inside:  # a range that holds no round value is told by its ends
                return [self.low, self.high]
            return inside if len(inside) <= 7 else [v for v in inside if math.log10(v) % 1 < 1e-9]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(name: str, values: Sequence[float], log: bool = False) -> Axis:
    """An axis that fits values; a linear one begins at 0 where that is near."""
    low, high = min(values), max(values)
    if log:
        return Axis(name, low / (2 if low == high else 1.1), high * (2 if low == high else 1.1), True)
    pad = (high - low) * 0.06 or 0.5
    return Axis(name, 0.0 if 0 <= low < 8 * pad else low - pad, high + pad)


def chart(label: str, series: Sequence[Series], x: str, y: str, *, xlog: bool = False, ylog: bool = False) -> str:
    """Draw lines over common axes; points that an axis cannot show are left out."""

    def fits(a: float, b: float) -> bool:
        return math.isfinite(a) and math.isfinite(b) and (a > 0 or not xlog) and (b > 0 or not ylog)

    shown = [Series(s.name, [p for p in s.points if fits(*p)], s.dots, s.dashed) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return ""
    ax = axis(x, [p[0] for s in shown for p in s.points], xlog)
    ay = axis(y, [p[1] for s in shown for p in s.points], ylog)

    def place(a: float, b: float) -> tuple[float, float]:
        return LEFT + ax.at(a) * (W - LEFT - RIGHT), H - BOTTOM - ay.at(b) * (H - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(label)}">']
    for v in ay.ticks():
        py = place(ax.low, v)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    for v in ax.ticks():
        parts.append(f'<text x="{place(v, ay.low)[0]:.1f}" y="{H - BOTTOM + 18}" text-anchor="middle">{v:.3g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{W - RIGHT}" y1="{H - BOTTOM}" y2="{H - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="{LEFT}" y="10">{escape(y)}</text>')
    names: list[tuple[float, int, str]] = []
    for i, s in enumerate(shown):
        spots = [place(*p) for p in s.points]
        if not (s.dots and not s.name):
            d = "".join(f"{'L' if k else 'M'}{px:.1f} {py:.1f}" for k, (px, py) in enumerate(spots))
            parts.append(f'<path class="line s{i % 6}{" dashed" if s.dashed else ""}" d="{d}"/>')
        if s.dots:
            parts += [f'<circle class="s{i % 6}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in spots]
        if s.name:
            names.append((spots[-1][1], i, s.name))
    names.sort()
    lowest = [H - BOTTOM - 15 * k for k in reversed(range(len(names)))]  # of each name: none is below the axis
    above = -math.inf
    for (py, i, name), low in zip(names, lowest, strict=True):
        above = min(max(py, above + 15), low)
        parts.append(f'<text class="name s{i % 6}" x="{W - RIGHT + 10}" y="{above + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])
