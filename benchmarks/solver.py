"""The solver beside the one of torchortho 0.1.2, the paper's library: GELU, Hermite series of degree 3 to 16, one run.

    pip install --no-deps --target /tmp/torchortho torchortho==0.1.2
    python benchmarks/solver.py /tmp/torchortho          # writes benchmarks/solver.md

torchortho is under the GPL and is imported by this benchmark alone, from the folder that it is given. Its `act_init`
runs Adam on fresh random points, up to 40,000 steps or a loss of 1e-4, while the module is made; here it is stopped
after `--seconds` for each degree and asked for the best numbers it has seen until then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import process_time

import numpy as np
import torch

from orthoact.interp import fit, get_target
from orthoact.interp.domains import Uniform

HERE = Path(__file__).parent
GELU = get_target("gelu")


class TimeIsUp(Exception):
    """Raised by the function that torchortho fits."""


def their_fit(degree: int, seconds: float):
    """Its module for GELU, the seconds it took, and whether it ended by itself."""
    from torchortho import HermiteActivation  # pyright: ignore[reportMissingImports]

    start = process_time()

    def gelu(x: torch.Tensor) -> torch.Tensor:
        if process_time() - start > seconds:
            raise TimeIsUp
        return torch.nn.functional.gelu(x)

    try:
        return HermiteActivation(degree, act_init=gelu, load_cached=False), process_time() - start, True
    except TimeIsUp as stop:
        took, frame = process_time() - start, stop.__traceback__
        while frame and "coefficients_min" not in frame.tb_frame.f_locals:
            frame = frame.tb_next
        assert frame is not None
        module = HermiteActivation(degree)
        with torch.no_grad():
            module.coefficients.copy_(frame.tb_frame.f_locals["coefficients_min"])
        return module, took, False


def evaluate(module: torch.nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes in float64."""
    points = torch.tensor(x, requires_grad=True)
    values = module.double()(points)
    (slopes,) = torch.autograd.grad(values.sum(), points)
    return values.detach().numpy(), slopes.numpy()


def errors(copy, degree: int) -> tuple[float, float, float]:
    """Value and slope RMS under N(0, 1), value RMS on U[-sqrt(n), sqrt(n)]."""
    z = np.linspace(-8, 8, 4001)
    w = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    value, slope = (got - wanted for got, wanted in zip(copy(z), GELU(z), strict=True))
    u = np.linspace(-1, 1, 2001) * degree**0.5
    own = copy(u)[0] - GELU(u)[0]
    return float(w @ value**2) ** 0.5, float(w @ slope**2) ** 0.5, float(np.mean(own**2)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where torchortho 0.1.2 is installed")
    parser.add_argument("--degrees", type=int, nargs="+", default=list(range(3, 17)))
    parser.add_argument("--seconds", type=float, default=12, help="the most that torchortho gets for one degree")
    parser.add_argument("--output", type=Path, default=HERE / "solver.md")
    args = parser.parse_args()
    sys.path.insert(0, args.folder)
    torch.manual_seed(0)
    lines = [
        "GELU by Hermite series. Root mean square errors of value and slope under N(0, 1), and of the value on",
        "torchortho's own domain U[-sqrt n, sqrt n]; seconds of one core. orthoact twice: with its defaults (another",
        "law, straight tails), and without tails for U[-sqrt n, sqrt n], the problem that torchortho solves.",
        f"torchortho 0.1.2 was stopped after {args.seconds:g} s where it had not ended by itself (*), with the best",
        "that it had found.",
        "",
        "| n | | value, N(0, 1) | slope, N(0, 1) | value, U | seconds |",
        "|---|---|---|---|---|---|",
    ]
    fit("gelu")  # imports and caches
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    for degree in args.degrees:
        end = degree**0.5
        bare = {"domain": Uniform(-end, end), "tails": "none", "derivative_weight": 1.0}
        rows = []
        for name, options in (("orthoact", {}), ("orthoact, U, no tails", bare)):
            start = process_time()
            result = fit("gelu", degree=degree, **options)
            rows.append((name, *errors(result, degree), f"{process_time() - start:.3f}"))
        module, seconds, ended = their_fit(degree, args.seconds)
        mine = errors(lambda x, module=module: evaluate(module, x), degree)
        rows.append(("torchortho", *mine, f"{seconds:.1f}{'' if ended else ' *'}"))
        for name, value, slope, own, took in rows:
            lines.append(f"| {degree} | {name} | {value:.1e} | {slope:.1e} | {own:.1e} | {took} |")
            print(lines[-1], flush=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
