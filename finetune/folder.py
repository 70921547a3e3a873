"""The folder of a run: begun before the first step, when all else is sound; the model comes last, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..convert.checkpoint import check_output, replacing, save
from ..convert.provenance import own_command
from ..convert.sources import REPORT, Source
from ..interp.errors import OrthoactError
from .data import digest
from .recipe import Recipe

METRICS = "metrics.jsonl"
"""One JSON object a logged step."""


def check(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool, accelerator: Any) -> dict[str, Any] | None:
    """Whether the folder may be written or gone on in; the facts of a run that is finished already."""
    if is_begun(out, resume):
        held = json.loads((out / REPORT).read_text(encoding="utf-8")).get("training") or {}
        if held.get("recipe") is None:
            raise OrthoactError(f"--resume: {out} is not the folder of a training run; give another with --output")
        if changed := list(changes(held["recipe"], recipe.public())):
            raise OrthoactError(
                f"--resume: the run in {out} has another recipe ({'; '.join(changed[:3])}); give the same, or another "
                f"--output"
            )
        if held.get("digest", now := digest(recipe.data.path)) != now:
            raise OrthoactError(f"--resume: the run in {out} had other data in data.path; give another --output")
        accelerator.wait_for_everyone()
        return held if held.get("finished") and (out / "config.json").is_file() else None
    if accelerator.is_main_process:
        try:
            check_output(out, overwrite=overwrite)
        except OrthoactError as error:
            text = str(error).replace("with -o, or --overwrite", "with --output, --resume, or --overwrite")
            raise OrthoactError(text.replace("with -o", "with --output")) from error
    return None


def is_begun(out: Path, resume: bool) -> bool:
    """Whether a run goes on in this folder."""
    return resume and (out / REPORT).is_file()


def begin(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    """Make the folder, in place of one that is there."""
    with replacing(out, overwrite=overwrite) as folder:
        training = {"recipe": recipe.public(), "digest": digest(recipe.data.path), "finished": False}
        record = {"orthoact": __version__, "training": training}
        (folder / REPORT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The keys in which two recipes differ, but for what says nothing about the run itself."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if (key + name) not in ("about", "name", "compare", "offline"):
                yield from changes(old.get(name), new.get(name), f"{key}{name}.")
    elif old != new:
        yield f"{key.rstrip('.')} was {old!r}, is {new!r}"


def keep_lines(path: Path, step: int) -> None:
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


def finish(model: nn.Module, out: Path, source: Source, record: dict[str, Any]) -> None:
    """Write the model into the folder of the run, config.json last: without it nothing loads the folder."""
    seed = record["training"]["recipe"]["seed"]
    with _emptied(out / ".model") as folder:
        save(model, folder, source=source, report=record, seed=seed, command=own_command())
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
