"""How well each family copies each target at two sizes, under the default law: docs/targets.md.

python benchmarks/targets.py                # writes docs/targets.md
OMP_NUM_THREADS=1 python benchmarks/targets.py --seconds     # only the milliseconds at its end
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from statistics import median
from timeit import repeat

from orthoact.interp import FAMILIES, TARGETS, OrthoactError, fit
from orthoact.interp.family import Family

FILE = Path(__file__).parent.parent / "docs" / "targets.md"
SIZES = (9, 17)
TIMED = {"hermite": (4, 8, 16), "fourier": (1, 2, 3, 7, 8, 12, 16)}
"""Degrees to be timed where these are not those of the tables."""
BARS = {"hermite": 10, "fourier": 10}
"""Milliseconds that a fit may take; 300 in the other families."""

HEAD = f"""# What each family makes of each target

Root mean square errors of value / slope of `orthoact.fit(target, family=..., degree=...)` under its default law: nine
tenths N(0, 1), one tenth N(0, 4). Each family has about {SIZES[0]} learnable numbers in the first table and about
{SIZES[1]} in the second; their heads have the degree and the count. `exact` is below 1e-9, for joints or kinks of the
copy sit on those of the target. Made by `python benchmarks/targets.py`; a test makes rows of it again.

*convex*: a tropical polynomial is convex. It cannot have the asymptotes of a target whose slope falls from left to
right, nor two parallel ones, and `fit` refuses these. Numbers in brackets: the asymptotes are convex, the target is
not, and the copy is the nearest convex function with these asymptotes. GELU's error is then 0.17, for ReLU is the
nearest; without exact tails it is at least 0.085, half of the depth of GELU's dip, since a convex function that has a
bound on the left never falls. Use tropical-rational for them.

*tangents*: the target has no affine asymptote on at least one side (relu2, sqrtsoftplus, softsign, xielu), so tails are
its tangents at the joints, and `Fit.holds` has the range in which the copy holds. hardshrink jumps, which no continuous
copy can.
"""

PASSES = 5
"""How often all fits are timed, minutes apart: a machine may be slow for a while."""

COST = "## What a fit costs\n\n"
CLOCK = f"""Milliseconds of one core, the least of {PASSES} passes over all fits: for GELU, and the median and the most
over all targets. Made by `OMP_NUM_THREADS=1 python benchmarks/targets.py --seconds`. Python's `sum(range(1000))` took
{{:.0f}} microseconds meanwhile."""


def degree(family: Family, size: int) -> int:
    """The degree whose count of numbers is nearest to `size`."""
    return min(family.degrees, key=lambda n: (abs(family.size(n) - size), n))


def number(value: float) -> str:
    return "exact" if value < 1e-9 else f"{value:.1e}".replace("e-0", "e-")


def cell(target: str, family: Family, size: int) -> str:
    try:
        result = fit(target, family=family.name, degree=degree(family, size))
    except OrthoactError as refusal:
        if "convex" not in str(refusal):
            raise
        return "convex"
    values = [number(result.value_rms), number(result.slope_rms)]
    text = values[0] if values[0] == values[1] else " / ".join(values)
    bent = family.name == "tropical" and text != "exact" and "not convex" in result.reason
    return f"({text})" if bent else text


def row(target: str, size: int) -> str:
    return f"| {target} | " + " | ".join(cell(target, family, size) for family in FAMILIES.values()) + " |"


def table(size: int) -> str:
    heads = [f"{f.name} {degree(f, size)} ({f.size(degree(f, size))})" for f in FAMILIES.values()]
    lines = ["| target | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for target in TARGETS:
        lines.append(row(target, size))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def seconds() -> str:
    """Milliseconds of a fit over all targets, for each family and size, beside what it may take."""
    rows = [(f, n) for f in FAMILIES.values() for n in TIMED.get(f.name, [degree(f, size) for size in SIZES])]
    taken: dict[tuple[str, int], dict[str, float]] = {(family.name, n): {} for family, n in rows}
    yardstick = []
    for _ in range(PASSES):
        yardstick += repeat("sum(range(1000))", number=1000)  # seconds for a thousand are milliseconds for one
        for family, n in rows:
            found = taken[family.name, n]
            for target in TARGETS:
                try:
                    ms = 1e3 * fit(target, family=family.name, degree=n).seconds
                except OrthoactError:
                    continue
                found[target] = min(ms, found.get(target, ms))
    lines = [CLOCK.format(1e3 * min(yardstick)), ""]
    lines += ["| family | numbers | GELU | median | most | bar | over it |", "|---" * 7 + "|"]
    for family, n in rows:
        found, bar = taken[family.name, n], BARS.get(family.name, 300)
        most, over = max(found, key=found.__getitem__), sum(ms > bar for ms in found.values())
        cells = [family.name, f"{family.size(n)}", f"{found['gelu']:.1f}", f"{median(found.values()):.1f}"]
        cells += [f"{found[most]:.1f} ({most})", f"{bar}", f"{over} of {len(found)}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", action="store_true", help="measure only the milliseconds at its end")
    before, _, clock = (FILE.read_text() if FILE.exists() else "").partition(COST)
    if parser.parse_args().seconds:
        FILE.write_text(f"{before}{COST}{seconds()}\n")
        return
    parts = [HEAD, *(f"## About {size} numbers\n\n{table(size)}\n" for size in SIZES)]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(parts) + (f"\n{COST}{clock}" if clock else ""))


if __name__ == "__main__":
    main()
