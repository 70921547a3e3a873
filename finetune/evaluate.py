"""Losses and task metrics, on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .examples import IGNORED

BEST = {
    "causal-lm": ("loss", -1),
    "sequence-classification": ("accuracy", 1),
    "image-classification": ("accuracy", 1),
    "divergence": ("loss", -1),
}
"""The figure of each task that is chosen by, and the sign that makes more of it better."""


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits for a batch; `labels` are left out."""
    out = model(**{k: v for k, v in batch.items() if k != "labels"})
    return out if isinstance(out, Tensor) else out.logits


def task_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the labels, which stand where their logits do."""
    found = logits(model, batch).float()
    return F.cross_entropy(found.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED)


class Objective(nn.Module):
    """A model with its loss as one module, so that every wrapper of parallel training sees one forward pass."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = task_loss):
        super().__init__()
        self.model, self.loss = model, loss

    @property
    def _no_split_modules(self) -> Any:
        """What FSDP shards as a unit."""
        return getattr(self.model, "_no_split_modules", None)

    def forward(self, batch: dict[str, Tensor], *, want: str = "loss") -> Tensor:
        """The loss of a batch, or with `want="logits"` its logits."""
        return logits(self.model, batch) if want == "logits" else self.loss(self.model, batch)


def measure(objective: nn.Module, loader: Any, task: str, accelerator: Any) -> dict[str, float]:
    """`loss` (nats) and `perplexity`, or `loss`, `accuracy` and `f1` (macro), of a whole split.

    Every process computes its share; what it found is gathered, so that all return the same figures. A loss that is
    not finite is returned as it is. The task `divergence` is that of a model that is taught without labels: `loss` is
    the objective's own.
    """
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    quiet: dict[str, Any] = {"sync_on_compute": False}  # what is counted was gathered before
    mean = MeanMetric(nan_strategy="disable", **quiet).to(accelerator.device).set_dtype(torch.float64)
    classes: MetricCollection | None = None
    training = objective.training
    objective.eval()
    with torch.no_grad():
        for batch in loader:
            if task == "divergence":
                losses = accelerator.gather(objective(batch).double()[None])
                mean.update(losses)
                continue
            found, labels = objective(batch, want="logits").float(), batch["labels"]
            losses = F.cross_entropy(found.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
            counted = (labels != IGNORED).reshape(len(labels), -1).sum(1)
            sums = losses.double().reshape(len(labels), -1).sum(1)
            sums, counted = accelerator.gather_for_metrics((sums, counted))
            mean.update(sums / counted.clamp(min=1), counted)
            if task != "causal-lm":
                if classes is None:
                    kinds = {"accuracy": MulticlassAccuracy, "f1": MulticlassF1Score}
                    options = {"accuracy": {"average": "micro"}, "f1": {"average": "macro"}}
                    made = {name: kind(found.shape[-1], **options[name], **quiet) for name, kind in kinds.items()}
                    classes = MetricCollection(made).to(accelerator.device)
                guesses, labels = accelerator.gather_for_metrics((found.argmax(-1), labels))
                classes.update(guesses, labels)
    objective.train(training)
    loss = float(mean.compute())
    if task == "causal-lm":
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss}
    figures = classes.compute() if classes is not None else {}
    return {"loss": loss, **{name: float(value) for name, value in figures.items()}}


def better(new: dict[str, float], old: dict[str, float] | None, task: str) -> bool:
    """Whether figures are better than others: by the task's own, ties by the loss; what is not finite is worst."""
    return old is None or rank(new, task) > rank(old, task)


def rank(figures: dict[str, float], task: str) -> tuple[float, float]:
    """What figures are ordered by; more is better."""
    name, sign = BEST[task]
    value, loss = figures[name], figures["loss"]
    if not math.isfinite(value) or not math.isfinite(loss):
        return (-math.inf, -math.inf)
    return (sign * value, -loss)
