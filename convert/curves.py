"""The activations of a folder as functions of x: target, start and what they have learned, from their tensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ..interp.errors import OrthoactError

POINTS = 161
"""Points of a curve."""

MOST_GROUPS = 64
"""Groups of a site that are evaluated: the band of the learned curves spans these, evenly chosen."""


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


def curves(folder: Path, sites: Mapping[str, Any]) -> dict[str, Curves]:
    """The curves of every one of the record's `sites` whose tensors the folder holds, evaluated in float64."""
    import torch

    tensors = _tensors(folder, sites)
    if not tensors:
        return {}
    view = _view([(float(t["lo"]), float(t["hi"])) for n, t in tensors.items() if sites[n]["tails"] == "linear"])
    made = {}
    with torch.no_grad():
        for name, held in tensors.items():
            made[name] = _evaluate(name, sites[name], held, view)
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
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
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
