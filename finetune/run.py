"""From a recipe to a folder: read, convert, train, measure, write."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from .._version import __version__
from ..convert.checkpoint import check_output, replacing, save
from ..convert.sources import REPORT, Source
from ..interp.errors import OrthoactError
from .data import Examples, make_examples, read_rows
from .distill import Distillation
from .evaluate import Objective, measure, task_loss
from .examples import Stream
from .launch import make_accelerator
from .loop import Job, loop
from .memory import Peak
from .models import make_model
from .monitor import Monitor
from .parameters import Trainable, choose
from .progress import Progress
from .recipe import Recipe, read
from .state import STATE, States
from .swap import Swap

log = logging.getLogger("orthoact")

METRICS = "metrics.jsonl"
"""One JSON object a logged step."""


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
    known = _begin(recipe, out, resume=resume, overwrite=overwrite, accelerator=accelerator)
    if known is not None:
        log.warning("%s: the run is finished already, nothing to resume", out)
        return known | {"output": str(output or recipe.name)} if accelerator.is_main_process else {}
    states = States(out / STATE, recipe.train.keep)
    step = states.steps()[-1] if resume and states.steps() else None
    if resume and accelerator.is_main_process:
        where = f"resuming from step {step}" if step else "no checkpoint to resume from, starting afresh"
        log.warning("%s: %s", out, where)
    if accelerator.is_main_process:
        states.clear()
        _keep_lines(out / METRICS, step or 0)
    accelerator.wait_for_everyone()
    with open(out / METRICS, "a", encoding="utf-8") as lines, Progress(recipe, accelerator, quiet) as bar:

        def write(values: dict[str, Any]) -> None:
            lines.write(json.dumps(values) + "\n")
            lines.flush()

        facts, source, trainable, record = run(
            recipe, accelerator, states, log=write, show=bar.show, tell=bar.tell, resume=step
        )
    if accelerator.is_main_process:
        model = trainable.finish()
        _finish(model, out, source, {**record, "training": facts})
    accelerator.wait_for_everyone()
    return facts | {"output": str(output or recipe.name)} if accelerator.is_main_process else {}


def run(
    recipe: Recipe,
    accelerator: Any,
    states: States,
    *,
    log: Callable[[dict[str, Any]], None],
    show: Callable[..., None],
    tell: Callable[[str], None] = lambda text: None,
    resume: int | None = None,
) -> tuple[dict[str, Any], Source, Trainable, dict[str, Any]]:
    """One run without its folder: the facts, the model, what trained, the record of the conversion."""
    chosen = recipe.train
    with Peak() as peak:
        start = perf_counter()
        rows = read_rows(recipe)
        source, record = make_model(recipe, rows)
        examples = make_examples(rows, source, recipe)
        trainable = choose_what(source.model, recipe)
        count = trainable.count
        tell(f"{chosen.what}: {sum(count.values()):,} trainable numbers {count}, {_sizes(examples)}")
        if chosen.gradient_checkpointing:
            _checkpoint_gradients(trainable.model)
        loss, begin = make_loss(trainable.model, recipe)
        objective = Objective(trainable.model, loss)
        with Monitor(trainable.model, penalise=chosen.boundary_penalty > 0) as monitor:
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
                begin=begin,
                resume=resume,
                seed=recipe.seed,
            )
            found = loop(job, accelerator)
        test = DataLoader(examples.test, chosen.evaluation_batch_size or chosen.batch_size, collate_fn=examples.collate)
        prepared = found.pop("objective")
        figures = measure(prepared, accelerator.prepare(test), recipe.task, accelerator)
    for tracker in accelerator.trackers:
        tracker.finish()
    facts = {"recipe": recipe.to_dict(), "what": chosen.what, "trainable": sum(count.values()), "trainable_by": count}
    facts |= {"processes": accelerator.num_processes, "train": _size(examples.train), **found, "test": figures}
    facts |= {"total_seconds": round(perf_counter() - start, 3), "peak_memory": peak.bytes, "finished": True}
    trainable.model.eval()
    accelerator.free_memory()
    return facts, source, trainable, record


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
    return f"{len(examples.train)} + {len(examples.validation)} + {len(examples.test)} {unit}"


# -- the folder --------------------------------------------------------------------------------------------------------


def _begin(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool, accelerator: Any) -> dict[str, Any] | None:
    """Make the folder, or check that it is one to go on in; the facts of a run that is finished already."""
    report = out / REPORT
    if resume and report.is_file():
        held = json.loads(report.read_text(encoding="utf-8")).get("training") or {}
        if held.get("recipe") is None:
            raise OrthoactError(f"--resume: {out} is not the folder of a training run; give another with --output")
        if changed := list(changes(held["recipe"], recipe.to_dict())):
            raise OrthoactError(
                f"--resume: the run in {out} has another recipe ({'; '.join(changed[:3])}); give the same, or another "
                f"--output"
            )
        accelerator.wait_for_everyone()
        return held if held.get("finished") and (out / "config.json").is_file() else None
    if accelerator.is_main_process:
        try:
            check_output(out, overwrite=overwrite)
        except OrthoactError as error:
            raise OrthoactError(str(error).replace("-o,", "--output, --resume,").replace("-o", "--output")) from error
        with replacing(out, overwrite=overwrite) as folder:
            record = {"orthoact": __version__, "training": {"recipe": recipe.to_dict(), "finished": False}}
            (folder / REPORT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return None


def changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The keys in which two recipes differ, but for what says nothing about the run itself."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if (key + name) not in ("about", "name", "compare", "offline"):
                yield from changes(old.get(name), new.get(name), f"{key}{name}.")
    elif old != new:
        yield f"{key.rstrip('.')} was {old!r}, is {new!r}"


def _keep_lines(path: Path, step: int) -> None:
    """Drop the lines after a checkpoint, and one that a kill cut short."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def _finish(model: torch.nn.Module, out: Path, source: Source, record: dict[str, Any]) -> None:
    """Write the model into the folder of the run, config.json last: without it nothing loads the folder."""
    with _emptied(out / ".model") as folder:
        save(model, folder, source=source, report=record)
        for name in sorted(
            (p.name for p in folder.iterdir()), key=lambda name: (name == "config.json", name == REPORT)
        ):
            target = out / name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(folder / name, target)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
