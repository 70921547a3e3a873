"""The figures of a fit, taken anew from an activation that has learned since."""

from __future__ import annotations

from dataclasses import replace

import torch

from .activation import Activation
from .fit import Fit, measured
from .formula import Frame, derivatives, value
from .problem import Problem
from .targets import Target

PIECE = 2**21
"""Values that are computed at a time."""


@torch.no_grad()
def learned(act: Activation, fit: Fit, target: Target, reason: str) -> Fit:
    """`fit` with joints, common curve and errors of `act` as it is now.

    Root mean squares are over all groups, the largest errors those of the worst.

    >>> from .fit import fit
    >>> from .targets import get_target
    >>> gelu = fit("gelu", degree=4)
    >>> act = Activation.from_fit(gelu)
    >>> abs(learned(act, gelu, get_target("gelu"), "").value_rms - gelu.value_rms) < 1e-7
    True
    >>> _ = act.theta.data.add_(0.1)
    >>> learned(act, gelu, get_target("gelu"), "moved").value_rms > 2 * gelu.value_rms
    True
    """
    p = Problem(target, act.family, act.degree, fit.domain, act.tails, fit.derivative_weight)
    at = torch.from_numpy(p.points()).to(act.theta.device)
    every = act._numbers(act.theta).view(act.groups or 1, -1)
    frame, found = Frame(*act._frame().unbind()), []
    for some in every.split(max(1, PIECE // len(at))):
        numbers, x = list(some.unsqueeze(1).unbind(-1)), at.expand(len(some), -1)
        slope, _ = derivatives(act.family, x, numbers, frame, False)
        found.append([value(act.family, x, numbers, frame), slope + torch.zeros_like(x)])
    values, slopes = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    lo, hi, location, scale = (float(getattr(act, name)) for name in ("lo", "hi", "location", "scale"))
    now = replace(
        fit,
        coefficients=tuple(act.start.double().tolist()),
        lo=lo,
        hi=hi,
        location=location,
        scale=scale,
        jumps=tuple(act.jumps.double().tolist()),
        reason=reason,
    )
    return measured(p, now, values, slopes)
