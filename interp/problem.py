"""One fit as a problem: the target sampled under the law, and what is asked of the copy at its joints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import inf

import numpy as np

from .domains import Law
from .errors import OrthoactError
from .family import Family, Linear
from .targets import Line, Target

FINER = 4
"""Cells of the target's table in one cell of the law's nodes."""

BESIDE = 2e-6
"""How far from a kink the target's table begins and ends, in standard deviations."""

DETAIL = 10
"""Nodes in the spread of the target's curvature, and between its kinks, at least: a wide law has few of its own."""

MOST = 2**19
"""Nodes of a law, at most."""

APART, NEAR = 1.2e-2, 2e-3
"""The distance of a target from its asymptote beyond the law that is too much, and one that is near enough."""

PANELS = 16
"""Parts of a core that are looked at one by one, at most."""

LOUD = 20
"""Standard deviations of a target that an error is a share of where that is less than its root mean square: an error
beyond one of them is more than `fit.POOR` of it."""

UNSEEN = 1e-14
"""The weight of the whole core beside the law's: where no input lies the copy follows the target all the same."""


@dataclass(frozen=True)
class Side:
    """What is asked of one joint."""

    line: Line | None
    """The affine tail to meet; None takes the target's own value and slope at the joint."""
    joint: float | None = None
    """The joint sits here; None leaves it to the search."""
    kink: bool = False
    """The joint sits on a kink of the target: the tail's slope need not be the core's."""

    @property
    def equalities(self) -> int:
        """How many equalities the core meets at the joint: the value, and the slope unless there is a kink."""
        return 1 if self.kink else 2


class Problem:
    """A target sampled under a law, and the family, tails and J that will copy it."""

    def __init__(self, target: Target, family: Family, degree: int, domain: Law, tails: str, weight: float):
        domain = domain.narrow() if tails == "none" else domain
        self.target, self.family, self.degree, self.domain = target, family, degree, domain
        self.tails, self.weight = tails, weight
        far = np.linspace(-20, 20, 401) if tails == "linear" else np.linspace(*self.four_deviations(), 401)
        far = far[self.smooth(far)]
        # a bare polynomial of degree n has its mass out to 2 sqrt(n) standard deviations
        x, w = domain.nodes(14.0) if tails == "none" else domain.nodes()
        values, slopes = self.ask(np.concatenate([x, far]))
        self.far = (far, values[len(x) :], slopes[len(x) :])
        self.parts = self.needed(x)
        """Nodes for one of the law."""
        if self.parts > 1:
            inside = (np.arange(self.parts) + 0.5) / self.parts - 0.5
            x = (x[:, None] + (x[1] - x[0]) * inside).ravel()
            w = np.repeat(w / self.parts, self.parts)
            values, slopes = self.ask(x)
        self.law, self.x, self.w = w, x, np.where(self.smooth(x), w, 0.0)
        self.f, self.d = values[: len(x)], slopes[: len(x)]
        level = self.w @ self.f
        spread = float(self.w @ (self.f - level) ** 2) ** 0.5
        rounding = 1e-6 * domain.std * max(np.abs(self.far[2]).max(), np.abs(self.d).max())
        self.size = max(min(float(self.w @ self.f**2) ** 0.5, LOUD * spread), rounding, 1e-300)
        """What an error is a share of."""
        self.step = x[1] - x[0]
        self.cells = np.append(x - self.step / 2, x[-1] + self.step / 2)
        self.ends = self.reach()
        """Between which joints may lie."""
        narrow = (self.ends[1] - self.ends[0]) / (self.cells[-1] - self.cells[0])
        self.panels, self.wider = int(min(np.ceil(narrow - 1e-9), PANELS)), max(narrow / PANELS, 1.0)
        """Parts of a core that have the nodes of one each, for a law that is narrow in it to be seen; and how much
        wider it is taken for where these are too few."""
        self.sums: dict[tuple[int, Line], np.ndarray] = {}

    def ask(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes of the target; `OrthoactError` where they are not finite."""
        values, slopes = self.target(x)
        if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
            where = x[~(np.isfinite(values) & np.isfinite(slopes))]
            raise OrthoactError(
                f"target {self.target.name!r} is not finite at x = {where[np.abs(where).argmin()]:g}: give a function "
                f"that is, or inputs where it is"
            )
        return values, slopes

    def points(self) -> np.ndarray:
        """Where a copy is measured: at the nodes of the law, and from there far out."""
        return np.concatenate([self.x, self.far[0]])

    def smooth(self, x: np.ndarray) -> np.ndarray:
        """Where x is no kink: the slope there is a convention of autograd."""
        beside = 1e-9 * min(self.domain.std, 1.0)
        return np.all([np.abs(x - kink) > beside for kink in self.target.kinks] or [np.isfinite(x)], axis=0)

    def needed(self, x: np.ndarray) -> int:
        """The nodes that one of the law's is to be, for what the target does to be seen where it does it."""
        far, bend, kinks = self.far[0], self.bend_between_kinks(), sorted(set(self.target.kinks))
        details, mass = [there - here for here, there in pairwise(kinks)], bend.sum()
        if mass:
            middle, share = (far[1:] + far[:-1]) / 2, bend / mass
            details.append(float(np.sqrt(share @ (middle - share @ middle) ** 2)) or far[1] - far[0])
        bare = self.tails == "none" and isinstance(self.family, Linear)  # cannot follow it either
        if bare or not details:
            return 1
        return int(min(np.ceil((x[1] - x[0]) * DETAIL / min(details)), max(MOST // len(x), 1)))

    def bend_between_kinks(self) -> np.ndarray:
        """How much the target's slope changes between each two of the far points, its kinks apart."""
        far, _, slopes = self.far
        bend = np.abs(np.diff(slopes))
        if self.target.kinks:
            after = np.searchsorted(far, self.target.kinks)
            bend[after[(after > 0) & (after < len(far))] - 1] = 0
        return bend

    @cached_property
    def straight(self) -> bool:
        """Whether the target is straight between its kinks, and does not jump there."""
        sides = self.target(np.add.outer(np.array(self.target.kinks), [-1e-9, 1e-9]).ravel())[0].reshape(-1, 2)
        return bool(self.bend_between_kinks().sum() < 1e-12 and (np.abs(np.diff(sides)) < 1e-6).all())

    def reach(self) -> tuple[float, float]:
        """The ends of the law; or where the target is near its asymptote, if beyond the law it is still far from it."""
        (far, values, _), (first, last) = self.far, self.target.holds
        ends = [float(self.cells[0]), float(self.cells[-1])]
        for i, line in enumerate((self.target.left, self.target.right)):
            if self.tails == "linear" and line is not None:
                apart = np.abs(values - line[0] * far - line[1]) * ((far >= first) & (far <= last))
                outside = far < ends[0] if i == 0 else far > ends[1]
                if (apart[outside] > APART).any():
                    ends[i] = float(far[apart > NEAR][-i])
        for kink in self.target.kinks:
            if not ends[0] < kink < ends[1]:
                ends = [min(ends[0], kink - self.domain.std), max(ends[1], kink + self.domain.std)]
        return ends[0], ends[1]

    def four_deviations(self) -> tuple[float, float]:
        return self.domain.mean - 4 * self.domain.std, self.domain.mean + 4 * self.domain.std

    def bend(self) -> tuple[float, float]:
        """Centre and spread of the target's curvature; of the law, where the target is straight."""
        far, _, slopes = self.far
        outside = (far < self.cells[0]) & (far > self.ends[0]), (far > self.cells[-1]) & (far < self.ends[1])
        x, d = (np.concatenate([v[outside[0]], mine, v[outside[1]]]) for v, mine in ((far, self.x), (slopes, self.d)))
        bend = np.abs(np.diff(d))
        if not bend.sum():
            return self.domain.mean, self.domain.std
        middle, mass = (x[1:] + x[:-1]) / 2, bend.sum()
        centre = float(bend @ middle / mass)
        return centre, float(np.sqrt(bend @ (middle - centre) ** 2 / mass)) or self.domain.std

    @cached_property
    def unit(self) -> float:
        """What joints are near each other by: a standard deviation, or the spread of a target that bends in less."""
        return min(self.domain.std, self.bend()[1])

    def is_symmetric(self) -> bool:
        """Whether the best joints lie at mean +- R: law and target are symmetric there, the target but for a line."""
        t = self.x - self.domain.mean
        even = np.abs(self.w - self.w[::-1]).max() <= 1e-9 * self.w.max()
        if self.target.kinks or not even or np.abs(t + t[::-1]).max() > 1e-9 * self.domain.std:
            return False
        for sign in (1, -1):
            part = self.f - sign * self.f[::-1]  # zero, or a line, where the target is symmetric
            slope = part[-1] / t[-1] if sign == 1 else 0.0
            level = part.mean() if sign == -1 else 0.0
            if np.abs(part - slope * t - level).max() < 1e-9 * (1 + np.abs(self.f).max()):
                return True
        return False

    def choose_sides(self) -> tuple[tuple[Side, Side], str]:
        """Joints sit on the outermost kinks beyond which the target is a straight line: there the copy starts exact."""
        left, right = Side(self.target.left), Side(self.target.right)
        if not self.target.kinks:
            return (left, right), "joints minimise J; the core meets the asymptotes there"
        first, last = min(self.target.kinks), max(self.target.kinks)
        if self.is_line(left.line, -inf, first):
            left = Side(left.line, first, kink=True)
        if self.is_line(right.line, last, inf) and (not left.kink or last > first):
            right = Side(right.line, last, kink=True)
        placed = [side.joint for side in (left, right) if side.joint is not None]
        # where the core itself is the straight line beyond the only kink, any joint will do: then three deviations
        if placed == [last] and not right.kink and self.is_line(right.line, last, inf):
            right = Side(right.line, max(self.domain.mean, last) + 3 * self.domain.std)
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

    def wanted(self, joint: float, side: Side) -> tuple[float, float]:
        """Value and slope that the core shall have at a joint."""
        if side.line is not None:
            return side.line[0] * joint + side.line[1], side.line[0]
        value, slope = self.ask(np.array([joint]))
        return float(value[0]), float(slope[0])

    def meet(self, i: int, side: Side, joint: np.ndarray, value: np.ndarray, slope: np.ndarray) -> tuple:
        """Value and slope asked of the core at the left (0) or right (1) joints, where the target has these.

        And the share of J in the tail there, and how that grows with the joint where the tail is the target's tangent.
        """
        if side.line is None:
            return value, slope, *self.tangent(i, joint, value, slope)
        share = np.interp(joint, self.cells, self.running(i, side.line))
        return side.line[0] * joint + side.line[1], side.line[0], share, 0.0

    def near(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The target at `x` between the ends, from a table of cubics between its kinks: fast, for the searches."""
        t, (a, b, c, e), per = self.cubics(x)
        e = t * e
        return a + t * (b + t * (c + e)), (b + t * (2 * c + 3 * e)) * per

    def curvature(self, x: np.ndarray) -> np.ndarray:
        """The target's second derivative, from the same."""
        t, (_, _, c, e), per = self.cubics(x)
        return (2 * c + 6 * t * e) * per**2

    def cubics(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The place of each `x` in its cell, the cubic there, and cells in a unit."""
        table, borders, begin, per, first, last = self.table
        piece = np.searchsorted(borders, x) if len(borders) else 0
        per = per[piece]
        place = (x - begin[piece]) * per
        cell = np.minimum(np.maximum(place.astype(int), 0), last[piece])
        return place - cell, table.take(first[piece] + cell, axis=1), per

    @cached_property
    def table(self) -> tuple[np.ndarray, ...]:
        """The cubics of `near`, and for each piece between kinks: where it begins, cells in a unit, its cells."""
        kinks = [k for k in self.target.kinks if min(abs(k - end) for end in self.ends) > self.step]
        borders = np.array(sorted([*self.ends, *kinks]))
        # beside a kink is beyond what any target takes for the kink itself
        begin, end = borders[:-1] + BESIDE * self.domain.std, borders[1:] - BESIDE * self.domain.std
        count = np.ceil((end - begin) * (FINER / self.step)).astype(int)
        count = np.minimum(np.maximum(count, FINER), FINER * len(self.x))
        h = (end - begin) / count
        f, d = self.ask(np.concatenate([a + s * np.arange(n + 1) for a, s, n in zip(begin, h, count, strict=True)]))
        ends = np.cumsum(count + 1)[:-1]
        cubics = []
        for value, slope, unit in zip(np.split(f, ends), np.split(d, ends), h, strict=True):
            slope, rise = slope * unit, np.diff(value)
            here, there = slope[:-1], slope[1:]
            cubics.append(np.stack([value[:-1], here, 3 * rise - 2 * here - there, here + there - 2 * rise]))
        first = np.cumsum(count) - count
        return np.concatenate(cubics, axis=1), borders[1:-1], begin, 1 / h, first, count - 1

    def gauss(self, joints: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss-Legendre nodes between each pair of joints, (pairs, count), and their weights under the law."""
        t, w = legendre(count, self.panels)
        half = (joints[:, 1:] - joints[:, :1]) / 2
        x = (joints[:, 1:] + joints[:, :1]) / 2 + half * t
        at = x if self.wider == 1 else self.domain.mean + (x - self.domain.mean) / self.wider
        place = np.minimum(np.maximum((at - (self.x[0] - self.step)) / self.step, 0), len(self.x) + 1)
        cell, (weights, rises) = place.astype(int), self.density
        here = weights.take(cell)
        here += (place - cell) * rises.take(cell)
        here *= half / (self.step * self.wider)
        here += UNSEEN / 2
        return x, here * w

    @cached_property
    def density(self) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each node, of one more on either side, and from each to the next."""
        weights = np.pad(self.w, (1, 2))
        return weights, np.append(np.diff(weights), 0.0)

    def pieces(self, joints: np.ndarray, kinks: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same with as many of the nodes on either side of each kink, where the target is smooth."""
        at = np.clip(np.array(kinks), joints[:, :1], joints[:, 1:])
        borders = np.concatenate([joints[:, :1], at, joints[:, 1:]], axis=1)
        pairs = np.stack([borders[:, :-1], borders[:, 1:]], axis=2).reshape(-1, 2)
        x, w = self.gauss(pairs, count // (len(kinks) + 1))
        return x.reshape(len(joints), -1), w.reshape(len(joints), -1)

    def tangent(self, i: int, joint: np.ndarray, value: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The share of J in a tail that takes the target's value and slope at the joint, and how it grows with it."""
        one, t, tt, f, tf, ff, d, dd = self.moments(i, joint)
        joint = joint - self.domain.mean
        level = value - slope * joint
        gap = level * one + slope * t - f
        square = level * (gap - f) + slope * (level * t + slope * tt - 2 * tf) + ff
        steep, steep_square = slope * one - d, slope * (slope * one - 2 * d) + dd
        turned = level * t + slope * tt - tf - joint * gap + self.weight * steep
        bend = self.curvature(joint + self.domain.mean)
        return np.maximum(square, 0) + self.weight * np.maximum(steep_square, 0), 2 * bend * turned

    def moments(self, i: int, joint: np.ndarray) -> np.ndarray:
        """Sums of the weights, and of these times what stands in `tangent`, left (0) or right (1) of each joint."""
        place = np.clip((joint - self.cells[0]) / self.step, 0, len(self.x) - 1e-9)
        cell, table = place.astype(int), self.outer[i]
        return table[:, cell] + (place - cell) * (table[:, cell + 1] - table[:, cell])

    @cached_property
    def outer(self) -> tuple[np.ndarray, np.ndarray]:
        """These sums at the borders of the nodes' cells, left and right."""
        t = self.x - self.domain.mean
        each = self.w * np.stack([t**0, t, t**2, self.f, t * self.f, self.f**2, self.d, self.d**2])
        left, right = (np.cumsum(part, axis=1) for part in (each, each[:, ::-1]))
        return np.pad(left, ((0, 0), (1, 0))), np.pad(right, ((0, 0), (1, 0)))[:, ::-1]

    def running(self, i: int, line: Line) -> np.ndarray:
        """The share of J in a straight tail that ends at each border of the nodes' cells, summed from outside."""
        if (i, line) not in self.sums:
            error = self.w * ((self.f - line[0] * self.x - line[1]) ** 2 + self.weight * (self.d - line[0]) ** 2)
            order = slice(None, None, -1 if i else 1)
            self.sums[i, line] = np.append(0.0, np.cumsum(error[order]))[order]
        return self.sums[i, line]

    def cannot_meet(self) -> OrthoactError:
        """What to say where the equalities at the joints cannot be satisfied."""
        return OrthoactError(
            f"--degree {self.degree}: a {self.family.name} core of this degree cannot meet the asymptotes of "
            f"{self.target.name} at both joints; raise the degree or use --tails none"
        )


@lru_cache
def legendre(count: int, panels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes in [-1, 1] and their weights, so many in each of several equal panels."""
    t, w = np.polynomial.legendre.leggauss(count)
    middles = (2 * np.arange(panels) + 1) / panels - 1
    return (middles[:, None] + t / panels).ravel(), np.tile(w / panels, panels)
