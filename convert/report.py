"""The report: one HTML file that shows what a model's activations became, where the error sits and what it cost.

It is made from the files of a converted or fine-tuned folder alone: `orthoact.json`, the config's record, the tensors
of the activations, and where they are, `metrics.jsonl` and `comparison.json`. It needs no network. Every number of its
text is a `<data>` element that names the file and the place that it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ..interp.errors import OrthoactError
from . import charts
from .charts import Axis, short
from .sources import REPORT

PAGE = "report.html"
"""The name of the report in the folder that it is about."""

METRICS, COMPARISON = "metrics.jsonl", "comparison.json"
"""What fine-tuning writes beside the weights."""

POINTS = 161
"""Points of a curve."""

MOST_GROUPS = 64
"""Groups of a site that are evaluated: the band of the learned curves spans these, evenly chosen."""

NAMES = {
    "data": "data",
    "kl": "KL divergence to the original, nats",
    "top1_agreement": "same most likely token or class",
    "cosine_mean": "cosine to the original, mean",
    "cosine_min": "cosine to the original, least",
    "loss": "loss",
    "perplexity": "perplexity",
    "change": "change",
}
"""What the figures of an evaluation are called."""

DATA = {"file": "the data given", "demo": "the demo's held-out text", "probe": "a seeded probe batch, not real data"}
"""What an evaluation was measured on."""


@dataclass(frozen=True)
class Curves:
    """One site as functions of x: target, start and, where it has learned, mean and range over its groups."""

    name: str
    x: np.ndarray
    lo: float
    hi: float
    start: np.ndarray
    target: np.ndarray | None = None
    learned: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    moved: float = 0.0
    """How far it has moved from its start: the root mean square of theta, a distance between functions."""


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
    path = folder / PAGE if path is None else Path(path)
    page = render(read(folder), name or folder.resolve().name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def read(folder: str | Path) -> Files:
    """The files of a folder; the weights are not read but for the activations' tensors, and these later."""
    folder = Path(folder)
    if not (folder / REPORT).is_file():
        raise OrthoactError(f"{folder} has no {REPORT}: expected a folder that orthoact convert or finetune wrote")
    record = _json(folder / REPORT)
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    spec = config.get("orthoact") or config.get("model_args", {}).get("orthoact") or {}
    files = Files(folder, record, spec)
    if (folder / COMPARISON).is_file():
        files.comparison = _json(folder / COMPARISON)
    if (folder / METRICS).is_file():
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        files.metrics = [_parse(line, folder / METRICS) for line in lines if line.strip()]
    if not files.sites:
        raise OrthoactError(f"{folder}: {REPORT} names no site; convert the model again")
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


# -- the curves --------------------------------------------------------------------------------------------------------


def curves(files: Files) -> dict[str, Curves]:
    """The curves of every site whose tensors the folder holds, evaluated in float64 by the activation itself."""
    import torch

    tensors = _tensors(files.folder, files.spec.get("sites", {}))
    if not tensors:
        return {}
    view = _view(
        [(float(t["lo"]), float(t["hi"])) for n, t in tensors.items() if files.spec["sites"][n]["tails"] == "linear"]
    )
    made = {}
    with torch.no_grad():
        for name, held in tensors.items():
            made[name] = _evaluate(name, files.spec["sites"][name], held, view)
    return made


def _view(joints: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """One range of x for all sites, so that they can be compared; None where their cores differ too much."""
    widths = [hi - lo for lo, hi in joints]
    if not joints or max(widths) > 3 * min(widths):
        return None
    low, high = min(lo for lo, _ in joints), max(hi for _, hi in joints)
    return low - 0.3 * (high - low), high + 0.3 * (high - low)


def _evaluate(name: str, entry: Mapping[str, Any], held: Mapping[str, Any], view: tuple[float, float] | None) -> Curves:
    import torch

    from ..interp.activation import Activation
    from ..interp.domains import law_from_dict

    theta = held["theta"].double()
    groups = None if theta.dim() == 1 else len(theta)
    kept = np.unique(np.linspace(0, (groups or 1) - 1, MOST_GROUPS).astype(int))
    act = Activation(entry["family"], entry["degree"], tails=entry["tails"], groups=groups and len(kept))
    act.load_state_dict({**held, "theta": held["theta"] if groups is None else held["theta"][kept]})
    lo, hi = (float(held[k]) if entry["tails"] == "linear" else s * float("inf") for k, s in (("lo", -1), ("hi", 1)))
    if view is None:
        law = law_from_dict(entry["domain"])
        ends = (lo, hi) if isfinite(lo) and isfinite(hi) else (law.mean - 3 * law.std, law.mean + 3 * law.std)
        view = (ends[0] - 0.3 * (ends[1] - ends[0]), ends[1] + 0.3 * (ends[1] - ends[0]))
    x = np.linspace(*view, POINTS)
    at = torch.from_numpy(x)
    at = at if groups is None else at[:, None].expand(-1, len(kept))
    moved = bool((theta != 0).any())
    values = act(at).reshape(POINTS, -1).numpy() if moved else None
    act.theta.zero_()
    start = act(at).reshape(POINTS, -1)[:, 0].numpy()
    target = _target(entry["target"], tuple(view))
    if values is None:
        return Curves(name, x, lo, hi, start, target)
    low, high = (values.min(1), values.max(1)) if groups else (None, None)
    return Curves(name, x, lo, hi, start, target, values.mean(1), low, high, float((theta**2).mean() ** 0.5))


@cache
def _target(name: str, view: tuple[float, float]) -> np.ndarray | None:
    """The target's values; None where its name does not say what it is (a callable of the user's)."""
    from ..interp.targets import get_target

    try:
        return get_target(name)(np.linspace(*view, POINTS))[0]
    except OrthoactError:
        return None


def _tensors(folder: Path, sites: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The activations' tensors, by site; sites that no weight file of the folder holds are left out."""
    from safetensors import safe_open

    from ..interp.activation import TENSORS

    index = folder / "model.safetensors.index.json"
    places = _json(index)["weight_map"] if index.is_file() else {}
    shards = sorted({*places.values()}) or [p.name for p in sorted(folder.glob("*.safetensors"))]
    found: dict[str, dict[str, Any]] = {}
    for shard in shards:
        with safe_open(folder / Path(shard).name, framework="pt") as file:
            keys = set(file.keys())
            for prefix in [key.removesuffix(".theta") for key in keys if key.endswith(".theta")]:
                held = [tensor for tensor in TENSORS if f"{prefix}.{tensor}" in keys]
                found.setdefault(prefix, {}).update({t: file.get_tensor(f"{prefix}.{t}") for t in held})
    names = _stored_names(list(sites), list(found))
    return {site: found[names[site]] for site in sites if site in names and len(found[names[site]]) == len(TENSORS)}


def _stored_names(sites: Sequence[str], stored: Sequence[str]) -> dict[str, str]:
    """What each site is called in the weight files: transformers stores some models under older names.

    >>> _stored_names(["vit.layers.0.act"], ["vit.encoder.layer.0.act"])
    {'vit.layers.0.act': 'vit.encoder.layer.0.act'}
    """
    same = {site: site for site in sites if site in stored}

    def key(name: str) -> tuple[str, ...]:
        """What a new name keeps: the numbers and the last part."""
        return (*(part for part in name.split(".") if part.isdigit()), name.rpartition(".")[2])

    left = [site for site in sites if site not in same]
    others = {key(name): name for name in stored if name not in same}
    unique = len({*map(key, left)}) == len(left)
    return same | ({site: others[key(site)] for site in left if key(site) in others} if unique else {})


# -- numbers and names -------------------------------------------------------------------------------------------------


def number(roots: Mapping[str, Any], file: str, *path: str | int, digits: int = 3, percent: bool = False) -> Markup:
    """The number at a place of a file as a `<data>` element: its whole value, where it stands, and a readable text."""
    value: Any = roots[file]
    for step in path:
        value = value[step]
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


# -- the parts of the page ---------------------------------------------------------------------------------------------


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


def _rounded(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [float(f"{v:.5g}") if isfinite(v) else 0.0 for v in values]


def depth_charts(files: Files, drawn: Mapping[str, Curves], names: Sequence[str]) -> tuple[list[dict], dict[str, Any]]:
    """The charts along the depth of the model, and the numbers that the page shows under the pointer."""
    rows = files.record.get("sites", [])

    def column(key: str) -> list[float]:
        return [float(row.get(key, float("nan"))) for row in rows]

    moved = [drawn[name].moved if name in drawn else float("nan") for name in files.sites]
    wanted: list[tuple[str, str, str, dict[str, list[float]], bool]] = [
        ("error", "Error of the copy", "Root mean square of copy less target, of value and slope, over the inputs.",
         {"value": column("value_rms"), "slope": column("slope_rms")}, True),
        ("sensitivity", "Sensitivity", "Sum of the squared gradients of the model's loss at the site's "
         "output, at one position: what a squared error there costs.", {"sensitivity": column("sensitivity")}, True),
        ("outside", "Inputs outside the core", "Share of the inputs that the straight tails carry.",
         {"outside": column("outside")}, False),
        ("moved", "Learned", "How far each activation has moved from its start, as the root mean square of theta: a "
         "distance between functions.", {"moved": moved}, False),
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


def training(files: Files) -> tuple[list[dict], dict[str, Any]]:
    """A chart for each quantity of `metrics.jsonl`, losses first."""
    keys: dict[str, None] = {}
    for row in files.metrics:
        keys |= dict.fromkeys(k for k in row if k not in ("step", "epoch"))
    made, numbers = [], {}
    for key in sorted(keys, key=lambda k: ("loss" not in k, k != "loss")):
        if (found := over_steps(files.metrics, key)) is not None:
            made.append({"title": key.replace("_", " "), "chart": found[0]})
            numbers[f"metric-{key}"] = found[1]
    return made, numbers


def comparison_rows(files: Files) -> tuple[list[str], list[list[tuple]]]:
    """The table of `comparison.json`: its columns, and the places of its cells."""
    rows = files.comparison.get("rows", [])
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(k for k, v in row.items() if isinstance(v, str | int | float))
    return list(columns), [[("rows", i, c) if c in row else () for c in columns] for i, row in enumerate(rows)]


def render(files: Files, name: str) -> str:
    """The page; the model is called `name` unless its record names the base."""
    from jinja2 import Environment, PackageLoader

    drawn, names = curves(files), short_names(files.sites)
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
    depth, numbers = depth_charts(files, drawn, names)
    trained, more = training(files)
    columns, cells = comparison_rows(files)
    held: Callable[..., Markup] = lambda file, *path, **how: number(files.roots, file, *path, **how)  # noqa: E731
    hover = {
        "sites": [
            {
                "name": full,
                "x": [float(drawn[full].x[0]), float(drawn[full].x[-1])],
                "target": _rounded(drawn[full].target),
                "copy": _rounded(drawn[full].start),
                "learned": _rounded(drawn[full].learned),
            }
            if full in drawn
            else None
            for full in files.sites
        ],
        "charts": numbers | more,
    }
    environment = Environment(loader=PackageLoader("orthoact.convert", "."), autoescape=True)
    environment.globals |= {"n": held, "NAMES": NAMES, "DATA": DATA, "REPORT": REPORT, "COMPARISON": COMPARISON}
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
        cells=cells,
        hover=Markup(json.dumps(_finite(hover), separators=(",", ":")).replace("<", "\\u003c")),
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
