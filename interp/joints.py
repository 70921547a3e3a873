"""Where the core ends: the pair of joints of least J."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import numpy as np

from .domains import Gaussian
from .errors import OrthoactError
from .family import Family
from .targets import Line, Target


@dataclass(frozen=True)
class Side:
    """What is asked of one joint."""

    line: Line | None
    """The affine tail to meet; None takes the target's own value and slope at the joint."""
    kink: float | None = None
    """The joint sits here, and the tail's slope need not be the core's."""


@dataclass(frozen=True)
class Samples:
    """A target sampled under a law, and the family and J that will copy it."""

    target: Target
    family: Family
    degree: int
    domain: Gaussian
    weight: float
    """Lambda of J."""
    x: np.ndarray
    """Nodes of the law, equidistant."""
    w: np.ndarray
    """Their weights."""
    f: np.ndarray
    """Values of the target."""
    d: np.ndarray
    """Slopes of the target."""
    ends: tuple[float, float]
    """The interval that the nodes stand for."""


def search_joints(p: Samples, sides: tuple[Side, Side]) -> tuple[float, float]:
    """The joints of least J: a scan outwards from the centre of the target's curvature, then a pattern search."""
    fixed = tuple(side.kink for side in sides)
    if fixed[0] is not None and fixed[1] is not None:
        return fixed[0], fixed[1]
    objective = Objective(p, sides)
    bend = np.abs(np.diff(p.d))
    middle = (p.x[1:] + p.x[:-1]) / 2
    mass = bend.sum() or 1.0
    centre = float(bend @ middle / mass) if bend.sum() else p.domain.mean
    spread = float(np.sqrt(bend @ (middle - centre) ** 2 / mass)) or p.domain.std
    symmetric = is_symmetric(p)
    if symmetric:
        centre = 0.0
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
            raise OrthoactError(
                f"--degree {p.degree}: a {p.family.name} core of this degree cannot meet the asymptotes of "
                f"{p.target.name} at both joints; raise the degree or use --tails none"
            )
        # where the copy is exact to rounding any joint will do: then three standard deviations
        good = values <= value + 1e-14 * (1 + p.w @ p.f**2)
        exact = bool(good.all())
        best = np.flatnonzero(good)[np.abs(radii[good] - 3 * p.domain.std).argmin()]
        radius = radii[best]
        radii = np.linspace(radii[max(best - 1, 0)], radii[min(best + 1, len(radii) - 1)], 9)
    lo, hi = (float(side[0]) for side in joints(np.array([radius])))
    if not symmetric and not exact:
        lo, hi = pattern_search(p, objective, lo, hi, fixed, value)
    return lo, hi


def pattern_search(p: Samples, objective, lo, hi, fixed, value) -> tuple[float, float]:
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


def is_symmetric(p: Samples) -> bool:
    """Whether the best joints lie at +-R: a law that is even, and a target that is even or odd but for a line."""
    if p.domain.mean != 0 or p.target.kinks:
        return False
    for sign in (1, -1):
        part = p.f - sign * p.f[::-1]  # zero, or a line, where the target is symmetric
        slope = part[-1] / p.x[-1] if sign == 1 else 0.0
        level = part.mean() if sign == -1 else 0.0
        if np.abs(part - slope * p.x - level).max() < 1e-9 * (1 + np.abs(p.f).max()):
            return True
    return False


class Objective:
    """J at many pairs of joints at once, on every third node: enough to choose the joints.

    Each pair has a basis scaled to its own core, and J is a sum of squared residuals: the cheaper difference of running
    sums loses all its digits where J is small.
    """

    def __init__(self, samples: Samples, sides: tuple[Side, Side]):
        self.samples, self.sides = samples, sides
        p = samples
        self.x, self.w, self.f, self.d = p.x[1::3], p.w[1::3] / p.w[1::3].sum(), p.f[1::3], p.d[1::3]
        self.step = self.x[1] - self.x[0]

    def __call__(self, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        p, weight = self.samples, self.samples.weight
        narrow = hi - lo < (p.degree + 1) * self.step  # fewer nodes than coefficients
        hi = np.where(narrow, lo + 1, hi)
        below, above = self.share_below(lo), 1 - self.share_below(hi)
        w = np.clip(self.w * (1 - below - above), 0, None)
        used = np.flatnonzero(w.max(axis=0))
        middle, unit = (lo + hi) / 2, (hi - lo) / 2 / p.family.reach(p.degree)
        at = np.concatenate([np.broadcast_to(self.x[used], (len(lo), len(used))), lo[:, None], hi[:, None]], axis=1)
        z = (at - middle[:, None]) / unit[:, None]
        values = np.stack(p.family.basis(z, p.degree), axis=-1)
        slopes = np.stack(p.family.slopes(z, p.degree), axis=-1)  # with respect to z
        root = np.sqrt(w[:, used])[..., None]
        tilt = np.sqrt(weight) * root
        system = np.concatenate([root * values[:, :-2], tilt / unit[:, None, None] * slopes[:, :-2]], axis=1)
        right = np.concatenate([root * self.f[used, None], tilt * self.d[used, None]], axis=1)
        tails, equalities, wanted = 0.0, [], []
        for i, (side, joint, share) in enumerate(zip(self.sides, (lo, hi), (below, above), strict=True)):
            if side.line is not None:
                value, slope = side.line[0] * joint + side.line[1], np.full_like(joint, side.line[0])
                error = (self.f - side.line[0] * self.x - side.line[1]) ** 2 + weight * (self.d - side.line[0]) ** 2
            else:  # the tail takes the target's value and slope at the joint
                value, slope = np.interp(joint, p.x, p.f), np.interp(joint, p.x, p.d)
                gap = value[:, None] + slope[:, None] * (self.x - joint[:, None]) - self.f
                error = gap**2 + weight * (slope[:, None] - self.d) ** 2
            tails = tails + (share * error) @ self.w
            rows = [(values[:, i - 2], value), (slopes[:, i - 2], slope * unit)]
            for row, target in rows[:1] if side.kink is not None else rows:
                equalities.append(row)
                wanted.append(target)
        matrix, target = np.stack(equalities, axis=1), np.stack(wanted, axis=1)[..., None]
        inverse = np.linalg.pinv(matrix, rcond=1e-10)
        particular = inverse @ target
        missed = np.abs(matrix @ particular - target).max(axis=(1, 2)) > 1e-7 * (1 + np.abs(target).max())
        fixed = inverse @ matrix
        eye = np.eye(fixed.shape[-1])
        reduced, rest = system @ (eye - fixed), right - system @ particular
        gram = reduced.transpose(0, 2, 1) @ reduced
        size = np.trace(gram, axis1=1, axis2=2)[:, None, None] / len(eye) + 1e-300
        free = np.linalg.solve(gram / size + fixed + 1e-13 * eye, reduced.transpose(0, 2, 1) @ rest / size)
        value = ((reduced @ free - rest) ** 2).sum(axis=(1, 2)) + tails
        return np.where(missed | narrow, inf, value)

    def share_below(self, joint: np.ndarray) -> np.ndarray:
        """The share of each node's cell below a joint, so that J is continuous in it: (joints, nodes)."""
        return np.clip((joint[:, None] - self.x) / self.step + 0.5, 0, 1)
