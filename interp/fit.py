r"""The solver: coefficients and joints of a copy of a target, by constrained linear least squares.

The copy is a core series $S$ on $[lo, hi]$ continued by straight tails (see `activation`). It minimises

$$J = E[(F - f)^2] + \lambda E[(F' - f')^2]$$

over the law of the inputs, under the equalities that S takes the value and slope of the target's asymptote at each
joint. The joints minimise J too. Everything is deterministic linear algebra in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from time import perf_counter

import numpy as np
from torch import Tensor

from .domains import Gaussian, Law
from .errors import OrthoactError
from .families import get_family
from .family import TAILS, Linear, Piecewise, Separable
from .joints import Series, search_joints
from .kinks import search_kinks
from .problem import Problem, Side
from .race import ROUNDING
from .shapes import FINE, search_shapes
from .targets import Target, get_target

POOR = 0.05
"""The error, as a share of the target's root mean square, from which the reason of a fit says so."""

LOST = 1e-5
"""The share of the target that rounding the numbers to float32 may add to an error before it is counted."""

ROUNDED = 2e-7
"""What rounding may do to a copy, as a share of the sum of its numbers: where that is below `LOST`, so is the error."""

DERIVATIVE_WEIGHT = 0.01
"""The default lambda: what the copy itself does not need helps learning later, and a little does not hurt the copy."""


@dataclass(frozen=True)
class Copy:
    """A copy of a target: all that an activation starts from."""

    target: str
    """Name of the target."""
    family: str
    """Name of the family."""
    degree: int
    """Degree of the core."""
    tails: str
    """`linear` (straight tails outside the joints) or `none` (the bare series everywhere)."""
    coefficients: tuple[float, ...]
    """The learnable numbers of the core, in the order of the family's `numbers`."""
    domain: Law
    """The law of the inputs."""
    derivative_weight: float
    """Lambda of J."""
    location: float
    """Centre of the standardised variable z = (x - location) / scale."""
    scale: float
    """Unit of the standardised variable."""
    lo: float
    """Left joint, -inf without tails."""
    hi: float
    """Right joint, inf without tails."""
    jumps: tuple[float, float]
    """What is added to the core's slope at lo and hi to give the tails' slopes; zero unless a joint sits on a kink."""

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes of the copy at `x`, in float64: the reference that the module is tested against."""
        x = np.asarray(x, dtype=np.float64)
        value, slope = self.series(np.clip(x, self.lo, self.hi))
        if self.tails == "none":
            return value, slope
        ends = self.series(np.array([self.lo, self.hi]))[1] + np.array(self.jumps)
        value = value + ends[0] * np.minimum(x - self.lo, 0) + ends[1] * np.maximum(x - self.hi, 0)
        return value, np.where(x < self.lo, ends[0], np.where(x > self.hi, ends[1], slope))

    def series(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes of the core at `x`, in float64."""
        value, slope = get_family(self.family).curve(list(self.coefficients))((x - self.location) / self.scale)
        return value, slope / self.scale


@dataclass(frozen=True)
class Fit(Copy):
    """A fitted copy of a target: what it is, how near it is, and why it is what it is."""

    value_rms: float
    """Root mean square of F - f under the law."""
    slope_rms: float
    """Root mean square of F' - f' under the law."""
    share: float
    """`value_rms` as a share of the target's own root mean square under the law, or of twenty of its standard
    deviations where these are less."""
    value_max: float
    """Largest |F - f| on [-20, 20] and mean +- 9 std; without tails on mean +- 4 std."""
    slope_max: float
    """Largest |F' - f'| on the same points."""
    objective: float
    """J."""
    condition: float
    """Condition number of the least-squares system that was solved."""
    holds: tuple[float, float]
    """The range in which the copy can be trusted: unbounded where the target's asymptotes are affine."""
    reason: str
    """How the joints and the coefficients were found."""
    seconds: float
    """Time taken."""

    @property
    def parameters(self) -> int:
        """Number of learnable numbers."""
        return len(self.coefficients)

    @property
    def poor(self) -> bool:
        """Whether the copy is one in name only: `share` is more than `POOR`."""
        return self.share > POOR

    def to_dict(self) -> dict:
        """The fields as plain JSON values; an infinite joint or range end is None."""
        values = asdict(replace(self, domain=Gaussian())) | {
            "parameters": self.parameters,
            "domain": self.domain.to_dict(),
        }
        finite = {k: None for k in ("lo", "hi") if not isfinite(values[k])}
        return values | finite | {"holds": [end if isfinite(end) else None for end in self.holds]}


def fit(
    target: str | Target | Callable[[Tensor], Tensor],
    *,
    family: str = "hermite",
    degree: int = 8,
    domain: Law | None = None,
    tails: str = "linear",
    derivative_weight: float = DERIVATIVE_WEIGHT,
) -> Fit:
    """Fit a copy of `target` (a name, a `Target` or an elementwise callable).

    `degree` is the degree of the core, `domain` the law of the inputs (default: `Gaussian()`), `derivative_weight` the
    lambda of J. Raises `OrthoactError` for an unknown family or target, a degree out of range, or one that is too low
    to meet the target's asymptotes.

    >>> copy = fit("gelu", degree=8)
    >>> copy.parameters, copy.value_rms < 2e-3, round(copy.hi, 1) == -round(copy.lo, 1)
    (9, True, True)
    """
    start = perf_counter()
    check_options(family, degree, tails, derivative_weight)
    problem = Problem(get_target(target), get_family(family), degree, domain or Gaussian(), tails, derivative_weight)
    try:
        with np.errstate(all="ignore"):  # what is not finite loses the search
            found = _solve(problem)
    except (ArithmeticError, IndexError, ValueError, np.linalg.LinAlgError) as error:
        law = problem.domain
        raise OrthoactError(
            f"no {family} copy of {problem.target.name} was found for inputs of mean {law.mean:g} and std {law.std:g}: "
            f"choose another family or degree, or exclude the site"
        ) from error
    return replace(found, seconds=perf_counter() - start)


def variance_preserving(family: str = "hermite", degree: int = 3) -> Fit:
    """A start for training from scratch, a copy of nothing: E[F^2] = E[F'^2] = 1 under N(0, 1), see `variance`.

    >>> [round(c, 6) for c in variance_preserving("hermite", 2).coefficients]
    [0.5, 0.707107, -0.5]
    """
    start = perf_counter()
    check_options(family, degree, "none", DERIVATIVE_WEIGHT)
    return Fit(
        target="variance-preserving",
        family=family,
        degree=degree,
        tails="none",
        coefficients=tuple(get_family(family).variance_preserving(degree)),
        domain=Gaussian(tail=0.0),
        derivative_weight=DERIVATIVE_WEIGHT,
        location=0.0,
        scale=1.0,
        lo=-inf,
        hi=inf,
        jumps=(0.0, 0.0),
        value_rms=0.0,
        slope_rms=0.0,
        share=0.0,
        value_max=0.0,
        slope_max=0.0,
        objective=0.0,
        condition=1.0,
        holds=(-inf, inf),
        reason="E[F^2] = E[F'^2] = 1 under N(0, 1)",
        seconds=perf_counter() - start,
    )


def check_options(family: str, degree: int, tails: str, derivative_weight: float) -> None:
    """Raise `OrthoactError` for options that no fit can have; cheap, for callers that want to know before they load."""
    degrees = get_family(family).degrees
    if not isinstance(degree, int | np.integer) or degree not in degrees:
        bounds = f"{degrees[0]} to {degrees[-1]}"
        raise OrthoactError(f"--degree {degree}: expected a whole number from {bounds} for the family {family}")
    if tails not in TAILS:
        raise OrthoactError(f"--tails {tails!r}: expected one of {', '.join(TAILS)}")
    if not (isfinite(derivative_weight) and derivative_weight >= 0):
        raise OrthoactError(f"--derivative-weight {derivative_weight}: expected a finite number that is not negative")


def _solve(p: Problem) -> Fit:
    """The numbers, the joints and the unit of the copy, by the solver of the family's kind."""
    if p.tails == "none":
        sides, reason = (Side(None), Side(None)), "least squares on the law, no tails"
    else:
        sides, reason = p.choose_sides()
    family, shape, rounding, condition = p.family, [], ROUNDING, 1.0
    if isinstance(family, Piecewise):
        numbers, lo, hi, location, scale, reason = search_kinks(p)
    else:
        lo, hi, location, scale = -inf, inf, p.domain.mean, p.domain.std
        if isinstance(family, Separable):
            found = search_shapes(p, sides)
            shape, lo, hi = found.shape, found.lo, found.hi
            location, scale, rounding = found.location, found.scale, found.rounding
        elif p.tails == "linear":
            lo, hi = search_joints(p, sides, Series(p, sides))
        lo, hi = float(np.float32(lo)), float(np.float32(hi))  # the module keeps them so
        if isinstance(family, Linear) and p.tails == "linear":  # the core spans what the basis is well conditioned on
            half = (hi - lo) / 2
            location, scale = (float(np.float32(v)) for v in ((lo + hi) / 2, half / family.reach(p.degree)))
        numbers, condition = _least_squares(p, sides, lo, hi, location, scale, shape, rounding)
    jumps = [0.0, 0.0]
    for i, (joint, side) in enumerate(zip((lo, hi), sides, strict=True)):
        if side.kink and side.line is not None and not isinstance(family, Piecewise):
            slope = family.slope(numbers, np.array([(joint - location) / scale])) / scale
            jumps[i] = float(side.line[0] - slope[0])
    holds = tuple(
        joint if line is None else end
        for line, joint, end in zip((p.target.left, p.target.right), (lo, hi), p.target.holds, strict=True)
    )
    result = Fit(
        target=p.target.name,
        family=family.name,
        degree=p.degree,
        tails=p.tails,
        coefficients=tuple(numbers),
        domain=p.domain,
        derivative_weight=p.weight,
        location=location,
        scale=scale,
        lo=lo,
        hi=hi,
        jumps=(jumps[0], jumps[1]),
        value_rms=0.0,
        slope_rms=0.0,
        share=0.0,
        value_max=0.0,
        slope_max=0.0,
        objective=0.0,
        condition=condition,
        holds=(holds[0], holds[1]) if p.tails == "linear" else p.four_deviations(),
        reason=reason,
        seconds=0.0,
    )
    found = measured(p, result, *result(p.points()))
    if ROUNDED * sum(map(abs, result.coefficients)) < LOST * p.size:
        return found
    rounded = kept(result)
    rounded = measured(p, rounded, *rounded(p.points()))
    return found if rounded.share < 2 * found.share + LOST else rounded


def _least_squares(
    p: Problem,
    sides: tuple[Side, Side],
    lo: float,
    hi: float,
    location: float,
    scale: float,
    shape: list[float],
    rounding: float,
) -> tuple[list[float], float]:
    """The linear numbers of least J at given joints and shape, under the equalities; and the condition number."""
    family, linear = p.family, p.family.size(p.degree) - len(shape)

    def rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = (x - location) / scale
        if isinstance(family, Separable):
            values, slopes = (part[0] for part in family.columns(np.array([shape]), z[None], linear))
        else:
            values, slopes = (np.stack(part, axis=-1) for part in family.jacobian([0.0] * linear, z))
        return values, slopes / scale

    core = (p.x >= lo) & (p.x <= hi)
    x, w, f, d = p.x[core], p.w[core], p.f[core], p.d[core]
    few = len(x) < (FINE if shape else 1.5 * linear)  # a steep shape would hide between them
    if p.tails == "linear" and (few or lo < p.ends[0] or hi > p.ends[1]):
        x, w = (part[0] for part in p.gauss(np.array([[lo, hi]]), FINE))
        f, d = p.target(x)
    root = np.sqrt(w)
    basis, slopes = (root[:, None] * part for part in rows(x))
    share = np.linalg.norm(basis, axis=0)  # of each number in the copy
    system = np.concatenate([basis, np.sqrt(p.weight) * slopes, rounding * np.diag(share)])
    wanted = np.concatenate([root * f, np.sqrt(p.weight) * root * d, np.zeros(linear)])
    particular, free = np.zeros(linear), np.eye(linear)
    if p.tails == "linear":
        equalities, values = [], []
        for joint, side in zip((lo, hi), sides, strict=True):
            of_value, of_slope = rows(np.array([joint]))
            equalities += [of_value[0], of_slope[0]][: side.equalities]
            values += p.wanted(joint, side)[: side.equalities]
        u, s, vt = np.linalg.svd(np.array(equalities))
        rank = int((s > 1e-10 * s[0]).sum())
        particular = vt[:rank].T @ ((u[:, :rank].T @ np.array(values)) / s[:rank])
        free = vt[rank:].T
        missed = np.abs(np.array(equalities) @ particular - values).max()
        if missed > 1e-6 * (1 + np.abs(values).max()):
            raise p.cannot_meet()
    # the triangle has the singular values of the whole system
    size = free.shape[1]
    triangle = np.array(np.linalg.qr(np.column_stack([system @ free, wanted - system @ particular]), mode="r"))[:size]
    if not np.isfinite(triangle).all():
        raise np.linalg.LinAlgError
    solution, _, _, singular = np.linalg.lstsq(triangle[:, :size], triangle[:, size], rcond=None)
    numbers = particular + free @ solution
    condition = float(singular[0] / singular[-1]) if len(singular) and singular[-1] > 0 else 1.0
    return [float(v) for v in numbers] + [float(v) for v in shape], condition


def measured(p: Problem, result: Fit, value: np.ndarray, slope: np.ndarray) -> Fit:
    """`result` with the figures of these values and slopes at `p.points()`, one curve, or several in rows."""
    n = len(p.x)
    error, slope_error = value[..., :n] - p.f, np.where(p.smooth(p.x), slope[..., :n] - p.d, 0.0)
    sup, slope_sup = np.abs(value[..., n:] - p.far[1]).max(), np.abs(slope[..., n:] - p.far[2]).max()
    first, last = (-inf, inf) if p.tails == "linear" else p.four_deviations()
    near = (p.x >= first) & (p.x <= last)
    sup, slope_sup = max(sup, np.abs(error[..., near]).max()), max(slope_sup, np.abs(slope_error[..., near]).max())
    square, slope_square = (float(np.mean(part**2 @ p.w)) for part in (error, slope_error))
    share, reason = square**0.5 / p.size, result.reason
    if share > POOR:
        reason += f"; a poor copy: its error is {percent(share)} of the target, try another degree or family"
    return replace(
        result,
        reason=reason,
        value_rms=square**0.5,
        slope_rms=slope_square**0.5,
        share=share,
        value_max=float(sup),
        slope_max=float(slope_sup),
        objective=square + p.weight * slope_square,
    )


def kept(copy: Fit) -> Fit:
    """The copy as the module keeps it: its numbers in float32, the slopes of its tails as they were."""
    numbers = tuple(np.array(copy.coefficients, dtype=np.float32).astype(float).tolist())
    rounded = replace(copy, coefficients=numbers, reason=f"{copy.reason}; rounded, for they are large")
    if copy.tails == "none":
        return rounded
    ends = np.array([copy.lo, copy.hi])
    turned = copy.series(ends)[1] - rounded.series(ends)[1]
    return replace(rounded, jumps=(copy.jumps[0] + float(turned[0]), copy.jumps[1] + float(turned[1])))


def percent(share: float) -> str:
    """A share in words.

    >>> percent(0.163), percent(1e9)
    ('16 %', 'more than 1,000 %')
    """
    return f"{100 * share:.0f} %" if share <= 10 else "more than 1,000 %"
