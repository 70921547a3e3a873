"""Write a converted model as a folder: complete, under its final name or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .._version import __version__
from ..interp.errors import OrthoactError
from .files import read_json
from .names import is_adapter
from .provenance import provenance
from .record import SENTINEL, spec_of
from .report import write_report
from .sources import REPORT, Source, carried_files

FORMS = ("full", "adapter", "standalone")
"""What a converted model can be written as."""


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that must not be written."""
    out = Path(os.path.abspath(out.expanduser()))
    place = next(path for path in (out, *out.parents) if path.exists())
    if place != out and not (place.is_dir() and os.access(place, os.W_OK)):
        raise OrthoactError(f"{out}: nothing can be written into {place}; give another folder with -o")
    if not out.exists():
        return
    if not overwrite:
        raise OrthoactError(f"{out} exists: give another folder with -o, or --overwrite to replace it")
    if not out.is_dir():
        raise OrthoactError(f"{out} is a file: give a folder with -o")
    if any(out.iterdir()) and not (out / REPORT).is_file() and not is_adapter(out):
        raise OrthoactError(f"{out} was not written by orthoact (it has no {REPORT}): give another folder with -o")


@contextmanager
def replacing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder beside `out` that takes its name at the end; on failure nothing is left and nothing lost.

    Where the system can exchange two names at once (Linux, macOS), a process that is killed at any moment leaves the
    old folder or the new one, whole, under `out`; what else it leaves is swept by the next one.
    """
    out = Path(os.path.abspath(out.expanduser()))
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    new = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.new"
    new.mkdir()
    try:
        yield new
        check_output(out, overwrite=overwrite)  # it may have appeared meanwhile
        if not out.exists():
            os.rename(new, out)
        elif not _exchange(new, out):
            old = new.with_suffix(".old")
            os.rename(out, old)
            try:
                os.rename(new, out)
            except OSError:
                os.rename(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:  # a full disk, which it does not tell as an OSError
        raise OrthoactError(f"{out}: its weights could not be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step of the file system; False where it has no such step."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0  # RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return False


def _sweep(out: Path) -> None:
    """Remove what processes that are no more left beside `out`, and give back a folder that one of them had put by."""
    for path in out.parent.glob(f".{out.name}.*-*.*"):
        pid = path.name.removeprefix(f".{out.name}.").partition("-")[0]
        if not pid.isdigit() or path.suffix not in (".new", ".old") or _runs(int(pid)):
            continue
        if path.suffix == ".old" and not out.exists():
            os.rename(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # asking is killing there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def save(
    model: nn.Module,
    out: str | Path,
    *,
    source: Source | None = None,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
    form: str = "full",
    seed: int | None = None,
    command: Iterable[str] = (),
    page: bool = False,
) -> Path:
    """Write `model`, with the tokenizer and the like of its `source`, as a folder that plain loaders read.

    `form`: `full`, a checkpoint; `adapter`, the activations alone, without a weight (see `adapter`); `standalone`, a
    checkpoint with a code file that evaluates them without this package (see `standalone`). With a `source` the record
    names where the model comes from, and `seed` and `command`; with `page` a checkpoint has its report beside it.
    Raises `OrthoactError` where `out` exists (without `overwrite`) or the model is of neither library.
    """
    out = Path(out)
    if form not in FORMS:
        raise OrthoactError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    spec = spec_of(model)
    if form != "full" and spec is None:
        raise OrthoactError(f"{type(model).__name__} is not converted: only a converted model is written as {form}")
    if spec is not None and source is not None and "base" not in spec:
        spec.update(provenance(source, seed=seed, command=command))
    with replacing(out, overwrite=overwrite) as folder:
        if form == "adapter":
            from .adapter import write_adapter

            write_adapter(model, folder)
            return out
        if source is not None and source.planned:
            from .shards import write_shards

            write_shards(model, source, folder)
        else:
            write_weights(model, folder)
        if spec is not None and SENTINEL not in (folder / "config.json").read_text(encoding="utf-8"):
            raise OrthoactError(
                f"the config class of {type(model).__name__} did not write the record of its activations: the folder "
                f"would load with the old ones; report this architecture"
            )
        if source is not None and source.folder is not None:
            for path in carried_files(source):
                target = folder / path.relative_to(source.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        if form == "standalone":
            from .standalone import write_standalone

            write_standalone(model, folder)
        record = {"orthoact": __version__, **(report or {})}
        if source is not None:
            record["base"] = {"model": source.base, "revision": source.revision, "library": source.kind}
            record["base"] |= described(source)
        (folder / REPORT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if page:
            write_report(folder, name=out.name)
    return out


def _set_apart(model: Any, tensors: dict[str, Any], *_: Any) -> None:
    """Copies of what several modules hold (CoaT): safetensors writes no tensor twice, timm reads every name."""
    seen = set()
    for name, tensor in tensors.items():
        at = tensor.untyped_storage().data_ptr()
        if at in seen:
            tensors[name] = tensor.clone()
        seen.add(at)


def described(source: Source) -> dict[str, Any]:
    """What the base's own card says of it and is carried on: licence, language, task."""
    from huggingface_hub import metadata_load

    before = source.folder / REPORT if source.folder else None
    if before is not None and before.is_file():
        return {"card": (read_json(before, strict=False).get("base") or {}).get("card") or {}}
    try:
        found = metadata_load(source.folder / "README.md") if source.folder else None
    except (OSError, ValueError):  # no card, or one whose metadata are broken
        found = None
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {"card": {key: found[key] for key in kept if key in found}} if isinstance(found, dict) else {}


def write_weights(model: Any, folder: Path) -> None:
    """Weights and config, by the model's own library."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        hook = model.register_state_dict_post_hook(_set_apart)
        try:
            save_for_hf(model, str(folder), safe_serialization=True)
        finally:
            hook.remove()
        # transformers' TimmWrapper gives num_classes itself and fails where model_args has it too
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        raise OrthoactError(f"{type(model).__name__} is of neither transformers nor timm: save its state_dict yourself")
