"""The model of a recipe: loaded or built, with a head that fits the labels, its activations replaced."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..convert.calibrate import calibrate_on
from ..convert.sources import REPORT, Source, load_source
from ..convert.surgeon import Plan, convert_, inspect_model, plan
from ..interp.errors import OrthoactError
from ..interp.fit import DERIVATIVE_WEIGHT, variance_preserving
from .data import Rows
from .evaluate import logits
from .recipe import Recipe
from .sections import Convert


def make_model(recipe: Recipe, rows: Rows) -> tuple[Source, dict[str, Any]]:
    """The model of a recipe and what the folder's report says of its conversion (empty where it has none).

    Seeded: the same recipe gives the same weights. Raises `OrthoactError` where head and data have other labels.
    """
    torch.manual_seed(recipe.seed)
    source = _load(recipe, rows)
    source.model.requires_grad_(True)
    if recipe.task == "causal-lm":
        _check_causal(source)
    if source.converted:
        return source, _recorded(source)
    try:
        return source, _convert(source, recipe)
    except OrthoactError as error:  # a recipe has keys where the command has options
        raise OrthoactError(re.sub(r"--([a-z]+(?:-[a-z]+)*)", _key, str(error))) from error


def _key(option: re.Match) -> str:
    name = option[1].replace("-", "_")
    return f"convert.{name}" if name in Convert.__dataclass_fields__ else option[0]


@torch.no_grad()
def _check_causal(source: Source) -> None:
    """Refuse a model in which a token sees those after it: its labels would be among its inputs."""
    model: Any = source.model
    training, vocabulary = model.training, getattr(model.config, "vocab_size", 2)
    ids = torch.arange(8)[None] % vocabulary
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocabulary
    device = next(model.parameters()).device
    model.eval()
    here, there = (logits(model, {"input_ids": part.to(device)})[0, 0].float() for part in (ids, other))
    model.train(training)
    if (here - there).abs().max() > 1e-3 * here.abs().max():
        raise OrthoactError(
            f"model: in {source.name} a token sees the tokens after it; causal-lm needs a causal language model"
        )


def _load(recipe: Recipe, rows: Rows) -> Source:
    labels, config = rows.labels, dict(recipe.config)
    timm_model = recipe.model.startswith("timm:")
    if recipe.task == "causal-lm" or not labels:
        return load_source(recipe.model, task=recipe.task, config=config, scratch=recipe.scratch)
    if not timm_model and not recipe.scratch and not recipe.new_head:
        source = load_source(recipe.model, config=config)
        held = _classes(source)
        if held == len(labels) and _fits(source, labels):
            return source
        if held:
            raise OrthoactError(
                f"model: the head of {source.name} has {held} classes ({_named(source)}), the data has {len(labels)} "
                f"({', '.join(labels[:3])}, ...); new_head: true gives it a new head"
            )
        timm_model = source.kind == "timm"
    if timm_model:
        config |= {"num_classes": len(labels)}
    else:
        names = dict(enumerate(labels))
        config |= {"num_labels": len(labels), "id2label": names, "label2id": {n: i for i, n in names.items()}}
        config |= {} if recipe.scratch else {"ignore_mismatched_sizes": True}
    return load_source(recipe.model, task=recipe.task, config=config, scratch=recipe.scratch)


def _classes(source: Source) -> int:
    """The classes of a head that is in the checkpoint; 0 where there is none."""
    model: Any = source.model
    if source.kind == "timm":
        return model.num_classes
    return model.config.num_labels if type(model).__name__.endswith("Classification") else 0


def _fits(source: Source, labels: tuple[str, ...]) -> bool:
    """Whether a head that says what its classes are says the same, in the same order."""
    if source.kind == "timm":
        return True
    held = [str(name) for name in source.model.config.id2label.values()]  # pyright: ignore
    return all(name.startswith("LABEL_") for name in held) or list(labels) in (held, [str(i) for i in range(len(held))])


def _named(source: Source) -> str:
    names = list(getattr(getattr(source.model, "config", None), "id2label", {}).values())
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "") if names else "unnamed"


def _recorded(source: Source) -> dict[str, Any]:
    """What the report of a model that was converted before says of its conversion."""
    import json

    path = source.folder / REPORT if source.folder else None
    if path is None or not path.is_file():
        return {}
    kept = ("sites", "left", "parameters", "fits", "calibration")
    return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k in kept}


def _convert(source: Source, recipe: Recipe) -> dict[str, Any]:
    """Replace the activations as the recipe says."""
    wanted = recipe.convert
    if wanted.family == "none":
        return {}
    choice = {"include": wanted.include, "exclude": wanted.exclude}
    options: dict[str, Any] = {"family": wanted.family, "tails": wanted.tails, "groups": wanted.groups, **choice}
    options["derivative_weight"] = wanted.derivative_weight or DERIVATIVE_WEIGHT
    if wanted.start == "variance-preserving":
        made = _from_scratch(source.model, plan(source.model, degree=4, **options), wanted)
    else:
        domains = None
        if wanted.calibrate:
            sites, _ = inspect_model(source.model, **choice)
            domains = calibrate_on(source, sites, wanted.calibrate, seed=0)
        chosen = {k: v for k in ("tolerance", "parameters") if (v := getattr(wanted, k)) is not None}
        made = plan(source.model, domains=domains, **options, **(chosen or {"degree": wanted.degree}))
    convert_(source.model, made)
    left = [{"where": i.where, "function": i.function, "calls": i.calls, "reason": i.reason} for i in made.left]
    record: dict[str, Any] = {"sites": made.rows, "left": left, "parameters": made.parameters}
    if wanted.start == "fit":
        record["fits"] = {s.name: f.to_dict() for s, f in zip(made.sites, made.fits, strict=True)}
    return record


@torch.no_grad()
def _from_scratch(model: nn.Module, made: Plan, wanted: Any) -> Plan:
    """The same sites with variance-preserving starts; the layers before them get weights of variance 1 / fan_in."""
    for site in made.sites:
        owner = model.get_submodule(site.name.rpartition(".")[0])
        for layer in owner.modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() >= 2 and site.width in (_outputs(layer), None):
                weight.normal_(std=(weight.numel() / _outputs(layer)) ** -0.5)
    fits = tuple(variance_preserving(wanted.family, wanted.degree) for _ in made.sites)
    return Plan(made.sites, fits, made.left, made.groups, made.seconds)


def _outputs(layer: Any) -> int:
    """The output channels of a linear or convolutional layer; GPT-2's Conv1D holds its weight transposed."""
    return layer.weight.shape[1] if type(layer).__name__ == "Conv1D" else layer.weight.shape[0]
