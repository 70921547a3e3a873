"""Recovery: give back what a coarse conversion lost, by self-distillation on inputs without labels, in one go."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.data import Batches, batches, predicts_next
from ..convert.fidelity import outputs
from ..convert.names import portable
from ..convert.sources import Source
from ..interp import engine
from ..interp.activation import Activation, counted
from ..interp.errors import OrthoactError
from .distill import Distillation
from .evaluate import Objective, measure
from .examples import Stream
from .launch import make_accelerator
from .loop import Job, loop
from .monitor import Monitor
from .parameters import choose
from .recipe import Recipe
from .sections import Train
from .solve import solve
from .state import States
from .swap import Swap

LENGTH = 256
"""Tokens of a window of a causal model."""

RATE = 1e-3
"""Of the activations, from a start that is solved already (`benchmarks/recovery.py` tries several)."""

KEPT = {(False, False): "fit", (True, False): "solved", (False, True): "trained", (True, True): "both"}
"""What of a recovery is kept, by whether the least squares and the steps brought the model nearer to its original."""

SOLVED = 64
"""Texts, images or windows that the start is solved on."""

COARSE = 0.1
"""The divergence from which a conversion counts as coarse: its sites are then swapped one after the other."""


def recover(
    source: Source,
    data: str | Path,
    *,
    steps: int = 60,
    what: str = "activations",
    rate: float = RATE,
    weight_rate: float = 1e-4,
    swap: str | None = "auto",
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train the activations of the converted model of `source` towards its original, in place, on `data`.

    First each activation gets the joints and the numbers that are the least squares on its own inputs (`solve`); then
    all numbers are trained together in so many `steps`, or in none. Each is taken back where it brings the model no
    nearer to its original on data that are held out. In the end the model is in evaluation mode, and what `what` names
    is what requires gradients.

    `data` is what `convert.data.batches` takes, without labels; the last tenth of its batches, at least one, is held
    out; of a single batch half. Each step takes one batch of `batch_size` texts, images or windows of `LENGTH` tokens.
    The least squares take up to `SOLVED` of these: with far fewer they move little, for few inputs are no proof.
    `what` is that of `choose`: with the default no weight changes; `rate` is that of the activations, `weight_rate` of
    all else. `swap` is that of `Swap`; `auto` swaps site by site where the start is coarse. `limit` bounds the texts,
    images or tokens that are read; by default what the start and the steps can take. `progress` is told how much is
    done and of how much: first of the least squares, then of the steps.

    Returns `data` (of a path of this machine the last part), `steps`, `trained` (numbers), `swap`, `kept` (`fit`:
    nothing was nearer; `solved`: the least squares; `trained`: the steps; `both`), `divergence_before`,
    `divergence_solved` and `divergence` (of the held-out part, see `Distillation`; at the start, before the first step
    and in the end), `outside` (the largest share of a site's inputs outside its core during training; 0 without steps)
    and `seconds`.
    Raises `OrthoactError` for data that do not fit or are too few.
    """
    model = source.model
    if steps < 0:
        raise OrthoactError(f"--steps {steps}: expected a whole number that is not negative")
    if limit is None:  # what the start and the steps can take, and the tenth
        limit = ceil(max(SOLVED, steps * batch_size) / 0.9) * (LENGTH if predicts_next(model) else 1)
    inputs = batches(source, data, limit=limit, size=batch_size, seed=seed, flag="--recover")
    training, held = _split(_windows(inputs, batch_size, model))
    train = Train(
        loss="distill",
        what=what,
        max_steps=max(1, steps),
        learning_rate=weight_rate,
        activation_learning_rate=rate,
        batch_size=1,
        dropout=False,
        log_every=max(1, steps),
        evaluate_every=max(1, ceil(steps / 4)),
        save_every=max(1, steps),
    )
    began = perf_counter()
    accelerator = make_accelerator(Recipe(train=train), None, None)
    trainable = choose(model, what, learning_rate=weight_rate, activation_learning_rate=rate, head=False)
    taught = Distillation(model)
    objective = Objective(model, taught.loss)
    device = next(model.parameters()).device
    items = [{k: v.to(device) for k, v in item.items()} for item in held]
    before = measure(objective, items, "divergence", accelerator)["loss"]
    start = _kept(model)
    solve(model, taught, training.items[: ceil(SOLVED / batch_size)], seed=seed, progress=progress)
    solved = measure(objective, items, "divergence", accelerator)["loss"]
    if not solved < before:
        solved = before
        _restore(model, start)
    if swap == "auto":
        swap = None if solved < COARSE or not steps else "sites"
    if swap is not None:
        taught.swap = Swap(model, swap, steps=max(1, steps // 2))
    after, sites = solved, dict[str, Any]()
    if steps:
        start = _kept(model)
        path = engine.suited(_values(model, items[0]) * steps, training=True, device=device)
        with tempfile.TemporaryDirectory() as folder, engine.using(path), Monitor(model) as monitor:
            job = Job(
                objective=objective,
                groups=trainable.groups,
                stream=Stream(training, steps, seed),
                validation=held,
                collate=_only,
                task="divergence",
                train=train,
                states=States(Path(folder)),
                monitor=monitor,
                log=lambda values: sites.update(values.get("sites", {})),
                show=lambda step, loss, figures: progress(step, steps) if progress else None,
                begin=taught.begin,
                seed=seed,
            )
            found = loop(job, accelerator)
        after = (found["best"] or found["validation"])["loss"]
        if not after < solved:
            after = solved
            _restore(model, start)
    trainable.finish()
    model.eval()
    return {
        "data": portable(str(data)),
        "steps": steps,
        "trained": trainable.total,
        "swap": swap,
        "kept": KEPT[solved < before, after < solved],
        "divergence_before": before,
        "divergence_solved": solved,
        "divergence": after,
        "outside": max((row["outside"] for row in sites.values()), default=0.0),
        "seconds": round(perf_counter() - began, 3),
    }


class _Batches:
    """Batches of inputs as a split of the loop: each is one example."""

    def __init__(self, items: list[dict[str, Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.items[i]

    def trained(self, i: int, epoch: int, seed: int) -> dict[str, Tensor]:
        return self.items[i]


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains, and of the frame of each activation that does."""
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, m in model.named_modules():
        if isinstance(m, Activation) and m.theta.requires_grad:
            kept |= dict(m.named_buffers(prefix=name))
    return {name: t.detach().clone() for name, t in kept.items()}


def _restore(model: nn.Module, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if name in kept:
                t.copy_(kept[name])


def _values(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """How many values the activations compute at a pass."""
    with torch.no_grad(), counted(model) as values:
        outputs(model, batch)
    return sum(values)


def _only(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return examples[0]


def _windows(inputs: Batches, size: int, model: nn.Module) -> list[dict[str, Tensor]]:
    """The batches; the text of a causal model as `size` windows of `LENGTH` tokens each, or of its context."""
    if inputs.unit != "tokens":
        return [{k: v for k, v in item.items() if k != "labels"} for item in inputs]
    ids = torch.cat([item["input_ids"].flatten() for item in inputs])
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, context, max(2, len(ids) // 2))
    return [{"input_ids": part} for part in ids[: len(ids) // length * length].view(-1, length).split(size)]


def _split(items: list[dict[str, Tensor]]) -> tuple[_Batches, _Batches]:
    """The batches that are trained on, and the last tenth, which is held out."""
    if len(items) < 2:  # one batch: its first rows are trained on, its last are held out
        rows = min(len(next(iter(item.values()))) for item in items)
        if rows < 2:
            raise OrthoactError("--recover: expected at least two texts, images or windows of text; give more data")
        cut = max(1, rows // 2)
        items = [{k: v[part] for k, v in items[0].items()} for part in (slice(cut), slice(cut, None))]
    kept = max(1, len(items) // 10)
    return _Batches(items[:-kept]), _Batches(items[-kept:])
