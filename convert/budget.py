"""A budget of learnable numbers, shared over the sites so that the predicted loss is least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

import numpy as np
from torch import nn

from ..interp.domains import Law, Measured
from ..interp.errors import OrthoactError
from ..interp.fit import Fit
from .audit import probe_batch
from .calibrate import calibrate
from .sites import Site


def sensitivities(model: nn.Module, sites: Sequence[Site], laws: Mapping[str, Law]) -> tuple[dict[str, float], str]:
    """How much a squared error at each site costs, and where that was measured.

    Calibrated sites know it; else it is measured on seeded inputs made from the config, and where the model does not
    run on any all sites count alike.
    """
    known = {s.name: law.sensitivity for s in sites if isinstance(law := laws.get(s.name), Measured)}
    if len(known) == len(sites) and any(known.values()):
        return known, "calibrated"
    try:
        measured = calibrate(model, sites, [probe_batch(model, rows=4, length=64)])
    except OrthoactError:
        measured = {}
    if not any(law.sensitivity for law in measured.values()):
        return {s.name: 1.0 for s in sites}, "not measured, all alike"
    least = min(law.sensitivity for law in measured.values() if law.sensitivity)
    return {s.name: measured[s.name].sensitivity if s.name in measured else least for s in sites}, "on a probe batch"


def share(
    ladders: Sequence[Sequence[Fit]], weights: Sequence[float], units: Sequence[int], total: int, how: str
) -> list[Fit]:
    """One fit of each ladder, so that all have at most `total` numbers and the predicted loss is least.

    A fit takes its numbers times the site's `units` (groups of channels) and is predicted to cost half the site's
    weight times its mean squared error. Exact, by dynamic programming. Raises `OrthoactError` where not even the
    smallest fits of all sites are within the budget.
    """
    sizes = [[f.parameters * unit for f in ladder] for ladder, unit in zip(ladders, units, strict=True)]
    costs = [[w * f.value_rms**2 / 2 for f in ladder] for ladder, w in zip(ladders, weights, strict=True)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if total < least:
        raise OrthoactError(
            f"--parameters {total}: the {len(ladders)} sites need at least {least}; raise it, or have fewer --groups"
        )
    step = gcd(*(size for row in sizes for size in row))
    room = min(total, most) // step
    best, choices = np.zeros(room + 1), []  # the least cost of the sites so far, for each room they may take
    for row, cost in zip(sizes, costs, strict=True):
        options = np.full((len(row), room + 1), np.inf)
        for j, (size, c) in enumerate(zip(row, cost, strict=True)):
            if (taken := size // step) <= room:
                options[j, taken:] = best[: room + 1 - taken] + c
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    chosen = []
    for i in reversed(range(len(ladders))):
        j = int(choices[i][room])
        why = f"{sizes[i][j]} of {total} numbers: sensitivity {weights[i]:.2g} ({how}), loss {costs[i][j]:.1e}"
        chosen.append(replace(ladders[i][j], reason=f"{ladders[i][j].reason}; {why}"))
        room -= sizes[i][j] // step
    return chosen[::-1]
