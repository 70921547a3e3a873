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
from .family import Family
from .joints import Samples, Side, search_joints
from .targets import Line, Target, get_target

TAILS = ("linear", "none")

DERIVATIVE_WEIGHT = 0.01
"""The default lambda: what the copy itself does not need helps learning later, and a little does not hurt the copy."""


@dataclass(frozen=True)
class Fit:
    """A fitted copy of a target: what it is, how near it is, and why it is what it is."""

    target: str
    """Name of the target."""
    family: str
    """Name of the family."""
    degree: int
    """Degree of the core."""
    tails: str
    """`linear` (straight tails outside the joints) or `none` (the bare series everywhere)."""
    coefficients: tuple[float, ...]
    """Coefficients of the core in the family's basis, lowest degree first."""
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
    value_rms: float
    """Root mean square of F - f under the law."""
    slope_rms: float
    """Root mean square of F' - f' under the law."""
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
        """Number of learnable coefficients."""
        return len(self.coefficients)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes of the copy at `x`, in float64: the reference that the module is tested against."""
        return _copy(get_family(self.family), self, np.asarray(x, dtype=np.float64))

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
    problem = _Problem(get_target(target), get_family(family), degree, domain or Gaussian(), tails, derivative_weight)
    result = problem.solve()
    return replace(result, seconds=perf_counter() - start)


def fit_to_tolerance(target: str | Target | Callable[[Tensor], Tensor], tolerance: float, **options) -> Fit:
    """The fit of the lowest degree whose root of J is at most `tolerance`; `options` as in `fit`.

    Where no degree reaches it, the best fit is returned and its reason says so.

    >>> fit_to_tolerance("gelu", 1e-2).degree
    6
    """
    if not tolerance > 0:
        raise OrthoactError(f"--tolerance {tolerance}: expected a positive number")
    family = options.get("family", "hermite")
    degrees = get_family(family).degrees
    weight = options.get("derivative_weight", DERIVATIVE_WEIGHT)
    check_options(family, degrees[0], options.get("tails", "linear"), weight)
    best = None
    for degree in degrees:
        try:
            candidate = fit(target, degree=degree, **options)
        except OrthoactError:  # too low to meet the asymptotes
            continue
        if candidate.objective**0.5 <= tolerance:
            return candidate
        best = min(best or candidate, candidate, key=lambda f: f.objective)
    if best is None:
        raise OrthoactError(f"--tolerance {tolerance}: no degree could be fitted to {target!r}; use --tails none")
    return replace(best, reason=f"{best.reason}; misses the tolerance {tolerance:g} at {best.objective**0.5:.2e}")


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


class _Problem:
    """One fit: the target sampled under the law, what is asked of the joints, and the solution."""

    def __init__(self, target: Target, family: Family, degree: int, domain: Law, tails: str, weight: float):
        check_options(family.name, degree, tails, weight)
        domain = domain.narrow() if tails == "none" else domain
        self.target, self.family, self.degree, self.domain = target, family, degree, domain
        self.tails, self.weight = tails, weight
        # a bare polynomial of degree n has its mass out to 2 sqrt(n) standard deviations
        x, w = domain.nodes(14.0) if tails == "none" else domain.nodes()
        self.x, self.w = x, np.where(self.smooth(x), w, 0.0)
        half = (x[1] - x[0]) / 2
        self.ends = x[0] - half, x[-1] + half
        far = np.linspace(-20, 20, 401) if tails == "linear" else np.linspace(*self.four_deviations(), 401)
        far = far[self.smooth(far)]
        values, slopes = target(np.concatenate([self.x, far]))
        n = len(self.x)
        self.f, self.d = values[:n], slopes[:n]
        self.far = (far, values[n:], slopes[n:])
        self.location, self.scale = domain.mean, domain.std

    def smooth(self, x: np.ndarray) -> np.ndarray:
        """Where x is no kink: the slope there is a convention of autograd."""
        return np.all([np.abs(x - kink) > 1e-9 for kink in self.target.kinks] or [np.isfinite(x)], axis=0)

    def rows(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Basis values and derivatives with respect to x, each (points, coefficients)."""
        z = (x - self.location) / self.scale
        values = np.stack(self.family.basis(z, self.degree), axis=-1)
        return values, np.stack(self.family.slopes(z, self.degree), axis=-1) / self.scale

    def solve(self) -> Fit:
        if self.tails == "none":
            return self.finish(-inf, inf, (Side(None), Side(None)), "least squares on the law, no tails")
        sides, reason = self.choose_sides()
        samples = Samples(
            self.target, self.family, self.degree, self.domain, self.weight, self.x, self.w, self.f, self.d, self.ends
        )
        lo, hi = search_joints(samples, sides)
        return self.finish(lo, hi, sides, reason)

    def choose_sides(self) -> tuple[tuple[Side, Side], str]:
        """Joints sit on the outermost kinks beyond which the target is a straight line: there the copy starts exact."""
        left, right = Side(self.target.left), Side(self.target.right)
        if not self.target.kinks:
            return (left, right), "joints minimise J; the core meets the asymptotes there"
        first, last = min(self.target.kinks), max(self.target.kinks)
        if self.is_line(left.line, -inf, first):
            left = Side(left.line, first)
        if self.is_line(right.line, last, inf) and (left.kink is None or last > first):
            right = Side(right.line, last)
        placed = [side.kink for side in (left, right) if side.kink is not None]
        if not placed:
            return (left, right), "joints minimise J; the kink stays inside the core"
        return (left, right), "joints on the kinks at " + ", ".join(f"{k:g}" for k in placed)

    def is_line(self, line: Line | None, start: float, end: float) -> bool:
        if line is None:
            return False
        x = np.concatenate([self.x, self.far[0]])
        inside = (x > start) & (x < end)
        gap = np.concatenate([self.f, self.far[1]]) - (line[0] * x + line[1])
        return bool(inside.any() and np.abs(gap[inside]).max() < 1e-12 * (1 + np.abs(x[inside]).max()))

    def constraints(self, joint: float, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """Rows and right-hand sides of the equalities at a joint."""
        values, slopes = self.rows(np.array([joint]))
        if side.line is not None:
            wanted = np.array([side.line[0] * joint + side.line[1], side.line[0]])
        else:
            value, slope = self.target(np.array([joint]))
            wanted = np.array([value[0], slope[0]])
        rows = np.concatenate([values, slopes])
        return (rows[:1], wanted[:1]) if side.kink is not None else (rows, wanted)

    def finish(self, lo: float, hi: float, sides: tuple[Side, Side], reason: str) -> Fit:
        """Solve for the coefficients at given joints and measure the result."""
        lo, hi = float(np.float32(lo)), float(np.float32(hi))  # the module keeps them so
        if self.tails == "linear":  # the core spans |z| <= 3, where the basis is well conditioned
            self.location, self.scale = (
                float(np.float32(v)) for v in ((lo + hi) / 2, (hi - lo) / 2 / self.family.reach(self.degree))
            )
        core = (self.x >= lo) & (self.x <= hi)
        root = np.sqrt(self.w[core])[:, None]
        basis, slopes = self.rows(self.x[core])
        system = np.concatenate([root * basis, np.sqrt(self.weight) * root * slopes])
        wanted = np.concatenate([root[:, 0] * self.f[core], np.sqrt(self.weight) * root[:, 0] * self.d[core]])
        particular, free = np.zeros(system.shape[1]), np.eye(system.shape[1])
        if self.tails == "linear":
            pairs = [self.constraints(joint, side) for joint, side in zip((lo, hi), sides, strict=True)]
            equalities, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
            u, s, vt = np.linalg.svd(equalities)
            rank = int((s > 1e-10 * s[0]).sum())
            particular = vt[:rank].T @ ((u[:, :rank].T @ values) / s[:rank])
            free = vt[rank:].T
        solution, _, _, singular = np.linalg.lstsq(system @ free, wanted - system @ particular, rcond=None)
        coefficients = particular + free @ solution
        coefficients[np.abs(coefficients) < 1e-12 * np.abs(coefficients).max(initial=0)] = 0.0
        jumps = [0.0, 0.0]
        for i, (joint, side) in enumerate(zip((lo, hi), sides, strict=True)):
            if side.kink is not None and side.line is not None:
                jumps[i] = float(side.line[0] - self.rows(np.array([joint]))[1][0] @ coefficients)
        left, right = sides
        holds = (
            lo if left.line is None else self.target.holds[0],
            hi if right.line is None else self.target.holds[1],
        )
        result = Fit(
            target=self.target.name,
            family=self.family.name,
            degree=self.degree,
            tails=self.tails,
            coefficients=tuple(float(c) for c in coefficients),
            domain=self.domain,
            derivative_weight=self.weight,
            location=self.location,
            scale=self.scale,
            lo=lo,
            hi=hi,
            jumps=(jumps[0], jumps[1]),
            value_rms=0.0,
            slope_rms=0.0,
            value_max=0.0,
            slope_max=0.0,
            objective=0.0,
            condition=float(singular[0] / singular[-1]) if len(singular) and singular[-1] > 0 else 1.0,
            holds=holds if self.tails == "linear" else self.four_deviations(),
            reason=reason,
            seconds=0.0,
        )
        return self.measure(result)

    def four_deviations(self) -> tuple[float, float]:
        return self.domain.mean - 4 * self.domain.std, self.domain.mean + 4 * self.domain.std

    def measure(self, result: Fit) -> Fit:
        value, slope = result(self.x)
        error, slope_error = value - self.f, np.where(self.smooth(self.x), slope - self.d, 0.0)
        far_value, far_slope = result(self.far[0])
        sup, slope_sup = np.abs(far_value - self.far[1]).max(), np.abs(far_slope - self.far[2]).max()
        if self.tails == "linear":
            sup, slope_sup = max(sup, np.abs(error).max()), max(slope_sup, np.abs(slope_error).max())
        square, slope_square = float(self.w @ error**2), float(self.w @ slope_error**2)
        return replace(
            result,
            value_rms=square**0.5,
            slope_rms=slope_square**0.5,
            value_max=float(sup),
            slope_max=float(slope_sup),
            objective=square + self.weight * slope_square,
        )


def _copy(family: Family, fit: Fit, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def series(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = (at - fit.location) / fit.scale
        slopes = np.stack(family.slopes(z, fit.degree), axis=-1) @ np.array(fit.coefficients)
        return family.evaluate(list(fit.coefficients), z), slopes / fit.scale

    clipped = np.clip(x, fit.lo, fit.hi)
    value, slope = series(clipped)
    if fit.tails == "none":
        return value, slope
    ends = series(np.array([fit.lo, fit.hi]))[1] + np.array(fit.jumps)
    value = value + ends[0] * np.minimum(x - fit.lo, 0) + ends[1] * np.maximum(x - fit.hi, 0)
    return value, np.where(x < fit.lo, ends[0], np.where(x > fit.hi, ends[1], slope))
