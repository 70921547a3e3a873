"""What is trained and measured on: rows from `datasets`, files or folders, and how they become a model's inputs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert.data import read_datasets, read_text
from ..convert.sources import REPORT, Source, demo_folder
from ..interp.errors import OrthoactError
from .examples import Images, Sentences, Windows
from .recipe import Recipe
from .sections import Data

SPLITS = ("train", "validation", "test")
TEXTS = (".txt", ".md", ".text")
READ = (100, 2**20)
"""Of how many files the beginning counts in `digest`, and how many bytes."""


@dataclass(frozen=True)
class Rows:
    """The three splits as they were found; nothing of the model is known yet."""

    train: Any
    validation: Any
    test: Any
    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of their numbers; empty where nothing is classified."""


@dataclass(frozen=True)
class Examples:
    """The three splits as inputs of a model."""

    train: Any
    validation: Any
    test: Any
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
    unit: str
    """What they are counted in: tokens, texts or images."""


def read_rows(recipe: Recipe) -> Rows:
    """The splits that a recipe names, checked: columns, labels, sizes.

    Raises `OrthoactError`, quoting the key, for data that cannot be read, a column that is missing, labels that are no
    classes, a split that is empty.
    """
    limited = replace(recipe.data, length=1, size=None, augment=True)  # the rest does not change the rows
    seed = recipe.seed if recipe.data.train_limit else 0
    return _rows(limited, recipe.task, seed, digest(recipe.data.path, changed=True))


@lru_cache(maxsize=2)  # the rows of a comparison read the same data again and again
def _rows(data: Data, task: str, seed: int, state: str | None) -> Rows:
    found = _splits(data)
    for name, rows in found.items():
        if len(rows) == 0:
            raise OrthoactError(f"data.{name}: the split {getattr(data, name)!r} of {data.path} is empty")
    if task == "causal-lm":
        texts = {name: _texts(data, name, rows) for name, rows in found.items()}
        return Rows(**_held_out(data, texts, _cut_text))
    column = data.text if task == "sequence-classification" else data.image
    for name, rows in found.items():
        _check_columns(data, name, rows, column, data.label)
        if column == data.image and task == "image-classification" and type(rows.features[column]).__name__ != "Image":
            raise OrthoactError(
                f"data.image: column {column!r} of {data.path} holds {rows[0][column]!r}, no images; give a folder "
                f"with a folder of images for each class, or a data set with a column of images"
            )
    if task == "sequence-classification":
        for name, rows in found.items():
            _strings(data, name, rows[column][:])
    labels = _labels(data, found)
    found = _held_out(data, found, _cut_rows)
    for name, rows in found.items():
        if len(rows) == 0:
            raise OrthoactError(
                f"data.holdout: a share of {data.holdout:g} of the rows of {data.path} leaves none for {name}; give "
                f"more rows, another share, or the splits themselves"
            )
    limits = {name: getattr(data, f"{name}_limit") for name in SPLITS}
    found = {name: _draw(rows, limits[name], seed if name == "train" else 0) for name, rows in found.items()}
    return Rows(**{name: _pairs(data, name, rows, column, labels) for name, rows in found.items()}, labels=labels)


def digest(path: str, *, changed: bool = False) -> str | None:
    """What tells data on this machine from others: names, sizes and beginnings of the files; None for a Hub's.

    With `changed`, also when they were last written. What is hidden or was written by orthoact is none of them.
    """
    where = Path(path).expanduser()
    if path == "demo" or not where.exists():
        return None
    found = hashlib.sha256()
    for i, file in enumerate(_files(where) if where.is_dir() else [where]):
        state = file.stat()
        name = file.relative_to(where).as_posix()
        found.update(f"{name} {state.st_size} {state.st_mtime_ns if changed else 0}\n".encode())
        if i < READ[0]:
            with open(file, "rb") as content:
                found.update(content.read(READ[1]))
    return found.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(n for n in folders if not (n.startswith(".") or (here / n / REPORT).is_file()))
        yield from (file for name in sorted(names) if (file := here / name).is_file())


# -- reading -----------------------------------------------------------------------------------------------------------


def _splits(data: Data) -> dict[str, Any]:
    """The splits that are there: lists of texts, or rows of `datasets`."""
    path = demo_folder() / "heldout.txt" if data.path == "demo" else Path(data.path).expanduser()
    if path.is_file() and path.suffix in TEXTS:
        return {"train": [read_text(path)]}
    if path.is_dir() and (files := {p.stem: p for p in sorted(path.iterdir()) if p.suffix in TEXTS}):
        return _named(data, {name: [read_text(file)] for name, file in files.items()})
    if path.exists():
        try:
            held = read_datasets(path)
        except OrthoactError as error:
            if empty := re.search('Instruction "(.+?)" corresponds to no data', str(error)):
                name = next((name for name in SPLITS if getattr(data, name) == empty[1]), "path")
                raise OrthoactError(f"data.{name}: the split {empty[1]!r} of {data.path} is empty") from error
            raise OrthoactError(str(error).replace("--data", "data.path:")) from error
        return _named(data, held)
    if data.path.startswith((".", "/", "~")) or path.suffix:
        raise OrthoactError(f"data.path: there is no file or folder {data.path}")
    return _named(data, _from_hub(data))


def _from_hub(data: Data) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        whole: Any = datasets.load_dataset(data.path, data.subset)
        slices = {key for name in SPLITS if "[" in (key := getattr(data, name))}
        held: dict[str, Any] = {str(key): split for key, split in whole.items()}
        return held | {key: datasets.load_dataset(data.path, data.subset, split=key) for key in slices}
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OrthoactError(
            f"data.path: {data.path} is no file or folder here, and the Hub did not give it ({why}); check the name, "
            f"the network and HF_HUB_OFFLINE, or take the recipe's own substitute with --offline"
        ) from error


def _named(data: Data, held: dict[str, Any]) -> dict[str, Any]:
    """The splits that the recipe names; validation and test may be missing, unless they were asked for by name."""
    usual = Data()
    for name in SPLITS:
        key = getattr(data, name)
        if key not in held and (name == "train" or key != getattr(usual, name)):
            raise OrthoactError(f"data.{name}: {data.path} has no split {key!r}, it has {', '.join(sorted(held))}")
    return {name: held[key] for name in SPLITS if (key := getattr(data, name)) in held}


def _texts(data: Data, name: str, rows: Any) -> list[str]:
    """The documents of a split."""
    if not isinstance(rows, list):
        _check_columns(data, name, rows, data.text)
        rows = _strings(data, name, rows[data.text][:])
        rows = [text if data.eos or text.endswith("\n") else f"{text}\n\n" for text in rows]
    if not any(text.strip() for text in rows):
        raise OrthoactError(f"data.{name}: the split {getattr(data, name)!r} of {data.path} holds no text")
    return rows


def _strings(data: Data, name: str, texts: list[Any]) -> list[str]:
    """The texts of a column, all of which must be some."""
    if odd := [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise OrthoactError(
            f"data.text: expected text in column {data.text!r} of {name}, row {odd[0][0] + 1} has {odd[0][1]!r}"
        )
    return texts


def _check_columns(data: Data, name: str, rows: Any, *columns: str) -> None:
    held = getattr(rows, "column_names", [])
    for column in columns:
        if column not in held:
            key = next(k for k in ("text", "label", "image") if getattr(data, k) == column)
            known = ", ".join(held) or "text alone"
            raise OrthoactError(f"data.{key}: {data.path} has no column {column!r} in {name}, it has {known}")


def _held_out(data: Data, found: dict[str, Any], cut: Callable) -> dict[str, Any]:
    """Take the splits that are missing off the training split."""
    missing = [name for name in ("validation", "test") if name not in found]
    parts = cut(found["train"], [data.holdout] * len(missing))
    return found | dict(zip(("train", *missing), parts, strict=True))


def _cut_text(texts: list[str], shares: list[float]) -> list[list[str]]:
    """The ends of a text, the last share last, cut at line ends; whole documents where there are many, words where
    there are few lines.
    """
    units = texts if len(texts) >= 20 else "".join(texts).splitlines(keepends=True)
    if len(units) < 20:  # one long line, say
        units = re.findall(r"\s*\S+\s*", "".join(texts))
    sizes = torch.tensor([float(len(unit)) for unit in units]).cumsum(0)
    ends = [int((sizes <= sizes[-1] * (1 - sum(shares[i:]) + 1e-6)).sum()) for i in range(len(shares))] + [len(units)]
    parts = [units[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [part if len(texts) >= 20 else ["".join(part)] for part in parts]


def _cut_rows(rows: Any, shares: list[float]) -> list[Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    ends = [round(len(rows) * (1 - sum(shares[i:]))) for i in range(len(shares))] + [len(rows)]
    return [rows.select(order[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _draw(rows: Any, limit: int | None, seed: int) -> Any:
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def _labels(data: Data, found: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes."""
    rows, where = found["train"][data.label][:], f"column {data.label!r} of train"
    for i, label in enumerate(rows):
        if label is None or label != label:
            raise OrthoactError(f"data.label: row {i + 1} of {where} has no label; give it one or take it out")
        if not isinstance(label, int | str):
            raise OrthoactError(f"data.label: expected whole numbers or names in {where}, row {i + 1} has {label!r}")
    feature, values = found["train"].features[data.label], set(rows)
    if len(values) == 1:
        raise OrthoactError(f"data.label: all rows of train have the label {rows[0]!r}; expected two classes or more")
    if hasattr(feature, "names"):
        return tuple(feature.names)
    if all(isinstance(v, bool) for v in values):
        return ("false", "true")
    if all(isinstance(v, int) for v in values):
        if min(values) < 0:
            raise OrthoactError(f"data.label: expected whole numbers from 0, {where} has {min(values)}")
        return tuple(str(i) for i in range(max(values) + 1))
    return tuple(sorted(map(str, values)))


def _pairs(data: Data, name: str, rows: Any, column: str, labels: tuple[str, ...]) -> Any:
    """Rows as a sequence of (text or image, number of the class)."""
    known = {label: i for i, label in enumerate(labels)}
    numbers = [int(y) if isinstance(y, int) else known.get(y, -1) for y in rows[data.label]]
    if odd := [y for y, n in zip(rows[data.label], numbers, strict=True) if not 0 <= n < len(labels)]:
        raise OrthoactError(
            f"data.{name}: the label {odd[0]!r} of {len(odd)} rows is none of the {len(labels)} classes of the "
            f"training split; take a split that is labelled alike"
        )
    return Pairs(rows, column, numbers)


class Pairs:
    """A column and the numbers of its rows' classes."""

    def __init__(self, rows: Any, column: str, numbers: list[int]):
        self.rows, self.column, self.numbers = rows, column, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.rows[i][self.column], self.numbers[i]


# -- a model's inputs --------------------------------------------------------------------------------------------------


def make_examples(rows: Rows, source: Source, recipe: Recipe) -> Examples:
    """The rows as inputs of the model of `source`, by its own tokenizer or image processor."""
    kind = {"causal-lm": Windows, "sequence-classification": Sentences, "image-classification": Images}[recipe.task]
    maker = kind(source, recipe.data)
    splits = {name: maker.split(name, getattr(rows, name)) for name in SPLITS}
    return Examples(**splits, collate=maker.collate, unit=kind.unit)
