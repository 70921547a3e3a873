"""The record of a conversion: what a checkpoint says about its activations, and how a model is rebuilt from it.

A transformers checkpoint carries it as `config.orthoact`, a timm checkpoint in `model_args`. On disk every activation
key of the config is the sentinel `"orthoact"`, so that nothing can load the folder without this package and run
silently with the old activations; in memory the keys keep their values, so that a model builds the modules it always
built, and the record then replaces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..interp.activation import TENSORS, Activation
from ..interp.domains import Gaussian, law_from_dict
from ..interp.errors import OrthoactError
from ..interp.fit import DERIVATIVE_WEIGHT, fit

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
    return {"format": FORMAT, "version": __version__, "sites": sites}


def attach(model: nn.Module, activations: Mapping[str, Activation]) -> dict[str, Any]:
    """Record a conversion on the model, so that its own way of saving writes a complete checkpoint."""
    spec = describe(activations)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        spec["activations"] = dict(activation_keys(config.to_dict()))
        if not spec["activations"] or not _fails_without(model, config, spec):
            spec["fusion_sentinel"] = True
        config.orthoact = spec
    elif hasattr(model, "pretrained_cfg"):
        attach_timm(model, spec)
    return spec


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
    """Refuse a record that is not one, or that a later version wrote."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("sites"), Mapping) or not spec["sites"]:
        raise OrthoactError(
            "the config's orthoact entry is no record of a conversion: expected sites; convert the model again"
        )
    if not isinstance(spec.get("format"), int) or spec["format"] > FORMAT:
        raise OrthoactError(
            f"the checkpoint has record format {spec.get('format')}, this orthoact {__version__} reads up to {FORMAT}: "
            f"upgrade orthoact"
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
    for name, here in located(model, spec).items():
        if here is None:
            if complete:
                raise OrthoactError(
                    f"the record names the activation {name!r}, which {type(model).__name__} does not have: "
                    f"the config does not belong to this model; convert the model again"
                )
            continue
        installed.append(here)
        old = model.get_submodule(here)
        if not isinstance(old, Activation):
            put(model, here, _rebuild(name, spec["sites"][name], old))
    return installed


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the activation at a dotted path."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    parent._modules[leaf] = module
    if isinstance(parent, nn.TransformerEncoderLayer):
        # its fused path for inference runs the activation that this number names, whatever the module is
        parent.activation_relu_or_gelu = {nn.ReLU: 1, nn.GELU: 2}.get(type(module), 0)


def located(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, str | None]:
    """Each recorded name with the path that it has in this model, None where it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return {name: _find(model, name, prefix) for name in spec["sites"]}


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
    try:
        act = Activation(
            entry["family"],
            entry["degree"],
            tails=entry["tails"],
            groups=entry["groups"],
            channel=entry["channel"],
            target=entry["target"],
            original=old,
        )
        act.domain, act.derivative_weight = law_from_dict(entry["domain"]), entry["derivative_weight"]
    except KeyError as error:
        raise OrthoactError(f"the record of the activation {name!r} lacks {error}: convert the model again") from error
    if act.theta.is_meta:
        act.awaiting = True
    else:
        from .sites import recognise

        site = recognise(name, old)
        act.load_fit(
            fit(
                site.target if site else old,
                family=entry["family"],
                degree=entry["degree"],
                tails=entry["tails"],
                domain=act.domain,
                derivative_weight=entry["derivative_weight"],
            )
        )
    return act


def missing(act: Activation, loaded: Any) -> list[str]:
    """The tensors of a rebuilt activation that the checkpoint did not hold; `loaded` tells of one tensor."""
    return [name for name in TENSORS if not loaded(getattr(act, name))]
