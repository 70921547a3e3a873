"""The search for a separable family: a race of many starts, in which fewer and fewer are improved more and more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product

import numpy as np

from .family import Separable
from .joints import Determined, search_joints
from .problem import Problem, Side
from .race import LANES, ROUNDING, Race, State

COARSE, FINE, DENSE = 64, 160, 640
"""Nodes in the core: in the race, for its winners, and to choose among these (rationals hide poles and kinks between
nodes that are few)."""

RADII = (1.7, 6.0)
"""Least and greatest distance of a joint from the centre of the target's curvature to start from, in its spread."""

SHIFTS = (0.0, 0.4, 1.0, -0.4, -1.0)
"""Where z = 0 may lie in the core to start from, in half its length; one side will do where all is symmetric."""

BEST = 12
"""How many starts are improved beside the best of each kind."""

RACE = ((24, 6), (6, 10))
"""How many starts are improved, by how many steps; then fewer of them."""

SETTLE = ((12, 10), (6, 10))
"""The same for those that come from a smoother family, together with those of the family itself."""

HOPS, AFTER, PLACES, SIZES = 3, 2, 4, ((0.02, 0.1, 0.3), (0.05, 0.2, 0.5))
"""How often hops are made, and how often after a smoother family; from how many of the best; their relative sizes."""

HOP = ((24, 20), (6, 10))
"""How many hops are improved, by how many steps: at first the best valley is seldom the one where J is least."""

HOPPED = 1e-3
"""The gain of a step, as a share of J, from which a hop is improved further."""

LAST = (3, 60)
"""How many are improved on the fine nodes, by how many steps."""

FEW = (24, 2)
"""Nodes in the core for a family with one shape number, and how many more with each degree."""

ONE = (6, 4, 3, 3, 3, 2, 2, 2, 2, 1)
"""How many starts of a family with one shape number, no two with the same, are improved by a step; by another; ..."""

PAIRS = 5
"""How many pairs of joints are tried with every shape there."""

FAR = 100.0
"""J, in the least of them, from which a start is left alone."""

SETTLED = 2e-2
"""The share of J for which no further step is taken there."""

CHOSEN = 12
"""Among how many the winners are chosen."""

EXACTLY = 10
"""How many steps a start is improved that is exact already."""

PLAIN = 0.01
"""What a winner may lose, as a share of J, by being a member of the smoother family."""

OVER = ((1e2, 20, 40), (1e3, 6, 40), (1e5, 2, 50))
"""Where there are more equalities than linear numbers, so that shape and joints must help to meet them: weights of the
equalities, starts that are kept, and their steps, one after the other."""

SAME = 1e-3
"""Starts whose J differ by less than this share are taken for the same valley."""

EXACT = 4e-7
"""The error, as a share of the target's root mean square, at which a start needs no improvement."""


@dataclass(frozen=True)
class Found:
    """Where J is least."""

    shape: list[float]
    lo: float
    hi: float
    location: float
    scale: float
    rounding: float
    """The weight of the rows that keep the terms of the series small."""


def search_shapes(p: Problem, sides: tuple[Side, Side]) -> Found:
    """Shape and joints of least J."""
    assert isinstance(p.family, Separable)
    smooth, fine = p.family.relaxed(), Race(p, p.family, sides, FINE)
    race = Race(p, p.family, sides, FEW[0] + FEW[1] * p.degree if _few(p) else COARSE)
    over = _over(race)
    if _few(p) and not over:
        return _one(p, race)
    if over and (determined := Determined.of(p, sides)):
        lo, hi = (float(np.float32(joint)) for joint in search_joints(p, sides, determined))
        frame = np.array([(lo + hi) / 2, (hi - lo) / 2 / determined.reach])
        return _found(race, frame, np.concatenate([determined.shape(lo, hi), np.array([lo, hi])[race.free]]))
    begun = _begin(p, race)
    exact = np.flatnonzero(begun.value <= EXACT**2 * (p.w @ p.f**2))
    if len(exact):
        last = fine.improve(_again(fine, _best(begun, 1)), EXACTLY)
        return _found(fine, last.frame[0], last.alpha[0])
    if over:
        for race.equality, kept, steps in OVER:
            begun = race.improve(_again(race, _best(begun, kept)), steps, 1e-12, LANES)
        fine.equality, _, steps = OVER[-1]
        found = fine.improve(_again(fine, _best(begun, 1)), steps, 1e-12, LANES)
        return _found(fine, found.frame[0], found.alpha[0])
    found = _run(race, begun, RACE)
    if smooth is not None:
        other = Race(p, smooth, sides, COARSE)
        settled = _settle(race, _run(other, _begin(p, other), RACE), other)
        found = _run(race, _join([found, settled]), SETTLE)
    for seed in range(HOPS if smooth is None else AFTER):
        if found.value.min() <= race.floor:
            break
        hops = _run(race, _hop(race, _best(found, PLACES), seed), HOP, HOPPED)
        found = _join([found, hops])
    dense = Race(p, p.family, sides, DENSE)
    best = _best(found, CHOSEN)
    best = best[_valleys(dense.values(best.frame, best.alpha))[: LAST[0]]]
    # terms that cancel each other are worth a thousandth of the error, not the rounding of the copy
    fine.rounding = dense.rounding = max(ROUNDING, 1e-3 * float(best.value[0]) ** 0.5)
    last = fine.improve(_again(fine, best), LAST[1])
    last = _best(_join([_again(dense, best), _again(dense, last)]), LAST[0])
    if smooth is not None:  # without kinks so close to each other that they hide between nodes
        plain = _best(_settle(dense, last, dense), 1)
        if plain.value[0] < last.value[0] * (1 + PLAIN):
            last = plain
    return _found(fine, last.frame[0], last.alpha[0])


def _one(p: Problem, race: Race) -> Found:
    """Where J is least for a family with few valleys: the best joints for a shape in the middle, then every shape."""
    frame, alpha, kind = _starts(p, race)
    shapes = int(kind.max()) + 1
    rows = np.flatnonzero(kind == shapes // 2)
    rows = rows[np.argsort(race.values(frame[rows], alpha[rows]), kind="stable")[:PAIRS]]
    rows = (rows[:, None] - shapes // 2 + np.arange(shapes)).ravel()
    value = race.values(frame[rows], alpha[rows], each=shapes)
    order = np.argsort(value, kind="stable")
    rows, value = rows[order], value[order]
    _, first = np.unique(kind[rows], return_index=True)  # the best of each kind, whatever the joints
    first = np.sort(first)[: ONE[0]]
    first = first[value[first] <= FAR * value[0]]
    race.rounding = max(ROUNDING, 5e-4 * float(value[0]) ** 0.5)
    best = race.descend(frame[rows[first]], alpha[rows[first]], ONE, SETTLED)
    race.rounding = max(ROUNDING, 1e-3 * float(np.exp(best.value[0] / 2)))
    return _found(race, best.frame[0], best.alpha[0])


def _few(p: Problem) -> bool:
    """Whether there are few valleys and no poles: one shape number, and z = 0 is no special point."""
    assert isinstance(p.family, Separable)
    return p.family.shape(p.degree) == 1 and not p.family.centred


def _over(race: Race) -> bool:
    """Whether there are more equalities than linear numbers."""
    return not race.bare and sum(side.equalities for side in race.sides) > race.linear


def _begin(p: Problem, race: Race) -> State:
    """The best of the starts."""
    frame, alpha, kind = _starts(p, race)
    value = race.values(frame, alpha)
    rows = _valleys(value)
    _, first = np.unique(kind[rows], return_index=True)  # the best of each kind, whatever the joints
    rows = rows[np.union1d(first, np.arange(min(BEST, len(rows))))]
    return race.evaluate(frame[rows], alpha[rows])


def _run(race: Race, state: State, stages: tuple[tuple[int, int], ...], settled: float = 1e-4) -> State:
    for kept, steps in stages:
        state = race.improve(_best(state, kept), steps, settled)
    return state


def _join(states: list[State]) -> State:
    return State(*(np.concatenate([getattr(s, f.name) for s in states]) for f in fields(State)))


def _again(race: Race, state: State) -> State:
    """The same places on other nodes."""
    return race.evaluate(state.frame, state.alpha)


def _hop(race: Race, state: State, seed: int) -> State:
    """Hops of several sizes from these places."""
    count = HOP[0][0]
    rows = np.arange(count) % len(state.value)
    size = np.array(SIZES[seed % 2])[np.arange(count) // len(state.value) % len(SIZES[0]), None]
    frame, alpha = state.frame[rows], state.alpha[rows]
    origin = np.where(np.arange(alpha.shape[1]) < race.inner, 0.0, frame[:, :1])  # joints move about the location
    step = size * np.random.default_rng(seed).normal(size=alpha.shape)
    return race.evaluate(frame, alpha + step * (alpha - origin))


def _best(state: State, most: int) -> State:
    """The best of each valley."""
    return state[_valleys(state.value)[:most]]


def _valleys(value: np.ndarray) -> np.ndarray:
    """The rows of the least J in each valley, the best first."""
    order = np.argsort(value, kind="stable")
    value = value[order]
    return order[np.append(True, value[1:] > value[:-1] * (1 + SAME))]


def _settle(own: Race, state: State, race: Race) -> State:
    """Members of the smoother family as those of the family itself."""
    family, n = own.family, race.shapes
    frames, alphas = [], []
    for (location, scale), alpha, joints in zip(state.frame, state.alpha, race.joints(state.alpha), strict=True):
        location = location + scale * (alpha[n] if race.family.centred else 0.0)
        for shape, *frame, lo, hi in family.settle(alpha[:n].tolist(), location, scale, *joints.tolist()):
            frames.append(frame)
            alphas.append([*shape, *[0.0] * family.centred, *((lo, hi)[i] for i in race.free)])
    return own.evaluate(np.array(frames), np.array(alphas))


def _found(race: Race, frame: np.ndarray, alpha: np.ndarray) -> Found:
    p, family = race.p, race.family
    lo, hi = race.joints(alpha[None])[0].tolist() if p.tails == "linear" else (-np.inf, np.inf)
    location, scale = frame
    if family.anywhere:
        inside = [lo, (lo + hi) / 2, hi, min(max(p.domain.mean, lo), hi)] if p.tails == "linear" else [location]
        places = np.array(inside).astype(np.float32).astype(float)
        frames = np.stack([places, np.full_like(places, scale)], axis=1)
        location = places[race.solve(frames, np.tile(alpha, (len(places), 1))).value.argmin()]
    if family.centred:
        location = location + scale * alpha[race.shapes]
    location, scale = (float(np.float32(v)) for v in (location, scale))  # the module keeps them so
    return Found(alpha[: race.shapes].tolist(), lo, hi, location, scale, race.rounding)


def _starts(p: Problem, race: Race) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame, alpha and kind of each start."""
    family, frames, alphas, kinds = race.family, [], [], []
    shifts = (SHIFTS[:3] if p.is_symmetric() else SHIFTS) if family.centred else (0.0,)
    ends = np.array(_joints(p, race.sides), dtype=float)
    x, w = race.nodes(ends)
    f, half = p.near(x)[0], (ends[:, 1:] - ends[:, :1]) / 2
    rest = np.concatenate([np.zeros((len(ends), int(family.centred))), ends[:, race.free]], axis=1)
    middle = ends.mean(axis=1)
    for shift in shifts:
        frame = np.concatenate([middle[:, None] + shift * half, half / family.reach(p.degree)], axis=1)
        if p.tails == "none":
            frame[:] = p.domain.mean, p.domain.std
        shapes = family.starts(p.degree, (x - frame[:, :1]) / frame[:, 1:], w, f)
        n = shapes.shape[1]
        frames.append(np.repeat(frame, n, axis=0))
        kinds.append(np.tile(np.arange(n), len(ends)))
        alphas.append(np.concatenate([shapes.reshape(len(ends) * n, -1), np.repeat(rest, n, axis=0)], axis=1))
    return np.concatenate(frames).astype(np.float32).astype(float), np.concatenate(alphas), np.concatenate(kinds)


def _joints(p: Problem, sides: tuple[Side, Side]) -> list[tuple[float, float]]:
    """Pairs of joints to start from, around the target's curvature; fixed ones stay, and without tails there is one."""
    assert isinstance(p.family, Separable)
    if p.tails == "none":
        return [p.four_deviations()]
    centre, spread = p.bend()
    free = [side.joint is None for side in sides]
    if p.is_symmetric():
        radii = [min(r * spread, p.ends[1] - p.domain.mean) for r in np.geomspace(*RADII, 8).tolist()]
        pairs = list(zip(radii, radii, strict=True))
        if not p.family.centred:  # one side may be worth more all the same; a shift of z finds that too
            pairs += zip(radii[:-2], radii[2:], strict=True)
        return [(p.domain.mean - left, p.domain.mean + right) for left, right in pairs]
    ends, count = [], 3 if all(free) else 8
    for side, sign, end in zip(sides, (-1, 1), p.ends, strict=True):
        most = min(RADII[1] if all(free) else 9.0, abs(end - centre) / spread)
        radii = np.geomspace(min(RADII[0], most / 2), most, count)
        ends.append((centre + sign * spread * radii).tolist() if side.joint is None else [side.joint])
    return list(product(*ends))
