"""What the code file of a standalone checkpoint does: the part of loading that this package's hooks do elsewhere.

This module is not used where orthoact is installed; `standalone` writes its definitions, with all that they need, into
one file that needs torch and transformers (or timm) alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from ..interp.activation import TENSORS, Activation
from ..interp.errors import OrthoactError
from .record import SENTINEL, check_tensors, located, put


def install_recorded(model: nn.Module, spec: Mapping[str, Any], *, complete: bool) -> list[str]:
    """Replace the activations of a freshly built model as its record says; their numbers must come from a file."""
    installed = []
    for name, here in located(model, spec).items():
        if here is None:
            if complete:
                raise OrthoactError(f"the record names the activation {name!r}, which {type(model).__name__} lacks")
            continue
        old, entry = model.get_submodule(here), spec["sites"][name]
        installed.append(here)
        if hasattr(old, "theta"):  # orthoact is imported and has done it
            continue
        options = {key: entry[key] for key in ("tails", "groups", "channel", "target")}
        act = Activation(entry["family"], entry["degree"], original=old, **options)
        if not act.start.is_meta:
            act.start.fill_(torch.nan)  # what is not read from the file must not pass for an activation
        put(model, here, act)
    return installed


def loadable(base: Any) -> Any:
    """The class `base` of transformers, for a config with a record."""

    class Loadable(base):
        def __init__(self, config, *args, **kwargs):
            spec = getattr(config, SENTINEL, None)
            if spec:
                set_activations(config, spec, None)
            super().__init__(config, *args, **kwargs)
            if not spec:
                return
            if "orthoact" not in sys.modules:  # what is saved from here must not load with the old activations
                set_activations(config, spec, SENTINEL)
            own = base.__name__ in (config.architectures or [])
            names = install_recorded(self, spec, complete=own)
            if not names:
                raise OrthoactError(
                    f"none of the {len(spec['sites'])} recorded activations is in {base.__name__}: load the folder as "
                    f"{', '.join(config.architectures or ['the model that was converted'])}"
                )
            kept = {name.replace(".", r"\.") + r"\." for name in names}
            self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | kept

        @classmethod
        def from_pretrained(cls, name=None, *args, config=None, output_loading_info=False, **kwargs):
            if config is None:
                config = cls.config_class.from_pretrained(name)
            held = getattr(config, "fusion_config", None)
            if held and SENTINEL in held:
                config.fusion_config = {k: v for k, v in held.items() if k != SENTINEL} or None
            model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
            if held:
                model.config.fusion_config = held
            check_loaded(model, info)
            return (model, info) if output_loading_info else model

    Loadable.__name__ = Loadable.__qualname__ = base.__name__
    return Loadable


def set_activations(config: Any, spec: Mapping[str, Any], value: str | None) -> None:
    """Set the activation keys of a config: to what the record has for them, or all to `value`."""
    for key, recorded in spec.get("activations", {}).items():
        *path, leaf = key.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part, None)
        if owner is not None and hasattr(owner, leaf):
            setattr(owner, leaf, recorded if value is None else value)


def check_loaded(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model that was loaded from a file without all numbers of its activations, or with damaged ones.

    `info` is what transformers tells of its loading: what the file lacked is uninitialised memory by now.
    """
    lost = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    for path, module in model.named_modules():
        if not is_activation(module):
            continue
        lacks = [key for key in TENSORS if f"{path}.{key}" in lost]
        if lacks:
            raise OrthoactError(
                f"the file lacks {', '.join(lacks)} of the learnable activation {path!r}: it is incomplete; download "
                f"it again"
            )
        check_tensors(path, module)


def is_activation(module: nn.Module) -> TypeGuard[Activation]:
    """Whether a module is a learnable activation, of this file or of orthoact."""
    return type(module).__name__ == "Activation" and hasattr(module, "theta")


def checked(base: Any) -> Any:
    """The class `base` of transformers, whose activations are built by a library of its own, with the check of them."""

    class Checked(base):
        @classmethod
        def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            check_loaded(model, info)
            return (model, info) if output_loading_info else model

    Checked.__name__ = Checked.__qualname__ = base.__name__
    return Checked
