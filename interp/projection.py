"""The search for a separable family: shape and joints by least squares, everything linear eliminated.

Variable projection (Golub and Pereyra, 1973): for each shape and pair of joints the best linear numbers are those of a
least-squares problem, so that J is a function of shape and joints alone. Its Jacobian is Kaufman's (1975) for the shape
and exact for the joints. The equalities at the joints are rows of a large weight here; `fit` solves them exactly for
the shape and joints found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from .family import Separable
from .joints import Objective
from .problem import Problem, Side

EQUALITY = 1e3
"""Weight of a row that says what the core shall be at a joint; 1 is that of the whole law."""

ROUNDING = 1e-7
"""Weight of a row that keeps a coefficient small: what rounding it to float32 adds to the error."""

RADII = (1.6, 2.4, 3.5, 5.0)
"""Distances of each joint from the centre of the target's curvature that the search starts from, in its spread."""

TRIED = 7
"""How many of the starts are improved, the best ones first."""

ROUGH, FINE = 1e-2, 1e-4
"""The relative change of J below which the improvement of a start, and of the best of them, ends."""


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
        self.linear = self.family.size(problem.degree) - self.shapes
        self.free = [problem.tails == "linear" and side.joint is None for side in sides]
        self.root = np.sqrt(problem.w), np.sqrt(problem.weight * problem.w)
        self.rounding, self.last = ROUNDING, None

    def unpack(self, alpha: np.ndarray) -> tuple[list[float], float, float]:
        """Shape and joints."""
        if self.p.tails == "none":
            return [*map(float, alpha)], -np.inf, np.inf
        rest, joints = list(alpha[self.shapes :]), []
        for side, free in zip(self.sides, self.free, strict=True):
            joints.append(rest.pop(0) if free else side.joint)
        return [*map(float, alpha[: self.shapes])], float(joints[0]), float(joints[1])

    def pack(self, shape: list[float], lo: float, hi: float) -> np.ndarray:
        return np.array([*shape, *(joint for joint, free in zip((lo, hi), self.free, strict=True) if free)])

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
        if isinstance(self.last, Point) and np.array_equal(self.last.alpha, alpha):
            return self.last
        p = self.p
        shape, lo, hi = self.unpack(alpha)
        joints = list(zip((lo, hi), self.sides, strict=True)) if p.tails == "linear" else []
        core = slice(*np.searchsorted(p.x, (lo, hi)))
        z = np.concatenate([[joint for joint, _ in joints], p.x[core]])
        point = Point(alpha.copy(), shape, joints, core, (z - self.location) / self.scale)
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
        _, lo, hi = self.unpack(alpha)
        if p.tails == "linear" and not (p.ends[0] <= lo and hi <= p.ends[1] and hi - lo > p.domain.std / 2):
            return np.full(self.size, 1e3)  # the joints have left the law or each other
        return self.solve(alpha).residual

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
        row, column = 0, self.shapes
        for i, (joint, side) in enumerate(point.joints):
            if side.joint is not None:
                row += side.equalities
                continue
            step = 1e-5 * self.scale  # second derivatives at the joint, by differences of the exact first
            at = joint + np.array([-step, step])
            values, slopes = self.rows([0.0] * self.linear + point.shape, (at - self.location) / self.scale, linear)
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
    """Shape and joints of least J: the best of several starts, each improved a little, is improved to the end."""
    starts = sorted(_starts(p, sides), key=lambda start: start[0])[:TRIED]
    value, projection, alpha = min((improve(of, at, ROUGH) for _, of, at in starts), key=lambda r: r[0])
    # numbers that cancel each other are worth a thousandth of the error, not the rounding of the copy
    projection.rounding = max(ROUNDING, 1e-3 * value**0.5)
    _, projection, alpha = improve(projection, alpha, FINE)
    return Found(*projection.unpack(alpha), projection.location, projection.scale, projection.rounding)


def _starts(p: Problem, sides: tuple[Side, Side]) -> Iterator[tuple[float, Projection, np.ndarray]]:
    """J, projection and alpha to start from: of each pair of joints the best shape, or of each shape the best pair."""
    family = p.family
    assert isinstance(family, Separable)
    lo, hi = _joints(p, sides)

    def projection(i: int) -> Projection:
        half = float(np.float32((hi[i] - lo[i]) / 2 / family.reach(p.degree)))
        return Projection(p, sides, float(np.float32((lo[i] + hi[i]) / 2)), half)

    shapes = []
    for start, end in zip(lo, hi, strict=True):
        core = (p.x >= start) & (p.x <= end)
        z = (p.x[core] - (start + end) / 2) / ((end - start) / 2) * family.reach(p.degree)
        shapes.append(family.starts(p.degree, z, p.w[core], p.f[core]))
    if p.tails == "linear" and all(found == shapes[0] for found in shapes):
        objective = Objective(p, sides)
        for shape in shapes[0]:  # whatever the core, so that all pairs are judged at once
            values = objective.of(shape)(lo, hi)
            best = int(np.argmin(values))
            yield float(values[best]), (of := projection(best)), of.pack(shape, lo[best], hi[best])
    else:
        for i in range(len(lo)):
            of = projection(i)
            alphas = [of.pack(shape, lo[i], hi[i]) for shape in shapes[i]]
            values = [of.objective(alpha) for alpha in alphas]
            best = int(np.argmin(values))
            yield values[best], of, alphas[best]


def improve(projection: Projection, alpha: np.ndarray, tolerance: float) -> tuple[float, Projection, np.ndarray]:
    """J at the end of Levenberg and Marquardt's way from `alpha`, and where that is."""
    projection.last = None  # its rounding may have changed
    found = least_squares(
        projection.residual,
        alpha,
        projection.jacobian,  # pyright: ignore[reportArgumentType]
        method="lm",
        ftol=tolerance,
        xtol=tolerance / 100,
        max_nfev=60,
    )
    return 2 * found.cost, projection, found.x


def _joints(p: Problem, sides: tuple[Side, Side]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of joints to start from, around the target's curvature; fixed ones stay, and without tails there is one."""
    if p.tails == "none":
        lo, hi = p.four_deviations()
        return np.array([lo]), np.array([hi])
    centre, spread = p.bend()
    if p.is_symmetric():
        centre = 0.0
    ends = []
    for side, sign in zip(sides, (-1, 1), strict=True):
        fine = np.array(RADII) if all(s.joint is None for s in sides) else np.geomspace(1.2, 8, 9)
        free = np.clip(centre + sign * spread * fine, *p.ends)
        ends.append(free if side.joint is None else np.array([side.joint]))
    lo, hi = (part.ravel() for part in np.meshgrid(*ends, indexing="ij"))
    return lo, hi
