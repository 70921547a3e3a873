"""Runs of a table on several processes: every row at every rate with the first seed, at the best with the others.

A file of cells is written after every run; what it holds already is not run again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

Cell = dict[str, Any]


@dataclass
class Table:
    """Rows, what is tried of each, and the file of their cells."""

    file: Path
    rows: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    run: Callable[[str, float, int], Cell]
    """A function that a new process can import: the figures of a row at a rate with a seed."""
    worth: Callable[[Cell], float]
    """What the rate is chosen by, on the first seed; the more the better."""
    own: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The rates of rows that have others."""

    def tried(self, row: str) -> tuple[float, ...]:
        """The rates of a row."""
        return self.own.get(row, self.rates)

    def cells(self) -> list[Cell]:
        """What the file holds."""
        return json.loads(self.file.read_text())["cells"] if self.file.exists() else []

    def best(self, cells: list[Cell], row: str) -> float | None:
        """The rate of a row that is the best with the first seed; None until all were tried."""
        found = {c["rate"]: c for c in cells if c["row"] == row and c["seed"] == self.seeds[0]}
        if any(rate not in found for rate in self.tried(row)):
            return None
        return max(self.tried(row), key=lambda rate: -math.inf if "failed" in found[rate] else self.worth(found[rate]))

    def chosen(self, cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
        """Of each row that is tried, the cells at its best rate."""
        for row in self.rows:
            rate = self.best(cells, row)
            if rate is not None:
                yield row, [c for c in cells if c["row"] == row and c["rate"] == rate]

    def todo(self, cells: list[Cell]) -> list[tuple[str, float, int]]:
        """The runs that can be started now, row by row."""
        done = {(c["row"], c["rate"], c["seed"]) for c in cells}
        wanted = []
        for row in self.rows:
            rate = self.best(cells, row)
            wanted += [(row, rate, self.seeds[0]) for rate in self.tried(row)]
            wanted += [(row, rate, seed) for seed in self.seeds[1:]] if rate is not None else []
        return [one for one in wanted if one not in done]

    def fill(self, jobs: int = 1) -> None:
        """Run what is missing on so many processes."""
        cells, asked = self.cells(), {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            while True:
                ready = [one for one in self.todo(cells) if one not in asked.values()]
                for one in ready[: jobs - len(asked)]:
                    asked[pool.submit(_run, self.run, *one)] = one
                if not asked:
                    return
                for done in wait(asked, return_when=FIRST_COMPLETED).done:
                    row, rate, seed = asked.pop(done)
                    cells.append({"row": row, "rate": rate, "seed": seed, **done.result()})
                    print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    new = self.file.with_suffix(".new")
                    new.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
                    os.replace(new, self.file)


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # a GPU may multiply in TF32; a CPU does as ever


def _run(run: Callable[..., Cell], row: str, rate: float, seed: int) -> Cell:
    try:
        found = run(row, rate, seed)
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {**found, "device": device()}


def device() -> str:
    """What it runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"


def spread(values: list[float], digits: int) -> str:
    """Mean and deviation."""
    more = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{more}"
