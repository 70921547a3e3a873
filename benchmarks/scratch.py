"""Training from scratch, as in the paper: each family from its variance-preserving start, against GELU.

    python tests/real_models.py                          # fetch the data (third parties' uploads)
    python benchmarks/scratch.py --models gpt2           # writes benchmarks/scratch-gpt2.json and scratch.md
    python benchmarks/scratch.py --jobs 16               # all of it; a GPU is taken where there is one; resumable

Each cell is a run of a shipped recipe, scratch-gpt2 or scratch-convnext with its offline data, by the package's own
loop: the same weights, steps and data for every family, the same rates, the best on the validation split of the first
seed for the others.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from cells import Cell, Table, device, spread
from downstream import figure, sort, worth

from orthoact.finetune.compare import measured
from orthoact.finetune.progress import Progress
from orthoact.finetune.recipe import Recipe, read

HERE = Path(__file__).parent
MODELS = {
    "gpt2": ("a GPT-2 of 4 layers, 96 wide, on Jane Austen", "scratch-gpt2", {}),
    "convnext": (
        "a ConvNeXt of 5 blocks on Fashion-MNIST, 2,000 images",
        "scratch-convnext",
        {
            "train.max_steps": 300,
            "data.validation_limit": 1000,
            "data.test_limit": 2000,
            "train.evaluation_batch_size": 100,
        },
    ),
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)


def recipe_of(name: str, steps: int | None = None) -> Recipe:
    _, recipe, keys = MODELS[name]
    return read(recipe, offline=True).override(keys | ({"train.max_steps": steps} if steps else {}))


def run(name: str, steps: int | None, row: str, rate: float, seed: int) -> Cell:
    """The figures of a cell."""
    recipe = recipe_of(name, steps)
    recipe = recipe.override({**recipe.compare.rows[row], "train.learning_rate": rate, "seed": seed})
    with tempfile.TemporaryDirectory() as folder, Progress(recipe, Accelerator(), quiet=True) as bar:
        return measured(recipe, Path(folder), None, bar)


def table_of(name: str, folder: Path, steps: int | None = None) -> Table:
    recipe = recipe_of(name, steps)
    rows, file = tuple(recipe.compare.rows), folder / f"scratch-{name}.json"
    return Table(file, rows, RATES, SEEDS, partial(run, name, steps), partial(worth, recipe.task))


def markdown(folder: Path) -> str:
    """The tables of what is there."""
    lines = ["# Training from scratch", "", *(__doc__ or "").split("\n\n")[-1].strip().split("\n")]
    for name, (title, *_) in MODELS.items():
        table, recipe = table_of(name, folder), recipe_of(name)
        cells = table.cells()
        if not cells:
            continue
        metric = "perplexity" if recipe.task == "causal-lm" else "accuracy"
        ran = ", ".join(sorted({c["device"] for c in cells}))
        lines += ["", f"### {title[0].upper()}{title[1:]}", ""]
        lines += [f"{recipe.train.max_steps} steps of {recipe.train.batch_size}. Ran on {ran}; `--models {name}`.", ""]
        lines += [
            f"| activation | numbers | rate | seeds | held-out loss | held-out {metric} | runs that diverged | s | MB |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in table.rows:
            found, note = best_of(row, cells, table)
            if not found:
                continue
            good = [c for c in found if "failed" not in c and "diverged" not in c]
            every = [c for c in cells if c["row"] == row]
            lost = sum("diverged" in c for c in every)
            if not good:
                lines.append(f"| {row} | | | | | diverged at every rate | {lost} of {len(every)} | | |")
                continue
            figures = [spread([c["test"][key] for c in good], 4) for key in ("loss", metric)]
            cost = (
                f"{sum(c['seconds'] for c in good) / len(good):.0f} | {max(c['peak_memory'] for c in good) / 1e6:.0f}"
            )
            numbers = f"{good[0]['trainable']:,} | {good[0]['rate']:g}{note} | {len(good)}"
            lines.append(f"| {row} | {numbers} | {' | '.join(figures)} | {lost} of {len(every)} | {cost} |")
        lines += ["", f"Validation {metric} at every rate, first seed:", ""]
        for row in table.rows:
            told = sort(c for c in cells if c["row"] == row and c["seed"] == SEEDS[0])
            lines.append(f"- {row}: " + ", ".join(f"{c['rate']:g}: {figure(c, metric)}" for c in told))
    return "\n".join(lines) + "\n"


def best_of(row: str, cells: list[Cell], table: Table) -> tuple[list[Cell], str]:
    """The cells of a row at its best rate, and a remark where not all rates were tried."""
    mine = [c for c in cells if c["row"] == row]
    rate, note = table.best(cells, row), ""
    if rate is None:
        tried = [c for c in mine if c["seed"] == SEEDS[0] and "failed" not in c]
        rate = max(tried, key=table.worth)["rate"] if tried else None
        note = f" (of {len(tried)} tried)"
    return [c for c in mine if c["rate"] == rate], note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    parser.add_argument("--output", type=Path, default=HERE, help="folder")
    args = parser.parse_args()
    print(f"on {device()}")
    for name in args.models:
        table_of(name, args.output, args.steps).fill(args.jobs)
    (args.output / "scratch.md").write_text(markdown(args.output))
    print((args.output / "scratch.md").read_text())


if __name__ == "__main__":
    main()
