"""What fifty random layers do to the variance of activations and gradients, by activation.

    python benchmarks/depth.py           # writes benchmarks/depth.md, in a minute

Each layer is x -> W F(x), or x -> W F(LayerNorm(x)) as in a transformer, with N(0, gain / fan_in) weights W and the
forward gain 1 / E[F^2] under N(0, 1). Beside the starts of this package: those of the paper (arXiv:2502.01247) and of
its code, written here from their formulas, and two fixed activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import e, factorial, pi, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orthoact.interp import FAMILIES, Moments, get_family, get_target, moments

HERE = Path(__file__).parent
WIDTH, DEPTH, BATCH, SEEDS = 512, 50, 64, 5
SHOWN = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Uniform:
    """U(-pi, pi), the paper's law for Fourier: equidistant nodes are exact for a periodic series."""

    mean: float = 0.0

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        count = 4096
        return pi * (2 * (np.arange(count) + 0.5) / count - 1), np.full(count, 1 / count)


def hermite(degree: int) -> list[float]:
    """The paper's start: all a_k = 1 but a_0^2 = 1 - 1/n!, times e^(-1/2)."""
    a = [sqrt(1 - 1 / factorial(degree)), *[1.0] * degree]
    return [v / sqrt(e * factorial(k)) for k, v in enumerate(a)]


def fourier(degree: int, root: float) -> list[float]:
    """The paper's start; `root`: sqrt(2) for a_k = b_k = c / k!, 1 for c cos(kx - pi/4) / k!, as its code has it."""
    c = 1 / sqrt(sum(1 / factorial(k) ** 2 for k in range(40)))
    waves = [root * c / sqrt(2) / factorial(k) for k in range(1, degree + 1)]
    return [c * sqrt(1 - 1 / factorial(degree) ** 2), *waves, *waves, 1.0]


def tropical(degree: int) -> list[float]:
    """The paper's start: sqrt(2) / n max_k (k x + 1)."""
    return [sqrt(2) / degree] * (degree + 1) + [sqrt(2) / degree * k for k in range(degree + 1)]


def ours(name: str, degree: int) -> list[float]:
    return get_family(name).variance_preserving(degree)


def rows() -> list[tuple[str, str, list[float]]]:
    """(label, family, numbers) of every series that is compared."""
    found = [(f"{name} {n}", name, ours(name, n)) for name in FAMILIES for n in (3, 5)]
    found.insert(0, ("hermite 2", "hermite", ours("hermite", 2)))
    found += [(f"paper: hermite {n}", "hermite", hermite(n)) for n in (2, 3, 5)]
    found += [(f"paper: fourier {n}, theorem", "fourier", fourier(n, sqrt(2))) for n in (3, 5)]
    found += [("paper: fourier 5, code", "fourier", fourier(5, 1.0))]
    return found + [(f"paper: tropical {n}", "tropical", tropical(n)) for n in (3, 5, 6)]


def propagate(function: Callable[[Tensor], Tensor], gain: float, normed: bool, seed: int) -> tuple[list, list]:
    """Mean squares of each layer's inputs, and of the gradient there over that at the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, WIDTH, generator=generator, requires_grad=True)
    inputs = [x]
    for _ in range(DEPTH):
        weight = torch.randn(WIDTH, WIDTH, generator=generator) * sqrt(gain / WIDTH)
        site = torch.nn.functional.layer_norm(inputs[-1], (WIDTH,)) if normed else inputs[-1]
        inputs.append(function(site) @ weight)
    end = torch.randn(BATCH, WIDTH, generator=generator)
    gradients = torch.autograd.grad((inputs[-1] * end).sum(), inputs)
    size = float((end.double() ** 2).mean())
    return (
        [float((v.detach().double() ** 2).mean()) for v in inputs[1:]],
        [float((g.double() ** 2).mean()) / size for g in reversed(gradients[:-1])],
    )


def cells(values: list[list[float]]) -> list[str]:
    """The median over seeds at the depths shown; "-" where it is beyond float32."""
    at = np.array(values)[:, [depth - 1 for depth in SHOWN]]
    at[~(at < 1e38)] = np.inf
    return [f"{v:.3g}" if np.isfinite(v) else "-" for v in np.median(at, axis=0)]


def table(columns: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]]


def depth_table(normed: bool, seeds: int) -> list[str]:
    lines = []
    series = [(label, get_family(name), numbers) for label, name, numbers in rows()]
    curves = [
        (label, lambda x, f=family, p=numbers: f.evaluate(p, x), family.moments(numbers))
        for label, family, numbers in series
    ]
    for name in ("relu", "gelu"):
        target = get_target(name)
        curves.append((name, target.function, moments(target)))
    for label, function, found in curves:
        runs = [propagate(function, found.forward, normed, seed) for seed in range(seeds)]
        lost = sum(not all(v < 1e38 for v in run[0]) for run in runs)
        lines.append([label, *cells([run[0] for run in runs]), *cells([run[1] for run in runs]), str(lost)])
    return table(["start", *(f"x {d}" for d in SHOWN), *(f"grad {d}" for d in SHOWN), "lost"], lines)


def constants() -> list[str]:
    def line(label: str, found: Moments) -> list[str]:
        values = (found.mean, found.square, found.slope_square, found.chi)
        values += (found.slope_square / found.square, found.chi / found.square)
        return [label, *(f"{v:.4f}" for v in values)]

    lines = [line(label, get_family(name).moments(numbers)) for label, name, numbers in rows()]
    for label, numbers in (("theorem", fourier(5, sqrt(2))), ("code", fourier(5, 1.0))):
        found = moments(get_family("fourier").curve(numbers), Uniform())
        lines.append(line(f"paper: fourier 5, {label}, x ~ U(-pi, pi)", found))
    lines += [line(name, moments(get_target(name))) for name in ("relu", "gelu")]
    return table(["start", "E[F]", "E[F^2]", "E[F'^2]", "chi", "E[F'^2] / E[F^2]", "chi / E[F^2]"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=HERE / "depth.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "# Variance through depth",
        "",
        "Made by `benchmarks/depth.py`. The number after a family is its degree; `paper:` is the start of",
        "arXiv:2502.01247, the rest are those of this package. Weights have the variance 1 / (fan_in E[F^2]).",
        "",
        "## Moments under N(0, 1)",
        "",
        "chi is the slope at q = 1 of the map from the variance q of the inputs to E[F(sqrt(q) x)^2]. With these",
        "weights gradients grow by E[F'^2] / E[F^2] a layer, deviations of the variance from one by chi / E[F^2].",
        "",
        *constants(),
        "",
        "## Plain layers",
        "",
        "`x`: mean square of the inputs after so many layers; `grad`: that of the gradient so many layers below the",
        "end, over the one at the end; `lost`: runs that left float32.",
        f"Width {WIDTH}, batch {BATCH}, medians of {args.seeds} seeds.",
        "",
        *depth_table(False, args.seeds),
        "",
        "## With LayerNorm before each activation",
        "",
        *depth_table(True, args.seeds),
    ]
    args.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
