"""Pictures of a fit: a file, or a sketch of characters for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import OrthoactError
from .files import beside
from .fit import Fit
from .targets import Target

FORMATS = (".png", ".svg", ".pdf")

INK, SOFT, TARGET, COPY, SLOPE = "#1b1d21", "#5d636d", "#b4b9c1", "#0067a5", "#c2510a"
"""The colours of the report: told apart by people who see few colours, and in grey."""


def check_format(path: str | Path) -> None:
    """Raise `OrthoactError` for a file name that ends otherwise than `FORMATS`."""
    if Path(path).suffix.lower() not in FORMATS:
        raise OrthoactError(f"--plot {path}: expected a name that ends in {', '.join(FORMATS)}")


def plot_fit(fit: Fit, target: Target, path: str | Path) -> None:
    """Draw target and copy over the law of the inputs, and below them the errors; the file's name gives the format.

    Raises `OrthoactError` for a name that ends otherwise than `FORMATS`.
    """
    path = Path(path)
    check_format(path)
    import matplotlib
    from matplotlib.figure import Figure

    x, value, slope, wanted, wanted_slope = _sampled(fit, target, 1001)
    with matplotlib.rc_context({"svg.hashsalt": "orthoact", "font.size": 10, "axes.edgecolor": SOFT}):
        figure = Figure(figsize=(7.5, 6.5), layout="constrained", dpi=150)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 2))
        top.plot(x, wanted, color=TARGET, linewidth=6, solid_capstyle="round", label=fit.target)
        top.plot(x, value, color=COPY, linewidth=1.8, label=f"{fit.family} {fit.degree}, {fit.parameters} numbers")
        nodes, weights = fit.domain.nodes()
        density = weights / weights.max() * 0.35 * np.ptp(top.get_ylim())
        seen = (nodes >= x[0]) & (nodes <= x[-1])
        foot = top.get_ylim()[0]
        top.fill_between(nodes[seen], foot, foot + density[seen], color=TARGET, alpha=0.35, linewidth=0, label="inputs")
        top.set_ylim(foot, top.get_ylim()[1])
        middle.plot(x, value - wanted, color=COPY, linewidth=1.4)
        middle.set_ylabel("value error")
        bottom.plot(x, slope - wanted_slope, color=SLOPE, linewidth=1.4)
        bottom.set_ylabel("slope error")
        for axes in (top, middle, bottom):
            if np.isfinite([fit.lo, fit.hi]).all():
                axes.axvspan(fit.lo, fit.hi, color="#f0f1f2", zorder=0, linewidth=0)
            axes.axhline(0, color="#d8dade", linewidth=0.8, zorder=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=SOFT)
            axes.margins(x=0)
        top.legend(frameon=False, loc="upper left")
        top.set_title(
            f"{fit.target} as {fit.family} {fit.degree}: error {fit.value_rms:.2g} of the value, "
            f"{fit.slope_rms:.2g} of the slope (root mean square)",
            loc="left", fontsize=10, color=INK,
        )  # fmt: skip
        figure.align_ylabels()
        undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix.lower()]
        with beside(path) as part:
            figure.savefig(part, metadata=undated)


def plot_curves(x: np.ndarray, curves: dict[str, np.ndarray], wanted: np.ndarray | None, path: Any) -> None:
    """Draw the values of many activations by name over `x` and, below, their errors against `wanted`.

    One hue in the order of the sites; a target of None leaves the errors out. The format is that of the file's name,
    which may be a binary file too (then PNG).
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5 if wanted is not None else 3), layout="constrained", dpi=80)
    rows = figure.subplots(2 if wanted is not None else 1, 1, sharex=True, squeeze=False)[:, 0]
    if wanted is not None:
        rows[0].plot(x, wanted, color="0.8", linewidth=5, label="original")
    colours = colormaps["viridis"](np.linspace(0, 0.9, max(len(curves), 2)))
    for colour, (name, value) in zip(colours, curves.items(), strict=False):
        label = {"label": name} if len(curves) <= 8 else {}
        rows[0].plot(x, value, color=colour, linewidth=1, **label)
        if wanted is not None:
            rows[1].plot(x, value - wanted, color=colour, linewidth=1)
    rows[0].legend(fontsize=7)
    rows[0].set_ylabel("value")
    if wanted is not None:
        rows[1].axhline(0, color="0.8", zorder=0)
        rows[1].set_ylabel("error")
    rows[-1].set_xlabel("x")
    figure.savefig(path, format=None if isinstance(path, str | Path) else "png")


def sketch(fit: Fit, target: Target, width: int = 72) -> str:
    """The copy and its error as lines of braille characters, `width` wide with the numbers beside them.

    >>> from .fit import fit
    >>> from .targets import get_target
    >>> lines = sketch(fit("relu"), get_target("relu"), width=40).splitlines()
    >>> max(len(line) for line in lines) <= 40
    True
    """
    columns = width - 10
    x, value, _, wanted, _ = _sampled(fit, target, 2 * columns)
    lines = _panel(value, 10, "")
    lines += _panel(value - wanted, 4, "error")
    marks = [" "] * columns
    for at in (x[0], fit.lo, 0.0, fit.hi, x[-1]):
        if np.isfinite(at) and x[0] <= at <= x[-1]:
            text = f"{at:.3g}"
            place = round((at - x[0]) / (x[-1] - x[0]) * (columns - 1))
            first = min(max(place - len(text) // 2, 0), columns - len(text))
            if all(c == " " for c in marks[max(first - 1, 0) : first + len(text) + 1]):
                marks[first : first + len(text)] = text
    return "\n".join([*lines, " " * 10 + "".join(marks)])


def _sampled(fit: Fit, target: Target, count: int) -> tuple[np.ndarray, ...]:
    """Abscissae over the core and what lies about it; values and slopes of the copy, then of the target."""
    ends = [end for end in (fit.lo, fit.hi) if np.isfinite(end)]
    if ends:  # tails: what is beyond goes on straight
        middle, half = (fit.lo + fit.hi) / 2, max(0.75 * (fit.hi - fit.lo), 3.5 * fit.domain.std)
    else:
        middle, half = fit.domain.mean, 4.0 * fit.domain.std
    x = np.linspace(middle - half, middle + half, count)
    return x, *fit(x), *target(x)


DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot of a braille character, row by row."""


def _panel(values: np.ndarray, rows: int, title: str) -> list[str]:
    low, high = float(values.min()), float(values.max())
    room = (high - low) or 1.0
    heights = np.round((values - low) / room * (4 * rows - 1)).astype(int)
    cells = np.zeros((rows, len(values) // 2), dtype=int)
    last = heights[0]
    for i, height in enumerate(heights):
        a, b = sorted((last + (1 if height > last else -1 if height < last else 0), height))
        for h in range(a, b + 1):  # no gap where it is steep
            row, dot = divmod(4 * rows - 1 - h, 4)
            cells[row, i // 2] |= DOTS[dot][i % 2]
        last = height
    left = [""] * rows
    left[0], left[-1] = (f"{0.0 if abs(v) < 1e-9 * room else v:.2g}" for v in (high, low))
    if title:
        left[rows // 2] = title
    return [
        f"{text:>9} " + "".join(chr(0x2800 + c) if c else " " for c in row)
        for text, row in zip(left, cells, strict=True)
    ]
