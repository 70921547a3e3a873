"""Checkpoints of a run: written beside and renamed, the last few and the best kept, nothing pickled.

    state/step-00000120/trained.safetensors     what trains, and the buffers (running statistics, say)
                       /optimizer.safetensors   the moments of the optimizer
                       /state.json              step, rates, schedule, figures so far

A frozen weight is not in them: it comes from the model again. Nor is a random state: the examples and the dropout of a
step are functions of its number. A folder is complete when it has its name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
_MOMENTS = StateDictOptions(full_state_dict=True, cpu_offload=True)


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
        if accelerator.is_main_process:
            facts = facts | {"step": step, "schedule": schedule.state_dict(), "processes": accelerator.num_processes}
            self._write(step, trained, moments, facts)
        accelerator.wait_for_everyone()

    def _write(self, step: int, trained: dict[str, Any], moments: dict[str, Any], facts: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{secrets.token_hex(4)}.new"
        new.mkdir()
        try:
            tensors = {f"{name}.{key}": v for name, held in moments["state"].items() for key, v in held.items()}
            for name, held in (("trained", trained), ("optimizer", tensors)):
                save_file(
                    {k: v.detach().cpu().contiguous().clone() for k, v in held.items()}, new / f"{name}.safetensors"
                )
            (new / "state.json").write_text(json.dumps(facts | {"groups": moments["param_groups"]}), encoding="utf-8")
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
        """Go on from the checkpoint of a step: weights, optimizer, schedule; returns its facts."""
        from safetensors.torch import load_file

        facts = self.facts(step)
        if (processes := facts.pop("processes")) != accelerator.num_processes:
            raise OrthoactError(
                f"--resume: the run was on {processes} processes, this is on {accelerator.num_processes}; "
                f"give --num-processes {processes}"
            )
        self.load_trained(step, objective)
        moments: dict[str, Any] = {"state": {}, "param_groups": facts.pop("groups")}
        for key, value in load_file(self.path(step) / "optimizer.safetensors").items():
            name, _, kind = key.rpartition(".")
            moments["state"].setdefault(name, {})[kind] = value
        set_optimizer_state_dict(objective, _plain(optimizer), moments, options=_MOMENTS)
        schedule.load_state_dict(facts.pop("schedule"))
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


def is_sharded(objective: nn.Module) -> bool:
    """Whether each process holds a part of every weight (FSDP2)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in objective.parameters())


def whole_state(objective: nn.Module) -> dict[str, Any]:
    """All weights whole, on the CPU of the first process; empty on the others."""
    return get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def remove(folder: Path) -> None:
    """Delete a folder; what a kill leaves of it does not have its name."""
    gone = folder.with_name(f".{secrets.token_hex(4)}.new")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
