"""Where the core ends: a search for the pair of joints of least J, local at low degrees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from math import inf, isfinite

import numpy as np

from .family import Linear, Separable
from .problem import Problem, Side, legendre
from .race import ROUNDING

LOW = 7
"""The degree up to which all pairs of joints are scanned: one side may be worth more than the other."""

NODES = 64
"""Gauss-Legendre nodes in the core; half of them at those low degrees."""

STARTS = 3
"""How many of those pairs are improved."""

SIZES = (1.0, 1 / 3, 1 / 9)
"""Of the steps that are tried together."""

SLIGHT = 1e-4
"""The gain, as a share of J, from which the next steps are no longer."""

SYMMETRIC = np.array([(-1.0, 1.0), (1.0, -1.0)])
"""The ways of joints that stay symmetric."""

SAME = 1e-4
"""The share of J that another pair must gain on the first, which is symmetric where law and target are."""


def search_joints(p: Problem, sides: tuple[Side, Side], objective: Objective) -> tuple[float, float]:
    """The joints of least J: a scan outwards from the centre of the target's curvature, then a pattern search."""
    fixed = sides[0].joint, sides[1].joint
    if fixed[0] is not None and fixed[1] is not None:
        return fixed[0], fixed[1]
    centre, spread = p.bend()
    symmetric = p.is_symmetric()
    if symmetric:
        centre = p.domain.mean
    least, most = p.ends
    left, right = p.target.left, p.target.right
    if p.degree == 2 and left and right and left[0] != right[0]:
        # a parabola meets two lines only with joints symmetric about their crossing
        centre = (right[1] - left[1]) / (left[0] - right[0])

    def joints(radius: np.ndarray) -> np.ndarray:
        lo = np.full_like(radius, fixed[0]) if fixed[0] is not None else np.maximum(centre - radius, least)
        hi = np.full_like(radius, fixed[1]) if fixed[1] is not None else np.minimum(centre + radius, most)
        return np.stack([lo, hi], axis=1)

    radii = np.geomspace(0.4, 8, 16) * spread
    ends, best = joints(radii), 0
    for _ in range(2):
        ends = joints(radii)
        values = objective(ends)
        value = values.min()
        if not isfinite(value):
            raise p.cannot_meet()
        # where the copy is exact to rounding any joint will do: then three standard deviations
        good = np.flatnonzero(values <= value + 1e-14 * (1 + p.w @ p.f**2))
        best = good[np.abs(radii[good] - 3 * p.domain.std).argmin()]
        if len(good) == len(radii):
            return ends[best, 0], ends[best, 1]
        radii = np.linspace(radii[max(best - 1, 0)], radii[min(best + 1, len(radii) - 1)], 9)
    searches = [(ends[best : best + 1], SYMMETRIC if symmetric else moves(fixed))]
    if p.degree <= LOW and fixed == (None, None):
        pairs = np.array(list(product(np.geomspace(0.3, 8, 10) * spread, repeat=2)))
        pairs = np.unique(np.clip(centre + pairs * [-1, 1], least, most), axis=0)
        pairs = pairs[np.argsort(objective(pairs), kind="stable")[:STARTS]]
        if symmetric:
            searches.append((pairs, moves(fixed)))
        else:  # many at once take hardly longer than one
            searches = [(np.concatenate([ends[best : best + 1], pairs]), moves(fixed))]
    results = [pattern_search(p, objective, *search) for search in searches]
    found, values = (np.concatenate(part) for part in zip(*results, strict=True))
    best = values.argmin()
    if values[0] * (1 - SAME) <= values[best]:
        best = 0
    return float(found[best, 0]), float(found[best, 1])


def moves(fixed: tuple[float | None, float | None]) -> np.ndarray:
    """All directions in which a pair of joints can go."""
    every = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=float)
    every = np.unique(every * [fixed[0] is None, fixed[1] is None], axis=0)
    return every[np.abs(every).max(axis=1) > 0]


def pattern_search(p: Problem, objective: Objective, ends: np.ndarray, ways: np.ndarray):
    """Move pairs of joints (starts, 2) by steps of several sizes at once, until none helps; and J there.

    The steps are made from where the parabola through the last ones is least, or, if it has no such place, from the
    best pair.
    """
    parabola = Parabola(ways)
    every = np.concatenate([[[0.0, 0.0]], *(ways * size for size in SIZES)])
    ring = np.append(len(SIZES) - 1, np.repeat(np.arange(len(SIZES)), len(ways)))  # of each step, by its size
    size, first = np.array(SIZES)[ring], 1 + ring * len(ways)
    ends, aim, step, values = ends.copy(), ends.copy(), (ends[:, 1] - ends[:, 0]) / 8, np.full(len(ends), inf)
    for _ in range(30):
        going = np.flatnonzero(step >= 1e-3 * p.unit)
        if not len(going):
            break
        rows, unit = np.arange(len(going))[:, None], step[going]
        at = np.clip(aim[going, None] + unit[:, None, None] * every, *p.ends)
        there = objective(at.reshape(-1, 2)).reshape(at.shape[:2])
        best = there.argmin(axis=1)
        found = there[rows[:, 0], best]
        better = found < values[going]
        little = better & (found > values[going] * (1 - SLIGHT))
        moved = going[better]
        ends[moved], values[moved] = at[better, best[better]], found[better]
        # the parabola through the steps of the best's size
        around = np.concatenate([np.zeros_like(rows), first[best, None] + np.arange(len(ways))], axis=1)
        goal, curved = parabola.least(there[rows, around])
        goal = np.clip(aim[going] + (unit * size[best])[:, None] * goal, *p.ends)
        apart = np.abs(goal - ends[going]).max(axis=1)
        aim[going] = np.where(curved[:, None], goal, ends[going])
        blind = unit * np.where(better & (best > 0), np.where(size[best] == 1, 2.0, size[best]), SIZES[-1] / 3)
        least = np.where(best == 0, SIZES[-1] / 3, SIZES[-1])
        far = apart * np.where((best > 0) & (size[best] == 1), 2, 0.5)
        step[going] = np.where(curved, np.clip(far, unit * least, 2 * unit), blind)
        step[going[little]] = np.minimum(step[going], unit * SIZES[-1])[little]
    return ends, values


class Parabola:
    """Where parabolas are least that go through values at zero and some ways off."""

    def __init__(self, ways: np.ndarray):
        _, size, axes = np.linalg.svd(ways)
        self.axes = axes[: int((size > 1e-9).sum())]
        z = np.vstack([np.zeros(2), ways]) @ self.axes.T
        self.pairs = np.triu_indices(len(self.axes))
        products = [z[:, i] * z[:, j] for i, j in zip(*self.pairs, strict=True)]
        self.solve = np.linalg.pinv(np.column_stack([np.ones(len(z)), z, *products]))

    def least(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places, at most 3 ways off, from values (parabolas, ways + 1); and which have such a place."""
        n, fine = len(self.axes), np.isfinite(values.sum(axis=1))
        found = np.where(fine.reshape(-1, 1), values, 0.0) @ self.solve.T
        bend = np.zeros((len(values), n, n))
        bend[:, *self.pairs] = found[:, n + 1 :]
        curve, axes = np.linalg.eigh(bend + bend.swapaxes(1, 2))
        curved = fine & (curve[:, 0] > 0)
        along = (found[:, None, 1 : n + 1] @ axes)[:, 0] / np.where(curved.reshape(-1, 1), curve, 1.0)
        return (-np.clip(along, -3, 3)[:, None] @ axes.swapaxes(1, 2))[:, 0] @ self.axes, curved


class Objective(ABC):
    """J at many pairs of joints at once.

    The core of each pair is mapped to the same |z| <= reach, where the Gauss-Legendre nodes are the same for all; a
    pair changes only weights, targets and the unit of a slope. J is summed from squares.
    """

    def __init__(self, p: Problem, sides: tuple[Side, Side]):
        assert isinstance(p.family, Linear | Separable)
        self.p, self.sides = p, sides
        self.reach = p.family.reach(p.degree)
        self.count = NODES if p.degree > LOW else NODES // 2
        self.z = self.reach * legendre(self.count, p.panels)[0]
        """The nodes."""

    @abstractmethod
    def core(
        self, w: np.ndarray, f: np.ndarray, d: np.ndarray, asked: np.ndarray, turned: np.ndarray, weight: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and slopes by z of each core at the nodes, and what else J has: inf where there is no core.

        From weights and targets at the nodes, values and slopes at the joints, (pairs, 2), and the weight of a slope.
        """

    def __call__(self, joints: np.ndarray) -> np.ndarray:
        p, lo, hi = self.p, joints[:, 0], joints[:, 1]
        narrow = hi - lo < (p.degree + 1) * p.step  # fewer nodes than coefficients
        hi = np.where(narrow, lo + 1, hi)
        unit = (hi - lo)[:, None] / 2 / self.reach
        both = np.stack([lo, hi], axis=1)
        x, w = p.gauss(both, self.count)
        f, d = p.near(np.concatenate([both, x], axis=1))
        tails, asked, turned = 0.0, f[:, :2], d[:, :2]
        for i, side in enumerate(self.sides):
            asked[:, i], turned[:, i], share, _ = p.meet(i, side, both[:, i], asked[:, i], turned[:, i])
            tails = tails + share
        f, d, weight = f[:, 2:], d[:, 2:] * unit, p.weight / unit**2
        values, slopes, more = self.core(w, f, d, asked, turned * unit, weight)
        value = (w * ((values - f) ** 2 + weight * (slopes - d) ** 2)).sum(axis=1) + tails + more
        return np.where(narrow, inf, value)


class Series(Objective):
    """Of a linear family, whose basis and equalities are the same for all pairs too."""

    def __init__(self, p: Problem, sides: tuple[Side, Side]):
        super().__init__(p, sides)
        family = p.family
        assert isinstance(family, Linear)
        z = np.concatenate([self.z, [-self.reach, self.reach]])
        values = np.stack(family.basis(z, p.degree), axis=-1)
        slopes = np.stack(family.slopes(z, p.degree), axis=-1)
        self.values, self.slopes = values[:-2], slopes[:-2]
        self.squares = np.concatenate(
            [(b[:, :, None] * b[:, None]).reshape(len(b), -1) for b in (self.values, self.slopes)]
        )
        self.steep = [i for i, side in enumerate(sides) if side.equalities == 2]
        u, size, vt = np.linalg.svd(np.concatenate([values[-2:], slopes[-2:][self.steep]]))
        rank = int((size > 1e-10 * size[0]).sum())
        self.equalities = u, size[:rank], vt[:rank]
        self.free = vt[rank:].T

    def core(self, w, f, d, asked, turned, weight):
        target = np.concatenate([asked, turned[:, self.steep]], axis=1)
        u, size, rows = self.equalities
        inside = target @ u[:, : len(size)]
        missed = np.abs(inside @ u[:, : len(size)].T - target).max(axis=1) > 1e-7 * (1 + np.abs(target).max())
        c = (inside / size) @ rows
        if self.free.shape[1]:
            m = self.values.shape[1]
            gram = (np.concatenate([w, weight * w], axis=1) @ self.squares).reshape(-1, m, m)
            right = (w * f) @ self.values + (weight * w * d) @ self.slopes - (gram @ c[..., None])[..., 0]
            reduced = self.free.T @ gram @ self.free
            ridge = 1e-14 * np.trace(reduced, axis1=1, axis2=2)[:, None, None] + 1e-300
            y = np.linalg.solve(reduced + ridge * np.eye(reduced.shape[-1]), (right @ self.free)[..., None])[..., 0]
            c = c + y @ self.free.T
        return c @ self.values.T, c @ self.slopes.T, np.where(missed, inf, 0.0)


class Determined(Objective):
    """Of a family that has no choice between two joints (`through`)."""

    @classmethod
    def of(cls, p: Problem, sides: tuple[Side, Side]) -> Determined | None:
        """None for other families, and where slopes at the joints may be opposite: then there is a choice."""
        assert isinstance(p.family, Separable)
        slopes = [side.line[:1] if side.line else (p.d.min(), p.d.max()) for side in sides]
        least, most = (sum(map(end, slopes)) for end in (min, max))
        left, right = (side.line for side in sides)
        level = left and right and left[0] == right[0] == 0 and left != right
        if least <= 0 <= most and not level:
            return None
        if p.family.through(p.degree, np.array([[0.0, 1.0]]), np.ones((1, 2))) is None:
            return None
        return cls(p, sides)

    def numbers(self, asked: np.ndarray, turned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes and linear numbers."""
        assert isinstance(self.p.family, Separable)
        found = self.p.family.through(self.p.degree, asked, turned)
        assert found is not None
        return found

    def core(self, w, f, d, asked, turned, weight):
        family, (shape, numbers) = self.p.family, self.numbers(asked, turned)
        assert isinstance(family, Separable)
        fine = np.isfinite(numbers).all(axis=1)
        numbers[~fine], shape[~fine] = 0.0, 1.0
        values, slopes = family.columns(shape, np.tile(self.z, (len(w), 1)), numbers.shape[1])
        more = ROUNDING**2 * ((w[:, None] @ values**2)[:, 0] * numbers**2).sum(axis=1)
        return (values @ numbers[..., None])[..., 0], (slopes @ numbers[..., None])[..., 0], np.where(fine, more, inf)

    def shape(self, lo: float, hi: float) -> np.ndarray:
        """Between these joints."""
        half = (hi - lo) / 2 / self.reach
        asked = np.array([self.p.wanted(joint, side) for joint, side in zip((lo, hi), self.sides, strict=True)])
        return self.numbers(asked[None, :, 0], asked[None, :, 1] * half)[0][0]
