"""The bar of a run: loss, metric, speed, time left."""

from __future__ import annotations

from typing import Any

from .evaluate import BEST
from .recipe import Recipe


class Progress:
    """A bar on a terminal, a line at each measurement elsewhere; the first process alone shows it, on stderr."""

    def __init__(self, recipe: Recipe, accelerator: Any, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.metric = "perplexity" if recipe.task == "causal-lm" else BEST[recipe.task][0]
        self.console = Console(stderr=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 120
        self.on = accelerator.is_main_process and not quiet
        speed = TextColumn("{task.fields[speed]}")
        columns = (
            TextColumn(recipe.name or "training", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            speed,
            TimeRemainingColumn(),
        )
        shows = self.on and self.console.is_terminal
        self.bar = Bar(*columns, TextColumn("{task.fields[figures]}"), console=self.console, disable=not shows)
        self.total, self.last = recipe.train.max_steps, None
        self.job = self.bar.add_task("", total=self.total, speed="", figures="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        if self.on:
            self.console.print(text, markup=False)

    def show(self, step: int, loss: float, validation: dict[str, float] | None) -> None:
        """Move the bar to a step."""
        figures = f"loss {loss:.4f}"
        if validation:
            figures += f"  {self.metric} {validation[self.metric]:.4f}"
        if self.on and not self.console.is_terminal and validation is not self.last:
            self.console.print(f"step {step}/{self.total}  {figures}")
        self.last = validation
        speed = self.bar.tasks[0].speed
        self.bar.update(self.job, completed=step, figures=figures, speed=f"{speed:.2f} steps/s" if speed else "")
