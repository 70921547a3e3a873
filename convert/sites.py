"""Find the activations of a model: a walk over its modules, a list of classes, and a probe on a grid."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType

import numpy as np
import torch
from torch import nn

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from ..interp.targets import TARGETS, Target, get_target
from .calls import exposed

WITH_PARAMETERS = {
    nn.LeakyReLU: lambda m: f"leaky_relu({m.negative_slope!r})",
    nn.RReLU: lambda m: f"leaky_relu({(m.lower + m.upper) / 2!r})",
    nn.ELU: lambda m: f"elu({float(m.alpha)!r})",
    nn.CELU: lambda m: f"celu({float(m.alpha)!r})",
    nn.Hardtanh: lambda m: f"hardtanh({float(m.min_val)!r}, {float(m.max_val)!r})",
    nn.Softplus: lambda m: f"softplus({float(m.beta)!r}{f', {float(m.threshold)!r}' if m.threshold < 15 else ''})",
    nn.Softshrink: lambda m: f"softshrink({float(m.lambd)!r})",
    nn.Hardshrink: lambda m: f"hardshrink({float(m.lambd)!r})",
    nn.Threshold: lambda m: f"threshold({float(m.threshold)!r}, {float(m.value)!r})",
}
"""Classes whose target depends on their settings; every other class is recognised by its values alone."""

TRAINED = (nn.PReLU,)
"""Activations that hold parameters of their own (and those of transformers, found by name)."""

TRAINED_NAMES = re.compile("XIELUActivation|Snake(1d|Beta)$")

GATES = {"tanh", "sigmoid", "hardsigmoid", "hardtanh", "softplus", "sqrtsoftplus", "log_sigmoid", "laplace"}
"""Targets that are nearly always gates, poolers, routers or step sizes rather than hidden activations."""

HEADS = {"pooler", "head", "classifier", "cls", "lm_head", "score", "qa_outputs", "pre_logits"}
"""Names of submodules that a task, not the trunk, owns."""


@dataclass(frozen=True)
class Site:
    """One activation of a model."""

    name: str
    """Dotted path of the activation module."""
    target: Target
    """The function it computes."""
    module: str
    """Name of its class."""
    left: str = ""
    """Why it is not converted; empty where it is."""
    channel: int | None = None
    """The axis of its input that counts channels, None where no forward pass could tell."""
    width: int | None = None
    """The number of channels, where a forward pass told."""
    shared: str = ""
    """The first site with the very same module; empty for that one and for a module of one site."""

    @property
    def key(self) -> object:
        """Equal for sites with one target: a named one by its name, a module that no list knows by its identity."""
        return id(self.target.function) if isinstance(self.target.function, nn.Module) else self.target.name


def find_sites(
    model: nn.Module,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_heads: bool = False,
) -> list[Site]:
    """The activations of `model` that would be converted, in the order of the walk.

    Gates (tanh, sigmoid, ...), heads and poolers are left, unless a glob in `include` names them; with `include`, only
    the names that match one of its globs are taken; names that match a glob in `exclude` are not.

    >>> [s.name for s in find_sites(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 1), nn.Tanh()))]
    ['1']
    """
    with exposed(model):
        found = survey(model, include=include, exclude=exclude, include_heads=include_heads)
    return [s for s in found if not s.left]


def survey(
    model: nn.Module,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_heads: bool = False,
) -> list[Site]:
    """Every activation module of `model`, those that are left with the reason; the choice is that of `find_sites`."""
    include = (include,) if isinstance(include, str) else tuple(include)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    trunk = _trunk(model)
    sites, slots, first = [], set(), {}
    for path, parent in model.named_modules(remove_duplicate=False):
        for leaf, child in parent._modules.items():
            if child is None or (id(parent), leaf) in slots:  # a parent at several paths has each slot once
                continue
            slots.add((id(parent), leaf))
            name = f"{path}.{leaf}" if path else leaf
            site = recognise(name, child)
            if site is None:
                continue
            left = site.left or _reason(site, trunk, include, exclude, include_heads)
            shared = first.setdefault(id(child), name) if not left else name
            sites.append(replace(site, left=left, shared="" if shared == name else shared))
    return sites


def _reason(site: Site, trunk: str | None, include: tuple, exclude: tuple, include_heads: bool) -> str:
    if any(fnmatchcase(site.name, glob) for glob in exclude):
        return "excluded by --exclude"
    if include:
        return "" if any(fnmatchcase(site.name, glob) for glob in include) else "not named by --include"
    if site.target.name.split("(")[0] in GATES:
        return f"{site.target.name} is a gate or a pooler: name it with --include to convert it"
    if re.search("soft_?cap", site.module, re.IGNORECASE):
        return f"{site.target.name} is a soft cap, which only bounds: name it with --include to convert it"
    if "indexer" in site.name.split("."):
        return "in an indexer, which only selects tokens: no gradient reaches it"
    if not include_heads and _is_head(site.name, trunk):
        return "in a head: --include-heads converts it"
    return ""


def _is_head(name: str, trunk: str | None) -> bool:
    return bool(trunk and not name.startswith(trunk)) or bool(HEADS & set(name.split(".")[:-1]))


def _trunk(model: nn.Module) -> str | None:
    """The path of a transformers model's trunk, with a dot, where it has a head beside it."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else None


def recognise(name: str, module: nn.Module) -> Site | None:
    """The site at a module, None where it is no activation."""
    kind = type(module).__name__
    if isinstance(module, Activation):
        return Site(name, Target(module.target, module), kind, left="converted already")
    if isinstance(module, TRAINED) or TRAINED_NAMES.search(kind):
        return Site(name, Target(kind, module), kind, left=f"{kind} has parameters of its own")
    if module._modules or module._parameters or module._buffers:
        return None
    if type(module) in WITH_PARAMETERS:
        with torch.device("cpu"):
            return Site(name, get_target(WITH_PARAMETERS[type(module)](module)), kind)
    if type(module).__name__ in ("Dropout", "Identity", "DropPath", "Flatten", "Softmax"):
        return None  # only to save their probes
    found = _probe(module)
    if isinstance(found, str):
        return Site(name, Target(kind, module), kind, left=found)
    return None if found is None else Site(name, found, kind)


@lru_cache
def _grid() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    grid = torch.linspace(-8, 8, 129, dtype=torch.float64)
    grid = torch.cat([grid, torch.tensor([-25.0, -12.0, 12.0, 25.0], dtype=torch.float64)]).reshape(7, 19)
    with torch.no_grad():
        return grid, {name: get_target(name).function(grid) for name in TARGETS}


def _probe(module: nn.Module) -> Target | str | None:
    """What a leaf without parameters computes, if it is an elementwise function that is not linear; or why no copy of
    that can be made.
    """
    key = _settings(module)
    if key in _probed:
        return _probed[key]
    with torch.device("cpu"):  # also while a model is built on the meta device
        found = _recognise_values(module)
    if key is not None and (not isinstance(found, Target) or found.name in TARGETS):
        _probed[key] = found
    return found


_probed: dict[tuple, Target | str | None] = {}
"""What leaves of a library's class with these settings compute: a deep model has hundreds that are alike."""


def _settings(module: nn.Module) -> tuple | None:
    """The class of a leaf with its plain settings, None where it holds anything else."""
    kept = {k: v for k, v in vars(module).items() if k != "training" and not (k.startswith("_") and not v)}
    kept.pop("_is_full_backward_hook", None)
    plain = all(
        isinstance(v, bool | int | float | str | BuiltinFunctionType | None)
        or (isinstance(v, FunctionType) and not v.__closure__)
        for v in kept.values()
    )
    library = type(module).__module__.split(".")[0] in ("torch", "transformers", "timm", __name__.split(".")[0])
    return (type(module), *sorted(kept.items())) if plain and library else None


def _recognise_values(module: nn.Module) -> Target | str | None:
    grid, known = _grid()
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            values = module(grid.clone())
            again = module(grid.flip(0, 1).clone()).flip(0, 1)
            part = module(grid[:, 3:9].clone())
    except Exception:  # a leaf that does not take one plain tensor is no activation
        return None
    finally:
        module.train(training)
    if not isinstance(values, torch.Tensor) or values.shape != grid.shape or not values.is_floating_point():
        return None
    if not torch.equal(values.isfinite(), again.isfinite()) or not torch.allclose(values, again, equal_nan=True):
        return None
    if part.shape != grid[:, 3:9].shape or not torch.allclose(part, values[:, 3:9], equal_nan=True):
        return None  # an output that depends on the other inputs, as of softmin
    values = values.double()
    errors = {name: float((values - reference).abs().max()) for name, reference in known.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] <= 2e-6:
        return None if best == "linear" else get_target(best)
    if not values.isfinite().all() or _is_affine(grid, values):
        return None
    try:
        return replace(get_target(module), name=type(module).__name__)
    except OrthoactError as error:
        return str(error)


def _is_affine(x: torch.Tensor, y: torch.Tensor) -> bool:
    line = np.polyfit(x.flatten().numpy(), y.flatten().numpy(), 1)
    return bool(np.abs(np.polyval(line, x.numpy()) - y.numpy()).max() < 1e-9)
