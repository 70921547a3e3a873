"""How long an activation takes and what it keeps for backward, beside the GELU that it replaces and other packages'.

    python benchmarks/activation.py --quick                 # hermite 8 alone, one minute
    pip install --no-deps --target /tmp/peers torchortho==0.1.2 rational-activations==0.2.0
    python benchmarks/activation.py --peers /tmp/peers      # everything: writes benchmarks/activation.md
    python benchmarks/activation.py --family fourier        # renew the rows of some families

All that a table compares is timed in turn in one process: a round calls each once, forward without gradients and then
forward and backward, on the next of several inputs that together are larger than a core's cache. Medians over the
rounds, as ratios to the eager `F.gelu` of the same rounds. Everything is called three times before the first round, so
that kernels are made and caches are filled, and memory once taken is kept (`keep_memory`). torchortho is under the
GPL: it is imported from the folder of `--peers` and by this benchmark alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from orthoact.interp import FAMILIES, Activation, engine, fit

HERE = Path(__file__).parent
FILE = HERE / "activation.json"
SHAPE = 8, 128, 3072
DEGREES = 4, 8, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INPUTS = 4

BARS = {
    ("hermite 8", "float32", "eager"): (0.75, 0.95),
    ("hermite 8", "bfloat16", "eager"): (1.2, 1.4),
    ("fourier 4", "float32", "eager"): (2.0, 2.0),
    ("rational 5", "float32", "eager"): (2.0, 2.0),
    ("tropical-rational 8", "float32", "eager"): (2.0, 2.0),
    ("hermite 8, 3072 groups", "float32", "eager"): (1.2, 1.6),
}
"""The most that forward, and forward and backward, may take of the eager GELU's time."""


@dataclass
class Contestant:
    """One function of the input, by the way in which it is computed."""

    name: str
    path: str
    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    saved: float = 0.0

    def call(self, x: Tensor) -> Tensor:
        if self.path in engine.PATHS:
            with engine.using(self.path):
                return self.function(x)
        return self.function(x)

    def run(self, x: Tensor, grad: Tensor) -> tuple[float, float]:
        """Seconds of a forward pass, and of forward and backward."""
        with torch.no_grad():
            start = perf_counter()
            self.call(x)
            forward = perf_counter() - start
        x = x.detach().requires_grad_()
        start = perf_counter()
        with engine.using(self.path) if self.path in engine.PATHS else torch.enable_grad():
            torch.autograd.grad(self.function(x), [x, *self.parameters], grad)
        return forward, perf_counter() - start

    def weigh(self, x: Tensor) -> None:
        """Count what is kept for backward, as a multiple of the input."""
        kept: dict[int, int] = {}
        x = x.detach().requires_grad_()

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.call(x)
        self.saved = sum(kept.values()) / x.nbytes


def timed(contestants: list[Contestant], dtype: torch.dtype, rounds: int) -> None:
    """Time all in turn, in another order each round: what runs before decides what is in the cache."""
    shuffle = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(INPUTS)]
    grads = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(INPUTS)]
    for contestant in contestants:
        contestant.weigh(inputs[0])
        for _ in range(3):
            contestant.run(inputs[1], grads[1])
    for i in range(rounds):
        x, grad = inputs[i % INPUTS], grads[i % INPUTS]
        for contestant in shuffle.sample(contestants, len(contestants)):
            forward, both = contestant.run(x, grad)
            contestant.forward.append(forward)
            contestant.both.append(both)


def gelus() -> list[Contestant]:
    """The yardstick, itself a second time for the noise, and compiled."""
    compiled = torch.compile(F.gelu, fullgraph=True)
    return [
        Contestant("F.gelu", "torch eager", F.gelu),
        Contestant("F.gelu again", "torch eager", F.gelu),
        Contestant("F.gelu", "torch compiled", compiled),
        Contestant("x + 1, the memory alone", "torch eager", lambda x: x + 1),
    ]


def ours(family: str, degree: int, groups: int | None = None) -> list[Contestant]:
    act = Activation.from_fit(fit("gelu", family=family, degree=degree), groups=groups)
    name = f"{family} {degree}" + ("" if groups is None else f", {groups} groups")
    return [Contestant(name, path, act, [act.theta]) for path in ("eager", "torch")]


def module(name: str, made: nn.Module) -> Contestant:
    return Contestant(name, "theirs", made, list(made.parameters()))


class Kat(nn.Module):
    """The rational of Kolmogorov-Arnold transformers, P / (1 + |Q|) of degrees (5, 4), in plain torch.

    From equation 13 of arXiv:2409.10594: one numerator, a denominator for each of 8 groups of channels.
    """

    def __init__(self, groups: int = 8):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([-0.0012, 0.5, 0.34, 0.096, 0.02, 0.001]))
        self.q = nn.Parameter(torch.tensor([0.01, 0.2, 0.001, 0.02]).expand(groups, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        z = x.float().unflatten(-1, (len(self.q), -1))
        above = self.p[5]
        for p in self.p[:5].flip(0).unbind():
            above = above * z + p
        below = self.q[:, 3:]
        for j in (2, 1, 0):
            below = below * z + self.q[:, j : j + 1]
        return (above / (1 + (below * z).abs())).flatten(-2).to(x.dtype)


def peers(folder: str | None) -> tuple[list[Contestant], list[str]]:
    """Other packages' modules, and a sentence for each that is not there."""
    made, missing = [], []
    if folder:
        sys.path.append(folder)
    try:
        from torchortho import FourierActivation, HermiteActivation  # pyright: ignore[reportMissingImports]

        made += [module(f"torchortho Hermite {n}", HermiteActivation(n)) for n in (3, 8)]
        made.append(module("torchortho Fourier 4", FourierActivation(4)))
    except ImportError:
        missing.append("torchortho is not installed and was left out.")
    try:
        from rational.torch import Rational  # pyright: ignore[reportMissingImports]

        made.append(module("rational_activations (5, 4)", Rational("gelu", (5, 4), cuda=False, version="B")))
    except ImportError:
        missing.append("rational_activations is not installed and was left out.")
    kat = Kat()
    made.append(module("KAT (5, 4), 8 groups, plain torch", kat))
    made.append(Contestant(f"{made[-1].name}", "torch compiled", torch.compile(kat), list(kat.parameters())))
    return made, missing


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = quantiles(values, n=4)
    return (high - low) / 2 / middle


def rows(contestants: list[Contestant], dtype: str) -> list[dict]:
    base = contestants[0]
    return [
        {
            "name": each.name,
            "path": each.path,
            "dtype": dtype,
            "forward": median(each.forward) / median(base.forward),
            "both": median(each.both) / median(base.both),
            "spread": [spread(each.forward), spread(each.both)],
            "ms": [1e3 * median(each.forward), 1e3 * median(each.both)],
            "saved": each.saved,
        }
        for each in contestants
    ]


def markdown(stored: dict) -> str:
    noise = [row for table in stored["tables"].values() for row in table if row["name"] == "F.gelu again"]
    off = max(abs(row[key] - 1) for row in noise for key in ("forward", "both"))
    ms = next(row["ms"] for table in stored["tables"].values() for row in table if row["dtype"] == "float32")
    lines = [
        f"Input {' x '.join(map(str, SHAPE))}, {stored['threads']} threads, {stored['machine']}, torch",
        f"{stored['torch']}. Time as a ratio to eager `F.gelu` in the same rounds (float32: {ms[0]:.1f} ms "
        f"forward, {ms[1]:.1f} ms",
        "forward and backward); medians, with half the distance between the quartiles. The same GELU timed a second",
        f"time came out within {100 * off:.0f} % of itself. Kept for backward: as a multiple of the input. Bars are "
        "the project's own.",
        *stored["missing"],
        "",
        "| | path | dtype | forward | forward + backward | kept | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for table in stored["tables"].values():
        for row in table:
            if row["name"].startswith(("F.gelu", "x + 1")) and table is not next(iter(stored["tables"].values())):
                continue
            bar = BARS.get((row["name"], row["dtype"], row["path"]))
            cells = [
                f"{row[key]:.2f} ± {row[key] * s:.2f}"
                for key, s in zip(("forward", "both"), row["spread"], strict=True)
            ]
            shown = "" if bar is None else f"{bar[0]:g} / {bar[1]:g}"
            lines.append(
                f"| {row['name']} | {row['path']} | {row['dtype']} | {' | '.join(cells)} | {row['saved']:.2f} "
                f"| {shown} |"
            )
    return "\n".join(lines) + "\n"


def keep_memory() -> None:
    """Let the C library keep what is freed: else who comes next has its pages made anew, which takes as long again.

    Nothing is done where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, 2**30)


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            flags = "AVX-512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else ""
            return f"{line.split(':')[1].strip()} {flags}".strip()
    return platform.processor() or platform.machine()


def tables(args: argparse.Namespace) -> dict[str, tuple[str, Callable[[], list[Contestant]]]]:
    """What is timed together."""
    found: dict[str, tuple[str, Callable[[], list[Contestant]]]] = {}
    if args.quick:
        found["quick"] = ("float32", lambda: ours("hermite", 8))
        return found
    for dtype in args.dtype:
        for name in args.family:
            usual = (4, 5, 8) if name == "rational" else DEGREES
            degrees = [n for n in args.degrees or usual if n in FAMILIES[name].degrees]

            def make(name: str = name, degrees: list[int] = degrees) -> list[Contestant]:
                groups = ours("hermite", 8, 16) + ours("hermite", 8, SHAPE[-1]) if name == "hermite" else []
                return [each for n in degrees for each in ours(name, n)] + groups

            found[f"{name} {dtype}" + (f" {args.degrees}" if args.degrees else "")] = dtype, make
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hermite 8 in float32 alone; nothing is written")
    parser.add_argument("--peers", help="a folder with torchortho and rational_activations")
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--degrees", type=int, nargs="+", help="4, 8 and 16; 4, 5 and 8 for rational")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_memory()
    about = {"machine": machine(), "threads": args.threads, "torch": torch.__version__.split("+")[0]}
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"tables": {}, "missing": []}
    stored |= about
    for key, (dtype, make) in tables(args).items():
        contestants = gelus() + make()
        timed(contestants, DTYPES[dtype], args.rounds)
        stored["tables"][key] = show(rows(contestants, dtype))
        if not args.quick and not args.dry:
            write(stored)
    if args.peers and not args.quick:
        made, stored["missing"] = peers(args.peers)
        contestants = gelus() + made + ours("hermite", 3) + ours("rational", 5)
        timed(contestants, torch.float32, max(args.rounds // 8, 3))
        stored["tables"]["peers"] = show(rows(contestants, "float32"))
    if not args.quick and not args.dry:
        write(stored)


def write(stored: dict) -> None:
    FILE.write_text(json.dumps(stored, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(markdown(stored))


def show(found: list[dict]) -> list[dict]:
    for row in found:
        print(
            f"{row['name']:36} {row['path']:15} {row['dtype']:9} {row['forward']:8.2f} {row['both']:8.2f} "
            f"±{row['spread'][0]:.2f} ±{row['spread'][1]:.2f} {row['ms'][0]:8.2f} {row['ms'][1]:8.2f} ms "
            f"{row['saved']:6.2f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
