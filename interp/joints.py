"""Where the core ends: a search for the pair of joints of least J, local at low degrees."""

from __future__ import annotations

from itertools import product
from math import inf, isfinite

import numpy as np

from .family import Linear
from .problem import Problem, Side, legendre

LOW = 7
"""The degree up to which all pairs of joints are scanned: one side may be worth more than the other."""

NODES = 48
"""Gauss-Legendre nodes in the core; two thirds of them at those low degrees."""

STARTS = 3
"""How many of those pairs are improved."""

SYMMETRIC = np.array([(-1.0, 1.0), (1.0, -1.0)])
"""The ways of joints that stay symmetric."""

SAME = 1e-4
"""The share of J that a pair which is not symmetric must gain where law and target are symmetric."""


def search_joints(p: Problem, sides: tuple[Side, Side]) -> tuple[float, float]:
    """The joints of least J: a scan outwards from the centre of the target's curvature, then a pattern search."""
    fixed = sides[0].joint, sides[1].joint
    if fixed[0] is not None and fixed[1] is not None:
        return fixed[0], fixed[1]
    objective = Objective(p, sides)
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
    found, value = pattern_search(p, objective, ends[best : best + 1], SYMMETRIC if symmetric else moves(fixed))
    if p.degree <= LOW and fixed == (None, None):
        pairs = np.array(list(product(np.geomspace(0.3, 8, 10) * spread, repeat=2)))
        pairs = np.clip(centre + pairs * [-1, 1], least, most)
        pairs = pairs[np.argsort(objective(pairs), kind="stable")[:STARTS]]
        others, values = pattern_search(p, objective, pairs, moves(fixed))
        if values.min() < value[0] * (1 - SAME):
            found = others[[values.argmin()]]
    return float(found[0, 0]), float(found[0, 1])


def moves(fixed: tuple[float | None, float | None]) -> np.ndarray:
    """All directions in which a pair of joints can go."""
    every = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=float)
    every = np.unique(every * [fixed[0] is None, fixed[1] is None], axis=0)
    return every[np.abs(every).max(axis=1) > 0]


def pattern_search(p: Problem, objective: Objective, ends: np.ndarray, ways: np.ndarray):
    """Move pairs of joints (starts, 2) by steps of three sizes at once, until the least does not help; and J there.

    Where the longest step is the best the next ones are twice as long.
    """
    ways = np.concatenate([ways, ways / 3, ways / 9])
    ends, values, step = ends.copy(), objective(ends), (ends[:, 1] - ends[:, 0]) / 8
    size = np.abs(ways).max(axis=1)
    for _ in range(30):
        going = np.flatnonzero(step >= 1e-3 * p.unit)
        if not len(going):
            break
        at = np.clip(ends[going, None] + step[going, None, None] * ways, *p.ends)
        there = objective(at.reshape(-1, 2)).reshape(at.shape[:2])
        best = there.argmin(axis=1)
        found = there[np.arange(len(going)), best]
        better = found < values[going]
        moved = going[better]
        ends[moved], values[moved] = at[better, best[better]], found[better]
        step[going] *= np.where(better, np.where(size[best] == 1, 2.0, np.maximum(1 / 3, size[best])), 1 / 27)
    return ends, values


class Objective:
    """J at many pairs of joints at once.

    The core of each pair is mapped to the same |z| <= reach, where Gauss-Legendre nodes, the basis and the equalities
    are the same for all; a pair changes only weights, targets and the unit of a slope. J is summed from squares.
    """

    def __init__(self, samples: Problem, sides: tuple[Side, Side]):
        self.samples, self.sides = samples, sides
        p, family = samples, samples.family
        assert isinstance(family, Linear)
        self.reach = family.reach(samples.degree)
        self.count = NODES if samples.degree > LOW else 2 * NODES // 3
        self.step = p.step
        z = np.concatenate([self.reach * legendre(self.count, samples.panels)[0], [-self.reach, self.reach]])
        values = np.stack(family.basis(z, p.degree), axis=-1)
        slopes = np.stack(family.slopes(z, p.degree), axis=-1)
        self.values, self.slopes = values[:-2], slopes[:-2]
        self.squares = np.concatenate(
            [(b[:, :, None] * b[:, None]).reshape(len(b), -1) for b in (self.values, self.slopes)]
        )
        rows = [(values[i - 2], slopes[i - 2])[: side.equalities] for i, side in enumerate(self.sides)]
        u, size, vt = np.linalg.svd(np.array([row for pair in rows for row in pair]))
        rank = int((size > 1e-10 * size[0]).sum())
        self.equalities = u, size[:rank], vt[:rank]
        self.free = vt[rank:].T

    def __call__(self, joints: np.ndarray) -> np.ndarray:
        (lo, hi), p, weight = joints.T, self.samples, self.samples.weight
        narrow = hi - lo < (p.degree + 1) * self.step  # fewer nodes than coefficients
        hi = np.where(narrow, lo + 1, hi)
        unit = (hi - lo)[:, None] / 2 / self.reach
        x, w = p.gauss(np.stack([lo, hi], axis=1), self.count)
        f, d = p.near(x)
        tails, wanted = np.zeros(len(lo)), []
        for i, (side, joint) in enumerate(zip(self.sides, (lo, hi), strict=True)):
            value, slope = p.ask(side, joint)
            tails += p.tail(i, side.line, joint)
            wanted += [value, slope * unit[:, 0]][: side.equalities]
        u, size, rows = self.equalities
        target = np.stack(wanted, axis=1)
        inside = target @ u[:, : len(size)]
        missed = np.abs(inside @ u[:, : len(size)].T - target).max(axis=1) > 1e-7 * (1 + np.abs(target).max())
        c = (inside / size) @ rows
        if self.free.shape[1]:
            m = self.values.shape[1]
            gram = (np.concatenate([w, weight * w / unit**2], axis=1) @ self.squares).reshape(-1, m, m)
            right = (w * f) @ self.values + (weight * w * d / unit) @ self.slopes - (gram @ c[..., None])[..., 0]
            reduced = self.free.T @ gram @ self.free
            ridge = 1e-14 * np.trace(reduced, axis1=1, axis2=2)[:, None, None] + 1e-300
            y = np.linalg.solve(reduced + ridge * np.eye(reduced.shape[-1]), (right @ self.free)[..., None])[..., 0]
            c = c + y @ self.free.T
        error, slope_error = c @ self.values.T - f, c @ self.slopes.T / unit - d
        value = (w * (error**2 + weight * slope_error**2)).sum(axis=1) + tails
        return np.where(missed | narrow, inf, value)
