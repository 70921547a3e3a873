"""The report: one HTML file that shows what a model's activations became, where the error sits and what it cost.

It is made from the files of a converted or fine-tuned folder alone: `orthoact.json`, the config's record, the tensors
of the activations, and where they are, `metrics.jsonl` and `comparison.json`. It needs no network. Every number of its
text is a `<data>` element that names the file and the place that it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ..interp.errors import OrthoactError
from ..interp.files import beside
from .charts import Axis, short
from .curves import curves
from .names import is_adapter
from .pictures import comparison, depth_charts, metric_of, rounded, tile, training
from .provenance import record_in
from .sources import REPORT

PAGE = "report.html"
"""The name of the report in the folder that it is about."""

METRICS, COMPARISON = "metrics.jsonl", "comparison.json"
"""What fine-tuning writes beside the weights."""

DATA = {"file": "the data given", "demo": "the demo's held-out text", "probe": "a seeded probe batch, not real data"}
"""What an evaluation was measured on."""


@dataclass
class Files:
    """What a folder says about its activations."""

    folder: Path
    record: dict[str, Any]
    """`orthoact.json`."""
    spec: dict[str, Any]
    """The config's record: targets, families, degrees."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)

    @property
    def roots(self) -> dict[str, Any]:
        """The files by name: where a number on the page can come from."""
        return {REPORT: self.record, METRICS: self.metrics, COMPARISON: self.comparison}

    @property
    def sites(self) -> list[str]:
        """The names of the sites, in the model's order."""
        named = [row["name"] for row in self.record.get("sites", [])]
        return named or list(self.spec.get("sites", {}))


def write_report(folder: str | Path, path: str | Path | None = None, *, name: str | None = None) -> Path:
    """Write the report on `folder`, which `convert` or `finetune` wrote; by default into it. Returns the file.

    `name` is what the model is called where the folder does not say. Raises `OrthoactError` where the folder is none of
    ours or its files are damaged.
    """
    folder = Path(folder)
    if path is None and is_adapter(folder):
        raise OrthoactError(f"{folder} is an adapter, which is kept small: give the report a file of its own with -o")
    path = folder / PAGE if path is None else Path(path)
    page = render(read(folder), name or folder.resolve().name)
    with beside(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def read(folder: str | Path) -> Files:
    """The files of a folder; the weights are not read but for the activations' tensors, and these later."""
    folder = Path(folder)
    adapter = is_adapter(folder)
    if not adapter and not (folder / REPORT).is_file():
        raise OrthoactError(f"{folder} has no {REPORT}: expected a folder that orthoact convert or finetune wrote")
    record = {} if adapter else _json(folder / REPORT)
    config = folder / ("adapter_config.json" if adapter else "config.json")
    spec = record_in(_json(config)) if config.is_file() else {}
    files = Files(folder, record, spec)
    if (folder / COMPARISON).is_file():
        files.comparison = _json(folder / COMPARISON)
    if (folder / METRICS).is_file():
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        files.metrics = [_parse(line, folder / METRICS) for line in lines if line.strip()]
    if not (files.sites or files.metrics or files.comparison):
        raise OrthoactError(
            f"{folder}: {REPORT} names no site and there is no training to show; convert the model again"
        )
    return files


def _json(path: Path) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise OrthoactError(f"{path} is damaged ({error}): make the folder again") from error
    if not isinstance(value, dict):
        raise OrthoactError(f"{path} is damaged (expected an object): make the folder again")
    return value


# -- numbers and names -------------------------------------------------------------------------------------------------


def number(roots: Mapping[str, Any], file: str, *path: str | int, digits: int = 3, percent: bool = False) -> Markup:
    """The number at a place of a file as a `<data>` element: its whole value, where it stands, and a readable text."""
    value = _value(roots, file, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(value if value is not None else "-")
    place = "/".join([file, *(str(step).replace("~", "~0").replace("/", "~1") for step in path)])
    if isinstance(value, int):
        text = f"{value:,}"
    elif percent:
        text = f"{short(100 * value, digits)} %"
    else:
        text = short(value, digits)
    return Markup(f'<data value="{value!r}" data-from="{escape(place)}">{text}</data>')


def _value(roots: Mapping[str, Any], file: str, *path: str | int) -> Any:
    value: Any = roots[file]
    for step in path:
        value = value[step]
    return value


def short_names(names: Sequence[str]) -> list[str]:
    """The parts of dotted names that tell them apart, with the part before each.

    >>> short_names(["model.layers.0.mlp.act", "model.layers.1.mlp.act"])
    ['layers.0', 'layers.1']
    >>> short_names(["mlp.act"])
    ['mlp.act']
    """
    split = [name.split(".") for name in names]
    if len(split) < 2 or len({len(parts) for parts in split}) > 1:
        return list(names)
    varies = [len(set(column)) > 1 for column in zip(*split, strict=True)]
    shown = [v or (i + 1 < len(varies) and varies[i + 1] and split[0][i + 1].isdigit()) for i, v in enumerate(varies)]
    return [".".join(part for part, show in zip(parts, shown, strict=True) if show) for parts in split]


def render(files: Files, name: str) -> str:
    """The page; the model is called `name` unless its record names the base."""
    from jinja2 import Environment, PackageLoader

    drawn, names = curves(files.folder, files.spec.get("sites", {})), short_names(files.sites)
    moved = [drawn[name].moved if name in drawn else float("nan") for name in files.sites]
    seen = files.record.get("calibration", {})
    errors = [
        c - d.target for d in drawn.values() if d.target is not None for c in (d.start, d.learned) if c is not None
    ]
    # of a bare series outside its range, nothing is to be seen but that it leaves
    bare = any(not isfinite(d.lo) for d in drawn.values())
    bound = float(np.quantile(np.abs(np.concatenate(errors)), 0.9 if bare else 1.0)) if errors else 1.0
    error = Axis(-1.1 * (bound or 1.0), 1.1 * (bound or 1.0))
    tiles = [
        {"name": full, "short": label, "i": i, "row": i if i < len(files.record.get("sites", [])) else None}
        | ({"picture": tile(drawn[full], seen.get(full), error, full)} if full in drawn else {"picture": ""})
        for i, (full, label) in enumerate(zip(files.sites, names, strict=True))
    ]
    depth, numbers = depth_charts(files.record.get("sites", []), moved, names)
    trained, more = training(files.metrics)
    columns, picture = comparison(files.comparison.get("rows", []))
    held: Callable[..., Markup] = lambda file, *path, **how: number(files.roots, file, *path, **how)  # noqa: E731
    hover = {
        "sites": [
            {
                "name": full,
                "x": [float(drawn[full].x[0]), float(drawn[full].x[-1])],
                "target": rounded(drawn[full].target),
                "copy": rounded(drawn[full].start),
                "learned": rounded(drawn[full].learned),
            }
            if full in drawn
            else None
            for full in files.sites
        ],
        "charts": numbers | more,
    }
    environment = Environment(loader=PackageLoader("orthoact.convert", "."), autoescape=True)
    environment.globals |= {
        "n": held,
        "value_at": lambda *path: _value(files.roots, *path),
        "DATA": DATA,
        "REPORT": REPORT,
        "COMPARISON": COMPARISON,
    }
    return environment.get_template("report.jinja.html").render(
        record=files.record,
        model=str((files.record.get("base") or {}).get("model") or name).rstrip("/").rpartition("/")[2],
        tiles=tiles,
        families=sorted({(e["family"], e["degree"]) for e in files.spec.get("sites", {}).values()}),
        made=files.spec.get("made") or {},
        learned=any(c.learned is not None for c in drawn.values()),
        grouped=any(c.low is not None for c in drawn.values()),
        bound=short(error.high, 2),
        calibrated=bool(seen),
        depth=depth,
        training=trained,
        columns=columns,
        rows=len(files.comparison.get("rows", [])),
        picture=picture,
        metric=metric_of(files.record.get("training") or {}),
        hover=Markup(json.dumps(_finite(hover), separators=(",", ":")).replace("<", "\\u003c")),
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
