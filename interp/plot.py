"""Pictures of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import OrthoactError
from .fit import Fit
from .targets import Target

FORMATS = (".png", ".svg", ".pdf")


def plot_fit(fit: Fit, target: Target, path: str | Path) -> None:
    """Draw target, copy and joints, and the errors of value and slope below; the format is that of the file's name."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise OrthoactError(f"--plot {path}: expected a name that ends in {', '.join(FORMATS)}")
    from matplotlib.figure import Figure

    ends = [end for end in (fit.lo, fit.hi) if np.isfinite(end)]
    reach = 1.4 * max([4.0 * fit.domain.std + abs(fit.domain.mean), *map(abs, ends)])
    x = np.linspace(-reach, reach, 1001)
    value, slope = fit(x)
    wanted, wanted_slope = target(x)
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(x, wanted, color="0.6", linewidth=5, label=fit.target)
    top.plot(x, value, color="tab:blue", label=f"{fit.family} {fit.degree}")
    top.legend()
    bottom.plot(x, value - wanted, color="tab:blue", label="value error")
    bottom.plot(x, slope - wanted_slope, color="tab:orange", label="slope error")
    bottom.axhline(0, color="0.8", zorder=0)
    bottom.legend()
    for axes in (top, bottom):
        for end in ends:
            axes.axvline(end, color="0.8", linestyle=":", zorder=0)
    bottom.set_xlabel(f"x  (value RMS {fit.value_rms:.2e}, slope RMS {fit.slope_rms:.2e})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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
