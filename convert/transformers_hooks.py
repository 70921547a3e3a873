"""What transformers is taught, so that plain `from_pretrained`, `save_pretrained` and `from_config` know the record.

A few methods of two classes are wrapped. They were read and are tested on the range of versions below; outside it a
clear message says so at import.
"""

from __future__ import annotations

import logging
import warnings
from collections import ChainMap
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from .files import bounded, read_json
from .hooks import wrap
from .names import CONFIG, METHOD, resolve
from .record import SENTINEL, absent, check_tensors, holds, install, located, missing, seal, unseal

TESTED = ("5.20", "5.24")
"""First and last minor version of transformers that the tests ran on."""


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

    def get_config_dict(old):
        def get_config_dict(cls, *args, **kwargs):
            config, rest = old(cls, *args, **kwargs)
            if config.get(SENTINEL) and not absent.get() and config.get("model_type") != cls.model_type:
                config = with_parts(unseal(config), cls)
            return config, rest

        return get_config_dict

    def from_file(old):
        def _dict_from_json_file(cls, json_file, *args, **kwargs):
            bounded(json_file)  # from the folder of somebody else, and read whole
            config = old(cls, json_file, *args, **kwargs)
            if config.get(SENTINEL) and not absent.get():
                read_json(Path(json_file))  # refuses names that are there twice
            return config

        return _dict_from_json_file

    wrap(module.PreTrainedConfig, "_dict_from_json_file", from_file)
    wrap(module.PreTrainedConfig, "get_config_dict", get_config_dict)
    wrap(module.PreTrainedConfig, "to_dict", to_dict)
    wrap(module.PreTrainedConfig, "from_dict", from_dict)


def patch_validators(module: ModuleType) -> None:
    """A config made of what to_dict gave is unsealed as its model is built; until then the sentinel passes."""
    if SENTINEL not in getattr(module, "ACT2FN", {SENTINEL}):
        module.__dict__["ACT2FN"] = ChainMap(module.ACT2FN, {SENTINEL: None})


def with_parts(config: dict[str, Any], cls: Any) -> dict[str, Any]:
    """The config of a composite model (CLIP), the part that `cls` takes of it (its text model) with its own record."""
    spec = config[SENTINEL]
    for key, part in config.items():
        if isinstance(part, dict) and (key == cls.base_config_key or part.get("model_type") == cls.model_type):
            kept = {k.removeprefix(f"{key}."): v for k, v in spec["activations"].items() if k.startswith(f"{key}.")}
            stem = key.removesuffix("_config")
            sites = {}
            for name, entry in spec["sites"].items():
                path = name.split(".")
                at = next((i for i, step in enumerate(path) if stem in step), None)  # text_model, language_model, ...
                if at is not None:
                    sites[".".join(path[at + 1 :])] = entry
            if sites:
                part[SENTINEL] = {**spec, "activations": kept, "sites": sites}
    return config


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
                check_tensors(next(name for name, m in self.named_modules() if m is module), module)
            module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]

        return _initialize_weights

    def from_pretrained(old):
        def from_pretrained(cls, name=None, *args, **kwargs):
            if isinstance(name, str | Path):
                for path in [*Path(name).glob("*.index.json"), Path(name) / "generation_config.json"]:
                    bounded(path)
            result = old(cls, known_name(name), *args, **kwargs)
            check_loaded(result[0] if isinstance(result, tuple) else result)
            return result

        return from_pretrained

    def save_pretrained(old):
        def save_pretrained(self, *args, **kwargs):
            check_saveable(self)
            return old(self, *args, **kwargs)

        return save_pretrained

    def expanded(old):
        def get_expanded_tied_weights_keys(self, *args, **kwargs):
            # a pattern that ties all of two heads must not tie what this package put into them
            kept = tuple(f"{name}." for name in holds(self))
            return {k: v for k, v in old(self, *args, **kwargs).items() if not k.startswith(kept)}

        return get_expanded_tied_weights_keys

    def set_use_kernels(old):
        def set_use_kernels(self, use_kernels, *args, **kwargs):
            if use_kernels and holds(self):
                refuse_kernels(type(self).__name__)
            return old(self, use_kernels, *args, **kwargs)

        return set_use_kernels

    cls = module.PreTrainedModel
    for name, make in (
        ("__init__", init),
        ("post_init", post_init),
        ("_initialize_weights", initialize_weights),
        ("get_expanded_tied_weights_keys", expanded),
        ("from_pretrained", from_pretrained),
        ("save_pretrained", save_pretrained),
        ("set_use_kernels", set_use_kernels),
    ):
        wrap(cls, name, make)


def patch_auto(module: ModuleType) -> None:
    """The classes that choose a class know the demo model by the name that its adapters give it."""

    def from_pretrained(old):
        def from_pretrained(cls, name=None, *args, **kwargs):
            base = base_of(name)
            result = old(cls, known_name(base or name), *args, **kwargs)
            if base is not None:
                (result[0] if isinstance(result, tuple) else result).load_adapter(str(name))
            return result

        return from_pretrained

    classes = [module._BaseAutoModelClass]
    for cls in classes:  # those that are there already have a copy of the method
        classes += cls.__subclasses__()
        if "from_pretrained" in cls.__dict__:
            wrap(cls, "from_pretrained", from_pretrained)


def patch_adapters(module: ModuleType) -> None:
    """Transformers' own way of loading adapters leaves those of this package to PEFT and the method's own checks."""

    def load_adapter(old):
        def load_adapter(self, peft_model_id=None, adapter_name=None, **kwargs):
            found = _adapter_options(peft_model_id, kwargs)
            if found is None:
                return old(self, peft_model_id, adapter_name, **kwargs)
            from transformers.utils.loading_report import LoadStateDictInfo

            from .adapter import load_into

            trainable = kwargs.get("is_trainable", False)
            lost = load_into(self, str(peft_model_id), adapter_name or "default", is_trainable=trainable, **found)
            empty = {f.name: {} if f.name == "conversion_errors" else set() for f in fields(LoadStateDictInfo)}
            return LoadStateDictInfo(**{**empty, "missing_keys": lost, "error_msgs": []})

        return load_adapter

    wrap(module.PeftAdapterMixin, "load_adapter", load_adapter)


def _adapter_options(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """How to download the adapter called `name`, None where it is none of this package."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if name is None or kwargs.get("peft_config") is not None:
        return None
    loading = kwargs.get("load_config")
    options = {**(getattr(loading, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
    taken = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
    options = {k: v for k, v in options.items() if k in taken and v is not None and v != ""}
    file = find_adapter_config_file(str(name), **options)
    return options if file is not None and _method(file) == METHOD else None


def _method(file: str) -> str | None:
    """The type of the adapter with this configuration."""
    return read_json(Path(file), strict=False).get("peft_type")


def base_of(name: Any) -> str | None:
    """The folder of the demo, for a local adapter of it."""
    file = Path(str(name)) / CONFIG
    if not isinstance(name, str | Path) or not file.is_file() or _method(str(file)) != METHOD:
        return None
    base = read_json(file, strict=False).get("base_model_name_or_path")
    found = resolve(base)
    return found if found != base else None


def known_name(name: Any) -> Any:
    """The folder of the demo for its name, every other name as it is."""
    return resolve(name)


def refuse_kernels(name: str) -> None:
    """Kernels from the Hub replace whole blocks with the activation in them."""
    raise OrthoactError(
        f"use_kernels on the converted {name}: kernels that replace whole blocks compute the old activation inside; "
        f"load it without"
    )


def check_loaded(model: Any) -> None:
    """Refuse a model whose record could not be applied at all; tell of one where it could only in part."""
    spec = None if absent.get() else getattr(getattr(model, "config", None), SENTINEL, None)
    if not spec:
        return
    held = len(holds(model))
    name, recorded = type(model).__name__, len(spec["sites"])
    if not held:
        whole = ", ".join(model.config.architectures or ["the model that was converted"])
        raise OrthoactError(f"none of the {recorded} recorded activations is in {name}: load the folder as {whole}")
    if held < recorded:
        logging.getLogger("orthoact").warning("%s holds %d of the %d recorded activations", name, held, recorded)


def check_saveable(model: Any) -> None:
    """Refuse to write a folder whose record and modules disagree: it would load as something else."""
    if getattr(model, "_hf_peft_config_loaded", False):  # it saves its adapter, which has a record of its own
        return
    has = holds(model)
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
