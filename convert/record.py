"""The record of a conversion: what a checkpoint says about its activations, and how a model is rebuilt from it.

A transformers checkpoint carries it as `config.orthoact`, a timm checkpoint in `model_args`. On disk every activation
key of the config is the sentinel `"orthoact"`, so that nothing can load the folder without this package and run
silently with the old activations; in memory the keys keep their values, so that a model builds the modules it always
built, and the record then replaces them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from math import isfinite
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..interp import formula
from ..interp.activation import TENSORS, Activation
from ..interp.domains import Gaussian, law_from_dict
from ..interp.errors import OrthoactError
from ..interp.families import get_family
from ..interp.family import TAILS
from ..interp.fit import DERIVATIVE_WEIGHT, fit
from .calls import Shared, expose_, hide_, settle_fused_path

SENTINEL = "orthoact"
FORMAT = 2
"""Version of the record; a reader refuses a newer one."""


absent: ContextVar[bool] = ContextVar("orthoact_absent", default=False)
"""True while the hooks of transformers behave as if this package were not installed, to see that a checkpoint fails."""


def describe(activations: Mapping[str, Activation]) -> dict[str, Any]:
    """The record of these activations by name: everything that is not in their tensors."""
    sites = {
        name: {
            "target": act.target,
            "family": act.family.name,
            "degree": act.degree,
            "tails": act.tails,
            "groups": act.groups,
            "channel": act.channel,
            "domain": (act.domain or Gaussian()).to_dict(),
            "derivative_weight": DERIVATIVE_WEIGHT if act.derivative_weight is None else act.derivative_weight,
        }
        for name, act in activations.items()
    }
    first: dict[int, str] = {}
    for name, act in activations.items():
        if first.setdefault(id(act), name) != name:
            sites[name]["shared"] = first[id(act)]
    return {"format": FORMAT, "version": __version__, "sites": sites}


def attach(model: nn.Module, activations: Mapping[str, Activation]) -> dict[str, Any]:
    """Record a conversion on the model, so that its own way of saving writes a complete checkpoint."""
    spec = describe(activations)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config = _own_config(model, config)
        spec["activations"] = dict(activation_keys(config.to_dict()))
        if not spec["activations"] or not _fails_without(model, config, spec):
            spec["fusion_sentinel"] = True
        config.orthoact = spec
    elif hasattr(model, "pretrained_cfg"):
        attach_timm(model, spec)
    return spec


def _own_config(model: nn.Module, config: Any) -> Any:
    """A config of the model's own: another model that was built from the same object must not get the record."""
    own = copy.copy(config)
    for module in model.modules():
        if module.__dict__.get("config") is config:
            module.__dict__["config"] = own
    return own


def attach_timm(model: Any, spec: dict[str, Any]) -> None:
    """Record a conversion on a timm model: its architecture becomes `orthoact`, the record an argument of it."""
    base = model.pretrained_cfg["architecture"]
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": SENTINEL}
    model._model_args = {**getattr(model, "_model_args", {}), "base": base, SENTINEL: spec}


def detach(model: nn.Module) -> None:
    """Remove the record from a reverted model."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, SENTINEL):
        delattr(config, SENTINEL)
    args = getattr(model, "_model_args", {})
    if SENTINEL in args:
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": args["base"]}  # pyright: ignore
        model._model_args = {k: v for k, v in args.items() if k not in ("base", SENTINEL)}  # pyright: ignore


def spec_of(model: nn.Module) -> dict[str, Any] | None:
    """The record that a model carries, None where it is not converted."""
    return getattr(getattr(model, "config", None), SENTINEL, None) or getattr(model, "_model_args", {}).get(SENTINEL)


# -- the sentinel ------------------------------------------------------------------------------------------------------


def activation_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys of a config that name an activation of transformers, with their values."""
    from transformers.activations import ACT2CLS

    for key, value in config.items():
        if isinstance(value, Mapping) and key != SENTINEL:
            yield from activation_keys(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value in ACT2CLS and ("act" in key or key == "afn"):
            yield f"{prefix}{key}", value


def seal(config: dict[str, Any]) -> dict[str, Any]:
    """Put the sentinel into a config that is about to be written; in place."""
    spec = config[SENTINEL]
    for key in spec.get("activations", {}):
        owner, leaf = _owner(config, key)
        if owner is not None:
            owner[leaf] = SENTINEL
    if spec.get("fusion_sentinel"):
        config["fusion_config"] = {**(config.get("fusion_config") or {}), SENTINEL: False}
    return config


def unseal(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config as read, its activation keys back at their values.

    Raises `OrthoactError` for a record that this version cannot read.
    """
    spec = config[SENTINEL]
    check(spec)
    config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    for key, value in spec.get("activations", {}).items():
        owner, leaf = _owner(config, key)
        if owner is not None and owner.get(leaf) == SENTINEL:
            owner[leaf] = value
    if spec.get("fusion_sentinel"):
        rest = {k: v for k, v in (config.get("fusion_config") or {}).items() if k != SENTINEL}
        config.pop("fusion_config", None)
        if rest:
            config["fusion_config"] = rest
    return config


def check(spec: Any) -> None:
    """Refuse a record that is not one, or that a later version wrote, before any tensor of it is made.

    A record comes with a file of somebody else's: every number in it is bounded here, so that nothing it says can cost
    more than it is worth. Raises `OrthoactError`.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("sites"), Mapping) or not spec["sites"]:
        raise OrthoactError(
            "the config's orthoact entry is no record of a conversion: expected sites; convert the model again"
        )
    if not _is_whole(spec.get("format"), 1, 2**31) or spec["format"] > FORMAT:
        raise OrthoactError(
            f"the checkpoint has record format {_shown(spec.get('format'))}, this orthoact {__version__} reads up to "
            f"{FORMAT}: upgrade orthoact"
        )
    if len(spec["sites"]) > MOST_SITES:
        raise OrthoactError(f"the record names {len(spec['sites'])} activations: expected at most {MOST_SITES}")
    numbers = sum(_check_site(name, entry) for name, entry in spec["sites"].items())
    for name, entry in spec["sites"].items():
        first = spec["sites"].get(entry["shared"]) if "shared" in entry else {}
        if first is None or "shared" in first:
            raise OrthoactError(
                f"the record of the activation {name!r} shares that of {_shown(entry['shared'])}: expected another "
                f"activation with numbers of its own"
            )
    if numbers > MOST_NUMBERS:
        raise OrthoactError(f"the record asks for {numbers} learnable numbers: expected at most {MOST_NUMBERS}")
    for key in ("base", "made", "shapes"):
        if not isinstance(spec.get(key, {}), Mapping):
            raise OrthoactError(f"the record's {key} is {_shown(spec[key])}: expected names and values")
    for name, shapes in spec.get("shapes", {}).items():
        sizes = shapes.values() if isinstance(shapes, Mapping) else [None]
        if not all(isinstance(size, list) and all(_is_whole(n, 0, 2**63) for n in size) for size in sizes):
            raise OrthoactError(f"the record's shapes at {_shown(name)} are {_shown(shapes)}: expected whole numbers")
    for key, kind in (("model", str), ("revision", str), ("library", str), ("files", Mapping)):
        if not isinstance(spec.get("base", {}).get(key), kind | None):
            raise OrthoactError(f"the record's base has {key} {_shown(spec['base'][key])}: expected a {kind.__name__}")
    keys = spec.get("activations", {})
    if not isinstance(keys, Mapping) or len(keys) > MOST_SITES:
        raise OrthoactError(f"the record's activations are {_shown(keys)}: expected the keys of the config")
    for key, value in keys.items():
        if not isinstance(key, str) or not isinstance(value, str) or not re.fullmatch(_PATH, key[: MOST_TEXT + 1]):
            raise OrthoactError(
                f"the record names the config's key {_shown(key)} with {_shown(value)}: expected the name of an "
                f"activation; convert the model again"
            )


MOST_SITES = 100_000
"""Activations in one record: a hundred times those of the largest model known."""
MOST_NUMBERS = 2**27
"""Learnable numbers in one record: a number for each channel of a model with 405e9 parameters at degree 8 fits."""
MOST_GROUPS = 2**20
"""Groups of one activation: ten times the channels of the widest layer known."""
MOST_TEXT = 300
"""Characters of a name in a record."""
_PATH = r"[\w-]+(\.[\w-]+)*"


def _check_site(name: Any, entry: Any) -> int:
    """Refuse a site that is none; returns how many learnable numbers it has."""
    if not isinstance(name, str) or len(name) > MOST_TEXT or not re.fullmatch(_PATH, name):
        raise OrthoactError(f"the record names the activation {_shown(name)}: expected the dotted path of a module")
    if not isinstance(entry, Mapping):
        raise OrthoactError(f"the record of the activation {name!r} is {_shown(entry)}: expected its family and degree")

    def refuse(key: str, expected: str) -> OrthoactError:
        return OrthoactError(
            f"the record of the activation {name!r} has {key} {_shown(entry[key])}: expected {expected}"
        )

    for key in ("family", "degree", "tails", "groups", "channel", "target", "domain", "derivative_weight"):
        if key not in entry:
            raise OrthoactError(f"the record of the activation {name!r} lacks {key!r}: convert the model again")
    for key in ("family", "tails", "target"):
        if not isinstance(entry[key], str) or len(entry[key]) > MOST_TEXT:
            raise refuse(key, "a name")
    family = get_family(entry["family"])
    if not _is_whole(entry["degree"], family.degrees[0], family.degrees[-1]):
        raise refuse("degree", f"a whole number from {family.degrees[0]} to {family.degrees[-1]}")
    if entry["tails"] not in TAILS:
        raise refuse("tails", f"one of {', '.join(TAILS)}")
    if entry["groups"] is not None and not _is_whole(entry["groups"], 1, MOST_GROUPS):
        raise refuse("groups", f"a whole number from 1 to {MOST_GROUPS}, or none")
    if entry["channel"] is not None and not _is_whole(entry["channel"], -8, 8):
        raise refuse("channel", "an axis, or none")
    if entry["groups"] is not None and entry["channel"] is None:
        raise refuse("channel", "the axis that counts the channels of its groups")
    if not _is_number(entry["derivative_weight"]) or entry["derivative_weight"] < 0:
        raise refuse("derivative_weight", "a finite number that is not negative")
    if not isinstance(entry.get("shared", ""), str):
        raise refuse("shared", "the name of another activation")
    law = entry["domain"]
    known = ("mean", "std", "tail", "low", "high", "count", "below", "above")
    if not isinstance(law, Mapping) or not all(
        isinstance(v, str) if k == "kind" else k in known and _is_number(v) for k, v in law.items()
    ):
        raise refuse("domain", "a law with finite numbers")
    try:
        law_from_dict(law)
    except (KeyError, TypeError) as error:
        raise refuse("domain", "a law with all its numbers") from error
    return family.size(entry["degree"]) * (entry["groups"] or 1)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and isfinite(value)


def _shown(value: Any) -> str:
    """A value that somebody else chose, short enough for a message."""
    if isinstance(value, str):
        value = value if len(value) <= MOST_TEXT else value[:MOST_TEXT]
    elif isinstance(value, int) and abs(value) >= 2**63:
        return "a number beyond all bounds"
    elif not isinstance(value, int | float | None):
        return f"a {type(value).__name__}"
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def check_tensors(name: str, act: Activation) -> None:
    """Refuse the tensors of a loaded activation that it could not be evaluated with; on the meta device none are."""
    for key in TENSORS:
        tensor = getattr(act, key)
        if tensor.dtype != torch.float32:
            raise OrthoactError(f"{key} of the learnable activation {name!r} is {tensor.dtype}: expected float32")
        bare = key in ("lo", "hi") and act.tails == "none"  # a series without joints
        if not tensor.is_meta and not bare and not bool(tensor.isfinite().all()):
            raise OrthoactError(
                f"{key} of the learnable activation {name!r} holds NaN or infinite values: the file is damaged; "
                f"convert the model again"
            )
    if act.scale.is_meta:
        return
    if not (act.scale > 0 and (act.tails == "none" or act.lo <= act.hi)):
        raise OrthoactError(
            f"the learnable activation {name!r} has scale {act.scale:g} and joints {act.lo:g} to {act.hi:g}: expected "
            f"a positive scale and joints in order; the file is damaged"
        )
    with torch.no_grad():
        numbers, frame = act.numbers(torch.float32)
        x = torch.linspace(-64, 64, 33, device=frame.device)
        if act.tails == "none":
            x = act.location + act.scale * x / 16
        at = formula.value(act.family, x[:, None], list(numbers.unbind(-1)), formula.Frame(*frame.unbind()))
    if not bool(at.isfinite().all()):
        raise OrthoactError(
            f"the learnable activation {name!r} has numbers so large that it overflows: the file is damaged; convert "
            f"the model again"
        )


def _owner(config: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    *path, leaf = key.split(".")
    owner: Any = config
    for part in path:
        owner = owner.get(part) if isinstance(owner, dict) else None
    return (owner if isinstance(owner, dict) else None), leaf


def _fails_without(model: Any, config: Any, spec: dict[str, Any]) -> bool:
    """Whether building the model, or its trunk, from the sealed config fails where this package is absent."""
    sealed = seal({**config.to_dict(), SENTINEL: spec})
    trunk = getattr(model, "base_model", model)
    for cls in {type(model), type(trunk)}:
        token = absent.set(True)
        try:
            with torch.device("meta"):
                cls(type(config).from_dict({**sealed}))
        except Exception as error:  # of any kind: what counts is that it names us
            if SENTINEL not in str(error):
                return False
        else:
            return False
        finally:
            absent.reset(token)
    return True


# -- rebuilding --------------------------------------------------------------------------------------------------------


def install(model: nn.Module, spec: Mapping[str, Any], *, complete: bool) -> list[str]:
    """Replace the activations of a freshly built model as its record says; returns the names of the sites.

    On the meta device the new activations are empty and wait for their tensors; else they start as their fits. A model
    of another class (the trunk of a causal model, another head on a trunk) has the names with the trunk's prefix
    removed or added, and may lack some. With `complete`, a site that is not there is an error.
    """
    check(spec)
    installed = []
    calls = expose_(model) if None in located(model, spec).values() else []
    places = located(model, spec)
    for name in own_first(spec):
        here = places[name]
        if here is None:
            if complete:
                raise OrthoactError(
                    f"the record names the activation {name!r}, which {type(model).__name__} does not have: "
                    f"the config does not belong to this model; convert the model again"
                )
            continue
        old = model.get_submodule(here)
        if here in installed or (not isinstance(old, Activation) and any(p.dim() > 1 for p in old.parameters())):
            raise OrthoactError(
                f"the record names {name!r} as an activation, in {type(model).__name__} it is a "
                f"{'site already' if here in installed else type(old).__name__}: the config does not belong to this "
                f"model; convert the model again"
            )
        installed.append(here)
        shared = places.get(spec["sites"][name].get("shared", ""))
        if shared is not None:
            put(model, here, Shared(model.get_submodule(shared)))  # pyright: ignore[reportArgumentType]
        elif not isinstance(old, Activation):
            put(model, here, _rebuild(name, spec["sites"][name], old))
    hide_(calls)
    return installed


def own_first(spec: Mapping[str, Any]) -> list[str]:
    """The names of a record's sites, those that share another's activation behind those that have one of their own."""
    return sorted(spec["sites"], key=lambda name: "shared" in spec["sites"][name])


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the activation at a dotted path."""
    path, _, leaf = name.rpartition(".")
    put_in(model.get_submodule(path), leaf, module)


def put_in(parent: nn.Module, leaf: str, module: nn.Module) -> None:
    """Set the activation that its owner calls `leaf`."""
    parent._modules[leaf] = module
    settle_fused_path(parent)


def located(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, str | None]:
    """Each recorded name with the path that it has in this model, None where it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return {name: _find(model, name, prefix) for name in spec["sites"]}


def holds(model: nn.Module) -> set[str]:
    """The paths of a model's learnable activations."""
    return {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Activation | Shared)}


def _find(model: nn.Module, name: str, prefix: str) -> str | None:
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else [f"{prefix}.{name}"]
    for candidate in candidates:
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _rebuild(name: str, entry: Mapping[str, Any], old: nn.Module) -> Activation:
    act = rebuilt(name, entry, old)
    if act.theta.is_meta:
        act.awaiting = True
    else:
        start(name, act)
    return act


def rebuilt(name: str, entry: Mapping[str, Any], old: nn.Module, cls: type[Activation] = Activation) -> Activation:
    """The activation of a recorded site, its tensors still empty."""
    options = {key: entry[key] for key in ("tails", "groups", "channel", "target")}
    act = cls(entry["family"], entry["degree"], original=old, **options)
    act.domain, act.derivative_weight = law_from_dict(entry["domain"]), entry["derivative_weight"]
    return act


def start(name: str, act: Activation) -> None:
    """Start an activation afresh: as the fit of the function that it replaces."""
    from .sites import recognise

    old = act.original
    assert old is not None
    site = recognise(name, old) if isinstance(old, nn.Module) else None
    options: dict[str, Any] = {"tails": act.tails, "domain": act.domain, "derivative_weight": act.derivative_weight}
    act.load_fit(fit(site.target if site else old, family=act.family.name, degree=act.degree, **options))


def missing(act: Activation, loaded: Any) -> list[str]:
    """The tensors of a rebuilt activation that the checkpoint did not hold; `loaded` tells of one tensor."""
    return [name for name in TENSORS if not loaded(getattr(act, name))]
