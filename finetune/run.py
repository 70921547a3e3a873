"""From a recipe to a folder: read, convert, train, measure, write."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..convert.provenance import command_line, own_command
from ..convert.sources import Source
from ..interp import engine
from ..interp.activation import counted
from ..interp.errors import OrthoactError
from .data import Examples, digest, make_examples, read_rows
from .distill import Distillation
from .evaluate import Objective, logits, measure, task_loss
from .examples import Stream
from .folder import METRICS, begin, check, finish, is_begun, keep_lines
from .launch import make_accelerator, start_tracker
from .loop import Job, loop
from .memory import Peak
from .models import make_model
from .monitor import Monitor
from .parameters import Trainable, choose
from .progress import Progress
from .recipe import Recipe, read
from .sections import Train
from .state import STATE, States, is_sharded, whole_state
from .swap import Swap

log = logging.getLogger("orthoact")


def train(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run a recipe (or the one of this name or file) and write the trained model to the folder `output`.

    The folder loads like every converted checkpoint; what else is in it, see `orthoact.finetune`. With `resume` an
    interrupted run goes on from its last checkpoint, to the same end as if it had not been interrupted. `processes` is
    checked against the number that is there. Returns the facts that `orthoact.json` holds under `training`. Raises
    `OrthoactError` for a recipe, data or folder that does not fit, and where the loss is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read(recipe)
    out = Path(os.path.abspath(Path(output or recipe.name).expanduser()))
    accelerator = make_accelerator(recipe, out, processes)
    known = check(recipe, out, resume=resume, overwrite=overwrite, accelerator=accelerator)
    if known is not None:
        log.warning("%s: the run is finished already, nothing to resume", out)
        return known | {"output": str(output or recipe.name)} if accelerator.is_main_process else {}
    states = States(out / STATE, recipe.train.keep)
    step = states.steps()[-1] if resume and states.steps() else None
    if resume and accelerator.is_main_process:
        where = f"resuming from step {step}" if step else "no checkpoint to resume from, starting afresh"
        log.warning("%s: %s", out, where)
    with ExitStack() as stack, Progress(recipe, accelerator, quiet) as bar:
        files: list[Any] = []

        def ready() -> None:
            if accelerator.is_main_process:
                if not is_begun(out, resume):
                    begin(recipe, out, overwrite=overwrite)
                states.clear()
                keep_lines(out / METRICS, step or 0)
            accelerator.wait_for_everyone()
            start_tracker(recipe, accelerator)
            files.append(stack.enter_context(open(out / METRICS, "a", encoding="utf-8")))

        def write(values: dict[str, Any]) -> None:
            files[0].write(json.dumps(values) + "\n")
            files[0].flush()

        facts, source, trainable, record = run(
            recipe, accelerator, states, ready=ready, log=write, show=bar.show, tell=bar.tell, resume=step
        )
    if accelerator.is_main_process:
        model = trainable.finish()
        facts["command"] = command_line(own_command())
        finish(model, out, source, {**record, "training": facts})
    accelerator.wait_for_everyone()
    return facts | {"output": str(output or recipe.name)} if accelerator.is_main_process else {}


def run(
    recipe: Recipe,
    accelerator: Any,
    states: States,
    *,
    ready: Callable[[], None],
    log: Callable[[dict[str, Any]], None],
    show: Callable[..., None],
    tell: Callable[[str], None] = lambda text: None,
    resume: int | None = None,
) -> tuple[dict[str, Any], Source, Trainable, dict[str, Any]]:
    """One run without its folder: the facts, the model, what trained, the record of the conversion.

    `ready` is called when data and model are sound and the first step comes next.
    """
    chosen = recipe.train
    with Peak() as peak:
        start = perf_counter()
        facts: dict[str, Any] = {"recipe": recipe.public(), "digest": digest(recipe.data.path), "what": chosen.what}
        rows = read_rows(recipe)
        source, record = make_model(recipe, rows)
        examples = make_examples(rows, source, recipe)
        trainable = choose_what(source.model, recipe)
        count = trainable.count
        parts = ", ".join(f"{number:,} of {name}" for name, number in count.items())
        path = suited_path(trainable.model, examples, chosen)
        tell(f"what trains: {parts or 'nothing'}; {_sizes(examples)}; activations {path}")
        if chosen.gradient_checkpointing:
            _checkpoint_gradients(trainable.model)
        loss, told = make_loss(trainable.model, recipe)
        objective = Objective(trainable.model, loss)
        accelerator.wait_for_everyone()
        ready()
        with engine.using(path), Monitor(trainable.model, penalise=chosen.boundary_penalty > 0) as monitor:
            total = chosen.max_steps * chosen.accumulate * chosen.batch_size * accelerator.num_processes
            job = Job(
                objective=objective,
                groups=trainable.groups,
                stream=Stream(examples.train, total, recipe.seed),
                validation=examples.validation,
                collate=examples.collate,
                task=recipe.task,
                train=chosen,
                states=states,
                monitor=monitor,
                log=log,
                show=show,
                begin=told,
                resume=resume,
                seed=recipe.seed,
            )
            found = loop(job, accelerator)
        test = DataLoader(examples.test, chosen.evaluation_batch_size or chosen.batch_size, collate_fn=examples.collate)
        prepared = found.pop("objective")
        with engine.using(path):
            figures = measure(prepared, accelerator.prepare(test), recipe.task, accelerator)
    for tracker in accelerator.trackers:
        tracker.finish()
    facts |= {
        "trainable": sum(count.values()),
        "trainable_by": count,
        "path": path,
        "processes": accelerator.num_processes,
        "train": _size(examples.train),
        **found,
        "test": figures,
    }
    facts |= {"total_seconds": round(perf_counter() - start, 3), "peak_memory": peak.bytes, "finished": True}
    if is_sharded(prepared):
        source, trainable = _gathered(prepared, recipe, rows)
    trainable.model.eval()
    accelerator.free_memory()
    return facts, source, trainable, record


def _gathered(objective: torch.nn.Module, recipe: Recipe, rows: Any) -> tuple[Source, Trainable]:
    """The model whole again, on the CPU of every process, from the parts of it that each has (FSDP2)."""
    held = whole_state(objective)
    source, _ = make_model(recipe, rows)
    trainable = choose_what(source.model, recipe)
    if held:  # of the first process; the others do not write
        Objective(trainable.model).load_state_dict(held)
    return source, trainable


def suited_path(model: torch.nn.Module, examples: Examples, train: Train) -> str:
    """How the activations are computed: by kernels where the steps are worth making them (`engine.suited`)."""
    training, one = model.training, examples.collate([examples.train[0]])
    model.eval()
    try:
        with torch.no_grad(), counted(model) as values:
            logits(model, one)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in one.items())
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise OrthoactError(f"data: the model does not run on its inputs ({shapes}): {why}; give others") from error
    model.train(training)
    work = sum(values) * train.batch_size * train.accumulate * train.max_steps
    return engine.suited(work, training=True, device=next(model.parameters()).device)


def choose_what(model: torch.nn.Module, recipe: Recipe) -> Trainable:
    """What trains, as the recipe says."""
    chosen = recipe.train
    return choose(
        model,
        chosen.what,
        learning_rate=chosen.learning_rate,
        activation_learning_rate=chosen.activation_learning_rate,
        head_learning_rate=chosen.head_learning_rate,
        weight_decay=chosen.weight_decay,
        lora_rank=chosen.lora_rank,
        lora_alpha=chosen.lora_alpha,
        lora_targets=chosen.lora_targets,
        tails=chosen.tails,
    )


def make_loss(model: torch.nn.Module, recipe: Recipe) -> tuple[Callable, Callable[[int], None]]:
    """The loss of the recipe, and what is told the number of each step before it."""
    chosen = recipe.train
    if chosen.loss == "task":
        return task_loss, lambda step: None
    swap = None
    if chosen.swap is not None:
        if chosen.gradient_checkpointing:
            raise OrthoactError("train.swap: leave train.gradient_checkpointing out, it would recompute other values")
        swap = Swap(model, chosen.swap, steps=chosen.swap_steps or max(1, chosen.max_steps // 2))
    taught = Distillation(model, temperature=chosen.temperature, hidden=chosen.hidden_weight, swap=swap)
    return taught.loss, taught.begin


def _checkpoint_gradients(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is not None:
        enable()
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        raise OrthoactError(f"train.gradient_checkpointing: {type(model).__name__} does not know it; leave it out")


def _size(split: Any) -> int:
    return len(split)


def _sizes(examples: Examples) -> str:
    unit = "windows" if examples.unit == "tokens" else examples.unit
    sizes = [("to train on", examples.train), ("to validate on", examples.validation), ("to test on", examples.test)]
    return f"{unit}: " + ", ".join(f"{len(rows):,} {what}" for what, rows in sizes)
