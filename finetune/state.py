"""Checkpoints of a run: written beside and renamed, the last few and the best kept, nothing pickled.

    state/step-00000120/trained.safetensors     what trains, and the buffers (running statistics, say)
                       /optimizer.safetensors   the moments of the optimizer
                       /random.safetensors      the random state of every process
                       /state.json              step, rates, schedule, figures so far

A frozen weight is not in them: it comes from the model again. A folder is complete when it has its name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..interp.errors import OrthoactError

STATE = "state"
"""The folder of the checkpoints in the output folder; never pushed."""

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_MODEL = StateDictOptions(full_state_dict=True, strict=False)
_MOMENTS = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)


class States:
    """The checkpoints of one run, in a folder."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(step) for step in found if step.isdecimal())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def facts(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step says beside its tensors."""
        path = self.path(step) / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OrthoactError(f"{path}: the checkpoint cannot be read ({error}); delete {path.parent}") from error

    def save(
        self, step: int, objective: nn.Module, optimizer: Any, schedule: Any, accelerator: Any, facts: dict
    ) -> None:
        """Write the checkpoint of a step; every process calls it, the first one writes."""
        trained = get_model_state_dict(objective, options=_FULL)
        moments = get_optimizer_state_dict(objective, _plain(optimizer), options=_MOMENTS)
        random = _random(accelerator)
        if accelerator.is_main_process:
            self._write(step, trained, moments, random, facts | {"step": step, "schedule": schedule.state_dict()})
        accelerator.wait_for_everyone()

    def _write(self, step: int, trained: dict, moments: dict, random: dict[str, Tensor], facts: dict) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{secrets.token_hex(4)}.new"
        new.mkdir()
        try:
            plain = {key: value for key, value in moments.items() if not isinstance(value, Tensor)}
            tensors = {key: value for key, value in moments.items() if isinstance(value, Tensor)}
            for name, held in (("trained", trained), ("optimizer", tensors), ("random", random)):
                save_file(
                    {k: v.detach().cpu().contiguous().clone() for k, v in held.items()}, new / f"{name}.safetensors"
                )
            (new / "state.json").write_text(json.dumps(facts | {"optimizer": plain}), encoding="utf-8")
            if self.path(step).exists():  # of a run before that one that was resumed
                remove(self.path(step))
            os.rename(new, self.path(step))
        finally:
            shutil.rmtree(new, ignore_errors=True)
        best = (facts.get("best") or {}).get("step")
        for old in self.steps()[: -self.keep]:
            if old != best:
                remove(self.path(old))

    def load(self, step: int, objective: nn.Module, optimizer: Any, schedule: Any, accelerator: Any) -> dict[str, Any]:
        """Go on from the checkpoint of a step: weights, optimizer, schedule, random states; returns its facts."""
        from safetensors.torch import load_file

        facts = self.facts(step)
        self.load_trained(step, objective)
        moments: dict[str, Any] = {**load_file(self.path(step) / "optimizer.safetensors"), **facts.pop("optimizer")}
        set_optimizer_state_dict(objective, _plain(optimizer), moments, options=_MOMENTS)
        schedule.load_state_dict(facts.pop("schedule"))
        random = load_file(self.path(step) / "random.safetensors")
        if accelerator.num_processes != len(random["cpu"]):
            raise OrthoactError(
                f"--resume: the run was on {len(random['cpu'])} processes, this is on {accelerator.num_processes}; "
                f"give --num-processes {len(random['cpu'])}"
            )
        torch.set_rng_state(random["cpu"][accelerator.process_index])
        if "device" in random and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(random["device"][accelerator.process_index])
        return facts

    def load_trained(self, step: int, objective: nn.Module) -> None:
        """Put the trained weights of a step into the model."""
        from safetensors.torch import load_file

        held: dict[str, Any] = load_file(self.path(step) / "trained.safetensors")
        found = set_model_state_dict(objective, held, options=_MODEL)
        if found.unexpected_keys:
            raise OrthoactError(
                f"{self.path(step)}: {found.unexpected_keys[0]} is no weight of this model: another recipe"
            )

    def clear(self) -> None:
        """Remove what an interrupted write or an earlier run left."""
        for path in self.folder.glob(".*.new"):
            shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder; what a kill leaves of it does not have its name."""
    gone = folder.with_name(f".{secrets.token_hex(4)}.new")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _random(accelerator: Any) -> dict[str, Tensor]:
    """The random states of all processes, one a row."""
    own = torch.get_rng_state().to(accelerator.device)
    found = {"cpu": accelerator.gather(own[None])}
    if accelerator.device.type == "cuda":
        found["device"] = accelerator.gather(torch.cuda.get_rng_state().to(accelerator.device)[None])
    return {name: state.cpu() for name, state in found.items()}
