r"""Variable projection of many starts at once: shapes and joints by least squares, everything linear eliminated.

For each shape and pair of joints the best linear numbers are those of a least-squares problem, so that J is a function
of shape and joints alone (Golub and Pereyra, 1973); its Jacobian is Kaufman's (1975). The core of every start is mapped
to the same Gauss-Legendre nodes t in [-1, 1]: moving a joint changes weights and targets there, and neither the basis
nor the equalities. So one evaluation is a few operations on stacked arrays, and a step of Levenberg and Marquardt's is
made by all starts together. The equalities at the joints are rows of a large weight here; `fit` solves them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .family import Separable
from .problem import Problem, Side

EQUALITY = 1e3
"""Weight of a row that says what the core shall be at a joint; 1 is that of the whole law."""

ROUNDING = 1e-7
"""Weight of a row that keeps a term of the series small: what rounding its number to float32 adds to the error."""

FLOOR = 1e-13
"""J that needs no improvement, as a share of 1 + E f^2: float32 does not see it."""

FAR = 1e6
"""The size of a shape's number to which no step may go."""

STEEP = 15.0
"""The slope of a core at a joint on a kink above which J grows: rounding it to float32 turns the tail by 5e-7."""

NOTHING = 1e-100
"""The share in the copy below which a term of the series is none."""

DENSE = np.linspace(0, 1, 513)
"""Where in the core a shape is checked."""


@dataclass
class State:
    """Where each start is: rows of stacked arrays."""

    frame: np.ndarray
    """Location and scale of z, (starts, 2)."""
    alpha: np.ndarray
    """Shape, shift of z where it is searched, free joints: (starts, numbers)."""
    value: np.ndarray
    """J, and what rounding adds."""
    residual: np.ndarray
    jacobian: np.ndarray

    def __getitem__(self, rows) -> State:
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __setitem__(self, rows, other: State) -> None:
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


class Race:
    """J as a sum of squares over the nodes of a family's core, for many shapes and joints at once."""

    def __init__(self, p: Problem, family: Separable, sides: tuple[Side, Side], nodes: int, rounding: float = ROUNDING):
        self.p, self.family, self.sides, self.rounding = p, family, sides, rounding
        self.shapes = family.shape(p.degree)
        self.linear = family.size(p.degree) - self.shapes
        self.inner = self.shapes + family.centred
        self.bare = p.tails == "none"
        self.free = [i for i, side in enumerate(sides) if not self.bare and side.joint is None]
        self.steep = [] if self.bare else [i for i, side in enumerate(sides) if side.equalities == 2]
        """The joints at which the slope is asked for too."""
        self.kinked = [] if self.bare else [i for i in (0, 1) if i not in self.steep]
        self.unsound = type(family).sound is not Separable.sound
        self.count, self.floor = nodes, FLOOR * (1 + p.w @ p.f**2)

    def joints(self, alpha: np.ndarray) -> np.ndarray:
        """Both joints of each start, (starts, 2)."""
        ends = self.p.ends if self.bare else [side.joint if side.joint is not None else 0.0 for side in self.sides]
        both = np.tile(np.array(ends, dtype=float), (len(alpha), 1))
        both[:, self.free] = alpha[:, self.inner :]
        return both

    def nodes(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes of each core and their weights."""
        if self.bare:
            return np.tile(self.p.x, (len(joints), 1)), np.tile(self.p.w, (len(joints), 1))
        return self.p.gauss(joints, self.count)

    def rows(self, values: np.ndarray, slopes: np.ndarray, root: np.ndarray) -> np.ndarray:
        """Rows of the systems from values and slopes at the joints and the nodes, (starts, points, columns)."""
        n = 0 if self.bare else 2
        parts = [EQUALITY * values[:, :n], EQUALITY * slopes[:, self.steep]] if n else []
        lam = np.sqrt(self.p.weight)
        return np.concatenate([*parts, root[..., None] * values[:, n:], lam * root[..., None] * slopes[:, n:]], axis=1)

    def evaluate(self, frame: np.ndarray, alpha: np.ndarray) -> State:
        """Everything at these shapes and joints; where they are astray J is infinite."""
        p = self.p
        joints, astray, z, basis, root, system, y = self.systems(frame, alpha)
        q, r = np.linalg.qr(system)
        numbers = np.linalg.solve(r, q.swapaxes(1, 2) @ y)
        inside = y - system @ numbers
        value = (inside**2).sum(axis=(1, 2)) + self.outside(joints, basis[1], numbers)
        jacobian = self.jacobian(alpha, z, frame[:, 1:], root, joints, q, r, numbers, inside, basis)
        residual = inside[..., 0]
        for k, i in enumerate(self.free, self.inner):
            if self.sides[i].line is None:  # a tangent of the target turns as the joint moves
                before, now, after = (
                    np.sqrt(p.tail(i, None, joints[:, i] + by) + 1e-30) for by in (-p.step / 4, 0.0, p.step / 4)
                )
                turn = np.zeros((len(alpha), 1, alpha.shape[1]))
                turn[:, 0, k] = (after - before) / (p.step / 2)
                jacobian = np.concatenate([jacobian, turn], axis=1)
                residual = np.concatenate([residual, now[:, None]], axis=1)
        astray |= ~np.isfinite(jacobian).all(axis=(1, 2)) | ~np.isfinite(value)
        jacobian[astray], residual[astray] = 0.0, 0.0
        return State(frame, alpha, np.where(astray, np.inf, value), residual, jacobian)

    def values(self, frame: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """J alone, which costs half."""
        joints, astray, _, basis, _, system, y = self.systems(frame, alpha)
        r = np.asarray(np.linalg.qr(np.concatenate([system, y], axis=2), mode="r"))
        numbers = np.linalg.solve(r[:, :-1, :-1], r[:, :-1, -1:]) if self.kinked else None
        value = r[:, -1, -1] ** 2 + self.outside(joints, basis[1], numbers)
        return np.where(astray | ~np.isfinite(value), np.inf, value)

    def outside(self, joints: np.ndarray, slopes: np.ndarray, numbers: np.ndarray | None) -> np.ndarray:
        """The share of J that no row of the systems has: the tails', and a penalty where the core is too steep."""
        value = np.zeros(len(joints))
        for i in self.kinked:
            value += np.maximum(np.abs((slopes[:, i, None] @ numbers)[:, 0, 0]) - STEEP, 0) ** 2
        if not self.bare:
            for i, side in enumerate(self.sides):
                value += self.p.tail(i, side.line, joints[:, i])
        return value

    def systems(self, frame: np.ndarray, alpha: np.ndarray) -> tuple:
        """Joints, what is astray, z, the basis and its slopes, roots of weights, the systems and their right sides."""
        p, linear = self.p, self.linear
        location, scale = frame[:, :1], frame[:, 1:]
        shift = alpha[:, self.shapes : self.inner] if self.family.centred else 0.0
        joints = self.joints(alpha)
        astray = ~(np.abs(alpha).max(axis=1) < FAR)
        if not self.bare:
            astray |= (joints[:, 0] < p.ends[0]) | (joints[:, 1] > p.ends[1])
            astray |= joints[:, 1] - joints[:, 0] < p.domain.std / 2
            joints = np.where(astray[:, None], [p.domain.mean - p.domain.std, p.domain.mean + p.domain.std], joints)
            if self.unsound:
                ends = joints[:, :1] + DENSE * (joints[:, 1:] - joints[:, :1])
                astray |= ~self.family.sound(alpha[:, : self.shapes], (ends - location) / scale - shift)
        x, w = self.nodes(joints)
        root = np.sqrt(w)
        f, d = (p.f + 0 * x, p.d + 0 * x) if self.bare else p.near(x)
        at = x
        if not self.bare:
            asked = [p.ask(side, joint) for side, joint in zip(self.sides, joints.T, strict=True)]
            at = np.concatenate([joints, x], axis=1)
            f = np.concatenate([*(value[:, None] for value, _ in asked), f], axis=1)
            d = np.concatenate([*(slope[:, None] for _, slope in asked), d], axis=1)
        z = (at - location) / scale - shift
        values, slopes = self.family.columns(alpha[:, : self.shapes], z, linear)
        slopes = slopes / scale[..., None]
        system, y = self.rows(values, slopes, root), self.rows(f[..., None], d[..., None], root)
        # the share of each number in the copy, of which rounding is a share
        share = np.sqrt(w[:, None] @ values[:, -x.shape[1] :] ** 2)[:, 0]
        system = np.concatenate([system, self.rounding * share[..., None] * np.eye(linear)], axis=1)
        y = np.concatenate([y, np.zeros((len(alpha), linear, 1))], axis=1)
        astray |= ~np.isfinite(system).all(axis=(1, 2)) | (share.min(axis=1) < NOTHING)
        system[astray] = np.eye(system.shape[1], linear)
        return joints, astray, z, (values, slopes), root, system, y

    def jacobian(self, alpha, z, scale, root, joints, q, r, numbers, inside, basis) -> np.ndarray:
        r"""$-P^\perp \dot\Phi c - (\Phi^+)^T \dot\Phi^T r$, the second term for the joints only.

        A joint moves what is asked of the core and the border between core and tail, where both are alike: what one
        side gains there the other loses.
        """
        p, linear = self.p, self.linear
        shape, c = alpha[:, : self.shapes], numbers[..., 0]
        size = q.shape[1] - linear
        moved = np.zeros((*q.shape[:2], alpha.shape[1]))
        turned = np.zeros((len(alpha), linear, alpha.shape[1]))
        turns = self.family.turns(c, shape, z)
        moved[:, :size, : self.shapes] = self.rows(turns[0], turns[1] / scale[..., None], root)
        if self.family.centred:
            h = 1e-6
            after = self.family.columns(shape, z + h, linear)[1] @ numbers
            steep = scale[..., None] * (basis[1] @ numbers)
            bend = (after - steep) / h
            moved[:, :size, self.shapes : self.inner] = -self.rows(steep, bend / scale[..., None], root)
        if self.free:
            h = 1e-5
            ends = np.concatenate([z[:, :2] - h, z[:, :2] + h], axis=1)
            by = [
                EQUALITY * (part[:, 2:] - part[:, :2]) / (2 * h) / unit
                for part, unit in zip(
                    self.family.columns(shape, ends, linear), (scale[..., None], scale[..., None] ** 2), strict=True
                )
            ]
            for k, i in enumerate(self.free, self.inner):
                bend = 0.0 if self.sides[i].line is not None else p.curvature(joints[:, i])
                row = 2 + self.steep.index(i)
                moved[:, row, k] = (by[1][:, i, None] @ numbers)[:, 0, 0] - EQUALITY * bend
                turned[..., k] = by[0][:, i] * inside[:, i] + by[1][:, i] * inside[:, row]
        return q @ (q.swapaxes(1, 2) @ moved - np.linalg.solve(r.swapaxes(1, 2), turned)) - moved

    def improve(self, state: State, steps: int, settled: float = 1e-4) -> State:
        """So many of Levenberg and Marquardt's steps by every start, or until one gains less than `settled` of J."""
        best = State(*(getattr(state, f.name).copy() for f in fields(state)))
        damping, growth = np.full(len(best.value), 1e-2), np.full(len(best.value), 2.0)
        going, scale = np.isfinite(best.value) & (best.value > self.floor), np.zeros_like(best.alpha)
        for _ in range(steps):
            rows = np.flatnonzero(going)
            if not len(rows):
                break
            now = best[rows]
            n = now.alpha.shape[1]
            scale[rows] = np.maximum(scale[rows], np.linalg.norm(now.jacobian, axis=1)) + 1e-30
            both = np.concatenate([now.jacobian / scale[rows, None], now.residual[..., None]], axis=2)
            small = np.asarray(np.linalg.qr(both, mode="r"))
            a, b = small[:, :n, :n], small[:, :n, n:]
            q, r = np.linalg.qr(np.concatenate([a, np.sqrt(damping[rows])[:, None, None] * np.eye(n)], axis=1))
            step = -np.linalg.solve(r + 1e-14 * np.eye(n), np.swapaxes(q[:, :n], 1, 2) @ b)
            expected = (b**2).sum(axis=(1, 2)) - ((a @ step + b) ** 2).sum(axis=(1, 2))
            there = now.alpha + step[..., 0] / scale[rows]
            there[:, self.inner :] = there[:, self.inner :].clip(*self.p.ends)
            trial = self.evaluate(now.frame, there)
            gain = now.value - trial.value
            ratio = gain / np.maximum(expected, 1e-300)
            good = ratio > 1e-3
            went, stuck, least = rows[good], rows[~good], settled * now.value
            best[went] = trial[good]
            damping[went] *= np.maximum(1 / 3, 1 - (2 * np.minimum(ratio[good], 1e3) - 1) ** 3)  # Nielsen's rule
            growth[went] = 2.0
            damping[stuck] *= growth[stuck]
            growth[stuck] *= 2
            arrived = best.value[rows] <= self.floor
            arrived |= np.where(good, np.maximum(gain, expected) < least, expected < 1e-2 * least)
            going[rows[arrived | (damping[rows] > 1e10)]] = False
        return best
