"""How near the solver's copies are to the best there are: a brute-force search over shapes, kinks and joints.

    python benchmarks/reference.py --most 60     # minutes; goes on where benchmarks/reference.json ends
    python benchmarks/reference.py --refit       # only fit anew and compare with the references that are there
    python benchmarks/reference.py --again rational:silu:8      # search this one anew

For each family and target, at two sizes, J of `orthoact.fit` under the default law is divided by the least J that many
random starts find, the numbers of its shape, kinks and joints all free. The starts share nothing with the solver's, but
for a few that hop from its copy, so that a reference is hardly ever worse.

- hermite: a dense search over both joints, and a simplex from the best of them; the polynomial by Chebyshev series.
- separable families: seeded random shapes and joints, all improved by Levenberg and Marquardt's method, the best of
  them, hops from them and from the solver's own copy at length. What scores is least squares on the null space of the
  equalities over the law's own nodes, written here.
- piecewise families: seeded random kinks, each improved with the exact gradient of J, again and again; for convex ones
  also the non-negative least squares over a dense set of kinks. What scores is a sum over 32 times as many nodes.

J has a share of the squared terms of the series added, as in the solver: what keeps them from cancelling each other. J
below the resolution of float32, 1e-12 of 1 + E f^2, counts as that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.polynomial import chebyshev
from scipy.optimize import minimize, nnls

from orthoact.interp import FAMILIES, TARGETS, Fit, Gaussian, OrthoactError, fit, get_family, get_target
from orthoact.interp.family import Piecewise, Separable
from orthoact.interp.fit import DERIVATIVE_WEIGHT
from orthoact.interp.kinks import Tables, convexified
from orthoact.interp.problem import Problem
from orthoact.interp.race import ROUNDING, Race

HERE = Path(__file__).parent
FILE = HERE / "reference.json"
SIZES = (9, 17)
STARTS = 48
NODES = 320
"""Nodes in the core of a separable family in the search."""
FIRST = (
    *("gelu", "silu", "gelu_tanh", "mish", "relu6", "elu", "softplus", "tanh", "sigmoid", "quick_gelu", "selu"),
    *("hardswish", "relu2", "leaky_relu", "celu", "laplace", "log_sigmoid", "xielu", "softsign", "tanhshrink"),
)
"""The targets that matter most, in their order; the others follow."""


def problem(family: str, target: str, degree: int) -> Problem:
    return Problem(get_target(target), get_family(family), degree, Gaussian(), "linear", DERIVATIVE_WEIGHT)


def degrees(family: str) -> list[int]:
    """The degrees whose counts of numbers are nearest to `SIZES`."""
    of = FAMILIES[family]
    return [min(of.degrees, key=lambda n: (abs(of.size(n) - size), n)) for size in SIZES]


def floor(p: Problem) -> float:
    return 1e-12 * (1 + float(p.w @ p.f**2))


def ridge(j: float) -> float:
    """The weight of the linear numbers beside an error of J."""
    return max(ROUNDING, 1e-3 * j**0.5)


def cost(p: Problem, result: Fit) -> float:
    """J of a fit as the references have it."""
    if not isinstance(p.family, Separable):
        return fine(p, result) if isinstance(p.family, Piecewise) else result.objective
    j = fine(p, result)  # a core may be steep between the law's own nodes
    linear = p.family.size(p.degree) - p.family.shape(p.degree)
    core = (p.x >= result.lo) & (p.x <= result.hi)
    numbers = [0.0] * linear + list(result.coefficients[linear:])
    basis = np.stack(p.family.jacobian(numbers, (p.x[core] - result.location) / result.scale)[0][:linear])
    shares = basis**2 @ p.w[core] * np.square(result.coefficients[:linear])
    return j + ridge(j) ** 2 * float(shares.sum())


def dense(p: Problem) -> tuple[np.ndarray, ...]:
    """Nodes 32 times as dense as the law's own, their weights, and the target's values and slopes there."""
    step = p.step / 32
    x = p.ends[0] + step * (np.arange(32 * len(p.x)) + 0.5)
    w = np.interp(x, p.x, p.law)
    f, d = p.target(x)
    return x, w / w.sum(), f, d


def fine(p: Problem, copy) -> float:
    """J by a sum over dense nodes, so that it hardly jumps when a kink passes one and nothing hides between them."""
    x, w, f, d = dense(p)
    value, slope = copy(x)
    return float(w @ ((value - f) ** 2 + p.weight * (slope - d) ** 2))


# -- what scores -------------------------------------------------------------------------------------------------------


def score(p: Problem, sides, lo: float, hi: float, rows, weight: float = 0.0, nodes=None) -> float:
    """The least J at given joints for the series with these `rows` (values and slopes of its basis, by x).

    `weight` is that of the linear numbers, `nodes` are others than the law's own.
    """
    x, w, f, d = nodes or (p.x, p.w, p.f, p.d)
    core = (x >= lo) & (x <= hi)
    equalities, wanted, total = [], [], 0.0
    for joint, side, outside in ((lo, sides[0], x < lo), (hi, sides[1], x > hi)):
        level, steep = p.wanted(joint, side)
        gap = level + steep * (x[outside] - joint) - f[outside]
        total += w[outside] @ (gap**2 + p.weight * (steep - d[outside]) ** 2)
        value, slope = rows(np.array([joint]), lo, hi)
        equalities += [value[0], slope[0]][: side.equalities]
        wanted += [level, steep][: side.equalities]
    a, b = np.array(equalities), np.array(wanted)
    size = np.abs(a).max(axis=0) + 1e-300  # columns of one size: the rank is that of the series, not of its units
    u, s, vt = np.linalg.svd(a / size)
    rank = int((s > 1e-10 * s[0]).sum())
    particular, free = (vt[:rank].T @ ((u[:, :rank].T @ b) / s[:rank])) / size, vt[rank:].T / size[:, None]
    if np.abs(a @ particular - b).max() > 1e-7 * (1 + np.abs(b).max()):
        return np.inf
    values, slopes = rows(x[core], lo, hi)
    root, steep = np.sqrt(w[core]), np.sqrt(p.weight * w[core])
    share = np.linalg.norm(root[:, None] * values, axis=0)
    system = np.concatenate([root[:, None] * values, steep[:, None] * slopes, weight * np.diag(share)])
    right = np.concatenate([root * f[core], steep * d[core], np.zeros(len(size))]) - system @ particular
    found = np.linalg.lstsq(system @ free, right, rcond=None)[0]
    return float(total + np.sum((system @ (free @ found) - right) ** 2))


def separable_score(p: Problem, sides, where: dict, weight: float) -> float:
    """The least J of a separable family at the shape and joints of `where`."""
    location, scale, shape = where["location"], where["scale"], list(where["shape"])
    linear = p.family.size(p.degree) - len(shape)

    def rows(x, lo, hi):
        values, slopes = p.family.jacobian([0.0] * linear + shape, (x - location) / scale)
        return np.stack(values[:linear], axis=-1), np.stack(slopes[:linear], axis=-1) / scale

    return score(p, sides, where["lo"], where["hi"], rows, weight, dense(p))


# -- the three searches ------------------------------------------------------------------------------------------------


def search_hermite(p: Problem, sides, random) -> dict:
    derivative = np.stack([np.pad(chebyshev.chebder(e), (0, 1))[: p.degree + 1] for e in np.eye(p.degree + 1)])

    def rows(x, lo, hi):
        values = chebyshev.chebvander((2 * x - lo - hi) / (hi - lo), p.degree)
        return values, values @ derivative.T * 2 / (hi - lo)

    kinks, std = [side.joint for side in sides], p.domain.std

    def at(joints) -> float:
        lo, hi = (joint if kink is None else kink for joint, kink in zip(joints, kinks, strict=True))
        inside = p.ends[0] <= lo and hi <= p.ends[1] and hi - lo > std / 2
        return score(p, sides, lo, hi, rows) if inside else np.inf

    grid = np.concatenate([-np.geomspace(9, 0.1, 30), np.geomspace(0.1, 9, 30)])
    los, his = (grid if kink is None else [kink] for kink in kinks)
    tried = sorted((at((lo, hi)), lo, hi) for lo in los for hi in his if hi - lo > std / 2)
    ends = [minimize(at, t[1:], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-18}) for t in tried[:8]]
    best = min(ends, key=lambda end: end.fun)
    lo, hi = (float(j) if kink is None else kink for j, kink in zip(best.x, kinks, strict=True))
    return {"reference": float(best.fun), "lo": lo, "hi": hi}


def random_shape(name: str, degree: int, random) -> np.ndarray:
    n = degree
    if name == "fourier":
        return random.uniform(0.1, 1.3, 1)
    if name == "fourier-free":
        return np.sort(random.uniform(0.05, random.uniform(1, n), n))
    if name == "rational":  # 1 + Q is a product of factors with random poles
        product = np.ones(1)
        for _ in range(random.integers(1, (n - 1) // 2 + 1)):
            x, y = random.uniform(-1.2, 1.2), np.exp(random.uniform(np.log(0.1), np.log(3)))
            product = np.polymul(product, [1 / (x * x + y * y), -2 * x / (x * x + y * y), 1])
        return np.pad(product[::-1][1:], (0, n - len(product)))
    if name == "rational-sum":
        return np.exp(random.uniform(-4, 5, n - 1)) * (random.uniform(size=n - 1) < random.uniform(0.2, 1))
    raise NotImplementedError(name)


def search_separable(p: Problem, sides, random) -> dict:
    race = Race(p, p.family, sides, NODES)
    centre, spread = p.bend()

    def improve(places: list, steps: int) -> list:
        """J, frame and alpha of each, the best first."""
        frames, alphas = (np.array(part) for part in zip(*places, strict=True))
        state = race.improve(race.evaluate(frames, alphas), steps)
        ends = zip(state.value.tolist(), state.frame, state.alpha, strict=True)
        return sorted(((v, (frame, alpha)) for v, frame, alpha in ends), key=lambda end: end[0])

    def put(frame, shape, shift: float, lo: float, hi: float) -> tuple:
        free = [(lo, hi)[i] for i in race.free]
        return np.array(frame), np.array([*shape, *([shift] if p.family.centred else []), *free])

    def start() -> np.ndarray:
        radii = spread * np.exp(random.uniform(np.log(0.7), np.log(8), 2))
        lo, hi = np.clip(centre - radii[0], *p.ends), np.clip(centre + radii[1], *p.ends)
        lo, hi = (float(j if s.joint is None else s.joint) for j, s in zip((lo, hi), sides, strict=True))
        if hi - lo < p.domain.std:
            hi = lo + p.domain.std if sides[1].joint is None else hi
            lo = hi - p.domain.std if sides[0].joint is None else lo
        frame = (lo + hi) / 2, (hi - lo) / 2 / p.family.reach(p.degree)
        shift = random.choice([0.0, random.uniform(-1, 1)])
        return put(frame, random_shape(p.family.name, p.degree, random), shift, lo, hi)

    def hop(place: tuple, size: float) -> tuple:
        frame, alpha = place
        step = random.normal(size=(2, len(alpha)))
        return frame, alpha * (1 + size * step[0]) + 1e-3 * size * step[1]

    ends = improve([start() for _ in range(STARTS)], 60)[: STARTS // 4]
    own = fit(p.target.name, family=p.family.name, degree=p.degree)
    mine = put((own.location, own.scale), own.coefficients[race.linear :], 0.0, own.lo, own.hi)
    near = improve([hop(mine, size) for size in (0, 0.03, 0.1, 0.1, 0.3, 0.3)], 100)  # the bottom of its own valley?
    for _ in range(4):  # hops from the best
        ends = sorted([*ends, *near], key=lambda end: end[0])[:12]
        places = [place for _, place in ends]
        near = improve(places + [hop(place, size) for place in places for size in (0.1, 0.3)], 60)
    race.rounding = ridge(near[0][0])
    best = {"reference": np.inf}
    for _, ((location, scale), alpha) in improve([mine, *(place for _, place in near[:8])], 400)[:5]:
        lo, hi = (float(v) for v in race.joints(alpha[None])[0])
        if p.family.centred:
            location = location + scale * alpha[race.shapes]
        ends = [(alpha[: race.shapes].tolist(), location, scale, lo, hi)]
        if p.family.relaxed():  # the same without kinks that hide between the nodes
            ends += p.family.settle(*ends[0])
        for shape, location, scale, lo, hi in ends:
            lo, hi = (j if side.joint is None else side.joint for j, side in zip((lo, hi), sides, strict=True))
            where = {"lo": lo, "hi": hi, "location": float(location), "scale": float(scale), "shape": shape}
            inside = p.ends[0] <= lo < hi <= p.ends[1]
            value = separable_score(p, sides, where, race.rounding) if inside else np.inf
            if value < best["reference"]:
                best = {"reference": value} | where
    return best


def search_piecewise(p: Problem, sides, random) -> dict:
    tables, n = Tables(p), p.degree
    std, mean = p.domain.std, p.domain.mean

    def value(kinks, u) -> float:
        def copy(x):
            t = (x - mean) / std
            over = t[:, None] > kinks
            return u[0] + u[1] * t + np.maximum(t[:, None] - kinks, 0) @ u[2:], (u[1] + over @ u[2:]) / std

        return fine(p, copy)

    ends = []
    for i in range(STARTS + 2 * len(p.target.kinks)):
        kinks = random.uniform(-random.uniform(1, 6), random.uniform(1, 6), n)
        own = np.array(p.target.kinks)[: n if i >= STARTS else 0]  # the last starts have the target's own kinks
        kinks[: len(own)] = (own - mean) / std
        end = tables.improve(np.sort(kinks))
        if p.family.convex:
            end = convexified(p, tables, *end)
        ends.append(end)
    longer = []
    for end in sorted(ends, key=lambda end: end[0])[:6]:
        for _ in range(5 if len(end[1]) > 1 else 0):
            again = tables.improve(end[1] + 1e-4 * random.normal(size=len(end[1])))
            if p.family.convex and (again[2][2:] < -1e-9).any():
                continue
            end = min(end, again, key=lambda e: e[0])
        longer.append(end)
    scored = [(value(kinks, u), kinks) for _, kinks, u in longer]
    if p.family.convex:
        scored += [(value(kinks, u), kinks) for kinks, u in dense_convex(tables, n)]
    best, kinks = min(scored, key=lambda s: s[0])
    return {"reference": best, "kinks": [float(k) for k in mean + std * kinks]}


def dense_convex(tables: Tables, n: int) -> list:
    """The best convex function over a dense set of kinks; it counts where it needs no more than n of them."""
    kinks = np.unique(
        np.round(np.r_[np.linspace(-5, 5, 201), [np.clip(k, -8.9, 8.9) for k in (-8, -7, -6, 6, 7, 8)]], 6)
    )
    if None in tables.lines:
        return []
    (b, a), right = tables.lines
    t, over = tables.t, np.maximum(tables.t[:, None] - kinks, 0)
    root, lam = np.sqrt(tables.w), np.sqrt(tables.weight)
    turn = np.stack([np.ones(len(kinks)), -kinks])
    system = np.concatenate([root[:, None] * over, lam * root[:, None] * (t[:, None] > kinks), 1e4 * turn])
    wanted = [root * (tables.f - a - b * t), lam * root * (tables.d - b), 1e4 * np.array([right[0] - b, right[1] - a])]
    q, r = np.linalg.qr(system)
    c, _ = nnls(r, q.T @ np.concatenate(wanted), maxiter=5000)
    keep = c > 1e-9
    if keep.sum() > n:
        return []
    return [(kinks[keep], np.r_[a, b, c[keep]])]


# -- the table ---------------------------------------------------------------------------------------------------------


def key(row: dict) -> tuple:
    return row["family"], row["target"], row["degree"]


def cases():
    ordered = [*FIRST, *(target for target in TARGETS if target not in FIRST)]
    for batch in (ordered[:4], ordered[4:12], ordered[12:20], ordered[20:]):
        for place in range(len(SIZES)):
            for target in batch:
                for family in FAMILIES:
                    yield family, target, degrees(family)[place]


def compare(row: dict) -> dict:
    """The row with J of today's fit and its ratio to the reference."""
    p = problem(row["family"], row["target"], row["degree"])
    try:
        result = fit(row["target"], family=row["family"], degree=row["degree"])
    except OrthoactError as error:
        return row | {"refused": str(error)}
    j, least = cost(p, result), floor(p)
    return row | {"fit": j, "ratio": (j + least) / (row["reference"] + least) if "reference" in row else None}


def reference(family: str, target: str, degree: int) -> dict:
    start = perf_counter()
    row = {"family": family, "target": target, "degree": degree, "numbers": FAMILIES[family].size(degree)}
    row = compare(row)
    if "refused" in row:
        return row
    p = problem(family, target, degree)
    if row["fit"] <= floor(p):  # exact: nothing is better
        return compare(row | {"reference": row["fit"]})
    random = np.random.default_rng([*map(ord, family + target), degree])
    search = search_piecewise if isinstance(p.family, Piecewise) else search_separable
    search = search if isinstance(p.family, Piecewise | Separable) else search_hermite
    found = search(p, p.choose_sides()[0], random)
    return compare(row | found) | {"starts": STARTS, "seconds": round(perf_counter() - start, 1)}


def markdown(rows: list[dict]) -> str:
    done = [row for row in rows if row.get("ratio")]
    lines = [
        "J of `orthoact.fit` over the least J that many random starts find (`benchmarks/reference.py`); below 1 the",
        "solver found the better one.",
        "",
        "| family | numbers | targets | median | worst | within 5 % | worst targets |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for degree in degrees(family):
            mine = sorted((r["ratio"], r["target"]) for r in done if (r["family"], r["degree"]) == (family, degree))
            if not mine:
                continue
            ratios = [ratio for ratio, _ in mine]
            worst = ", ".join(f"{target} {ratio:.2f}" for ratio, target in reversed(mine[-4:]) if ratio > 1.05)
            cells = [family, FAMILIES[family].size(degree), len(mine), f"{np.median(ratios):.3f}", f"{ratios[-1]:.3f}"]
            lines.append("| " + " | ".join(map(str, [*cells, sum(r <= 1.05 for r in ratios), worst])) + " |")
    refused = sorted({f"{row['family']} and {row['target']}" for row in rows if "refused" in row})
    if refused:
        lines += ["", f"Refused, with the reason: {', '.join(refused)}."]
    return "\n".join(lines) + "\n"


def write(rows: list[dict], worst: Path | None) -> None:
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    FILE.with_suffix(".md").write_text(markdown(rows))
    if worst:
        lines = []
        for row in sorted((r for r in rows if r.get("ratio")), key=lambda r: -r["ratio"]):
            where = {k: row[k] for k in ("lo", "hi", "location", "scale", "shape", "kinks") if k in row}
            head = f"{row['family']} {row['target']} {row['degree']} {row['fit']:.4e} {row['reference']:.4e}"
            if row["ratio"] > 1.02:
                lines.append(f"{head} {row['ratio']:.3f} {json.dumps(where)}")
        worst.write_text("\n".join(["family target degree J_fit J_reference ratio where", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=60, help="minutes")
    parser.add_argument("--refit", action="store_true", help="compare today's fits with the references that are there")
    parser.add_argument("--again", nargs="+", metavar="FAMILY:TARGET:DEGREE", default=[], help="search these anew")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--worst", type=Path, help="a text file for the ratios above 1.02, with where the better one is"
    )
    args = parser.parse_args()
    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    if args.refit:
        rows = [compare(row) if "reference" in row else row for row in rows]
        write(rows, args.worst)
        return
    again = {(family, target, int(degree)) for family, target, degree in (case.split(":") for case in args.again)}
    for i, row in enumerate(rows):
        if key(row) in again:
            rows[i] = reference(*key(row))
            write(rows, args.worst)
            print(*key(row), rows[i].get("ratio", "refused"), rows[i].get("seconds", ""), flush=True)
    if again:
        return
    start, there = perf_counter(), {key(row) for row in rows}
    for case in cases():
        if case in there or case[0] not in args.families:
            continue
        if perf_counter() - start > 60 * args.most:
            break
        rows.append(reference(*case))
        write(rows, args.worst)
        row = rows[-1]
        print(*case, row.get("ratio", "refused"), row.get("seconds", ""), flush=True)


if __name__ == "__main__":
    main()
