"""Degrees and families chosen by an error instead of being given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from torch import Tensor

from .errors import OrthoactError
from .families import FAMILIES, get_family
from .fit import DERIVATIVE_WEIGHT, Fit, check_options, fit
from .targets import Target

AUTO = "auto"
"""In place of a family: every one is tried."""

RESOLUTION = 1e-7
"""The root of J below which a copy in float32 gets no better."""

SAME = 1e-9
"""The share of J that a rung must gain: an odd number beside an even function gains by rounding alone."""


def fit_to_tolerance(
    target: str | Target | Callable[[Tensor], Tensor], tolerance: float, *, family: str = "hermite", **options
) -> Fit:
    """The fit with the fewest learnable numbers whose root of J is at most `tolerance`; `options` as in `fit`.

    `family` is one of `FAMILIES`, or `auto` for the best of all. Where none reaches the tolerance, the best fit is
    returned and its reason says so. Of as many numbers those of least J are taken.

    >>> fit_to_tolerance("gelu", 1e-2).degree
    6
    >>> fit_to_tolerance("gelu", 2e-3, family="auto").parameters
    8
    """
    if not tolerance > 0:
        raise OrthoactError(f"--tolerance {tolerance}: expected a positive number")
    names = families_of(family, **options)
    chosen, tried, refusal = None, [], None
    for name in names:
        degrees = list(get_family(name).degrees)
        if chosen is not None:  # only with no more numbers than what is found already, from there downwards
            degrees = [n for n in reversed(degrees) if get_family(name).size(n) <= chosen.parameters]
        downwards = chosen is not None
        for degree in degrees:
            try:
                tried.append(fit(target, family=name, degree=degree, **options))
            except OrthoactError as error:  # cannot have the target's asymptotes, or not at so low a degree
                refusal = error
                if downwards:
                    break
                continue
            reached = tried[-1].objective ** 0.5 <= tolerance
            if reached and (chosen is None or _order(tried[-1]) < _order(chosen)):
                chosen = tried[-1]
            if reached != downwards:
                break
    if not tried:
        raise refusal or OrthoactError(f"--tolerance {tolerance}: no degree could be fitted to {target!r}")
    if chosen is None:
        best = min(tried, key=lambda f: f.objective)
        return replace(best, reason=f"{best.reason}; misses the tolerance {tolerance:g} at {best.objective**0.5:.2e}")
    among = f", the fewest of {len(names)} families" if len(names) > 1 else ""
    return replace(
        chosen, reason=f"{chosen.reason}; {chosen.parameters} numbers{among} reach the tolerance {tolerance:g}"
    )


def _order(fit: Fit) -> tuple[int, float]:
    return fit.parameters, fit.objective


def ladder(
    target: str | Target | Callable[[Tensor], Tensor], *, family: str = "hermite", most: float = inf, **options
) -> list[Fit]:
    """Fits with more and more learnable numbers, each with a lower J than the one before.

    It ends at `most` numbers, but for the first fit, or where a copy in float32 would get no better. `family` is one of
    `FAMILIES` or `auto`.

    >>> [f.parameters for f in ladder("gelu", most=9)]
    [3, 4, 5, 7, 9]
    """
    rungs: list[Fit] = []
    refusal = None
    for name in families_of(family, **options):
        for degree in get_family(name).degrees:
            if rungs and get_family(name).size(degree) > most:
                break
            try:
                rungs.append(fit(target, family=name, degree=degree, **options))
            except OrthoactError as error:
                refusal = error
                continue
            if rungs[-1].objective ** 0.5 < RESOLUTION:
                break
    if not rungs:
        raise refusal or OrthoactError(f"no degree of the family {family} could be fitted to {target!r}")
    kept: list[Fit] = []
    for rung in sorted(rungs, key=lambda f: (f.parameters, f.objective)):
        if not kept or (rung.objective < kept[-1].objective * (1 - SAME) and rung.parameters > kept[-1].parameters):
            kept.append(rung)
    return kept


def families_of(family: str, **options) -> list[str]:
    """The families that a name stands for; `OrthoactError` for an unknown one or options that no fit can have."""
    names = list(FAMILIES) if family == AUTO else [family]
    tails, weight = options.get("tails", "linear"), options.get("derivative_weight", DERIVATIVE_WEIGHT)
    for name in names:
        check_options(name, get_family(name).degrees[0], tails, weight)
    return names


def check_choice(
    family: str,
    degree: int,
    tolerance: float | None,
    parameters: int | None,
    tails: str,
    derivative_weight: float,
) -> None:
    """Raise `OrthoactError` for options that no plan can have: cheap, before anything is loaded."""
    if tolerance is not None and parameters is not None:
        raise OrthoactError("--tolerance and --parameters: give one of them")
    if tolerance is not None and not tolerance > 0:
        raise OrthoactError(f"--tolerance {tolerance}: expected a positive number")
    if parameters is not None and parameters < 1:
        raise OrthoactError(f"--parameters {parameters}: expected a positive whole number")
    if tolerance is not None or parameters is not None:
        families_of(family, tails=tails, derivative_weight=derivative_weight)
    elif family == AUTO:
        raise OrthoactError("--family auto chooses by --tolerance or --parameters: give one of them")
    else:
        check_options(family, degree, tails, derivative_weight)
