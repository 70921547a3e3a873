"""What transformers is taught, so that plain `from_pretrained`, `save_pretrained` and `from_config` know the record.

A few methods of two classes are wrapped. They were read and are tested on the range of versions below; outside it a
clear message says so at import.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from .record import SENTINEL, absent, install, located, missing, seal, unseal

TESTED = ("5.20", "5.24")
"""First and last minor version of transformers that the tests ran on."""


def _wrap(cls: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method once; `make` gets the old one and gives the new one."""
    old = cls.__dict__[name]
    function = old.__func__ if isinstance(old, classmethod) else old
    if getattr(function, SENTINEL, False):
        return
    new = functools.wraps(function)(make(function))
    setattr(new, SENTINEL, True)
    setattr(cls, name, classmethod(new) if isinstance(old, classmethod) else new)


def check_version() -> None:
    """Warn where the installed transformers is outside the tested range; refuse one that cannot work."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    first, last = (tuple(int(part) for part in bound.split(".")) for bound in TESTED)
    if version[0] != first[0]:
        raise OrthoactError(
            f"transformers {transformers.__version__} is installed, orthoact needs 5.x "
            f"(tested {TESTED[0]} to {TESTED[1]}): pip install 'transformers>={TESTED[0]},<6'"
        )
    if not first <= version <= last:
        warnings.warn(
            f"orthoact was tested with transformers {TESTED[0]} to {TESTED[1]}, "
            f"{transformers.__version__} is installed",
            stacklevel=2,
        )


def patch_configuration(module: ModuleType) -> None:
    """Configs are sealed as they are written and unsealed as they are read."""
    check_version()

    def to_dict(old):
        def to_dict(self) -> dict[str, Any]:
            config = old(self)
            return seal(config) if config.get(SENTINEL) and not absent.get() else config

        return to_dict

    def from_dict(old):
        def from_dict(cls, config_dict: dict[str, Any], **kwargs):
            if config_dict.get(SENTINEL) and not absent.get():
                config_dict = unseal(config_dict)
            return old(cls, config_dict, **kwargs)

        return from_dict

    _wrap(module.PreTrainedConfig, "to_dict", to_dict)
    _wrap(module.PreTrainedConfig, "from_dict", from_dict)


def patch_modeling(module: ModuleType) -> None:
    """Models with a record are rebuilt at the end of their construction, before any weight is loaded."""

    def init(old):
        def __init__(self, config, *args, **kwargs):
            if getattr(config, SENTINEL, None) and not absent.get():
                _unseal_object(config)
            old(self, config, *args, **kwargs)

        return __init__

    def post_init(old):
        def post_init(self):
            spec = None if absent.get() else getattr(self.config, SENTINEL, None)
            if not spec:
                return old(self)
            # a part of the model (T5's encoder) has a copy of the config and only some of the sites, or none
            own = type(self).__name__ in (self.config.architectures or [])
            names = install(self, spec, complete=own)
            old(self)
            # read when the weights' dtypes are planned; the names are regular expressions
            self._keep_in_fp32_modules_strict |= {name.replace(".", r"\.") + r"\." for name in names}

        return post_init

    def initialize_weights(old):
        def _initialize_weights(self, module, *args, **kwargs):
            if not isinstance(module, Activation):
                return old(self, module, *args, **kwargs)
            if module.awaiting:
                lost = missing(module, lambda tensor: getattr(tensor, "_is_hf_initialized", False))
                if lost:
                    name = next(name for name, m in self.named_modules() if m is module)
                    raise OrthoactError(
                        f"the checkpoint lacks {', '.join(lost)} of the learnable activation {name!r}: "
                        f"its file is incomplete; convert the model again"
                    )
                module.awaiting = False
            module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]

        return _initialize_weights

    def from_pretrained(old):
        def from_pretrained(cls, *args, **kwargs):
            result = old(cls, *args, **kwargs)
            check_loaded(result[0] if isinstance(result, tuple) else result)
            return result

        return from_pretrained

    def save_pretrained(old):
        def save_pretrained(self, *args, **kwargs):
            check_saveable(self)
            return old(self, *args, **kwargs)

        return save_pretrained

    cls = module.PreTrainedModel
    for name, make in (
        ("__init__", init),
        ("post_init", post_init),
        ("_initialize_weights", initialize_weights),
        ("from_pretrained", from_pretrained),
        ("save_pretrained", save_pretrained),
    ):
        _wrap(cls, name, make)


def check_loaded(model: Any) -> None:
    """Refuse a model whose record could not be applied at all; tell of one where it could only in part."""
    spec = None if absent.get() else getattr(getattr(model, "config", None), SENTINEL, None)
    if not spec:
        return
    held = sum(isinstance(m, Activation) for m in model.modules())
    name, recorded = type(model).__name__, len(spec["sites"])
    if not held:
        raise OrthoactError(
            f"none of the {recorded} recorded activations is in {name}: "
            f"load the folder as {', '.join(model.config.architectures)}"
        )
    if held < recorded:
        logging.getLogger("orthoact").warning("%s holds %d of the %d recorded activations", name, held, recorded)


def check_saveable(model: Any) -> None:
    """Refuse to write a folder whose record and modules disagree: it would load as something else."""
    has = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Activation)}
    spec = getattr(model.config, SENTINEL, None)
    if not has and not spec:
        return
    if not spec:
        raise OrthoactError(
            f"{type(model).__name__} holds {len(has)} learnable activations but its config has no record of them: "
            f"convert it with orthoact.convert_, or save the model that was converted"
        )
    if has != {path for path in located(model, spec).values() if path is not None}:
        raise OrthoactError(
            f"the config of {type(model).__name__} records {len(spec['sites'])} learnable activations, the model holds "
            f"{len(has)}, not at the same places: revert it with orthoact.revert_ or convert it again"
        )


def _unseal_object(config: Any) -> None:
    """Unseal a config object that was made from a sealed dict without `from_dict`."""
    for key, value in getattr(config, SENTINEL).get("activations", {}).items():
        *path, leaf = key.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part, None)
        if getattr(owner, leaf, None) == SENTINEL:
            setattr(owner, leaf, value)
