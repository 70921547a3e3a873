"""Patch transformers, timm and peft when, and only when, somebody imports them.

`import orthoact` must stay light, and plain `from_pretrained` must work whichever of them is imported first. So each
patch is applied at once where its module is loaded, and else right after the module has been executed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _configuration(module: ModuleType) -> None:
    from .transformers_hooks import patch_configuration

    patch_configuration(module)


def _validators(module: ModuleType) -> None:
    from .transformers_hooks import patch_validators

    patch_validators(module)


def _modeling(module: ModuleType) -> None:
    from .transformers_hooks import patch_modeling

    patch_modeling(module)


def _auto(module: ModuleType) -> None:
    from .transformers_hooks import patch_auto

    patch_auto(module)


def _adapters(module: ModuleType) -> None:
    from .transformers_hooks import patch_adapters

    patch_adapters(module)


def _peft(module: ModuleType) -> None:
    import_module(".adapter", __package__)  # registers at its end, which is later where it is what imports peft


def _timm(module: ModuleType) -> None:
    from .timm_hooks import register

    register()


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": _configuration,
    "transformers.utils.type_validators": _validators,
    "transformers.modeling_utils": _modeling,
    "transformers.models.auto.auto_factory": _auto,
    "transformers.integrations.peft": _adapters,
    "peft": _peft,
    "timm.models": _timm,
}
"""What is done to which module, after it has been executed."""


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method of a class, or a function of a module, once; `make` gets the old one and gives the new one."""
    old = owner.__dict__[name]
    function = old.__func__ if isinstance(old, classmethod) else old
    if getattr(function, "_orthoact_wrapped", False):
        return
    new = functools.wraps(function)(make(function))
    new.__dict__["_orthoact_wrapped"] = True
    setattr(owner, name, classmethod(new) if isinstance(old, classmethod) else new)


class _Patched(Loader):
    """The module's own loader, followed by its patch."""

    def __init__(self, loader: Loader, patch: Callable[[ModuleType], None]):
        self.loader, self.patch = loader, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.patch(module)

    def __getattr__(self, name: str):  # resources, source code: whatever else the real loader offers
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    """Finds the modules of `PATCHES` where the other finders do, and wraps their loaders."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in PATCHES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Patched(spec.loader, PATCHES[fullname])
                return spec
        return None


def install() -> None:
    """Patch what is imported already and wait for the rest; doing it twice changes nothing."""
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
