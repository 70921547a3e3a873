"""Recipes: what a training run does, as one frozen dataclass that a commented YAML file fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..interp.errors import OrthoactError
from .sections import Compare, Convert, Data, Train, one_of
from .values import build, near, plain, unknown

TASKS = ("causal-lm", "sequence-classification", "image-classification")
"""What a model can be trained for."""


@dataclass(frozen=True)
class Recipe:
    """A training run.

    >>> recipe = read("demo-smoke", ["train.learning_rate=3e-3", "seed=1"])
    >>> recipe.train.learning_rate, recipe.seed
    (0.003, 1)
    """

    about: str = ""
    """One line for `orthoact recipes`."""
    model: str = "demo"
    """A Hub id, a local folder, timm:NAME or demo, converted already or not."""
    task: str = "causal-lm"
    """See `TASKS`."""
    scratch: bool = False
    """Take the architecture of `model` with new random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """With `scratch`: values of the model's config (timm: arguments of create_model) that replace its own."""
    new_head: bool = False
    """Give a classifier a new head for the labels of the data, whatever head the model has."""
    seed: int = 0
    """Of the new weights, the order of the data and dropout."""
    convert: Convert = field(default_factory=Convert)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    compare: Compare = field(default_factory=Compare)
    offline: dict[str, Any] = field(default_factory=dict)
    """The keys that `--offline` replaces, for a run without a network."""
    name: str = ""
    """What the file is called."""

    def __post_init__(self):
        one_of("task", self.task, TASKS)
        if not 0 <= self.seed < 2**63:
            raise OrthoactError(f"seed: expected a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.config and not self.scratch:
            raise OrthoactError(f"config: {', '.join(self.config)} is for untrained weights; give scratch: true too")
        if self.convert.start != "fit" and not self.scratch:
            raise OrthoactError(f"convert.start: {self.convert.start} is for untrained weights; give scratch: true too")
        if self.scratch and self.train.loss == "distill":
            raise OrthoactError("train.loss: distill has nothing to teach from untrained weights (scratch: true)")
        if self.compare.rows or self.offline:
            alone = replace(self, compare=Compare(), offline={})
            for keys in (*self.compare.rows.values(), self.offline):  # a wrong key is told before anything runs
                alone.override(keys)

    def override(self, keys: Mapping[str, Any]) -> Recipe:
        """The recipe with dotted keys replaced: `{"train.max_steps": 5}`."""
        values = self.to_dict()
        for key, value in keys.items():
            owner, *path = values, *key.split(".")
            for depth, part in enumerate(path[:-1]):
                if not isinstance(owner.get(part), dict):
                    raise unknown(".".join(path[: depth + 1]), owner)
                owner = owner[part]
            free = path[0] in ("config", "offline") or path[:2] == ["compare", "rows"]
            if path[-1] not in owner and not free:
                raise unknown(key, owner, key[: -len(path[-1])])
            owner[path[-1]] = value
        return build(Recipe, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as a YAML file holds them."""
        return plain(asdict(self))

    def public(self) -> dict[str, Any]:
        """As `to_dict`, for a file that can be pushed: of a path on this machine only the last part."""
        return _without_paths(self.to_dict())


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    local = isinstance(value, str) and "/" in value and (value.startswith("/") or Path(value).exists())
    return Path(value).name if local else value


def read(name: str | Path, overrides: list[str] | tuple[str, ...] = (), *, offline: bool = False) -> Recipe:
    """The recipe in a YAML file or the shipped one of this name; `overrides` are `key=value`.

    With `offline`, the recipe's own substitutes come before the overrides. Raises `OrthoactError` for a file that is
    missing or no YAML, an unknown key (with the near names) and a value that does not fit.
    """
    import yaml

    name = str(name)
    try:
        values = yaml.safe_load(source_of(name))
    except yaml.YAMLError as error:
        raise OrthoactError(f"{name}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise OrthoactError(f"{name}: expected a mapping of keys to values")
    recipe = build(Recipe, {"name": Path(name).stem, **values}, "")
    if offline:
        recipe = recipe.override(recipe.offline)
    given = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise OrthoactError(f"{text!r}: expected key=value, such as train.max_steps=100")
        try:
            given[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OrthoactError(f"{key}: {value!r} is not a YAML value") from error
    return recipe.override(given)


def source_of(name: str) -> str:
    """The text of a recipe: of a file, or of the shipped recipe of this name."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise OrthoactError(f"{name}: there is no such recipe file")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OrthoactError(f"{name}: expected UTF-8 text ({error})") from error
    shipped = _shipped()
    if name not in shipped:
        raise OrthoactError(f"{name}: no recipe of this name{near(name, shipped)}; `orthoact recipes` lists them")
    return shipped[name].read_text(encoding="utf-8")


def listing() -> list[Recipe]:
    """The shipped recipes, by name."""
    return [read(name) for name in sorted(_shipped())]


def _shipped() -> dict[str, Any]:
    folder = files(__package__.partition(".")[0] if __package__ else "orthoact") / "recipes"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}
