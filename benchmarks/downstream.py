"""Learnable activations beside norms, biases and LoRA on downstream tasks, every row of a recipe treated alike.

    python tests/real_models.py                        # fetch the models and data (third parties' uploads)
    python benchmarks/downstream.py --tasks gpt2       # writes benchmarks/downstream-gpt2.{json,png} and downstream.md
    python benchmarks/downstream.py --jobs 16          # all of them; a GPU is taken where there is one; resumable

Each cell is a run of a recipe by the package's own loop. All rows of a task have the same steps, data, seeds and rates:
every rate with the first seed, the best on the validation split with the others. A classifier's head trains in every
row, at its own fixed rate. Groups are so many that they are as many numbers as LoRA with r=1.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from cells import Cell, Table, device, spread

from orthoact.finetune.compare import measured, plot, summary
from orthoact.finetune.evaluate import BEST
from orthoact.finetune.progress import Progress
from orthoact.finetune.recipe import Recipe, read

HERE = Path(__file__).parent
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """A recipe and what of it changes."""

    title: str
    recipe: str
    same: dict[str, Any]
    groups: int
    """With degree 7, as many numbers as LoRA with r=1 has."""
    late: str
    """The activations of the second half of the layers."""
    extra: bool = False
    """Whether to look at what makes groups gain."""
    without: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS


TASKS = {
    "dinov2": Task(
        "DINOv2 ViT-S (timm) on Fashion-MNIST at 70 px, 1,500 training images",
        "image-dinov2",
        {
            "data.validation_limit": 1000,
            "data.test_limit": 2000,
            "data.augment": False,
            "train.max_steps": 280,
            "train.evaluation_batch_size": 100,
            "train.lora_targets": ["attn.qkv"],
        },
        groups=192,
        late="blocks.[6-9]*,blocks.1[01]*",
        extra=True,
    ),
    "minilm": Task(
        "all-MiniLM-L6-v2 on SpamAssassin, 128 tokens, 1,000 training mails",
        "text-minilm",
        {"data.train_limit": 1000, "train.max_steps": 190, "train.evaluation_batch_size": 100},
        groups=192,
        late="*layer.[345].*",
    ),
    "gpt2": Task(
        "the demo GPT-2 on Moby Dick, which it has never seen, windows of 256 tokens",
        "lm-gpt2",
        {
            "data.path": "~/.cache/orthoact-tests/moby-dick",
            "data.eos": True,
            "data.test_limit": None,
            "train.evaluate_every": None,
            "train.dropout": False,
        },
        groups=64,
        late="transformer.h.[345].*",
        extra=True,
        without=("head",),
        rates=(*RATES, 1e-1),
    ),
}


def rows(task: Task) -> dict[str, dict[str, Any]]:
    """The rows of a task by name, with the keys that each changes."""
    gelu = {"convert.family": "none"}
    new = {"convert.family": "hermite", "convert.degree": 7}
    some = new | {"convert.groups": task.groups, "train.what": "activations"}
    few = f"{task.groups} groups"
    found = {
        "head": gelu | {"train.what": "head"},
        "norms": gelu | {"train.what": "norms"},
        "biases": gelu | {"train.what": "bias"},
        "LoRA r=1": gelu | {"train.what": "lora", "train.lora_rank": 1},
        "LoRA r=8": gelu | {"train.what": "lora", "train.lora_rank": 8},
        "activations, one per layer": some | {"convert.groups": None},
        f"activations, {few}": some,
        "activations, per channel": some | {"convert.groups": "per-channel"},
        f"activations, {few}, + norms": some | {"train.what": "activations+norms"},
        f"LoRA r=1 + activations, {few}": some | {"train.what": "lora+activations", "train.lora_rank": 1},
        "everything": gelu | {"train.what": "all"},
    }
    if task.extra:
        found |= {
            "activations, 16 groups": some | {"convert.groups": 16},
            f"activations, {few}, degree 4": some | {"convert.degree": 4},
            f"activations, {few}, degree 12": some | {"convert.degree": 12},
            f"activations, {few}, tails fixed": some | {"train.tails": "fixed"},
            f"activations, {few}, second half of the layers": some | {"convert.include": task.late.split(",")},
            f"activations, {few}, rational 4": some | {"convert.family": "rational", "convert.degree": 4},
        }
    return {name: keys for name, keys in found.items() if name not in task.without}


def recipe_of(name: str, steps: int | None = None) -> Recipe:
    """The recipe of a task, without its rows."""
    task = TASKS[name]
    keys = {
        **task.same,
        "compare.rows": rows(task),
        "compare.learning_rates": list(RATES),
        "compare.seeds": list(SEEDS),
    }
    return read(task.recipe, offline=True).override(keys | ({"train.max_steps": steps} if steps else {}))


def run(name: str, steps: int | None, row: str, rate: float, seed: int) -> Cell:
    """The figures of a cell."""
    recipe = recipe_of(name, steps)
    recipe = recipe.override({**recipe.compare.rows[row], "train.learning_rate": rate, "seed": seed})
    with tempfile.TemporaryDirectory() as folder, Progress(recipe, Accelerator(), quiet=True) as bar:
        return measured(recipe, Path(folder), None, bar)


def worth(task: str, cell: Cell) -> float:
    """The validation figure that a rate is chosen by."""
    if "diverged" in cell:
        return -float("inf")
    name, sign = BEST[task]
    return sign * cell["validation"][name]


def table_of(name: str, folder: Path, steps: int | None) -> Table:
    recipe = recipe_of(name, steps)
    file = folder / f"downstream-{name}.json"
    tell = partial(worth, recipe.task)
    task = TASKS[name]
    return Table(file, tuple(recipe.compare.rows), task.rates, task.seeds, partial(run, name, steps), tell)


def picture(name: str, folder: Path) -> None:
    """The figure of a task."""
    recipe, table = recipe_of(name), table_of(name, folder, None)
    told = [row for row, cells in table.chosen(table.cells())]
    cells = [as_compared(c) for _, cells in table.chosen(table.cells()) for c in cells if "failed" not in c]
    if told:
        plot(list(summary(cells, recipe)), recipe, folder / f"downstream-{name}.png")


def as_compared(cell: Cell) -> Cell:
    return {**cell, "learning_rate": cell["rate"]}


def markdown(folder: Path) -> str:
    """The tables of what is there."""
    lines = ["# Learnable activations on downstream tasks", "", *(__doc__ or "").split("\n\n")[-1].strip().split("\n")]
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    lines += [f"Rates: {rates}. ± is the deviation over the seeds. Seconds are those of runs that"]
    lines += ["shared a machine with up to thirty others: they rank nothing. Beyond an edge of the grid may be better."]
    lines += ["", *overview(folder)]
    for name, task in TASKS.items():
        table, recipe = table_of(name, folder, None), recipe_of(name)
        cells = table.cells()
        chosen = dict(table.chosen(cells))
        if not chosen:
            continue
        causal = recipe.task == "causal-lm"
        metric = "perplexity" if causal else "accuracy"
        train, data = recipe.train, recipe.data
        parts = [
            f"{train.max_steps} steps of {train.batch_size}",
            f"{train.schedule} schedule, clipped at {train.clip:g}",
        ]
        parts += [] if causal else [f"head at {train.head_learning_rate:g}"]
        parts += [f"measured on {data.test_limit or 'all'} of the test split"]
        ran = ", ".join(sorted({c["device"] for c in cells}))
        lines += ["", f"### {task.title}", "", f"{'; '.join(parts)}. Ran on {ran}; `--tasks {name}`.", ""]
        lines += [
            f"| what trains | numbers | rate | seeds | {metric} before | validation | **{metric}, test** | loss, test"
        ]
        lines[-1] += " | s | MB |"
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for row, found in chosen.items():
            good = [c for c in found if "failed" not in c and "diverged" not in c]
            if not good:
                lines.append(f"| {row} | | | | failed or diverged at every rate | | | | | |")
                continue
            at = "" if row == "head" else f"{good[0]['rate']:g}{' (edge)' * edged(good[0]['rate'], task)}"
            digits = 3 if causal else 4
            figures = [spread([c[part][metric] for c in good], digits) for part in ("zero_step", "validation", "test")]
            figures += [spread([c["test"]["loss"] for c in good], 4)]
            lost = f" ({len(found) - len(good)} of {len(found)} diverged)" if len(good) < len(found) else ""
            cost = (
                f"{sum(c['seconds'] for c in good) / len(good):.0f} | {max(c['peak_memory'] for c in good) / 1e6:.0f}"
            )
            lines.append(
                f"| {row}{lost} | {good[0]['trainable']:,} | {at} | {len(good)} | {' | '.join(figures)} | {cost} |"
            )
        lines += ["", f"Validation {metric} at every rate, first seed:", ""]
        for row in chosen:
            told = (c for c in cells if c["row"] == row and c["seed"] == 0)
            lines.append(f"- {row}: " + ", ".join(f"{c['rate']:g}: {figure(c, metric)}" for c in sort(told)))
    return "\n".join(lines) + "\n"


def overview(folder: Path) -> list[str]:
    """One table of all tasks: the test figure of each row that all have."""
    found: dict[str, dict[str, str]] = {}
    tasks = {name: task for name, task in TASKS.items() if task.seeds == SEEDS}
    for name, task in tasks.items():
        table, causal = table_of(name, folder, None), recipe_of(name).task == "causal-lm"
        for row, cells in table.chosen(table.cells()):
            values = [c["test"]["perplexity" if causal else "accuracy"] for c in cells if "test" in c]
            if len(values) == len(SEEDS):
                told = spread(values, 1) if causal else spread([100 * v for v in values], 1)
                row = row.replace(f"{task.groups} groups", "groups to match LoRA r=1")
                found.setdefault(row, {})[name] = told
    lines = ["| what trains, beside a head | " + " | ".join(task.title.split(",")[0] for task in tasks.values()) + " |"]
    lines += ["|---|" + "---|" * len(tasks), "| | accuracy, % | accuracy, % | perplexity |"]
    lines += [f"| {row} | {' | '.join(of.get(name, '') for name in tasks)} |" for row, of in found.items()]
    return lines


def edged(rate: float, task: Task) -> bool:
    """Whether a rate is the least or the greatest that was tried."""
    return len(task.rates) > 1 and rate in (task.rates[0], task.rates[-1])


def sort(cells: Any) -> list[Cell]:
    return sorted(cells, key=lambda cell: cell["rate"])


def figure(cell: Cell, metric: str) -> str:
    """A validation figure in short."""
    if "failed" in cell or "diverged" in cell:
        return "failed" if "failed" in cell else "diverged"
    return f"{cell['validation'][metric]:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    parser.add_argument("--output", type=Path, default=HERE, help="folder")
    args = parser.parse_args()
    print(f"on {device()}")
    for name in args.tasks:
        table_of(name, args.output, args.steps).fill(args.jobs)
        picture(name, args.output)
    (args.output / "downstream.md").write_text(markdown(args.output))
    print((args.output / "downstream.md").read_text())


if __name__ == "__main__":
    main()
