"""One process or several: the accelerator of a run, and starting the command again on several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..interp.errors import OrthoactError
from .recipe import Recipe
from .state import STATE


def relaunch(processes: int, arguments: list[str]) -> bool:
    """Run `orthoact ARGUMENTS` on so many processes of this machine; false where this is one of them already."""
    if processes < 1:
        raise OrthoactError(f"--num-processes {processes}: expected a positive whole number")
    if processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    command = ["--standalone", "--nproc-per-node", str(processes), "-m", "orthoact", *arguments]
    try:
        run(parse_args(command))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        raise OrthoactError(
            f"--num-processes {processes}: process {first.local_rank} failed (exit code {first.exitcode}); its message "
            f"is above"
        ) from error
    return True


def make_accelerator(recipe: Recipe, out: Path | None, processes: int | None) -> Any:
    """The Accelerator of a run, checked to have as many processes as were asked for.

    `accelerate launch --cpu --num_processes 2` silently runs one.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    train = recipe.train
    if train.tracker and out is not None and train.tracker not in (known := _trackers()):
        raise OrthoactError(f"train.tracker: {train.tracker} is none of those installed here ({', '.join(known)})")
    AcceleratorState._reset_state()  # of a run before in this process, which may have had another precision
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else Accelerate takes one process, whatever the launcher says
        # a pretrained model may hold weights that its head does not use, such as a mask token
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=train.what == "all")],
        mixed_precision=None if train.mixed_precision == "no" else train.mixed_precision,
        gradient_accumulation_steps=train.accumulate,
        log_with=train.tracker if out is not None else None,
        project_dir=None if out is None else str(out / STATE),
        step_scheduler_with_optimizer=False,
    )
    if processes is not None and accelerator.num_processes != processes:
        raise OrthoactError(
            f"--num-processes {processes}: {accelerator.num_processes} are running; leave the launcher away and let "
            f"--num-processes start them, or give torchrun --nproc-per-node {processes}"
        )
    return accelerator


def _trackers() -> list[str]:
    from accelerate.tracking import get_available_trackers

    return [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]


def start_tracker(recipe: Recipe, accelerator: Any) -> None:
    """Open the tracker of the recipe, if it names one; it writes into the folder of the run."""
    if recipe.train.tracker:
        accelerator.init_trackers("orthoact", config=dict(_flat(recipe.to_dict())))


def close() -> None:
    """Part from the other processes."""
    import torch.distributed as group

    if group.is_available() and group.is_initialized():
        group.destroy_process_group()


def _flat(values: dict[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, int | float | str | bool) else str(value)
