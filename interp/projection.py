"""The search for a separable family: shape and joints by least squares, everything linear eliminated.

Variable projection (Golub and Pereyra, 1973): for each shape and pair of joints the best linear numbers are those of a
least-squares problem, so that J is a function of shape and joints alone. Its Jacobian is Kaufman's (1975) for the shape
and exact for the joints. The equalities at the joints are rows of a large weight here; `fit` solves them exactly for
the shape and joints found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
from scipy.optimize import least_squares

from .family import Separable
from .joints import Objective
from .problem import Problem, Side

EQUALITY = 1e3
"""Weight of a row that says what the core shall be at a joint; 1 is that of the whole law."""

ROUNDING = 1e-7
"""Weight of a row that keeps a coefficient small: what rounding it to float32 adds to the error."""

RADII = (1.5, 6.0)
"""Least and greatest distance of a joint from the centre of the target's curvature to start from, in its spread."""

SHIFTS = (0.0, 0.4, -0.4, 0.7)
"""Where z = 0 may lie in the core to start from, in half its length; one side will do where all is symmetric."""

FAR = 1e6
"""The size of a shape's number to which no step may go."""

RACE = ((10, 8), (5, 30))
"""How many starts are improved, by how many steps: first the best ones a little, then a few more; one to the end."""


@dataclass
class Point:
    """The problem at one shape and pair of joints."""

    alpha: np.ndarray
    shape: list[float]
    joints: list[tuple[float, Side]]
    core: slice
    z: np.ndarray
    """Joints and nodes of the core, standardised."""
    system: np.ndarray = field(init=False)
    """Rows of the least-squares problem: equalities, values, slopes, rounding."""
    q: np.ndarray = field(init=False)
    r: np.ndarray = field(init=False)
    numbers: np.ndarray = field(init=False)
    """The best linear numbers."""
    inside: np.ndarray = field(init=False)
    """What the rows miss with them."""
    tails: list[slice] = field(init=False)
    residual: np.ndarray = field(init=False)


class Projection:
    """J as a sum of squares over the nodes of the law, with the linear numbers at their best."""

    def __init__(self, problem: Problem, sides: tuple[Side, Side], location: float, scale: float):
        self.p, self.sides, self.location, self.scale = problem, sides, location, scale
        assert isinstance(problem.family, Separable)
        self.family = problem.family
        self.shapes = self.family.shape(problem.degree)
        self.inner = self.shapes + self.family.centred
        self.linear = self.family.size(problem.degree) - self.shapes
        self.free = [problem.tails == "linear" and side.joint is None for side in sides]
        self.root = np.sqrt(problem.w), np.sqrt(problem.weight * problem.w)
        self.rounding, self.ended = ROUNDING, False
        self.last: Point | None = None

    def unpack(self, alpha: np.ndarray) -> tuple[list[float], float, float]:
        """Shape and joints."""
        if self.p.tails == "none":
            return [*map(float, alpha[: self.shapes])], -np.inf, np.inf
        rest, joints = list(alpha[self.inner :]), []
        for side, free in zip(self.sides, self.free, strict=True):
            joints.append(rest.pop(0) if free else side.joint)
        return [*map(float, alpha[: self.shapes])], float(joints[0]), float(joints[1])

    def pack(self, shape: list[float], lo: float, hi: float) -> np.ndarray:
        joints = [joint for joint, free in zip((lo, hi), self.free, strict=True) if free]
        return np.array([*shape, *([self.location] if self.family.centred else []), *joints])

    def centre(self, alpha: np.ndarray) -> float:
        """The location: searched where z = 0 is a special point of the family."""
        return float(alpha[self.shapes]) if self.family.centred else self.location

    def rows(self, parameters: list[float], z: np.ndarray, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of value and slope by some of the numbers, each (points, numbers)."""
        values, slopes = self.family.jacobian(parameters, z)
        return np.array(values[columns]).T, np.array(slopes[columns]).T / self.scale

    def weigh(self, point: Point, values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        """The rows of the core's system from values and slopes at the joints and at the core's nodes."""
        n, parts = len(point.joints), []
        for i, (_, side) in enumerate(point.joints):
            parts += [EQUALITY * values[i : i + 1], EQUALITY * slopes[i : i + 1]][: side.equalities]
        root = self.root[0][point.core, None], self.root[1][point.core, None]
        return np.concatenate(
            [*parts, root[0] * values[n:], root[1] * slopes[n:], np.zeros((self.linear, values.shape[1]))]
        )

    def solve(self, alpha: np.ndarray) -> Point:
        """Everything at one point, kept for the Jacobian there."""
        if self.last is not None and np.array_equal(self.last.alpha, alpha):
            return self.last
        p = self.p
        shape, lo, hi = self.unpack(alpha)
        joints = list(zip((lo, hi), self.sides, strict=True)) if p.tails == "linear" else []
        core = slice(*np.searchsorted(p.x, (lo, hi)))
        z = np.concatenate([[joint for joint, _ in joints], p.x[core]])
        point = Point(alpha.copy(), shape, joints, core, (z - self.centre(alpha)) / self.scale)
        wanted = np.array([p.wanted(joint, side) for joint, side in joints]).reshape(-1, 2)
        target = np.concatenate([wanted, np.stack([p.f[core], p.d[core]], axis=-1)])
        y = self.weigh(point, target[:, :1], target[:, 1:])[:, 0]
        point.system = self.weigh(point, *self.rows([0.0] * self.linear + shape, point.z, slice(0, self.linear)))
        point.system[-self.linear :] = self.rounding * np.eye(self.linear)
        point.q, point.r = np.linalg.qr(point.system)
        point.numbers = np.linalg.solve(point.r, point.q.T @ y)
        point.inside = y - point.system @ point.numbers
        outside = np.zeros((2, len(p.x)))
        point.tails = [slice(0, core.start), slice(core.stop, len(p.x))]
        for nodes, (joint, _), (level, steep) in zip(point.tails, joints, wanted, strict=False):
            outside[0, nodes] = self.root[0][nodes] * (p.f[nodes] - level - steep * (p.x[nodes] - joint))
            outside[1, nodes] = self.root[1][nodes] * (p.d[nodes] - steep)
        point.residual = self.spread(point, point.inside, outside)
        self.last = point
        return point

    def spread(self, point: Point, rows: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """Rows of the core's system and of the nodes outside, at the same places for every core."""
        size = point.core.stop - point.core.start
        equalities = len(rows) - 2 * size - self.linear
        outside[:, point.core] = rows[equalities : equalities + 2 * size].reshape(2, size)
        return np.concatenate([rows[:equalities], rows[equalities + 2 * size :], outside.ravel()])

    def residual(self, alpha: np.ndarray) -> np.ndarray:
        """The square root of J, split over the nodes."""
        p = self.p
        shape, lo, hi = self.unpack(alpha)
        astray = max(map(abs, shape), default=0.0) > FAR
        if p.tails == "linear":  # the joints have left the law or each other
            astray |= not (p.ends[0] <= lo and hi <= p.ends[1] and hi - lo > p.domain.std / 2)
        return np.full(self.size, 1e3) if astray else self.solve(alpha).residual

    @property
    def size(self) -> int:
        equalities = sum(side.equalities for side in self.sides) if self.p.tails == "linear" else 0
        return equalities + self.linear + 2 * len(self.p.x)

    def jacobian(self, alpha: np.ndarray) -> np.ndarray:
        r"""Of the residual: $-P^\perp \dot\Phi c - (\Phi^+)^T \dot\Phi^T r$, the second term for the joints only."""
        p, point = self.p, self.solve(alpha)
        parameters, linear = [*point.numbers, *point.shape], slice(0, self.linear)
        moved = np.zeros((len(point.system), len(alpha)))
        turned = np.zeros((self.linear, len(alpha)))
        outside = np.zeros((len(alpha), 2, len(p.x)))
        moved[:, : self.shapes] = self.weigh(point, *self.rows(parameters, point.z, slice(self.linear, None)))
        if self.family.centred:
            step = 1e-6
            system = self.weigh(point, *self.rows([0.0] * self.linear + point.shape, point.z - step, linear))
            small = len(system) - self.linear
            moved[:small, self.shapes] = (system - point.system)[:small] @ point.numbers / (step * self.scale)
        row, column = 0, self.inner
        for i, (joint, side) in enumerate(point.joints):
            if side.joint is not None:
                row += side.equalities
                continue
            step = 1e-5 * self.scale  # second derivatives at the joint, by differences of the exact first
            at = joint + np.array([-step, step])
            values, slopes = self.rows(
                [0.0] * self.linear + point.shape, (at - self.centre(alpha)) / self.scale, linear
            )
            by = EQUALITY * np.diff(values, axis=0)[0] / (2 * step), EQUALITY * np.diff(slopes, axis=0)[0] / (2 * step)
            bend = 0.0 if side.line is not None else float(np.diff(p.target(at)[1])[0]) / (2 * step)
            moved[row + 1, column] = by[1] @ point.numbers - EQUALITY * bend
            turned[:, column] = by[0] * point.inside[row] + by[1] * point.inside[row + 1]
            if side.line is None:  # a tangent of the target turns as the joint moves
                nodes = point.tails[i]
                outside[column, 0, nodes] = -self.root[0][nodes] * bend * (p.x[nodes] - joint)
                outside[column, 1, nodes] = -self.root[1][nodes] * bend
            row, column = row + 2, column + 1
        change = point.q @ (point.q.T @ moved - np.linalg.solve(point.r.T, turned)) - moved
        return np.stack([self.spread(point, change[:, j], outside[j]) for j in range(len(alpha))], axis=-1)

    def objective(self, alpha: np.ndarray) -> float:
        residual = self.residual(alpha)
        return float(residual @ residual)


@dataclass(frozen=True)
class Found:
    """Where J is least."""

    shape: list[float]
    lo: float
    hi: float
    location: float
    scale: float
    rounding: float
    """The weight of the rows that keep the linear numbers small."""


def search(p: Problem, sides: tuple[Side, Side]) -> Found:
    """Shape and joints of least J: a race of several starts, in which fewer and fewer are improved more and more."""
    assert isinstance(p.family, Separable)
    racers = sorted(_starts(p, sides), key=lambda start: start[0])
    apart = [True] + [b[0] > a[0] * (1 + 1e-6) for a, b in pairwise(racers)]  # alike in J: the same start twice
    racers = [start for start, new in zip(racers, apart, strict=True) if new]
    for kept, steps in RACE if p.family.shape(p.degree) > 1 else ((1, 60),):  # one number has one valley
        racers = sorted((improve(*start[1:], steps) for start in racers[:kept]), key=lambda start: start[0])
    value, projection, alpha = racers[0]
    # numbers that cancel each other are worth a thousandth of the error, not the rounding of the copy
    projection.rounding = max(ROUNDING, 1e-3 * value**0.5)
    _, projection, alpha = improve(projection, alpha, 100, again=True)
    location = float(np.float32(projection.centre(alpha)))  # the module keeps it so
    return Found(*projection.unpack(alpha), location, projection.scale, projection.rounding)


def _starts(p: Problem, sides: tuple[Side, Side]) -> Iterator[tuple[float, Projection, np.ndarray]]:
    """J, projection and alpha of each start."""
    family = p.family
    assert isinstance(family, Separable)
    pairs = _joints(p, sides)
    shifts = (SHIFTS[:2] if p.is_symmetric() else SHIFTS) if family.centred else (0.0,)

    def start(lo: float, hi: float, shift: float = 0.0) -> Projection:
        half = (hi - lo) / 2
        location, scale = np.float32((lo + hi) / 2 + shift * half), np.float32(half / family.reach(p.degree))
        return Projection(p, sides, float(location), float(scale))

    cores = [(lo, hi, start(lo, hi, shift)) for lo, hi in pairs for shift in shifts]
    shapes = []
    for lo, hi, of in cores:
        core = (p.x >= lo) & (p.x <= hi)
        shapes.append(family.starts(p.degree, (p.x[core] - of.location) / of.scale, p.w[core], p.f[core]))
    if p.tails == "linear" and all(found == shapes[0] for found in shapes):
        lo, hi = np.array(pairs).T
        objective = Objective(p, sides)
        for shape in shapes[0]:  # whatever the core, so that all pairs are judged at once
            values = objective.of(shape)(lo, hi)
            best = int(np.argmin(values))
            of = start(*pairs[best])
            yield float(values[best]), of, of.pack(shape, *pairs[best])
        return
    for (lo, hi, of), found in zip(cores, shapes, strict=True):
        for shape in found:
            of = Projection(p, sides, of.location, of.scale)
            alpha = of.pack(shape, lo, hi)
            yield of.objective(alpha), of, alpha


def improve(
    projection: Projection, alpha: np.ndarray, steps: int, again: bool = False
) -> tuple[float, Projection, np.ndarray]:
    """J after so many of Levenberg and Marquardt's steps from `alpha`, or where they end, and where that is.

    Where they have ended before nothing is done, unless `again`.
    """
    if projection.ended and not again:
        return projection.objective(alpha), projection, alpha
    projection.last = None  # its rounding may have changed
    found = least_squares(
        projection.residual,
        alpha,
        projection.jacobian,  # pyright: ignore[reportArgumentType]
        method="lm",
        ftol=1e-4,
        xtol=1e-6,
        max_nfev=steps,
    )
    projection.ended = found.status > 0
    return 2 * found.cost, projection, found.x


def _joints(p: Problem, sides: tuple[Side, Side]) -> list[tuple[float, float]]:
    """Pairs of joints to start from, around the target's curvature; fixed ones stay, and without tails there is one."""
    if p.tails == "none":
        return [p.four_deviations()]
    centre, spread = p.bend()
    free = [side.joint is None for side in sides]
    if p.is_symmetric():
        radii = [min(r * spread, p.ends[1] - p.domain.mean) for r in np.geomspace(*RADII, 8).tolist()]
        return [(p.domain.mean - r, p.domain.mean + r) for r in radii]
    ends = []
    for side, sign in zip(sides, (-1, 1), strict=True):
        radii = np.geomspace(*RADII, 3 if all(free) else 6)
        ends.append(np.clip(centre + sign * spread * radii, *p.ends).tolist() if side.joint is None else [side.joint])
    return list(product(*ends))
