"""Prove that a converted model is its base with other activations: every other tensor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..interp.activation import TENSORS
from ..interp.errors import OrthoactError
from .folder import read_activations, read_record
from .names import is_adapter
from .provenance import commit_of, sha256, weight_files, weights_folder
from .sources import Source, load_source

Tensors = dict[str, Callable[[], Tensor]]
"""Names of tensors, and how to read each."""


def verify(out: str | Path, base: str | None = None, *, revision: str | None = None, **options) -> dict[str, Any]:
    """Compare a converted folder (or Hub id) with its base, tensor by tensor, and the base's files with their hashes.

    `base` is the model that it was made of: the one that the record names, unless given. Tensors are read one by one,
    so that the memory is that of the largest; where the two files name them differently (an older checkpoint), the base
    is loaded by its library. `options` are those of `load_source`.

    Returns `verified` (all of it holds), `base`, `revision`, `tensors` (how many were compared), `activations`,
    `differ`, `missing` (of the base, not in the folder), `added` (the other way round), and `files`: for each
    recorded file of the base `equal`, `differs` or `absent`. Raises `OrthoactError` where there is nothing to compare.
    """
    folder, record = _converted(str(out))
    recorded = record.get("base") or {}
    name = base or recorded.get("model")
    if not name:
        raise OrthoactError(f"{out}: its record names no base: give it with --base")
    activations = read_activations(folder)
    source = load_source(_known(name), revision=revision or _revision(recorded, base), **options)
    if source.converted:
        raise OrthoactError(f"{name} is a converted model itself: give the original with --base")
    weights = weights_folder(source)
    files = _compare_files(recorded.get("files") or {}, weights)
    differ, missing, added, compared = [], [], [], 0
    if not is_adapter(folder):
        own = tuple(f"{path}.{key}" for path in activations for key in TENSORS)
        with _opened(folder) as held, _opened(weights) as original:
            mine = {k: read for k, read in held.items() if not k.endswith(own)}
            pairs, missing, added = _matched(mine, original, source)
            if missing or added:  # another version of the library named or arranged them otherwise
                state = source.model.state_dict()
                pairs, missing, added = _matched(mine, {k: lambda v=v: v for k, v in state.items()}, source)
                missing = [k for k in missing if not _is_tied(state, k, mine)]
            for key, other in pairs:
                compared += 1
                if not _same(mine[key](), other()):
                    differ.append(key)
    verified = not (differ or missing or added) and "differs" not in files.values()
    return {
        "verified": verified and bool(compared or files),
        "output": str(out),
        "base": name,
        "revision": commit_of(weights) or revision or recorded.get("revision"),
        "tensors": compared,
        "activations": len(activations),
        "differ": differ,
        "missing": missing,
        "added": added,
        "files": files,
    }


def _converted(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a converted model and its record; a Hub id is downloaded."""
    from .sources import fetch

    path = fetch(name, ["*.json", "*.safetensors"])
    return path, read_record(path)


def _known(name: str) -> str:
    from .names import DEMO, DEMO_NAME

    return DEMO if DEMO_NAME.fullmatch(name) else name


def _revision(recorded: dict[str, Any], given: str | None) -> str | None:
    """The recorded revision, for the recorded base."""
    return None if given else recorded.get("revision")


def _compare_files(recorded: dict[str, str], folder: Path | None) -> dict[str, str]:
    here = {path.name: path for path in weight_files(folder)} if folder else {}
    return {
        name: "absent" if name not in here else "equal" if sha256(here[name]) == digest else "differs"
        for name, digest in recorded.items()
    }


@contextmanager
def _opened(folder: Path | None) -> Iterator[Tensors]:
    """The tensors in the weights of a folder; pickled ones are read without running code."""
    from safetensors import SafetensorError, safe_open

    found: Tensors = {}
    with ExitStack() as stack:
        for path in weight_files(folder) if folder else []:
            try:
                if path.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(path, "pt"))
                    found |= {key: lambda f=opened, k=key: f.get_tensor(k) for key in opened.keys()}
                else:
                    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    found |= {k: lambda v=v: v for k, v in held.items() if isinstance(v, Tensor)}
            except (OSError, RuntimeError, SafetensorError) as error:
                raise OrthoactError(f"{path}: could not be read ({str(error).splitlines()[0]})") from error
        yield found


def _matched(mine: Tensors, theirs: Tensors, source: Source) -> tuple[list, list[str], list[str]]:
    """Pairs of names and readings that belong together, and what is only in the base, or only in the folder."""
    prefix = getattr(source.model, "base_model_prefix", "") or ""
    pairs, used = [], set()
    for key in mine:
        names = [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")] if prefix else [key]
        other = next((name for name in names if name in theirs), None)
        if other is not None:
            pairs.append((key, theirs[other]))
            used.add(other)
    found = {key for key, _ in pairs}
    return pairs, [k for k in theirs if k not in used], [k for k in mine if k not in found]


def _is_tied(state: dict[str, Tensor], key: str, mine: Tensors) -> bool:
    """Whether a tensor of the loaded base is one of those that were compared, under another name."""
    place = state[key].data_ptr()
    return any(k in mine and v.data_ptr() == place and k != key for k, v in state.items())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bits; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if plain is None or a.is_complex():
        return torch.equal(a, b)
    return torch.equal(a.cpu().contiguous().view(plain), b.cpu().contiguous().view(plain))
