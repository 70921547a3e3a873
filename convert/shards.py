"""Write a converted checkpoint without loading it: the base's shards as they are, and one more with the activations.

A conversion changes no weight, so a model that is planned on the meta device is written in the memory of a copy of one
file after the other.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from .provenance import weight_files
from .sources import Source, fetch, weight_bytes
from .transformers_hooks import check_saveable

SINGLE, INDEX, ADDED = "model.safetensors", "model.safetensors.index.json", "model-orthoact.safetensors"

LIGHT = 2**30
"""Bytes of weights that are loaded to plan a conversion; more are left where they are, and the meta device does."""


def memory() -> int:
    """Bytes of memory of this machine that are free."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not tell
        return 2**62


def write_shards(model: Any, source: Source, folder: Path) -> None:
    """The files of the base, its config with the record, and a shard with the tensors of the activations of `model`.

    Raises `OrthoactError` where the base holds no safetensors.
    """
    check_saveable(model)
    base = source.folder if weight_bytes(source.folder) else fetch(source.name, ["*.safetensors", INDEX])
    placed = _placed(base, source.name)
    names = sorted(set(placed.values()))
    renamed = {SINGLE: "model-00001-of-00001.safetensors"}  # a file of the plain name would be read alone
    for name in names:
        shutil.copyfile(base / name, folder / renamed.get(name, name))
    tensors = {
        f"{path}.{key}": tensor.contiguous()
        for path, act in model.named_modules()
        if isinstance(act, Activation)
        for key, tensor in act.state_dict().items()
    }
    save_file(tensors, folder / ADDED, {"format": "pt"})
    weights = {key: renamed.get(name, name) for key, name in placed.items()} | dict.fromkeys(tensors, ADDED)
    size = sum((folder / name).stat().st_size for name in {*weights.values()})
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _placed(folder: Path, name: str) -> dict[str, str]:
    """The file that holds each tensor."""
    files = weight_files(folder)
    if not files or any(path.suffix != ".safetensors" for path in files):
        raise OrthoactError(
            f"{name}: its weights are no safetensors, and they are too large to be loaded and written anew: write an "
            f"--adapter, or save them as safetensors on a larger machine"
        )
    if lost := [path.name for path in files if not path.is_file()]:
        raise OrthoactError(f"{name}: its index names {lost[0]}, which is not there; download it again")
    placed = {}
    for path in files:
        with safe_open(path, "pt") as file:  # reads the names, not the tensors
            placed |= dict.fromkeys(file.keys(), path.name)
    return placed
