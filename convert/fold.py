r"""Activations as plain coefficients, for runtimes of one's own: pieces of polynomials or quotients, and tails.

$$F(x) = S(x_c) + l \min(x - lo, 0) + r \max(x - hi, 0), \quad x_c = \mathrm{clip}(x, lo, hi)$$

$$S(x) = P_i(t) / Q_i(t), \quad t = (x - o_i) u_i$$

in the piece i = number of `breaks` that are at most $x_c$. Hermite is one polynomial; the tropical families are
straight pieces; the rational ones have a piece for each sign in their denominator. All of these are exact. Other
families are interpolated by polynomials of degree 7 to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import factorial, inf, isfinite, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial, chebyshev, hermite_e

from .._version import __version__
from ..interp.activation import TENSORS, Activation
from ..interp.errors import OrthoactError
from ..interp.family import Family
from ..interp.hermite import Hermite
from ..interp.rational import Rational, SumRational
from ..interp.tropical import Tropical, TropicalRational

FORMAT = 1
"""Version of the file."""

DEGREE, ACCURACY, DEPTH = 7, 1e-9, 40
"""Of the interpolation: degree of a piece, error in the unit of the largest value, most halvings of the core."""

ALLOWED = 1e-6
"""The error from which a fold is refused, in the unit of the largest value."""


class Piece(NamedTuple):
    """One piece from `start` on: numerator and denominator in powers of t = (x - origin) unit."""

    start: float
    origin: float
    unit: float
    numerator: list[float]
    denominator: list[float]


def fold(activations: Mapping[str, Activation], record: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The activations by name as a JSON object; `record` adds where they come from.

    `sites` has for each name `target`, `family`, `degree`, `groups` (none: one curve for all channels), `channel` (the
    axis that the groups divide evenly), `max_error` (measured, against the activation in float64) and `curves`, one for
    each group: `lo`, `hi` (none where there are no tails), `slope_lo`, `slope_hi`, `breaks`, and for each piece
    `origin`, `unit`, `numerator` and `denominator`, lowest power first. Raises `OrthoactError` for an activation that
    has no end on either side and is no quotient of polynomials.

    >>> from ..interp.fit import fit
    >>> made = fold({"act": Activation.from_fit(fit("relu", family="tropical-rational", degree=1))})
    >>> curve = made["sites"]["act"]["curves"][0]
    >>> abs(curve["slope_lo"]) < 1e-12, round(curve["slope_hi"], 12), made["sites"]["act"]["max_error"] < 1e-12
    (True, 1.0, True)
    """
    base = {key: record["base"][key] for key in ("model", "revision")} if record and record.get("base") else None
    sites = {name: _site(name, act) for name, act in activations.items()}
    return {"format": "orthoact-fold", "version": FORMAT, "orthoact": __version__, "base": base, "sites": sites}


@torch.no_grad()
def _site(name: str, act: Activation) -> dict[str, Any]:
    numbers, frame = (tensor.cpu().numpy() for tensor in act.numbers(torch.float64))
    plain = _coefficients(act)
    rows = numbers if act.groups is not None else numbers[None]
    parameters = plain if act.groups is not None else plain[None]
    lo, hi, unit, offset = frame.tolist()
    curves = []
    for row, own in zip(rows, parameters, strict=True):
        pieces = list(_pieces(name, act.family, own.tolist(), lo, hi, unit, offset))
        curves.append(
            {
                "lo": lo if isfinite(lo) else None,
                "hi": hi if isfinite(hi) else None,
                "slope_lo": -float(row[-2]) + 0.0,
                "slope_hi": float(row[-1]),
                "breaks": [piece.start for piece in pieces[1:]],
                "origin": [piece.origin for piece in pieces],
                "unit": [piece.unit for piece in pieces],
                "numerator": [piece.numerator for piece in pieces],
                "denominator": [piece.denominator for piece in pieces],
            }
        )
    error = _error(act, curves, lo, hi)
    if not error <= ALLOWED:
        raise OrthoactError(f"{name}: its fold is {error:.2g} from it, allowed are {ALLOWED:g}: report this")
    keys = {"target": act.target, "family": act.family.name, "degree": act.degree}
    return {**keys, "groups": act.groups, "channel": act.channel, "max_error": error, "curves": curves}


def _coefficients(act: Activation) -> np.ndarray:
    """The numbers of the series in float64: (n,) or (groups, n)."""
    theta = act.theta.double() @ act.transform.double().T
    return (act.start.double() + theta).cpu().numpy()


def _pieces(
    name: str, family: Family, own: list[float], lo: float, hi: float, unit: float, offset: float
) -> Iterator[Piece]:
    """The core between the joints, of a family with these numbers."""
    origin, ends = -offset / unit, (lo * unit + offset, hi * unit + offset)
    if isinstance(family, Hermite):
        series = [a / sqrt(factorial(k)) for k, a in enumerate(own)]
        yield Piece(-inf, origin, unit, hermite_e.herme2poly(series).tolist(), [1.0])
    elif isinstance(family, Tropical | TropicalRational):
        kinks = [k for k in _kinks(family, own) if ends[0] < k < ends[1]]
        last = None
        for start, stop in zip([ends[0], *kinks], [*kinks, ends[1]], strict=True):
            inner = start if isfinite(start) else stop if isfinite(stop) else 0.0
            middle = (start + stop) / 2 if isfinite(stop - start) else inner + (1 if isfinite(start) else -1)
            value, slope = (
                float(part(own, np.array(at))) for part, at in ((family.evaluate, inner), (family.slope, middle))
            )
            if last is None or abs(slope - last) > 1e-12 * max(1.0, abs(slope)):
                yield Piece(
                    _from(start, last is None, origin, unit), origin + inner / unit, unit, [value, slope], [1.0]
                )
            last = slope
    elif isinstance(family, Rational):
        cut = len(own) // 2 + 1
        numerator, shape = own[:cut], own[cut:]
        if isinstance(family, SumRational):
            breaks = [0.0] if ends[0] < 0 < ends[1] else []
        else:
            roots = Polynomial([0.0, *shape]).trim().roots() if any(shape) else np.zeros(0)
            breaks = sorted({float(r.real) for r in roots if abs(r.imag) < 1e-9 and ends[0] < r.real < ends[1]})
        for start, stop in zip([ends[0], *breaks], [*breaks, ends[1]], strict=True):
            low, high = (
                (start if isfinite(start) else min(stop, 0.0) - 1),
                (stop if isfinite(stop) else max(start, 0.0) + 1),
            )
            middle = (low + high) / 2
            if isinstance(family, SumRational):
                denominator = [abs(b) * (1 if middle > 0 or j % 2 == 0 else -1) for j, b in enumerate(shape, 1)]
            else:
                sign = 1 if Polynomial([0.0, *shape])(middle) >= 0 else -1
                denominator = [sign * b for b in shape]
            yield Piece(_from(start, start == ends[0], origin, unit), origin, unit, numerator, [1.0, *denominator])
    else:
        if not all(map(isfinite, ends)):
            raise OrthoactError(
                f"{name}: {family.name} without tails goes on for ever and is no polynomial: convert it with "
                f"--tails linear, or export it to onnx"
            )
        for start, stop, numerator in _interpolated(lambda z: family.evaluate(own, z), *ends):
            middle, half = (start + stop) / 2, (stop - start) / 2
            at = _from(start, start == ends[0], origin, unit)
            yield Piece(at, origin + middle / unit, unit / half, numerator, [1.0])


def _from(z: float, first: bool, origin: float, unit: float) -> float:
    return -inf if first else origin + z / unit


def _kinks(family: Family, own: list[float]) -> list[float]:
    """Where a straight family may bend."""
    if isinstance(family, TropicalRational):
        return sorted({k for _, k in family.split(own)[2]})
    half = len(own) // 2
    lines = list(zip(own[half:], own[:half], strict=True))
    crossings = {(t - b) / (a - s) for i, (s, t) in enumerate(lines) for a, b in lines[:i] if a != s}
    return sorted(crossings)


def _interpolated(
    curve: Callable[[np.ndarray], np.ndarray], lo: float, hi: float
) -> Iterator[tuple[float, float, list[float]]]:
    """Pieces (start, stop, coefficients in -1..1) in which polynomials meet `curve`."""
    size = max(1.0, float(abs(curve(np.linspace(lo, hi, 257))).max()))
    check = np.cos(np.pi * (np.arange(4 * DEGREE) + 0.5) / (4 * DEGREE))
    stack = [(lo, hi, 0)]
    while stack:
        start, stop, depth = stack.pop()
        middle, half = (start + stop) / 2, (stop - start) / 2
        nodes = chebyshev.chebpts1(DEGREE + 1)
        series = chebyshev.chebfit(nodes, curve(middle + half * nodes), DEGREE)
        error = abs(chebyshev.chebval(check, series) - curve(middle + half * check)).max()
        if error <= ACCURACY * size or depth == DEPTH:
            yield start, stop, chebyshev.cheb2poly(series).tolist()
        else:
            stack += [(middle, stop, depth + 1), (start, middle, depth + 1)]


def evaluate(curve: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """A folded curve at `x`, in float64: what a reader of the file does.

    >>> curve = {"lo": -1.0, "hi": 1.0, "slope_lo": -2.0, "slope_hi": 2.0, "breaks": [], "origin": [0.0], "unit": [1.0],
    ...          "numerator": [[0.0, 0.0, 1.0]], "denominator": [[1.0]]}
    >>> evaluate(curve, np.array([-2.0, 0.5, 3.0])).tolist()  # x^2, straight from -1 and from 1 on
    [3.0, 0.25, 5.0]
    """
    lo, hi = (-inf if curve["lo"] is None else curve["lo"]), (inf if curve["hi"] is None else curve["hi"])
    inner = np.clip(x, lo, hi)
    piece = np.searchsorted(curve["breaks"], inner, side="right")
    t = (inner - np.array(curve["origin"])[piece]) * np.array(curve["unit"])[piece]
    top, bottom = (_values(curve[part], piece, t) for part in ("numerator", "denominator"))
    below, above = np.minimum(x - inner, 0), np.maximum(x - inner, 0)
    return top / bottom + curve["slope_lo"] * below + curve["slope_hi"] * above


def _values(rows: list[list[float]], piece: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The polynomial of each point's piece, by Horner's rule."""
    table = np.zeros((len(rows), max(map(len, rows))))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    value = np.zeros_like(t)
    for column in table.T[::-1]:
        value = value * t + column[piece]
    return value


def _error(act: Activation, curves: list[dict[str, Any]], lo: float, hi: float) -> float:
    """The largest difference to the activation, in the unit of the largest value, over the core and beyond it."""
    ends = (lo, hi) if isfinite(lo) else (-8.0, 8.0)
    reach = ends[1] - ends[0]
    x = np.linspace(ends[0] - reach, ends[1] + reach, 2001)
    found = np.stack([evaluate(curve, x) for curve in curves])
    own = Activation(act.family.name, act.degree, tails=act.tails, groups=act.groups, channel=-1)
    for key in TENSORS:
        getattr(own, key).copy_(getattr(act, key))
    at = torch.from_numpy(x)
    wanted = own(at[:, None].expand(-1, len(curves)) if act.groups else at).reshape(len(x), -1).T.numpy()
    return float(abs(found - wanted).max() / max(1.0, abs(wanted).max()))
