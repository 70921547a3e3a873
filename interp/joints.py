"""Where the core ends: a search for the pair of joints of least J, local at low degrees."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import inf, isfinite

import numpy as np

from .family import Linear
from .problem import Problem, Side

LOW = 7
"""The degree up to which all pairs of joints are scanned: one side may be worth more than the other."""

STARTS = 4
"""How many of them are improved."""


def search_joints(p: Problem, sides: tuple[Side, Side]) -> tuple[float, float]:
    """The joints of least J: a scan outwards from the centre of the target's curvature, then a pattern search."""
    fixed = tuple(side.joint for side in sides)
    if fixed[0] is not None and fixed[1] is not None:
        return fixed[0], fixed[1]
    objective = Objective(p, sides)
    centre, spread = p.bend()
    symmetric = p.is_symmetric() and p.degree > LOW
    if symmetric:
        centre = p.domain.mean
    least, most = p.ends
    left, right = p.target.left, p.target.right
    if p.degree == 2 and left and right and left[0] != right[0]:
        # a parabola meets two lines only with joints symmetric about their crossing
        centre = (right[1] - left[1]) / (left[0] - right[0])

    def joints(radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lo = np.full_like(radius, fixed[0]) if fixed[0] is not None else np.maximum(centre - radius, least)
        hi = np.full_like(radius, fixed[1]) if fixed[1] is not None else np.minimum(centre + radius, most)
        return lo, hi

    radii, radius, value, exact = np.geomspace(0.4, 8, 16) * spread, spread, inf, False
    for _ in range(3):
        values = objective(*joints(radii))
        value = float(values.min())
        if not isfinite(value):
            raise p.cannot_meet()
        # where the copy is exact to rounding any joint will do: then three standard deviations
        good = values <= value + 1e-14 * (1 + p.w @ p.f**2)
        exact = bool(good.all())
        best = np.flatnonzero(good)[np.abs(radii[good] - 3 * p.domain.std).argmin()]
        radius = radii[best]
        radii = np.linspace(radii[max(best - 1, 0)], radii[min(best + 1, len(radii) - 1)], 9)
    lo, hi = (float(side[0]) for side in joints(np.array([radius])))
    if p.degree <= LOW and not symmetric and not exact and fixed == (None, None):
        pairs = np.array(list(product(np.geomspace(0.3, 8, 14) * spread, repeat=2)))
        pairs = np.clip(centre + pairs * [-1, 1], least, most)
        values = objective(*pairs.T)
        ends = [pattern_search(p, objective, lo, hi, fixed, value)]
        for i in np.argsort(values, kind="stable")[:STARTS]:  # finite: so is that of the scan
            lo, hi = pairs[i].tolist()
            ends.append(pattern_search(p, objective, lo, hi, fixed, float(values[i])))
        return ends[int(np.argmin(objective(*np.array(ends).T)))]
    if not symmetric and not exact:
        lo, hi = pattern_search(p, objective, lo, hi, fixed, value)
    return lo, hi


def pattern_search(p: Problem, objective, lo, hi, fixed, value) -> tuple[float, float]:
    """Move both joints apart from each other, by steps of three sizes at once, until the smallest does not help."""
    moves = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)], dtype=float)
    moves = np.unique(moves * [fixed[0] is None, fixed[1] is None], axis=0)
    moves = np.concatenate([moves, moves / 3, moves / 9])
    step = (hi - lo) / 8
    for _ in range(30):
        at = np.clip(np.array([lo, hi]) + step * moves, *p.ends)
        values = objective(at[:, 0], at[:, 1])
        best = int(values.argmin())
        if values[best] < value:
            (lo, hi), value = at[best], values[best]
            step *= max(1 / 3, np.abs(moves[best]).max())
        else:
            step /= 27
        if step < 1e-3 * p.domain.std:
            break
    return float(lo), float(hi)


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
        self.t, self.gauss = _legendre()
        self.step = p.step
        z = np.concatenate([self.reach * self.t, [-self.reach, self.reach]])
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

    def __call__(self, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        p, weight = self.samples, self.samples.weight
        narrow = hi - lo < (p.degree + 1) * self.step  # fewer nodes than coefficients
        hi = np.where(narrow, lo + 1, hi)
        half = (hi - lo)[:, None] / 2
        unit = half / self.reach
        x = (lo + hi)[:, None] / 2 + half * self.t
        f, d = (part.reshape(x.shape) for part in p.target(x.ravel()))
        w = np.interp(x, p.x, p.w) / self.step * half * self.gauss
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


@lru_cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(48)
