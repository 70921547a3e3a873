"""The loop: everything that happens between the first step and the last, in one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..interp.errors import OrthoactError
from .evaluate import better, measure
from .examples import mixed
from .sections import Train
from .state import States


class Watch(Protocol):
    """What the loop asks of a monitor of the sites."""

    def step(self) -> Mapping[str, Any]: ...
    def penalty(self) -> Tensor | None: ...
    def broken(self) -> str | None: ...


@dataclass
class Job:
    """What the loop is given."""

    objective: nn.Module
    """The model with its loss; see `Objective`."""
    groups: list[dict[str, Any]]
    """Parameter groups of the optimizer, each with a peak rate."""
    stream: Any
    """The examples of the whole run, in order."""
    validation: Any
    """The split that is measured on the way."""
    collate: Callable
    task: str
    train: Train
    states: States
    monitor: Watch
    log: Callable[[dict[str, Any]], None]
    """Takes the figures of a logged step; the first process alone calls it."""
    show: Callable[[int, float, dict[str, float] | None], None]
    """Takes step, loss and the last figures of the validation split, at every step."""
    begin: Callable[[int], None] = lambda step: None
    """Told the number of each step before it, from 0."""
    resume: int | None = None
    """The step of the checkpoint to go on from."""
    seed: int = 0


def rate(train: Train) -> Callable[[int], float]:
    """The share of the peak rate at each step: linear warm-up, then the schedule down to `final_rate`."""
    warm = round(train.warmup * train.max_steps)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min((step - warm) / max(1, train.max_steps - warm), 1.0)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[train.schedule]
        return train.final_rate + (1 - train.final_rate) * fall

    return share


def loop(job: Job, accelerator: Any) -> dict[str, Any]:
    """Train; returns the facts of the run: `step`, `loss` of the last step, `best` and `validation` figures, `seconds`.

    A run that is resumed does what the uninterrupted one does: the data are a function of the step, the rest is in the
    checkpoint. With `evaluate_every` the best measured model is left in the end. Raises `OrthoactError` with step, site
    and last good checkpoint where the loss is not finite.
    """
    train, states = job.train, job.states
    optimizer = torch.optim.AdamW(job.groups, betas=(0.9, train.beta2))
    loader = DataLoader(job.stream, train.batch_size, collate_fn=job.collate)
    measured = DataLoader(job.validation, train.evaluation_batch_size or train.batch_size, collate_fn=job.collate)
    objective, optimizer, loader, measured = accelerator.prepare(job.objective, optimizer, loader, measured)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, rate(train))
    trained = [p for group in job.groups for p in group["params"]]
    facts: dict[str, Any] = {"losses": [], "best": None, "stale": 0, "validation": None, "seconds": 0.0}
    if job.resume is None:
        facts["zero_step"] = measure(objective, measured, job.task, accelerator)
    else:
        facts = states.load(job.resume, objective, optimizer, schedule, accelerator)
    objective.train(train.dropout)
    step, start, losses = job.resume or 0, perf_counter() - facts["seconds"], []
    every = train.save_every or max(1, math.ceil(train.max_steps / 10))

    ended = step >= train.max_steps or bool(train.patience and facts["stale"] >= train.patience)
    rest = () if ended else accelerator.skip_first_batches(loader, step * train.accumulate)
    for place, batch in enumerate(rest, start=step * train.accumulate):
        torch.manual_seed(mixed(job.seed, place, accelerator.process_index))  # dropout: a function of the place
        job.begin(step)
        with accelerator.accumulate(objective):
            loss = objective(batch)
            penalty = job.monitor.penalty() if train.boundary_penalty else None
            accelerator.backward(loss if penalty is None else loss + train.boundary_penalty * penalty)
            if train.clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
        if not accelerator.sync_gradients:
            continue
        step += 1
        schedule.step()
        mean = accelerator.gather(torch.stack(losses)).mean().item()
        losses = []
        if not math.isfinite(mean):
            raise _diverged(step, job)
        facts["losses"].append(mean)

        last = step == train.max_steps
        measures = last or bool(train.evaluate_every and step % train.evaluate_every == 0)
        if measures:
            figures = facts["validation"] = measure(objective, measured, job.task, accelerator)
            if not math.isfinite(figures["loss"]):  # the last update, after the loss above
                raise _diverged(step, job)
            facts["stale"] += 1
            if better(figures, facts["best"], job.task):
                facts |= {"best": {"step": step, **figures}, "stale": 0}
            last = last or bool(train.patience and facts["stale"] >= train.patience)
        job.show(step, mean, facts["validation"])
        if last or measures or step % train.log_every == 0:
            values = {"step": step, "loss": sum(facts["losses"]) / len(facts["losses"])}
            values |= {"learning_rate": schedule.get_last_lr()[0], "seconds": round(perf_counter() - start, 3)}
            values |= {f"validation_{k}": v for k, v in facts["validation"].items()} if measures else {}
            facts |= {"losses": [], "loss": values["loss"]}
            sites = job.monitor.step()
            if accelerator.is_main_process:
                job.log(values | ({"sites": sites} if sites else {}))
            accelerator.log({k: v for k, v in values.items() if k != "step"}, step=step)
        if last or measures or step % every == 0:
            facts["seconds"] = perf_counter() - start
            states.save(step, objective, optimizer, schedule, accelerator, facts)
        if last:
            break
    if train.evaluate_every and facts["best"] and facts["best"]["step"] != step:
        states.load_trained(facts["best"]["step"], objective)
    kept = ("loss", "best", "validation", "zero_step", "seconds")
    return {"step": step, "objective": objective, **{k: facts.get(k) for k in kept}}


def _diverged(step: int, job: Job) -> OrthoactError:
    site, good = job.monitor.broken(), job.states.steps()
    where = f", first at the activation {site}" if site else ""
    back = f"the last good checkpoint is {job.states.path(good[-1])}" if good else "there is no checkpoint before it"
    return OrthoactError(
        f"step {step}: the loss is not finite{where}; {back}; lower train.learning_rate or "
        f"train.activation_learning_rate"
    )
