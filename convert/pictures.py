"""The pictures of a report: a tile for each site, charts along the depth and the steps, the plot of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from markupsafe import Markup

from . import charts
from .charts import Axis
from .curves import Curves


def tile(curve: Curves, seen: Mapping[str, Any] | None, error: Axis, label: str) -> Markup:
    """One site: the curves over the histogram of its inputs, and below the differences to the target."""
    x = Axis(float(curve.x[0]), float(curve.x[-1]))
    shown = [c for c in (curve.target, curve.start, curve.learned) if c is not None]
    # not the bare series' poles: the target says how high the picture is
    y = Axis.over(np.concatenate(shown[:1] if curve.learned is None else [shown[0], shown[-1]]).tolist())
    parts = [charts.band(curve.lo, curve.hi, x, "core")]
    if seen:
        parts.append(charts.steps(seen["low"], seen["high"], seen["density"], x, "density"))
        if any(seen["sensitivity"]):
            parts.append(charts.steps(seen["low"], seen["high"], seen["sensitivity"], x, "sensitivity"))
    parts.append(charts.levels([0.0], y, "zero"))
    if curve.target is not None:
        parts.append(charts.line(curve.x, curve.target, x, y, "target"))
    if curve.low is not None and curve.high is not None:
        parts.append(charts.area(curve.x, curve.low, curve.high, x, y, "learned-band"))
    parts.append(charts.line(curve.x, curve.start, x, y, "copy" if curve.learned is None else "copy past"))
    if curve.learned is not None:
        parts.append(charts.line(curve.x, curve.learned, x, y, "learned"))
    below = [charts.band(curve.lo, curve.hi, x, "core"), charts.levels([0.0], error, "zero")]
    if curve.target is not None:
        below.append(charts.line(curve.x, curve.start - curve.target, x, error, "copy"))
        if curve.learned is not None:
            below.append(charts.line(curve.x, curve.learned - curve.target, x, error, "learned"))
    top = charts.chart(parts, f"{label}: target and copy", kind="curve", x=x, y=y)
    return top + charts.chart(below, f"{label}: error of the copy", kind="strip", x=x, y=error)


def by_depth(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, key: str, *, log: bool) -> Markup:
    """One dot a site for each series, in the order of the model; a class `s0`, `s1` for each series."""
    x = Axis(-0.7, len(names) - 0.3)
    y = Axis.over([v for values in series.values() for v in values], log=log, zero=not log)
    parts = []
    for i, values in enumerate(series.values()):
        parts += [charts.line(range(len(names)), values, x, y, f"thread s{i}")]
        parts += [charts.dots(range(len(names)), values, x, y, f"s{i}")]
    numerals = [name.rpartition(".")[2] for name in names]
    plain = all(n.isdigit() for n in numerals) and len({*numerals}) == len(names)
    every = -(-len(names) // (10 if plain else 4))
    marks = [(float(i), numerals[i] if plain else name) for i, name in enumerate(names) if i % every == 0]
    return charts.chart(parts, label, kind="wide", x=x, y=y, names=marks, key=key)


def over_steps(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[Markup, dict[str, Any]] | None:
    """A logged quantity against the step; of one that is logged for each site, the largest."""
    points = []
    for row in metrics:
        value = row.get(key)
        if isinstance(value, dict):
            value = max((v for v in value.values() if isinstance(v, int | float)), default=None)
        if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(row.get("step"), int | float):
            points.append((float(row["step"]), float(value)))
    if len(points) < 2:
        return None
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x, y = Axis.over(xs, margin=0.02), Axis.over(ys)
    parts = [charts.line(xs, ys, x, y, "s0"), charts.dots(xs, ys, x, y, "s0") if len(xs) < 40 else Markup("")]
    drawn = charts.chart(parts, f"{key} against the step", kind="wide", x=x, y=y, key=f"metric-{key}")
    return drawn, {"names": [f"step {int(v)}" for v in xs], "at": _places(xs, x), "series": {key: ys}}


def _places(values: Sequence[float], axis: Axis) -> list[float]:
    return [round(axis.at(v) / charts.SIZE, 4) for v in values]


def rounded(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [float(f"{v:.5g}") if isfinite(v) else 0.0 for v in values]


def depth_charts(
    rows: Sequence[Mapping[str, Any]], moved: Sequence[float], names: Sequence[str]
) -> tuple[list[dict], dict[str, Any]]:
    """The charts along the depth of the model, and the numbers that the page shows under the pointer."""

    def column(key: str) -> list[float]:
        return [float(row.get(key, float("nan"))) for row in rows]

    wanted: list[tuple[str, str, str, dict[str, list[float]], bool]] = [
        ("error", "Error of the copy", "Root mean square of copy less target, of value and slope, over the inputs.",
         {"value": column("value_rms"), "slope": column("slope_rms")}, True),
        ("sensitivity", "Sensitivity", "Sum of the squared gradients of the model's loss at the site's "
         "output, at one position: what a squared error there costs.", {"sensitivity": column("sensitivity")}, True),
        ("outside", "Inputs outside the core", "Share of the inputs that the straight tails carry.",
         {"outside": column("outside")}, False),
        ("moved", "Learned", "How far each activation has moved from its start, as the root mean square of theta: a "
         "distance between functions.", {"moved": list(moved)}, False),
    ]  # fmt: skip
    made, numbers = [], {}
    for key, title, text, series, log in wanted:
        kept = [v for values in series.values() for v in values if isfinite(v) and v > 0]
        if len(kept) < 2:
            continue
        chart = by_depth(names, series, f"{title} by depth", key, log=log)
        made.append({"title": title, "text": text, "chart": chart, "series": list(series)})
        axis = Axis(-0.7, len(names) - 0.3)
        numbers[key] = {"names": list(names), "at": _places(range(len(names)), axis), "series": series}
    return made, numbers


def training(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[dict], dict[str, Any]]:
    """A chart for each quantity of `metrics.jsonl`, losses first; of what is logged for each site, the extreme one."""
    rows, keys = [], {}
    for row in metrics:
        row, sites = dict(row), list((row.get("sites") or {}).values())
        if sites:
            row["inputs outside the core, the worst site"] = max(site["outside"] for site in sites)
            row["largest input of any site"] = max(max(-site["least"], site["greatest"]) for site in sites)
        rows.append(row)
        keys |= dict.fromkeys(k for k in row if k not in ("step", "epoch", "seconds", "sites"))
    made, numbers = [], {}
    for key in sorted(keys, key=lambda k: ("loss" not in k, k != "loss")):
        if (found := over_steps(rows, key)) is not None:
            made.append({"title": key.replace("_", " "), "chart": found[0]})
            numbers[f"metric-{key}"] = found[1]
    return made, numbers


SPLITS = {"zero_step": "before", "validation": "validation", "test": "test"}
"""What the parts of a row of a comparison are called."""


def metric_of(row: Mapping[str, Any]) -> str | None:
    """The figure that tells most of a row or a run."""
    held = row.get("test") or row.get("validation") or {}
    return next((name for name in ("accuracy", "perplexity", "loss") if name in held), None)


def comparison(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[tuple]], Markup]:
    """The table of `comparison.json`, for each column the places of its cells, and its picture."""
    metric = next(filter(None, map(metric_of, rows)), None)
    columns: dict[str, list[tuple]] = {}

    def put(label: str, i: int, *place: str) -> None:
        columns.setdefault(label, [()] * len(rows))[i] = ("rows", i, *place)

    for i, row in enumerate(rows):
        for key, value in row.items():
            if isinstance(value, str | int | float):
                put({"row": "what trains", "trainable": "numbers"}.get(key, key.replace("_", " ")), i, key)
            elif metric and key in SPLITS and metric in value:
                put(f"{metric}, {SPLITS[key]}", i, key, metric)
    told = [(row["row"], float(row["trainable"]), row["test"][metric]) for row in rows if metric in row.get("test", {})]
    if len(told) < 2:
        return columns, Markup("")
    sizes = [max(size, 1.0) for _, size, _ in told]
    x = Axis.over(sizes, log=True)
    y = Axis.over([v["mean"] + sign * v["std"] for *_, v in told for sign in (-1, 1)])
    parts = [charts.dots(sizes, [v["mean"] for *_, v in told], x, y, "s0")]
    for size, (_, _, v) in zip(sizes, told, strict=True):
        parts.append(charts.line([size, size], [v["mean"] - v["std"], v["mean"] + v["std"]], x, y, "s0"))
    labels = [(size, v["mean"], name) for size, (name, _, v) in zip(sizes, told, strict=True)]
    title = f"{metric} on the test split against the numbers that train"
    return columns, charts.chart(parts, title, kind="wide tall", x=x, y=y, labels=labels)
