"""Read a converted folder without its model: the record and the activations alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..interp.activation import TENSORS, Activation
from ..interp.errors import OrthoactError
from .files import read_json
from .names import CONFIG, WEIGHTS, is_adapter
from .provenance import record_in, weight_files
from .record import check, check_tensors, rebuilt
from .sources import REPORT


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a converted checkpoint or an adapter, checked."""
    record = record_in(read_json(folder / (CONFIG if is_adapter(folder) else "config.json")))
    if not record:
        raise OrthoactError(f"{folder}: its config has no record of a conversion; give the folder that orthoact wrote")
    check(record)
    return record


def read_report(folder: Path) -> dict[str, Any]:
    """What the conversion measured, as far as the folder says."""
    return read_json(folder / REPORT) if (folder / REPORT).is_file() else {}


def read_activations(folder: Path) -> dict[str, Activation]:
    """The learnable activations of a folder by name, in the order of its record; no other tensor is read.

    Raises `OrthoactError` for a record, a file or a tensor that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    record, found = read_record(folder), {}
    files = [folder / WEIGHTS] if is_adapter(folder) else weight_files(folder)
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
            where = {key: file for file in opened for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise OrthoactError(f"{folder}: its weights could not be read ({error})") from error
        for name, entry in record["sites"].items():
            if is_adapter(folder):
                from .adapter import LAYER, PackedActivation

                act = rebuilt(name, entry, torch.nn.Identity(), PackedActivation)
                keys = {key: f"base_model.model.{name}.{LAYER}.{key}" for key in ("theta", "fixed")}
            else:
                act = rebuilt(name, entry, torch.nn.Identity())
                stem = next((k.removesuffix(".theta") for k in where if _is_at(k, name)), name)
                keys = {key: f"{stem}.{key}" for key in TENSORS}
            for key, at in keys.items():
                if at not in where:
                    raise OrthoactError(f"{folder}: it lacks {key} of the learnable activation {name!r}")
                wanted, part = getattr(act, key), where[at].get_slice(at)
                if list(part.get_shape()) != list(wanted.shape) or part.get_dtype() != "F32":
                    raise OrthoactError(
                        f"{folder}: {key} of the learnable activation {name!r} is {part.get_dtype()} of shape "
                        f"{tuple(part.get_shape())}: expected F32 of {tuple(wanted.shape)}"
                    )
                wanted.data.copy_(where[at].get_tensor(at))
            check_tensors(name, act)
            found[name] = act
    return found


def _is_at(key: str, name: str) -> bool:
    """Whether a tensor is the theta of a site, whose file may leave out the prefix of the trunk or have one."""
    stem = key.removesuffix(".theta")
    return stem != key and (stem == name or name.endswith(f".{stem}") or stem.endswith(f".{name}"))
