"""How well each family copies each target at two sizes, under the default law: docs/targets.md.

python benchmarks/targets.py                # writes docs/targets.md
OMP_NUM_THREADS=1 python benchmarks/targets.py --seconds     # milliseconds of a fit instead, the least of five
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from orthoact.interp import FAMILIES, TARGETS, OrthoactError, fit
from orthoact.interp.family import Family

FILE = Path(__file__).parent.parent / "docs" / "targets.md"
SIZES = (9, 17)
TIMED = ("gelu", "silu", "relu", "tanh", "mish", "selu")

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
    """Milliseconds of a fit for each family, size and target of `TIMED`."""
    lines = ["| family, numbers | " + " | ".join(TIMED) + " |", "|---" * (1 + len(TIMED)) + "|"]
    for family in FAMILIES.values():
        for size in SIZES:
            n, cells = degree(family, size), []
            for target in TIMED:
                try:
                    best = min(fit(target, family=family.name, degree=n).seconds for _ in range(5))
                    cells.append(f"{1e3 * best:.1f}")
                except OrthoactError:
                    cells.append("refused")
            lines.append(f"| {family.name}, {family.size(n)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", action="store_true", help="print milliseconds of a fit and write nothing")
    if parser.parse_args().seconds:
        print(seconds())
        return
    parts = [HEAD, *(f"## About {size} numbers\n\n{table(size)}\n" for size in SIZES)]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
