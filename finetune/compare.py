"""The table of a recipe: every row at every rate and seed, chosen on validation and reported on test data."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .._version import __version__
from ..convert.checkpoint import check_output, replacing
from ..convert.files import read_json
from ..convert.sources import REPORT
from ..interp.errors import OrthoactError
from .data import digest
from .evaluate import BEST, rank
from .folder import changes
from .launch import make_accelerator
from .progress import Progress
from .recipe import Recipe
from .run import run
from .state import STATE, States

FILE = "comparison.json"


def compare(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run the table of `recipe.compare` and write comparison.json, .md and .png to the folder `output`.

    A cell is a row at a rate with a seed, trained as `train` does; all rows have the same rates, seeds, steps and data.
    Of each row the rate with the best mean validation figure over the seeds is reported, with the test figures there;
    every cell is in the file. It is written after every cell: with `resume`, those that are there are not run again. A
    cell that diverges counts as the worst, and says so. Returns what comparison.json holds, `output` and `table`.
    """
    if not recipe.compare.rows:
        raise OrthoactError(f"{recipe.name}: the recipe has no compare.rows; add some, each with the keys it changes")
    out = Path(os.path.abspath(Path(output or f"{recipe.name}-comparison").expanduser()))
    accelerator = make_accelerator(recipe, None, processes)
    main = accelerator.is_main_process
    held = _begin(recipe, out, resume=resume, overwrite=overwrite, main=main)
    rates = recipe.compare.learning_rates or (recipe.train.learning_rate,)
    todo = [(row, lr, seed) for row in recipe.compare.rows for lr in rates for seed in recipe.compare.seeds]

    def ready() -> None:
        if main and not held["cells"]:
            _make(out, overwrite=overwrite or resume)
        accelerator.wait_for_everyone()

    if main and held["cells"]:  # rows, rates and seeds may be others now
        _write(out, held, recipe, todo)
    for done, (row, lr, seed) in enumerate(todo):
        if any(_place(c) == (row, lr, seed) for c in held["cells"]):
            continue
        variant = recipe.override({**recipe.compare.rows[row], "train.learning_rate": lr, "seed": seed})
        scratch = out / STATE
        with Progress(variant, accelerator, quiet) as bar:
            bar.tell(f"{done + 1}/{len(todo)}: {row}, rate {lr:g}, seed {seed}")
            cell = {"row": row, "learning_rate": lr, "seed": seed, **measured(variant, scratch, processes, bar, ready)}
        held["cells"].append(cell)
        if main:
            shutil.rmtree(scratch, ignore_errors=True)
            _write(out, held, recipe, todo)
        accelerator.wait_for_everyone()
    if not main:
        return {}
    return held | {
        "output": str(output or f"{recipe.name}-comparison"),
        "table": (out / "comparison.md").read_text("utf-8"),
    }


def _place(cell: dict[str, Any]) -> tuple[str, float, int]:
    return cell["row"], cell["learning_rate"], cell["seed"]


def measured(
    variant: Recipe, folder: Path, processes: int | None, bar: Progress, ready: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The figures of one run, whose checkpoints are in `folder`; `diverged` alone where its loss was not finite."""
    try:
        accelerator = make_accelerator(variant, None, processes)
        facts, *_ = run(
            variant,
            accelerator,
            States(folder, keep=1),
            ready=ready,
            log=lambda values: None,
            show=bar.show,
            tell=bar.tell,
        )
    except OrthoactError as error:
        if "not finite" not in str(error):
            raise
        return {"diverged": str(error).partition(";")[0]}
    chosen = facts["best"] if variant.train.evaluate_every and facts["best"] else facts["validation"]
    kept = ("trainable", "trainable_by", "step", "zero_step", "test", "seconds", "peak_memory")
    figures = {k: v for k, v in chosen.items() if k != "step"}
    return {**{k: facts[k] for k in kept}, "validation": figures}


def summary(cells: list[dict[str, Any]], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """One entry a row: the rate that was chosen and what it gives on the test split, over the seeds."""
    task, rows = recipe.task, dict.fromkeys(cell["row"] for cell in cells)
    names = ("loss", "perplexity") if task == "causal-lm" else ("loss", "accuracy", "f1")
    for row in rows:
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for cell in cells:
            if cell["row"] == row:
                by_rate.setdefault(cell["learning_rate"], []).append(cell)
        best = max(by_rate, key=lambda lr: _worth(by_rate[lr], task))
        chosen = [cell for cell in by_rate[best] if "diverged" not in cell]
        entry: dict[str, Any] = {"row": row, "learning_rate": best, "seeds": len(by_rate[best])}
        entry |= {
            "diverged": len(by_rate[best]) - len(chosen),
            "rates": {f"{lr:g}": _told(c) for lr, c in by_rate.items()},
        }
        if chosen:
            entry["metric"] = _metric(task)
            for split in ("zero_step", "validation", "test"):
                entry[split] = {name: _spread([cell[split][name] for cell in chosen]) for name in names}
                entry[f"{split}_mean"], entry[f"{split}_std"] = entry[split][_metric(task)].values()
            entry["trainable"] = chosen[0]["trainable"]
            entry["seconds"] = mean(cell["seconds"] for cell in chosen)
            entry["peak_memory"] = max(cell["peak_memory"] for cell in chosen)
        yield entry


def _worth(cells: list[dict[str, Any]], task: str) -> tuple[float, float]:
    """The mean validation figure of the seeds; the worst of all where one diverged."""
    if any("diverged" in cell for cell in cells):
        return (-math.inf, -math.inf)
    ranks = [rank(cell["validation"], task) for cell in cells]
    return (mean(r[0] for r in ranks), mean(r[1] for r in ranks))


def _told(cells: list[dict[str, Any]]) -> Any:
    """The validation figures of a rate, for the record of the choice."""
    return [cell["validation"] if "diverged" not in cell else cell["diverged"] for cell in cells]


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


# -- the folder --------------------------------------------------------------------------------------------------------


def _begin(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool, main: bool) -> dict[str, Any]:
    """The cells that are there; nothing is written yet."""
    file, now = out / FILE, digest(recipe.data.path)
    if resume and file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        rows = recipe.public()["compare"]["rows"]
        if changed := list(changes(held["recipe"], recipe.public())):
            raise OrthoactError(f"--resume: {out} was made with another recipe ({changed[0]}); give another --output")
        was = held["recipe"]["compare"]["rows"]
        if moved := next((row for row in rows if row in was and was[row] != rows[row]), None):
            raise OrthoactError(f"--resume: the row {moved!r} was {was[moved]} in {out}; give it another name")
        if held.get("digest", now) != now:
            raise OrthoactError(f"--resume: {out} was made with other data in data.path; give another --output")
        return held | {"recipe": recipe.public()}
    if main:
        begun = (out / REPORT).is_file() and "comparison" in read_json(out / REPORT, strict=False)
        if resume and out.is_dir() and any(out.iterdir()) and not begun:
            raise OrthoactError(f"--resume: {out} is not the folder of a comparison; give another with --output")
        check_output(out, overwrite=overwrite or resume)
    return {"orthoact": __version__, "recipe": recipe.public(), "digest": now, "rows": [], "cells": []}


def _make(out: Path, *, overwrite: bool) -> None:
    """The folder, in place of one that is there."""
    with replacing(out, overwrite=overwrite) as folder:
        text = json.dumps({"orthoact": __version__, "comparison": FILE}) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")


def _write(out: Path, held: dict[str, Any], recipe: Recipe, wanted: list[tuple[str, float, int]]) -> None:
    """The table of the cells that are wanted, its figures and its picture, each whole or not at all."""
    held["rows"] = list(summary([cell for cell in held["cells"] if _place(cell) in wanted], recipe))
    plot(held["rows"], recipe, out / ".new.png")
    os.replace(out / ".new.png", out / "comparison.png")
    for name, text in (("comparison.md", markdown(held["rows"], recipe)), (FILE, json.dumps(held, indent=1) + "\n")):
        (out / f".{name}").write_text(text, encoding="utf-8")
        os.replace(out / f".{name}", out / name)


def markdown(rows: list[dict[str, Any]], recipe: Recipe) -> str:
    """The table in Markdown: mean and standard deviation over the seeds."""
    metric = _metric(recipe.task)
    rates = ", ".join(f"{rate:g}" for rate in recipe.compare.learning_rates or (recipe.train.learning_rate,))
    columns = ("what trains", "numbers", "rate", f"{metric} before", f"{metric}, validation", f"**{metric}, test**")
    lines = [
        f"`{recipe.name}`: {recipe.about}. {recipe.train.max_steps} steps, {len(recipe.compare.seeds)} seeds; the rate",
        f"of each row is chosen on the validation split from {rates}.",
        "",
        f"| {' | '.join(columns)} | loss, test | s | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "test" not in row:
            lines.append(f"| {row['row']} | | {row['learning_rate']:g} | diverged at every rate | | | | | |")
            continue
        note = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells = [_pm(row[split][metric]) for split in ("zero_step", "validation", "test")] + [_pm(row["test"]["loss"])]
        size = f"{row['seconds']:.0f} | {row['peak_memory'] / 1e6:.0f}"
        lines.append(
            f"| {row['row']}{note} | {row['trainable']:,} | {row['learning_rate']:g} | {' | '.join(cells)} | {size} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """The test metric against the number of trainable parameters, a point a row; the legend names the best first."""
    from matplotlib.figure import Figure

    metric = _metric(recipe.task)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    told = [(row["row"], max(row["trainable"], 1), row["test"][metric]) for row in rows if "test" in row]
    told.sort(key=lambda row: row[2]["mean"], reverse=metric != "perplexity")
    for i, (name, numbers, point) in enumerate(told):
        how = {"fmt": "osD^vPX"[i % 7], "color": f"C{i % 10}", "markersize": 6, "capsize": 3}
        axes.errorbar(numbers, point["mean"], yerr=point["std"], label=f"{i + 1}  {name}", **how)
        axes.annotate(str(i + 1), (numbers, point["mean"]), (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=f"{metric}, test", title=recipe.name)
    axes.grid(alpha=0.3)
    if told:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _metric(task: str) -> str:
    return "perplexity" if task == "causal-lm" else BEST[task][0]


def _pm(value: dict[str, float]) -> str:
    digits = 4 if abs(value["mean"]) < 10 else 2
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
