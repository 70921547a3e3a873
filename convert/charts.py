"""Charts as HTML: an SVG that stretches to its box, with ticks as text beside it, so that both are crisp at any width.

Every chart spans the unit box of 1000 by 1000; lines keep their width when the box is stretched and a dot is a line of
length nothing with a round cap. Colours are classes that the page's style defines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
from markupsafe import Markup, escape

SIZE = 1000
"""Units of a chart in each direction."""

Numbers = Sequence[float] | np.ndarray
"""A row of numbers."""


@dataclass(frozen=True)
class Axis:
    """A range of numbers laid on 0 to 1000, of lengths or of their logarithms.

    >>> [Axis(0.0, 2.0).at(v) for v in (0, 0.5, 2)]
    [0.0, 250.0, 1000.0]
    >>> Axis(1e-3, 1e1, log=True).ticks()
    [0.001, 0.01, 0.1, 1.0, 10.0]
    """

    low: float
    """The number at 0."""
    high: float
    """The number at 1000."""
    log: bool = False
    """Whether logarithms are laid out."""

    @classmethod
    def over(cls, values: Numbers, *, log: bool = False, zero: bool = False, margin: float = 0.06) -> Axis:
        """The axis that holds all finite `values`; with `zero`, also nought; logarithmic ones end at whole decades."""
        kept = [float(v) for v in values if isfinite(v) and (not log or v > 0)] or [1.0]
        low, high = min(kept), max(kept)
        if log:
            bottom = floor(log10(low) + 1e-9)
            return cls(10.0**bottom, 10.0 ** max(ceil(log10(high) - 1e-9), bottom + 1), log=True)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        room = (high - low) * margin or abs(high) * margin or 1.0
        return cls(low if zero and low == 0 else low - room, high if zero and high == 0 else high + room)

    def at(self, value: float) -> float:
        """The place of `value`; below the axis where its logarithm is not there."""
        if self.log:
            return self.at_end(log10(value), log10(self.low), log10(self.high)) if value > 0 else -SIZE
        return self.at_end(value, self.low, self.high)

    @staticmethod
    def at_end(value: float, low: float, high: float) -> float:
        return SIZE * (value - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on the axis, at most so many."""
        if self.log:
            decades = range(round(log10(self.low)), round(log10(self.high)) + 1)
            return [10.0**e for e in decades[:: ceil(len(decades) / most)]]
        raw = (self.high - self.low) / most
        unit = 10.0 ** floor(log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float, digits: int = 3) -> str:
    """A number in as few characters as so many digits need.

    >>> [short(v) for v in (0.00012345, 24.3141, 1234567, -2.0, 0.0)]
    ['1.23e-4', '24.3', '1.23e6', '-2', '0']
    """
    text = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def _told(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """The ticks with their texts, in as many digits as tell them apart."""
    texts = next(t for d in range(3, 18) if len({*(t := [short(v, d) for v in ticks])}) == len(ticks) or d == 17)
    return list(zip(ticks, texts, strict=True))


def line(xs: Numbers, ys: Numbers, x: Axis, y: Axis, kind: str) -> Markup:
    """A line through the points; it breaks where a value is not finite."""
    path, pen = [], "M"
    for a, b in zip(xs, ys, strict=True):
        if not (isfinite(b) and isfinite(a)) or (y.log and b <= 0):
            pen = "M"
            continue
        down = min(max(SIZE - y.at(b), -2 * SIZE), 3 * SIZE)  # a pole would overflow the renderer's numbers
        path.append(f"{pen}{x.at(a):.0f} {down:.0f}")
        pen = "L"
    return Markup(f'<path class="{escape(kind)}" d="{"".join(path)}"/>')


def dots(xs: Numbers, ys: Numbers, x: Axis, y: Axis, kind: str) -> Markup:
    """A round dot at every point."""
    kept = [(a, b) for a, b in zip(xs, ys, strict=True) if isfinite(b) and not (y.log and b <= 0)]
    path = "".join(f"M{x.at(a):.0f} {SIZE - y.at(b):.0f}h0" for a, b in kept)
    return Markup(f'<path class="dots {escape(kind)}" d="{path}"/>')


def band(low: float, high: float, x: Axis, kind: str) -> Markup:
    """The strip between two abscissae, over the whole height."""
    ends = [min(max(x.at(v) if isfinite(v) else (SIZE if v > 0 else 0.0), 0.0), SIZE) for v in (low, high)]
    return Markup(
        f'<rect class="{escape(kind)}" x="{ends[0]:.0f}" y="0" width="{ends[1] - ends[0]:.0f}" height="{SIZE}"/>'
    )


def area(xs: Numbers, lows: Numbers, highs: Numbers, x: Axis, y: Axis, kind: str) -> Markup:
    """The area between two lines."""
    there = [f"{x.at(a):.0f} {SIZE - y.at(b):.0f}" for a, b in zip(xs, highs, strict=True)]
    back = [f"{x.at(a):.0f} {SIZE - y.at(b):.0f}" for a, b in zip(xs, lows, strict=True)][::-1]
    return Markup(f'<path class="{escape(kind)}" d="M{"L".join(there + back)}Z"/>')


def steps(low: float, high: float, shares: Numbers, x: Axis, kind: str, height: float = 0.55) -> Markup:
    """A histogram of equal cells from `low` to `high` at the foot of the chart, its highest cell so high."""
    edges = np.linspace(low, high, len(shares) + 1)
    top = max(shares) or 1.0
    inside = [(a, b, s) for a, b, s in zip(edges, edges[1:], shares, strict=False) if b > x.low and a < x.high]
    if not inside:
        return Markup("")
    parts = [f"M{max(x.at(inside[0][0]), 0):.0f} {SIZE}"]
    for _, b, share in inside:
        parts.append(f"V{SIZE - SIZE * height * share / top:.0f}H{min(x.at(b), SIZE):.0f}")
    return Markup(f'<path class="{escape(kind)}" d="{"".join(parts)}V{SIZE}"/>')


def levels(values: Numbers, axis: Axis, kind: str, *, upright: bool = False) -> Markup:
    """Straight lines across the chart at these values."""
    places = [axis.at(v) for v in values if isfinite(v)]
    path = "".join(f"M{p:.0f} 0V{SIZE}" if upright else f"M0 {SIZE - p:.0f}H{SIZE}" for p in places if 0 <= p <= SIZE)
    return Markup(f'<path class="{escape(kind)}" d="{path}"/>')


def chart(
    parts: Sequence[Markup],
    label: str,
    *,
    kind: str = "",
    x: Axis | None = None,
    y: Axis | None = None,
    names: Sequence[tuple[float, str]] = (),
    labels: Sequence[tuple[float, float, str]] = (),
    key: str = "",
) -> Markup:
    """The parts in one box, with the ticks of `x` and `y` (or `names` along x) beside it and `labels` at points of it.

    `key` finds the numbers that the page shows under the pointer.
    """
    marks = []
    if x is not None:
        across = list(names) or _told(x.ticks())
        marks = [f'<span class="tx" style="left:{x.at(v) / 10:.2f}%">{escape(t)}</span>' for v, t in across]
    if y is not None:
        marks += [
            f'<span class="ty" style="top:{100 - y.at(v) / 10:.2f}%">{escape(t)}</span>' for v, t in _told(y.ticks())
        ]
    if x is not None and y is not None:
        for a, b, text in labels:
            right, height = x.at(a) > 0.6 * SIZE, 100 - y.at(b) / 10
            side, gap = ("right", 100 - x.at(a) / 10) if right else ("left", x.at(a) / 10)
            place = f"{side}:{gap:.2f}%;top:{height:.2f}%"
            marks.append(f'<span class="at {side}" style="{place}">{escape(text)}</span>')
    grid = levels(y.ticks(), y, "grid") if y is not None else Markup("")
    return Markup(
        f'<div class="chart {escape(kind)}" data-key="{escape(key)}"><svg viewBox="0 0 {SIZE} {SIZE}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(label)}">{grid}{Markup("").join(parts)}</svg>'
        f'<span class="cursor"></span>{"".join(marks)}</div>'
    )
