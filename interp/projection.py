"""The search for a separable family: shape and joints by least squares, everything linear eliminated.

Variable projection (Golub and Pereyra, 1973): for each shape and pair of joints the best linear numbers are those of a
least-squares problem, so that J is a function of shape and joints alone. Its Jacobian is Kaufman's (1975). The
equalities at the joints are rows of a large weight here; `fit` solves them exactly for the shape and joints found.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

from .family import Separable
from .problem import Problem, Side

EQUALITY = 1e3
"""Weight of a row that says what the core shall be at a joint; 1 is that of the whole law."""

ROUNDING = 1e-7
"""Weight of a row that keeps a coefficient small: what rounding it to float32 adds to the error."""

TRIED = 3
"""How many of the starts are improved, the best ones first; one where the shape is a single number."""

ROUGH, FINE = 1e-2, 1e-4
"""Relative changes of J and of the shape below which the improvement of a start, and of the best of them, ends."""


class Projection:
    """J as a sum of squares over the nodes of the law, with the linear numbers at their best."""

    def __init__(self, problem: Problem, sides: tuple[Side, Side], location: float, scale: float):
        self.p, self.sides, self.location, self.scale = problem, sides, location, scale
        assert isinstance(problem.family, Separable)
        self.family = problem.family
        self.shapes = self.family.shape(problem.degree)
        self.linear = self.family.size(problem.degree) - self.shapes
        self.free = [problem.tails == "linear" and side.kink is None for side in sides]
        self.root = np.sqrt(problem.w), np.sqrt(problem.weight * problem.w)
        self.last: tuple | None = None

    def unpack(self, alpha: np.ndarray) -> tuple[list[float], float, float]:
        """Shape and joints."""
        if self.p.tails == "none":
            return [*map(float, alpha)], -np.inf, np.inf
        rest, joints = list(alpha[self.shapes :]), []
        for side, free in zip(self.sides, self.free, strict=True):
            joints.append(rest.pop(0) if free else side.kink)
        return [*map(float, alpha[: self.shapes])], float(joints[0]), float(joints[1])

    def pack(self, shape: list[float], lo: float, hi: float) -> np.ndarray:
        return np.array([*shape, *(joint for joint, free in zip((lo, hi), self.free, strict=True) if free)])

    def solve(self, alpha: np.ndarray):
        """Everything at one point, kept for the Jacobian there: the core's rows, their QR, numbers and residual."""
        if self.last is not None and np.array_equal(self.last[0], alpha):
            return self.last[1:]
        p = self.p
        shape, lo, hi = self.unpack(alpha)
        core = slice(*np.searchsorted(p.x, (lo, hi)))
        joints = [(joint, side) for joint, side in zip((lo, hi), self.sides, strict=True) if p.tails == "linear"]
        z = (np.r_[[joint for joint, _ in joints], p.x[core]] - self.location) / self.scale
        basis, slopes = self.jacobian_rows([0.0] * self.linear + shape, z, slice(0, self.linear))
        n, value, slope = len(joints), self.root[0][core, None], self.root[1][core, None]
        rows, wanted = [], []
        for i, (joint, side) in enumerate(joints):
            rows += [basis[i], slopes[i]][: 1 if side.kink is not None else 2]
            wanted += p.wanted(joint, side)[: 1 if side.kink is not None else 2]
        system = np.concatenate(
            [
                EQUALITY * np.reshape(rows, (-1, self.linear)),
                value * basis[n:],
                slope * slopes[n:],
                ROUNDING * np.eye(self.linear),
            ]
        )
        y = np.concatenate(
            [EQUALITY * np.array(wanted), value[:, 0] * p.f[core], slope[:, 0] * p.d[core], np.zeros(self.linear)]
        )
        q, r = np.linalg.qr(system)
        numbers = np.linalg.solve(r, q.T @ y)
        residual = np.zeros(2 * len(p.x) + 4 + self.linear)
        self.scatter(residual, y - system @ numbers, core, len(rows))
        tails = [np.r_[: core.start], np.r_[core.stop : len(p.x)]]
        for nodes, (joint, side) in zip(tails, joints, strict=False):
            level, steep = p.wanted(joint, side)
            gap = p.f[nodes] - level - steep * (p.x[nodes] - joint)
            residual[nodes] = self.root[0][nodes] * gap
            residual[len(p.x) + nodes] = self.root[1][nodes] * (p.d[nodes] - steep)
        self.last = (alpha.copy(), residual, numbers, q, core, joints, len(rows), tails)
        return self.last[1:]

    def scatter(self, out: np.ndarray, rows: np.ndarray, core: slice, equalities: int) -> None:
        """Put rows of the core's system (equalities, values, slopes, rounding) to their places among all nodes."""
        n, size = len(self.p.x), core.stop - core.start
        out[core] = rows[equalities : equalities + size]
        out[n + core.start : n + core.stop] = rows[equalities + size : equalities + 2 * size]
        out[2 * n : 2 * n + equalities] = rows[:equalities]
        out[2 * n + 4 :] = rows[equalities + 2 * size :]

    def jacobian_rows(self, parameters, z, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = self.family.jacobian(parameters, z)
        return np.stack(values[columns], axis=-1), np.stack(slopes[columns], axis=-1) / self.scale

    def residual(self, alpha: np.ndarray) -> np.ndarray:
        return self.solve(alpha)[0]

    def jacobian(self, alpha: np.ndarray) -> np.ndarray:
        p = self.p
        residual, numbers, q, core, joints, equalities, tails = self.solve(alpha)
        shape, _, _ = self.unpack(alpha)
        z = (np.r_[[joint for joint, _ in joints], p.x[core]] - self.location) / self.scale
        parameters = [*numbers, *shape]
        by, slopes_by = self.jacobian_rows(parameters, z, slice(self.linear, None))
        n, size = len(joints), core.stop - core.start
        moved = np.zeros((q.shape[0], len(alpha)))
        row, column = 0, self.shapes
        out = np.zeros((len(residual), len(alpha)))
        for i, (joint, side) in enumerate(joints):
            moved[row, : self.shapes] = EQUALITY * by[i]
            if side.kink is not None:
                row += 1
                continue
            moved[row + 1, : self.shapes] = EQUALITY * slopes_by[i]
            step = 1e-5 * self.scale  # second derivatives at the joint, by differences of the exact first
            at = joint + np.array([-step, step])
            core_bend = np.diff(self.family.slope(parameters, (at - self.location) / self.scale) / self.scale)
            bend = 0.0 if side.line is not None else float(np.diff(p.target(at)[1])[0]) / (2 * step)
            moved[row + 1, column] = EQUALITY * (float(core_bend[0]) / (2 * step) - bend)
            if side.line is None:  # a tangent of the target turns as the joint moves
                nodes = tails[i]
                out[nodes, column] = -self.root[0][nodes] * bend * (p.x[nodes] - joint)
                out[len(p.x) + nodes, column] = -self.root[1][nodes] * bend
            row, column = row + 2, column + 1
        moved[equalities : equalities + size, : self.shapes] = self.root[0][core, None] * by[n:]
        moved[equalities + size : equalities + 2 * size, : self.shapes] = self.root[1][core, None] * slopes_by[n:]
        moved = moved - q @ (q.T @ moved)
        for j in range(len(alpha)):
            column_out = np.zeros(len(residual))
            self.scatter(column_out, -moved[:, j], core, equalities)
            out[:, j] += column_out
        return out

    def objective(self, alpha: np.ndarray) -> float:
        residual = self.residual(alpha)
        return float(residual @ residual)


def search(p: Problem, sides: tuple[Side, Side]) -> tuple[list[float], float, float, float, float]:
    """Shape, joints, location and scale of least J: several starts, the best of them improved."""
    family = p.family
    assert isinstance(family, Separable)
    starts = []
    for lo, hi in _joints(p, sides):
        location, half = ((lo + hi) / 2, (hi - lo) / 2) if p.tails == "linear" else (p.domain.mean, 4 * p.domain.std)
        location, scale = float(np.float32(location)), float(np.float32(half / family.reach(p.degree)))
        projection = Projection(p, sides, location, scale)
        core = (p.x >= location - half) & (p.x <= location + half)
        for shape in family.starts(p.degree, (p.x[core] - location) / scale, p.w[core], p.f[core]):
            alpha = projection.pack(shape, lo, hi)
            starts.append((projection.objective(alpha), len(starts), projection, alpha))
    tried = min(TRIED, family.shape(p.degree))
    rough = [improve(of, alpha, ROUGH) for _, _, of, alpha in sorted(starts, key=lambda s: s[:2])[:tried]]
    _, projection, alpha = improve(*min(rough, key=lambda r: r[0])[1:], FINE)
    return *projection.unpack(alpha), projection.location, projection.scale


def improve(projection: Projection, alpha: np.ndarray, tolerance: float) -> tuple[float, Projection, np.ndarray]:
    """J at the end of Levenberg and Marquardt's way from `alpha`, and where that is."""
    found = least_squares(
        lambda a: _guarded(projection, a),
        alpha,
        projection.jacobian,  # pyright: ignore[reportArgumentType]
        method="lm",
        ftol=tolerance,
        xtol=tolerance,
        max_nfev=100,
    )
    return 2 * found.cost, projection, found.x


def _guarded(projection: Projection, alpha: np.ndarray) -> np.ndarray:
    """The residual; a large one where the joints have left the law or each other."""
    p = projection.p
    _, lo, hi = projection.unpack(alpha)
    if p.tails == "linear" and not (p.ends[0] <= lo and hi <= p.ends[1] and hi - lo > p.domain.std / 2):
        return np.full(2 * len(p.x) + 4 + projection.linear, 1e3)
    return projection.residual(alpha)


def _joints(p: Problem, sides: tuple[Side, Side]) -> list[tuple[float, float]]:
    """Pairs of joints to start from: around the target's curvature, at several distances; kinks stay."""
    if p.tails == "none":
        return [(-np.inf, np.inf)]
    centre, spread = p.bend()
    if p.is_symmetric():
        centre = 0.0
    fixed = [side.kink for side in sides]
    if fixed[0] is not None and fixed[1] is not None:
        return [(fixed[0], fixed[1])]
    found = []
    for radius in (1.5, 2.2, 3.0, 4.0, 5.5):
        lo = fixed[0] if fixed[0] is not None else max(centre - radius * spread, p.ends[0])
        hi = fixed[1] if fixed[1] is not None else min(centre + radius * spread, p.ends[1])
        found.append((lo, hi))
    return found
