"""Write a converted model as a folder: complete, under its final name or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..interp.errors import OrthoactError
from .record import SENTINEL, spec_of
from .report import write_report
from .sources import REPORT, Source, carried_files


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that must not be written."""
    out = Path(os.path.abspath(out.expanduser()))
    if not out.exists():
        return
    if not overwrite:
        raise OrthoactError(f"{out} exists: give another folder with -o, or --overwrite to replace it")
    if not out.is_dir():
        raise OrthoactError(f"{out} is a file: give a folder with -o")
    if any(out.iterdir()) and not (out / REPORT).is_file():
        raise OrthoactError(f"{out} was not written by orthoact (it has no {REPORT}): give another folder with -o")


@contextmanager
def replacing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder beside `out` that takes its name at the end; on failure nothing is left and nothing lost."""
    out = Path(os.path.abspath(out.expanduser()))
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new, old = out.parent / f".{out.name}.{token}.new", out.parent / f".{out.name}.{token}.old"
    new.mkdir()
    try:
        yield new
        check_output(out, overwrite=overwrite)  # it may have appeared meanwhile
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(new, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save(
    model: nn.Module,
    out: str | Path,
    *,
    source: Source | None = None,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
    page: bool = False,
) -> Path:
    """Write `model`, with the tokenizer and the like of its `source`, as a folder that plain loaders read.

    With `page` also the report. Raises `OrthoactError` where `out` exists (without `overwrite`) or the model is of
    neither library.
    """
    out = Path(out)
    with replacing(out, overwrite=overwrite) as folder:
        write_weights(model, folder)
        if spec_of(model) is not None and SENTINEL not in (folder / "config.json").read_text(encoding="utf-8"):
            raise OrthoactError(
                f"the config class of {type(model).__name__} did not write the record of its activations: the folder "
                f"would load with the old ones; report this architecture"
            )
        if source is not None and source.folder is not None:
            for path in carried_files(source):
                target = folder / path.relative_to(source.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        record = {"orthoact": __version__, **(report or {})}
        if source is not None:
            record["base"] = {"model": source.base, "revision": source.revision, "library": source.kind}
        (folder / REPORT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if page:
            write_report(folder, name=out.name)
    return out


def write_weights(model: Any, folder: Path) -> None:
    """Weights and config, by the model's own library."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
        # transformers' TimmWrapper gives num_classes itself and fails where model_args has it too
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        raise OrthoactError(f"{type(model).__name__} is of neither transformers nor timm: save its state_dict yourself")
