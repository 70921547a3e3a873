r"""The search for a piecewise straight copy: the kinks of least J, everything linear eliminated.

With $S(t) = a + b t + \sum_i c_i (t - k_i)_+$ the products of the basis functions under the law are integrals from a
kink to infinity of $1, t, t^2, f, t f, f'$, read off tables. J and its gradient by the kinks are therefore exact for
both the value and the slope, where a sum over nodes would jump whenever a kink passes one.
"""

from __future__ import annotations

from math import inf, isfinite

import numpy as np
from scipy.optimize import minimize

from .errors import OrthoactError
from .family import Piecewise
from .problem import MOST, Problem

REFINE = 8
"""Cells of the tables in one cell of the law's nodes."""

EPSILON = 2e-16
"""What rounding leaves of a sum, as a share of its terms."""

SEEN = 4.0
"""The least standard deviation of a law in cells."""

ELSEWHERE = 1e-9
"""The weight of everything between the ends beside the law's: where no input lies the copy follows the target too."""


class Tables:
    """J of piecewise straight functions of t = (x - mean) / std, by the kinks."""

    def __init__(self, p: Problem):
        self.mean, self.std, self.weight = p.domain.mean, p.domain.std, p.weight / p.domain.std**2
        length = p.ends[1] - p.ends[0]
        count = round(min(length / p.step * REFINE, MOST))
        step = length / count
        x = p.ends[0] + step * (np.arange(count) + 0.5)
        wider = max(SEEN * step / self.std, 1.0)  # a law between two cells is seen by some
        w = np.interp(self.mean + (x - self.mean) / wider, p.x, p.law, 0.0, 0.0)
        w = w / w.sum() + ELSEWHERE / count
        f, d = p.ask(x)
        w, t, d = w / w.sum(), (x - self.mean) / self.std, d * self.std
        # without the line that is best under the law, which far from all bends is nearly all of the target
        tilt = float(w @ ((t - w @ t) * f) / (w @ (t - w @ t) ** 2))
        self.line = float(w @ (f - tilt * t)), tilt
        f, d = f - self.line[0] - tilt * t, d - tilt
        self.t, self.w, self.f, self.d, self.step = t, w, f, d, step / self.std
        self.edges = np.append(t - self.step / 2, t[-1] + self.step / 2)
        columns = np.stack([w, w * t, w * t * t, w * f, w * t * f, w * d])
        self.tails = np.concatenate([columns[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((6, 1))], axis=1)
        self.square = float(w @ f**2 + self.weight * (w @ d**2))
        lines = (p.target.left, p.target.right) if p.tails == "linear" else (None, None)
        self.lines = [
            None if line is None else (line[0] * self.std - tilt, line[1] + line[0] * self.mean - self.line[0])
            for line in lines
        ]

    def at(self, kinks: np.ndarray) -> np.ndarray:
        """The six integrals from each kink to infinity."""
        place = np.clip((kinks - self.edges[0]) / self.step, 0, len(self.t) - 1e-9)
        cell = place.astype(int)
        return self.tails[:, cell] + (self.tails[:, cell + 1] - self.tails[:, cell]) * (place - cell)

    def solve(self, kinks: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """J at sorted kinks, the numbers (a, b, c_1, ...) and the gradient of J by the kinks."""
        n, lam = len(kinks), self.weight
        m0, m1, m2, wf, wtf, wd = self.at(kinks)
        s0, s1, s2, sf, stf, sd = self.tails[:, 0]
        later = np.maximum.outer(np.arange(n), np.arange(n))
        k = kinks[:, None]
        gram = np.empty((n + 2, n + 2))
        gram[2:, 2:] = m2[later] - (k + k.T) * m1[later] + (k * k.T + lam) * m0[later]
        gram[0, :2], gram[1, :2] = (s0, s1), (s1, s2 + lam * s0)
        gram[0, 2:], gram[1, 2:] = m1 - kinks * m0, m2 - kinks * m1 + lam * m0
        gram[2:, :2] = gram[:2, 2:].T
        right = np.r_[sf, stf + lam * sd, wtf - kinks * wf + lam * wd]
        rows, wanted = self.equalities(kinks)
        e = len(rows)
        system = np.zeros((n + 2 + e, n + 2 + e))
        system[: n + 2, : n + 2] = gram + 1e-14 * np.eye(n + 2)
        system[n + 2 :, : n + 2], system[: n + 2, n + 2 :] = rows, rows.T
        try:
            if e >= n + 2:  # one kink between two lines: an equality too many
                raise np.linalg.LinAlgError
            found = np.linalg.solve(system, np.r_[right, wanted])
        except np.linalg.LinAlgError:
            found = np.linalg.lstsq(system, np.r_[right, wanted], rcond=1e-13)[0]
        u, mu = found[: n + 2], found[n + 2 :]
        # known to rounding: a wild copy far from the law pays for it
        noise = EPSILON * float(np.abs(u) @ np.abs(gram) @ np.abs(u))
        value = max(float(u @ gram @ u - 2 * right @ u) + self.square, noise)
        a, b, c = u[0], u[1], u[2:]
        inside = a * m0 + b * m1 + (m1[later] - kinks * m0[later]) @ c - wf  # integral of F - f from each kink
        cell = np.clip(((kinks - self.edges[0]) / self.step).astype(int), 0, len(self.t) - 1)
        density, slopes = self.w[cell] / self.step, b + np.cumsum(c)
        gradient = -2 * c * inside - lam * c * density * (2 * slopes - c - 2 * self.d[cell])
        if self.lines[1] is not None:
            gradient -= 2 * mu[-1] * c
        return value, u, gradient

    def equalities(self, kinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the lines at both ends ask of the numbers."""
        n, rows, wanted = len(kinks), [], []
        if self.lines[0] is not None:
            rows += [np.r_[0.0, 1.0, np.zeros(n)], np.r_[1.0, 0.0, np.zeros(n)]]
            wanted += self.lines[0]
        if self.lines[1] is not None:
            rows += [np.r_[0.0, 1.0, np.ones(n)], np.r_[1.0, 0.0, -kinks]]
            wanted += self.lines[1]
        return np.reshape(rows, (-1, n + 2)), np.array(wanted)

    def improve(self, kinks: np.ndarray, held: np.ndarray | None = None) -> tuple[float, np.ndarray, np.ndarray]:
        """A local minimum of J by the kinks, with its numbers; the kinks `held` are others, which stay."""
        held = np.zeros(0) if held is None else held
        if not len(kinks):  # a convex copy of what bends down everywhere is a line
            value, u, _ = self.solve(kinks)
            return value, kinks, u

        def logarithm(at: np.ndarray) -> tuple[float, np.ndarray]:  # J spans orders of magnitude
            every = np.append(at, held)
            order = np.argsort(every, kind="stable")
            value, _, gradient = self.solve(every[order])
            back = np.empty_like(gradient)
            back[order] = gradient
            return float(np.log(value + 1e-16)), back[: len(at)] / (value + 1e-16)

        found = minimize(logarithm, kinks, jac=True, method="BFGS", options={"maxiter": 100, "gtol": 1e-3})
        best = np.clip(np.sort(np.append(found.x, held)), self.edges[0], self.edges[-1])
        value, u, _ = self.solve(best)
        return value, best, u

    def spread(self, n: int, power: float, bend: np.ndarray) -> np.ndarray:
        """Place n kinks that share the curvature evenly, its density raised to a power."""
        share = (self.w[1:] * bend**2) ** power + 1e-12
        total = np.cumsum(share) / share.sum()
        return np.interp((np.arange(n) + 0.5) / n, total, (self.t[1:] + self.t[:-1]) / 2)


def search_kinks(p: Problem) -> tuple[list[float], float, float, float, float, str]:
    """The numbers, the core's ends, location and scale of the piecewise straight copy of least J, and why."""
    family, tables = p.family, Tables(p)
    assert isinstance(family, Piecewise)
    left, right = tables.lines
    reason = "kinks minimise J" + ("; the outer pieces are the asymptotes" if p.tails == "linear" else ", no tails")
    if left is not None and right is not None:
        turn, shift = right[0] - left[0], right[1] - left[1]
        if family.convex and (turn < 0 or (turn == 0 and shift != 0)):
            slopes = " to ".join(f"{line[0]:g}" for line in (p.target.left, p.target.right) if line)
            raise OrthoactError(
                f"a {family.name} copy is convex and cannot have the asymptotes of {p.target.name}, whose slope goes "
                f"from {slopes}: choose tropical-rational"
            )
        if p.degree == 1 and turn == 0 and shift != 0:
            raise p.cannot_meet()
    _, kinks, u = best_kinks(p, tables, p.degree)
    if len(p.target.kinks) <= p.degree and convex(p, u) and p.straight:
        reason = "exact: the target is piecewise straight"
    elif family.convex and len(kinks) < p.degree:
        reason = f"the best convex copy has {len(kinks)} of the kinks: the target is not convex"
    kinks, jumps = fill(p.degree, kinks, u[2:], family.convex)
    location, scale = float(np.float32(tables.mean)), float(np.float32(tables.std))
    z = (tables.mean + tables.std * kinks - location) / scale
    unit = scale / tables.std  # rounding alone
    u[:2] += tables.line
    level = u[0] + u[1] * (location - tables.mean) / tables.std
    numbers = family.from_kinks((u[1] * unit, level), z, jumps * unit)
    if p.tails == "none":
        return numbers, -inf, inf, location, scale, reason
    ends = tables.mean + tables.std * np.array([min(z.min() - 1, -4), max(z.max() + 1, 4)])
    return numbers, float(np.float32(ends[0])), float(np.float32(ends[1])), location, scale, reason


def best_kinks(p: Problem, tables: Tables, n: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The best of several local minima with n kinks; a convex family drops the kinks that would bend down."""
    assert isinstance(p.family, Piecewise)
    own = (np.array(sorted(p.target.kinks)) - tables.mean) / tables.std
    left, right = tables.lines
    if left is not None and right is not None and right[0] != left[0]:
        own = np.append(own, (left[1] - right[1]) / (right[0] - left[0]))  # where the asymptotes cross
    candidates = []
    if 0 < len(p.target.kinks) <= n:
        exact = np.sort(own[: len(p.target.kinks)])
        value, u, _ = tables.solve(exact)
        candidates.append((value, exact, u))
        if convex(p, u) and p.straight:
            return candidates[0]
    if n == 1 and left is not None and right is not None:
        only = own[-1:] if right[0] != left[0] else np.zeros(1)
        value, u, _ = tables.solve(only)
        return value, only, u
    bend = np.abs(np.diff(tables.d)) / tables.step
    if p.family.convex:
        bend = np.maximum(np.diff(tables.d), 0) / tables.step
    powers = (0.2,) if p.family.convex else (0.2, 1 / 3, 0.12)
    starts = [tables.spread(n, power, bend) for power in powers]
    if not p.family.convex and (up := np.maximum(np.diff(tables.d), 0)).any():  # as if convex
        starts.append(tables.spread(n, 0.2, up / tables.step))
    if p.target.kinks and n > len(p.target.kinks):
        smooth = np.minimum(bend, np.quantile(bend[bend > 0], 0.99)) if (bend > 0).any() else bend
        held = own[: len(p.target.kinks)]  # J has an edge there, at which a search along it would stop
        for power in powers:
            rest = tables.spread(n - len(held), power, smooth)
            candidates.append(tables.improve(rest + 1e-6 * np.arange(len(rest)), held))
    for start in starts:
        candidates.append(tables.improve(start + 1e-6 * np.arange(n)))
    if p.family.convex:
        candidates = [convexified(p, tables, *candidate) for candidate in candidates]
    least = min(c[0] for c in candidates if isfinite(c[0]))
    return min((c for c in candidates if c[0] <= least * (1 + 1e-9) + 1e-18), key=lambda c: len(c[1]))


def convex(p: Problem, u: np.ndarray) -> bool:
    assert isinstance(p.family, Piecewise)
    return not p.family.convex or bool((u[2:] >= -1e-9).all())


def convexified(p: Problem, tables: Tables, value: float, kinks: np.ndarray, u: np.ndarray):
    """The same with the kinks that bend down taken out and the others moved anew, until none does."""
    while not convex(p, u) and len(kinks) > 1:
        kinks = kinks[u[2:] > 0]
        if len(kinks) <= 1 and None not in tables.lines:
            return best_kinks(p, tables, 1)
        value, kinks, u = tables.improve(kinks)
    return value, kinks, u


def fill(n: int, kinks: np.ndarray, jumps: np.ndarray, is_convex: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bring the number of kinks to n and change nothing: split the largest jump, or add kinks without one."""
    missing = n - len(kinks)
    if missing and is_convex:
        parts = int(missing) + 1
        most = int(np.argmax(jumps))
        kinks = np.concatenate([kinks[:most], np.full(parts, kinks[most]), kinks[most + 1 :]])
        jumps = np.concatenate([jumps[:most], np.full(parts, jumps[most] / parts), jumps[most + 1 :]])
    elif missing:
        spread = 2 * (np.arange(missing) + 0.5) / missing * 2 - 2
        kinks, jumps = np.append(kinks, spread), np.append(jumps, np.zeros(missing))
    return kinks, jumps
