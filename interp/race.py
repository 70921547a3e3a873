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

from .family import Separable, empty
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

BESIDE = 1e-3
"""How far beside a place its gradient is compared, as a share of a shape's number or of half of the core."""

REACH = 0.25
"""How far its first step may go, in the same."""

NOTHING = 1e-100
"""The share in the copy below which a term of the series is none."""

Lanes = tuple[tuple[float, float], ...]

GAUSS: Lanes = ((1.0, 0.0),)
"""Steps to choose from, here one: a factor of the damping; and 1 for Newton's with what curved residuals add."""

LANES: Lanes = ((0.01, 0.0), (1.0, 0.0), (0.01, 1.0), (1.0, 1.0))
"""The steps where few starts must arrive soon."""

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
    """(starts, numbers, rows)."""

    def __getitem__(self, rows) -> State:
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __setitem__(self, rows, other: State) -> None:
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


@dataclass
class Walk:
    """Where each start is in `Race.descend`: rows of stacked arrays."""

    frame: np.ndarray
    alpha: np.ndarray
    value: np.ndarray
    """The logarithm of J."""
    unit: np.ndarray
    """Of the steps in each number."""
    slope: np.ndarray
    hessian: np.ndarray
    radius: np.ndarray
    trials: np.ndarray
    """Where to try next, (starts, places, numbers)."""
    hoped: np.ndarray
    """What is hoped to be gained there."""
    length: np.ndarray
    """How long the longest part of the way there is."""

    def __getitem__(self, rows) -> Walk:
        return Walk(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class Sample:
    """What is wanted of each start."""

    joints: np.ndarray
    astray: np.ndarray
    z: np.ndarray
    """The joints, if there are any, and the nodes."""
    w: np.ndarray
    f: np.ndarray
    d: np.ndarray
    tails: np.ndarray
    """The share of J in each tail."""
    growth: np.ndarray
    """How that grows with the joint, where the tail is a tangent of the target."""

    def __getitem__(self, rows) -> Sample:
        return Sample(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class Solved:
    """The best linear numbers of each start, and what they were found from."""

    at: Sample
    values: np.ndarray
    slopes: np.ndarray
    root: np.ndarray
    """Roots of the nodes' weights."""
    share: np.ndarray
    """The share of each number in the copy: the unit of the columns of the systems."""
    system: np.ndarray
    matrix: np.ndarray
    numbers: np.ndarray
    forces: np.ndarray
    """Multipliers of the equalities."""
    inside: np.ndarray
    """What is left of the rows."""
    value: np.ndarray
    """J."""

    def __getitem__(self, rows) -> Solved:
        return Solved(*(getattr(self, f.name)[rows] for f in fields(self)))


class Race:
    """J as a sum of squares over the nodes of a family's core, for many shapes and joints at once."""

    def __init__(self, p: Problem, family: Separable, sides: tuple[Side, Side], nodes: int, rounding: float = ROUNDING):
        self.p, self.family, self.sides, self.rounding, self.equality = p, family, sides, rounding, EQUALITY
        self.shapes = family.shape(p.degree)
        self.linear = family.size(p.degree) - self.shapes
        self.inner = self.shapes + family.centred
        self.bare = p.tails == "none"
        self.free = [i for i, side in enumerate(sides) if not self.bare and side.joint is None]
        self.steep = [] if self.bare else [i for i, side in enumerate(sides) if side.equalities == 2]
        """The joints at which the slope is asked for too."""
        self.kinked = [] if self.bare else [i for i in (0, 1) if i not in self.steep]
        self.unsound = type(family).sound is not Separable.sound
        self.rough = sorted(set(p.target.kinks) - {side.joint for side in sides})
        """Kinks of the target that stay inside the core."""
        self.count, self.floor = nodes, FLOOR * (1 + p.w @ p.f**2)

    def joints(self, alpha: np.ndarray) -> np.ndarray:
        """Both joints of each start, (starts, 2)."""
        ends = self.p.ends if self.bare else [side.joint if side.joint is not None else 0.0 for side in self.sides]
        both = np.empty((len(alpha), 2))
        both[:] = ends
        both[:, self.free] = alpha[:, self.inner :]
        return both

    def nodes(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes of each core and their weights."""
        if self.bare:
            return np.tile(self.p.x, (len(joints), 1)), np.tile(self.p.w, (len(joints), 1))
        return self.p.pieces(joints, self.rough, self.count) if self.rough else self.p.gauss(joints, self.count)

    def rows(self, values: np.ndarray, slopes: np.ndarray, root: np.ndarray, scale) -> tuple[np.ndarray, np.ndarray]:
        """From values and slopes at the joints and the nodes: what the equalities see, and the rows of the systems."""
        n, count = 0 if self.bare else 2, root.shape[1]
        data = empty(len(root), 2 * count, values.shape[2])
        np.multiply(values[:, n:], root[..., None], out=data[:, :count])
        np.multiply(slopes[:, n:], (np.sqrt(self.p.weight) * root / scale)[..., None], out=data[:, count:])
        return np.concatenate([values[:, :n], slopes[:, self.steep] / scale[..., None]], axis=1), data

    def evaluate(self, frame: np.ndarray, alpha: np.ndarray) -> State:
        """Everything at these shapes and joints; where they are astray J is infinite."""
        return self.state(frame, alpha, self.solve(frame, alpha))

    def state(self, frame: np.ndarray, alpha: np.ndarray, s: Solved) -> State:
        """The same of what is solved."""
        jacobian = self.jacobian(alpha, frame[:, 1:], s)
        residual = np.concatenate([-s.forces / self.equality, s.inside], axis=1)
        for k, i in enumerate(self.free, self.inner):
            if self.sides[i].line is None:  # a tangent of the target turns as the joint moves
                root = np.sqrt(s.at.tails[:, i, None] + 1e-30)
                turn = np.zeros((len(alpha), alpha.shape[1], 1))
                turn[:, k] = s.at.growth[:, i, None] / (2 * root)
                jacobian = np.concatenate([jacobian, turn], axis=2)
                residual = np.concatenate([residual, root], axis=1)
        astray = ~np.isfinite(jacobian).all(axis=(1, 2)) | ~np.isfinite(s.value)
        jacobian[astray], residual[astray] = 0.0, 0.0
        return State(frame, alpha, np.where(astray, np.inf, s.value), residual, jacobian)

    def values(self, frame: np.ndarray, alpha: np.ndarray, each: int = 1) -> np.ndarray:
        """J alone, from the normal equations alone: to 1e-15 of the target's square.

        So many starts as `each` says, one after the other, have the same frame and the same joints.
        """
        s, scale, lam = self.sample(frame[::each], alpha[::each]), frame[:, 1:], self.p.weight
        if each > 1:
            s = s[np.repeat(np.arange(len(s.joints)), each)]
        gram, right, slopes, numbers, forces, share, astray, _ = self.normal(s, scale, alpha)
        n = 0 if self.bare else 2
        inside = ((gram @ numbers[..., None])[..., 0] - 2 * right) * numbers
        value = np.maximum((s.w * (s.f[:, n:] ** 2 + lam * s.d[:, n:] ** 2)).sum(axis=1) + inside.sum(axis=1), 0)
        value += self.rounding**2 * ((share * numbers) ** 2).sum(axis=1) + (forces**2).sum(axis=1) / self.equality**2
        value += self.outside(s, slopes, numbers[..., None]).sum(axis=1)
        return np.where(astray | ~np.isfinite(value), np.inf, value)

    def normal(self, s: Sample, scale: np.ndarray, alpha: np.ndarray) -> tuple:
        """Normal equations, slopes at the joints, what solves them, shares, who is astray, and the series."""
        n, shape, lam = 0 if self.bare else 2, alpha[:, : self.shapes], self.p.weight
        gram, right, share, (values, slopes), series = self.family.normal(
            shape, s.z, s.w, s.f[:, n:], s.d[:, n:] * scale, lam / scale**2, self.linear
        )
        slopes = slopes / scale[..., None]
        equal = np.concatenate([values, slopes[:, self.steep]], axis=1)
        asked = np.concatenate([s.f[:, :n], s.d[:, self.steep]], axis=1)
        astray = s.astray | ~np.isfinite(gram).all(axis=(1, 2)) | ~(share.min(axis=1) > NOTHING)
        if astray.any():
            share[astray], gram[astray], right[astray], equal[astray] = 1.0, 0.0, 0.0, 0.0
        _, numbers, forces = self.bordered(gram, share, equal, right[..., None], asked[..., None])
        return gram, right, slopes, numbers[..., 0], forces[..., 0], share, astray, series

    def gradient(self, frame: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J and its gradient by shape and joints, for families that are not centred.

        What is linear is at its best and adds nothing to it. How the shares move is left out, and the penalty of steep
        cores.
        """
        s, scale, lam = self.sample(frame, alpha), frame[:, 1:], self.p.weight
        _, _, slopes, numbers, forces, share, astray, series = self.normal(s, scale, alpha)
        n = 0 if self.bare else 2
        value, slope, bend, by, slope_by = series(numbers)
        slope, bend, slope_by = slope / scale, bend / scale**2, slope_by / scale[..., None]
        rest, steep = s.w * (value - s.f)[:, n:], lam * s.w * (slope - s.d)[:, n:]
        j = (rest * (value - s.f)[:, n:] + steep * (slope - s.d)[:, n:]).sum(axis=1)
        j += self.rounding**2 * ((share * numbers) ** 2).sum(axis=1) + (forces**2).sum(axis=1) / self.equality**2
        j += self.outside(s, slopes, numbers[..., None]).sum(axis=1)
        found = np.zeros_like(alpha)
        found[:, : self.shapes] = 2 * (rest[:, None] @ by[:, n:] + steep[:, None] @ slope_by[:, n:])[:, 0]
        if n:
            pulled = np.concatenate([by[:, :2], slope_by[:, self.steep]], axis=1)
            found[:, : self.shapes] += 2 * (forces[:, None] @ pulled)[:, 0]
        for k, i in enumerate(self.free, self.inner):
            turned = 0.0 if self.sides[i].line is not None else self.p.curvature(s.joints[:, i])
            found[:, k] = 2 * forces[:, i] * (slope - s.d)[:, i]
            found[:, k] += 2 * forces[:, 2 + self.steep.index(i)] * (bend[:, i] - turned) + s.growth[:, i]
        astray |= ~np.isfinite(j)
        found[astray] = 0.0
        return np.where(astray, np.inf, j), found

    def outside(self, s: Sample, slopes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The share of J that no row has: that of each tail, and a penalty where the core is too steep at a kink."""
        value = s.tails.copy()
        for i in self.kinked:
            value[:, i] += np.maximum(np.abs((slopes[:, i, None] @ numbers)[:, 0, 0]) - STEEP, 0) ** 2
        return value

    def bordered(self, gram, share, equal, right, asked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normal equations with the equalities: the matrix, the linear numbers, multipliers of the equalities.

        Because of the rows that keep terms small, the numbers are as exact as J needs: errors of 1e-16 in the matrix
        are a hundredth of what these rows add.
        """
        linear, total = gram.shape[1], gram.shape[1] + equal.shape[1]
        matrix = np.zeros((len(gram), total, total))
        matrix[:, :linear, :linear] = gram
        matrix[:, :linear, linear:], matrix[:, linear:, :linear] = equal.swapaxes(1, 2), equal
        diagonal = matrix.reshape(len(gram), -1)[:, :: total + 1]
        diagonal[:, :linear] += (self.rounding * share) ** 2
        diagonal[:, linear:] = -1 / self.equality**2
        found = _solved(matrix, np.concatenate([right, asked], axis=1))
        return matrix, found[:, :linear], found[:, linear:]

    def sample(self, frame: np.ndarray, alpha: np.ndarray) -> Sample:
        """Where the joints and the nodes are, and what is wanted there."""
        p = self.p
        location, scale = frame[:, :1], frame[:, 1:]
        shift = alpha[:, self.shapes : self.inner] if self.family.centred else 0.0
        joints = self.joints(alpha)
        astray = ~(np.abs(alpha).max(axis=1) < FAR)
        if not self.bare:
            if self.free:
                astray |= (alpha[:, self.inner :].min(axis=1) < p.ends[0]) | (
                    alpha[:, self.inner :].max(axis=1) > p.ends[1]
                )
                astray |= joints[:, 1] - joints[:, 0] < p.unit / 2
                joints = np.where(astray[:, None], [p.domain.mean - p.domain.std, p.domain.mean + p.domain.std], joints)
            if self.unsound:
                ends = joints[:, :1] + DENSE * (joints[:, 1:] - joints[:, :1])
                astray |= ~self.family.sound(alpha[:, : self.shapes], (ends - location) / scale - shift)
        x, w = self.nodes(joints)
        tails, growth = np.zeros((2, len(x), 2))
        if self.bare:
            at, f, d = x, p.f + 0 * x, p.d + 0 * x
        else:
            at = np.concatenate([joints, x], axis=1)
            f, d = p.near(at)
            for i, side in enumerate(self.sides):
                f[:, i], d[:, i], tails[:, i], growth[:, i] = p.meet(i, side, joints[:, i], f[:, i], d[:, i])
        return Sample(joints, astray, (at - location) / scale - shift, w, f, d, tails, growth)

    def solve(self, frame: np.ndarray, alpha: np.ndarray) -> Solved:
        """The best linear numbers, and all that they leave."""
        s, scale = self.sample(frame, alpha), frame[:, 1:]
        root = np.sqrt(s.w)
        values, slopes = self.family.columns(alpha[:, : self.shapes], s.z, self.linear)
        equal, system = self.rows(values, slopes, root, scale)
        asked, y = self.rows(s.f[..., None], s.d[..., None], root, np.ones((1, 1)))
        # the share of each number in the copy, of which rounding is a share
        share = np.sqrt((system[:, : root.shape[1]] ** 2).sum(axis=1))
        astray = s.astray | ~np.isfinite(slopes).all(axis=(1, 2)) | ~(share.min(axis=1) > NOTHING)
        share[astray] = 1.0
        equal /= share[:, None]
        system /= share[:, None]
        equal[astray], system[astray] = 0.0, 0.0
        turned = system.swapaxes(1, 2)
        matrix, small, forces = self.bordered(turned @ system, np.ones(1), equal, turned @ y, asked)
        inside = np.concatenate([y - system @ small, -self.rounding * small], axis=1)[..., 0]
        numbers = small / share[..., None]
        value = (inside**2).sum(axis=1) + (forces**2).sum(axis=(1, 2)) / self.equality**2
        value += self.outside(s, slopes[:, :2] / scale[..., None], numbers).sum(axis=1)
        value = np.where(astray | ~np.isfinite(value), np.inf, value)
        return Solved(s, values, slopes, root, share, system, matrix, numbers, forces[..., 0], inside, value)

    def jacobian(self, alpha: np.ndarray, scale: np.ndarray, s: Solved) -> np.ndarray:
        r"""$-P^\perp \dot\Phi c - (\Phi^+)^T \dot\Phi^T r$, the second term for the joints only.

        A joint moves what is asked of the core and the border between core and tail, where both are alike: what one
        side gains there the other loses.
        """
        p, linear, z, numbers = self.p, self.linear, s.at.z, s.numbers
        shape, c = alpha[:, : self.shapes], numbers[..., 0]
        size = s.system.shape[1]
        moved = np.zeros((len(alpha), alpha.shape[1], size)).swapaxes(1, 2)
        asked = np.zeros((len(alpha), s.forces.shape[1], alpha.shape[1]))
        turned = np.zeros((len(alpha), linear, alpha.shape[1]))
        turns = self.family.turns(c, shape, z, s.values, s.slopes)
        asked[..., : self.shapes], moved[..., : self.shapes] = self.rows(*turns, s.root, scale)
        if self.family.centred:
            at, steep = slice(self.shapes, self.inner), -s.slopes @ numbers
            bend = -self.family.bend(c, shape, z, s.values, s.slopes)[..., None]
            asked[..., at], moved[..., at] = self.rows(steep, bend, s.root, scale)
        if self.free:
            h = 1e-5
            ends = self.family.columns(shape, np.concatenate([z[:, :2] - h, z[:, :2] + h], axis=1), linear)[1]
            by = s.slopes[:, :2] / scale[..., None], (ends[:, 2:] - ends[:, :2]) / (2 * h) / scale[..., None] ** 2
            for k, i in enumerate(self.free, self.inner):
                bend = 0.0 if self.sides[i].line is not None else p.curvature(s.at.joints[:, i])
                row = 2 + self.steep.index(i)
                asked[:, row, k] = (by[1][:, i, None] @ numbers)[:, 0, 0] - bend
                turned[..., k] = -by[0][:, i] * s.forces[:, i, None] - by[1][:, i] * s.forces[:, row, None]
        system = s.system.swapaxes(1, 2)
        right = system @ moved - turned / s.share[..., None]
        found = _solved(s.matrix, np.concatenate([right, asked], axis=1))
        found = found.swapaxes(1, 2)
        inside = found[..., :linear] @ system - moved.swapaxes(1, 2)
        return np.concatenate(
            [found[..., linear:] / self.equality, inside, self.rounding * found[..., :linear]], axis=2
        )

    def descend(self, frame: np.ndarray, alpha: np.ndarray, kept: tuple[int, ...], settled: float) -> Walk:
        """The best of what Newton's method on log J finds from each start, so many of which are `kept` at each step.

        The Hessian is made of the gradients at a place and beside it in each number, all of them in one batch. A step
        goes down along each axis of the Hessian, at most so far; there are two, for log J and for J, and the better
        one counts. The gradients beside it are those of the first; where the second is better the last Hessian is
        updated. The search ends where none of the starts can become better than the best by a share `settled`.
        """
        count, n = alpha.shape
        joints = self.joints(alpha)
        unit = np.repeat((joints[:, 1:] - joints[:, :1]) / 2, n, axis=1)
        unit[:, : self.inner] = np.abs(alpha[:, : self.inner])
        beside = BESIDE * np.array([1.0] * self.inner + [(1.0, -1.0)[i] for i in self.free])  # into the core
        ends = np.array([[-FAR, FAR]] * self.inner + [self.p.ends] * len(self.free)).T
        walk = Walk(
            frame=frame,
            alpha=alpha,
            value=np.full(count, np.inf),
            unit=unit,
            slope=np.zeros((count, n)),
            hessian=np.zeros((count, n, n)),
            radius=np.full(count, REACH),
            trials=alpha[:, None],
            hoped=np.zeros((count, 1)),
            length=np.zeros((count, 1)),
        )
        for most in kept:
            if len(walk.value) > most:  # those that may become the best
                may = walk.value - np.minimum(walk.hoped.max(axis=1), 1) if most > 1 else walk.value
                walk = walk[np.argsort(may, kind="stable")[:most]]
            self.step(walk, beside, ends)
            if (walk.value - np.minimum(walk.hoped.max(axis=1), 3) > walk.value.min() - settled).all():
                break
        return walk[[walk.value.argmin()]]

    def step(self, walk: Walk, beside: np.ndarray, ends: np.ndarray) -> None:
        """Try where to go, go there if it is better, and choose where to try next."""
        (count, lanes, n), rows = walk.trials.shape, np.arange(len(walk.trials))
        points = np.concatenate([np.repeat(walk.trials[:, :1], n + 1, axis=1), walk.trials[:, 1:]], axis=1)
        points[:, np.arange(1, n + 1), np.arange(n)] += walk.unit * beside
        value, gradient = self.gradient(np.repeat(walk.frame, n + lanes, axis=0), points.reshape(-1, n))
        value = value.reshape(count, -1) + self.floor / 10
        slopes = gradient.reshape(count, -1, n) / value[..., None] * walk.unit[:, None]
        tried = np.array([0, *range(n + 1, n + lanes)])
        best = rows, value[:, tried].argmin(axis=1)
        at = rows, tried[best[1]]
        there, slope = np.log(value[at]), slopes[at]
        bend = (slopes[:, 1 : n + 1] - slopes[:, :1]) / beside[:, None]
        bend = (bend + bend.swapaxes(1, 2)) / 2
        if best[1].any():
            moved = (walk.trials[best] - walk.alpha) / walk.unit
            bend = np.where((best[1] > 0)[:, None, None], _rank_one(walk.hessian, moved, slope - walk.slope), bend)
        gain, hoped = walk.value - there, walk.hoped[best]
        good, grown = gain > 0, np.where(gain > 0.5 * hoped, 2.0, np.where(gain < 0.2 * hoped, 0.5, 1.0))
        walk.radius = np.where(good, walk.radius * grown, np.minimum(walk.radius, walk.length[best]) / 4)
        walk.value[good], walk.alpha = there[good], np.where(good[:, None], walk.trials[best], walk.alpha)
        walk.slope[good], walk.hessian[good] = slope[good], bend[good]
        held = ((walk.alpha <= ends[0]) & (walk.slope > 0)) | ((walk.alpha >= ends[1]) & (walk.slope < 0))
        down = np.where(held, 0.0, walk.slope)
        curved = np.where(held[:, None] | held[..., None] | ~np.isfinite(walk.hessian), 0.0, walk.hessian)
        size, axes = np.linalg.eigh(np.stack([curved + down[:, None] * down[..., None], curved], axis=1))
        along, limit = (down[:, None, None] @ axes)[:, :, 0], walk.radius[:, None, None]
        step = np.minimum(np.maximum(-along / np.maximum(np.abs(size), 1e-3), -limit), limit)
        walk.length = np.abs(step).max(axis=2)
        walk.hoped = -(step * (along + size * step / 2)).sum(axis=2)
        walk.hoped[:, 0] = -np.log(np.maximum(1 - walk.hoped[:, 0], 0.05))  # of J
        there = walk.alpha[:, None] + walk.unit[:, None] * (axes @ step[..., None])[..., 0]
        walk.trials = np.minimum(np.maximum(there, ends[0]), ends[1])

    def improve(self, state: State, steps: int, settled: float = 1e-4, lanes: Lanes = GAUSS) -> State:
        """So many of Levenberg and Marquardt's steps by every start, or until one gains less than `settled` of J.

        Each step is the best of some `lanes`.
        """
        best = State(*(getattr(state, f.name).copy() for f in fields(state)))
        starts, n = best.alpha.shape
        every = np.array(lanes).T[..., None, None]
        straight = every[:, every[1, :, 0, 0] == 0]
        damping, growth = np.full(starts, 1e-2 if len(lanes) == 1 else 1.0), np.full(starts, 2.0)
        going, scale = np.isfinite(best.value) & (best.value > self.floor), np.zeros_like(best.alpha)
        curved, bent = len(lanes) > 1, np.zeros((starts, n, n))
        for _ in range(steps):
            rows = np.flatnonzero(going)
            if not len(rows):
                break
            now = best[rows]
            factors, second = every if curved and bent.any() else straight
            gram = now.jacobian @ now.jacobian.swapaxes(1, 2)
            scale[rows] = np.maximum(scale[rows], np.sqrt(np.einsum("snn->sn", gram))) + 1e-30
            unit = scale[rows]
            square = unit[..., None] * unit[:, None]
            a, b = gram / square, (now.jacobian @ now.residual[..., None]) / unit[..., None]
            model = a[:, None] + second * (bent[rows] / square)[:, None]
            model = model + factors * damping[rows, None, None, None] * np.eye(n)
            step = -_solved(model, b[:, None])
            there = now.alpha[:, None] + step[..., 0] / unit[:, None]
            there[..., self.inner :] = there[..., self.inner :].clip(*self.p.ends)
            tried = self.solve(np.repeat(now.frame, len(factors), axis=0), there.reshape(-1, n))
            index, lane = np.arange(len(rows)), tried.value.reshape(-1, len(factors)).argmin(axis=1)
            there, step = there[index, lane], step[index, lane]
            trial = self.state(now.frame, there, tried[index * len(factors) + lane] if len(factors) > 1 else tried)
            expected = -(step * (2 * b + a @ step)).sum(axis=(1, 2))
            gain = now.value - trial.value
            ratio = gain / np.maximum(expected, 1e-100)
            good = (gain > 0) & (ratio > 1e-3)
            if curved:
                bent[rows] = _bent(bent[rows], now, trial)
            went, stuck, least = rows[good], rows[~good], settled * now.value
            best[went] = trial[good]
            # Nielsen's rule
            damping[went] *= factors[lane[good], 0, 0] * np.maximum(
                1 / 3, 1 - (2 * np.minimum(ratio[good], 1e3) - 1) ** 3
            )
            damping[went] = np.maximum(damping[went], 1e-10)
            growth[went] = 2.0
            damping[stuck] *= growth[stuck] * factors.max()
            growth[stuck] *= 2
            arrived = best.value[rows] <= self.floor
            arrived |= np.where(good, np.maximum(gain, expected) < least, expected < 1e-2 * least)
            going[rows[arrived | (damping[rows] > 1e10)]] = False
        return best


def _solved(model: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The steps; where one of the models has no inverse, the shortest."""
    try:
        return np.linalg.solve(model, b)
    except np.linalg.LinAlgError:
        return np.linalg.pinv(np.nan_to_num(model), hermitian=True) @ b


def _rank_one(hessian: np.ndarray, moved: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """The Hessians that explain how the gradients rose over steps, by a change of rank one (Broyden, 1967)."""
    missed = rise - (hessian @ moved[..., None])[..., 0]
    along = (missed * moved).sum(axis=1)
    sure = np.abs(along) > 1e-8 * np.linalg.norm(missed, axis=1) * np.linalg.norm(moved, axis=1)
    change = missed[:, :, None] * missed[:, None] / np.where(sure, along, 1.0)[:, None, None]
    return hessian + np.where(sure[:, None, None], change, 0.0)


def _bent(bent: np.ndarray, now: State, then: State) -> np.ndarray:
    """What curved residuals add to the Hessian, from two gradients (Dennis, Gay and Welsch, 1981)."""
    step = (then.alpha - now.alpha)[..., None]
    after = then.jacobian @ then.residual[..., None]
    rise = after - now.jacobian @ now.residual[..., None]
    missed = after - now.jacobian @ then.residual[..., None] - bent @ step
    along = (rise * step).sum(axis=(1, 2))[:, None, None]
    sure = np.isfinite(then.value[:, None, None]) & (
        along > 1e-8 * np.linalg.norm(rise, axis=1, keepdims=True) * np.linalg.norm(step, axis=1, keepdims=True)
    )
    along = np.where(sure, along, 1.0)
    both = missed @ rise.swapaxes(1, 2)
    update = (both + both.swapaxes(1, 2)) / along
    update -= (missed * step).sum(axis=(1, 2))[:, None, None] / along**2 * (rise @ rise.swapaxes(1, 2))
    return np.where(sure, bent + update, bent)
