"""Adapters: the activations alone, without a weight, as a method of PEFT that composes with LoRA.

An adapter is a folder of a few kB: `adapter_config.json` names the base model and holds the record of the activations,
`adapter_model.safetensors` their numbers, two tensors a site. `PeftModel.from_pretrained(base, folder)` applies it,
`disable_adapter()` gives the base back exactly, `merge_and_unload()` a converted model that saves as every other.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import load_peft_weights, register_peft_method, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.peft_types import PeftType
from safetensors.torch import save_file
from torch import Tensor, nn

from ..interp.activation import TENSORS, Activation
from ..interp.errors import OrthoactError
from .calls import Shared, expose_, hide_
from .files import bounded, read_json
from .hooks import wrap
from .names import CONFIG, DEMO, DEMO_NAME, METHOD, WEIGHTS, portable
from .provenance import recorded_sha256, weight_files, weights_folder
from .record import (
    SENTINEL,
    attach,
    check,
    check_tensors,
    holds,
    located,
    own_first,
    put,
    put_in,
    rebuilt,
    spec_of,
    start,
)
from .sites import recognise
from .sources import Source, load_source

TESTED = ("0.21", "0.21")
"""First and last minor version of PEFT that the tests ran on."""

LAYER = "orthoact_act"
"""What holds the activations of a site, in the model and in the names of the tensors."""

PARTS = TENSORS[1:]
"""The tensors that an adapter keeps end to end in one: a name in a file costs more than the numbers under it."""


class PackedActivation(Activation):
    """An `Activation` of two tensors: `theta`, and `fixed`, which is all the others end to end.

    >>> act = PackedActivation("hermite", 2)
    >>> act.fixed.shape, act.start.shape, act.transform.shape  # 3 + 9 + 4 + 2 numbers
    (torch.Size([18]), torch.Size([3]), torch.Size([3, 3]))
    """

    fixed: Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        parts = [cast(Tensor, self._buffers.pop(name)) for name in PARTS]
        ends = torch.tensor([0, *(part.numel() for part in parts)], device="cpu").cumsum(0).tolist()
        self.places = {
            name: (slice(*ends[i : i + 2]), part.shape) for i, (name, part) in enumerate(zip(PARTS, parts, strict=True))
        }
        self.register_buffer("fixed", torch.cat([part.flatten() for part in parts]))

    def part(self, name: str) -> Tensor:
        """One of the tensors in `fixed`, as a view."""
        place, shape = self.places[name]
        return self.fixed[place].view(shape)

    @classmethod
    def of(cls, act: Activation) -> PackedActivation:
        """The same activation, packed."""
        return cast(PackedActivation, _copied(act, cls))

    def unpacked(self) -> Activation:
        """The same activation as every other: what a merged model holds."""
        return _copied(self, Activation)


for _name in PARTS:
    setattr(PackedActivation, _name, property(lambda self, name=_name: self.part(name)))


@torch.no_grad()
def _copied(act: Activation, cls: type[Activation]) -> Activation:
    options = {"tails": act.tails, "groups": act.groups, "channel": act.channel, "target": act.target}
    new = cls(act.family.name, act.degree, original=act.original, **options).to(act.theta.device)
    new.domain, new.derivative_weight = act.domain, act.derivative_weight
    for name in TENSORS:
        getattr(new, name).copy_(getattr(act, name))
    new.theta.requires_grad_(act.theta.requires_grad)
    return new.train(act.training)


@dataclass
class OrthoactConfig(LoraConfig):
    """The configuration of an adapter: a record of activations, and whatever LoRA takes, to train both as one.

    Made by `adapter_config(model)` from a converted model; with `target_modules` (and `r`, `lora_alpha`, ...) LoRA
    layers go along. Without them there are none.
    """

    orthoact: dict[str, Any] = field(default_factory=dict)
    """The record, as in `record`, with the shapes around each site."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(METHOD)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write what differs from the defaults, one line for each activation; no path of this machine."""
        found = self.to_dict() | {"auto_mapping": kwargs.pop("auto_mapping_dict", None) or self.auto_mapping}
        plain = LoraConfig().to_dict()
        kept = {k: v for k, v in found.items() if k not in plain or plain[k] != v or k == "peft_version"}
        base = self.orthoact.get("base", {}).get("model") or self.base_model_name_or_path
        kept |= {"peft_type": METHOD, "base_model_name_or_path": portable(base)}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG).write_text(_compact(kept), encoding="utf-8")


def _compact(config: Mapping[str, Any]) -> str:
    """JSON with a line for each key, and within the record for each site."""

    def line(value: Any) -> str:
        return json.dumps(sorted(value) if isinstance(value, set) else value, separators=(",", ":"))

    def nested(value: Mapping[str, Any], depth: int, inner: int) -> str:
        rows = [
            f"{json.dumps(k)}:{nested(v, depth + 1, inner) if depth < inner and isinstance(v, dict) and v else line(v)}"
            for k, v in sorted(value.items())
        ]
        return "{\n" + ",\n".join(rows) + "\n}"

    record = config.get(SENTINEL) or {}
    rest = {k: v for k, v in config.items() if k != SENTINEL}
    rows = [f"{json.dumps(k)}:{line(v)}" for k, v in sorted(rest.items())]
    return "{\n" + ",\n".join([*rows, f"{json.dumps(SENTINEL)}:{nested(record, 0, 1)}"]) + "\n}\n"


# -- the layers --------------------------------------------------------------------------------------------------------


class ActivationLayer(nn.Module, BaseTunerLayer):
    """An activation of the base model and its learnable copies, one for each adapter."""

    adapter_layer_names = (LAYER,)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.orthoact_act = nn.ModuleDict()
        self.merged_adapters = []
        self._unmerged: list[nn.Module] = []  # in a list: not a child

    def forward(self, input: Tensor) -> Tensor:
        if self.disable_adapters:
            return (self._unmerged[0] if self._unmerged else self.base_layer)(input)
        active = [name for name in self.active_adapters if name in self.orthoact_act]
        if self.merged or not active:
            return self.base_layer(input)
        if len(active) > 1:
            raise OrthoactError(
                f"the adapters {', '.join(active)} are active together and each replaces the same activation: "
                f"set_adapter to one of them"
            )
        return self.orthoact_act[active[0]](input)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active copy in the place of the original."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.orthoact_act]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise OrthoactError(f"merging {', '.join(names)}: expected one adapter with activations, merged once")
        self._unmerged = [self.base_layer]
        self.base_layer = cast(PackedActivation, self.orthoact_act[names[0]]).unpacked()
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the original back."""
        if self._unmerged:
            self.base_layer = self._unmerged.pop()
            self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No low rank makes an activation."""
        return False


class OrthoactModel(LoraModel):
    """PEFT's tuner for adapters of this kind: LoRA's, with activations."""

    prefix = f"{METHOD.lower()}_"
    tuner_layer_cls = (LoraLayer, ActivationLayer)  # pyright: ignore[reportAssignmentType]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add the LoRA layers, if any, and the activations; a base that does not match is refused before."""
        config = cast(OrthoactConfig, self.peft_config[adapter_name])
        calls = expose_(model)
        places = check_base(model, config.orthoact)
        asked = config.target_modules
        if not asked and not config.target_parameters:
            config.target_modules = DUMMY_TARGET_MODULES  # LoRA nowhere
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if config.target_modules == DUMMY_TARGET_MODULES:
                config.target_modules = asked
        trained = adapter_name in self.active_adapters and not config.inference_mode
        for name in own_first(config.orthoact):
            if name not in places:
                continue
            path, entry = places[name], config.orthoact["sites"][name]
            held = model.get_submodule(path)
            if entry.get("shared") in places:  # one activation, called from several places
                put(model, path, model.get_submodule(places[entry["shared"]]))
                continue
            layer = held if isinstance(held, ActivationLayer) else ActivationLayer(held).train(held.training)
            act = _fresh(name, config, layer.get_base_layer()).to(_device(model, path))
            layer.orthoact_act[adapter_name] = act.requires_grad_(trained)
            layer._active_adapter = self.active_adapters
            if layer is not held:
                put(model, path, layer)
        hide_(calls)
        self.targeted_module_names += [p for p in places.values() if p not in self.targeted_module_names]

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(child, ActivationLayer):
            put_in(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        names = kwargs.get("adapter_names") or self.active_adapters
        records = [cast(OrthoactConfig, self.peft_config[name]).orthoact for name in names]
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for path, layer in list(model.named_modules(remove_duplicate=False)):
            if isinstance(layer, ActivationLayer):  # at a further place of a shared one
                held = layer.base_layer
                put(model, path, Shared(held) if isinstance(held, Activation) else held)
        hide_(model.modules())
        found = {path: cast(Activation, _activation(model.get_submodule(path))) for path in sorted(holds(model))}
        order = [path for path, _ in model.named_modules(remove_duplicate=False)]
        found = {path: found[path] for path in order if path in found}
        if found:
            kept = {k: v for record in records for k, v in record.items() if k in ("base", "made")}
            attach(model, found).update(kept)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        here = {k.removeprefix("base_model.model."): v for k, v in state_dict.items()}
        whole = getattr(model, "base_model", model)
        whole = whole.model if isinstance(whole, OrthoactModel) else model
        places, twins = located(whole, config.orthoact), {}
        for name in own_first(config.orthoact):
            path, first = places[name], config.orthoact["sites"][name].get("shared")
            if first is not None:
                twins[path] = places[first]
                continue
            layer = None if path is None else whole.get_submodule(path)
            act = layer.orthoact_act[adapter_name] if isinstance(layer, ActivationLayer) else None
            for key in ("theta", "fixed"):
                tensor = here.pop(f"{name}.{LAYER}.{key}", None)
                if tensor is None:
                    raise OrthoactError(
                        f"the adapter lacks {key} of the learnable activation {name!r}: its file is incomplete"
                    )
                wanted = getattr(act, key)
                if tensor.shape != wanted.shape or tensor.dtype != torch.float32:
                    raise OrthoactError(
                        f"the adapter has {key} of the learnable activation {name!r} as {tensor.dtype} of shape "
                        f"{tuple(tensor.shape)}: expected float32 of {tuple(wanted.shape)}; its file is damaged"
                    )
                here[f"{path}.{LAYER}.{key}"] = tensor
            _check_packed(
                name, cast(PackedActivation, act), here[f"{path}.{LAYER}.theta"], here[f"{path}.{LAYER}.fixed"]
            )
        found = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, {f"base_model.model.{k}": v for k, v in here.items()}
        )
        for path, first in twins.items():  # the same tensors by another name
            for key in ("theta", "fixed"):
                at = f"base_model.model.{{}}.{LAYER}.{adapter_name}.{key}"
                found[at.format(path)] = found[at.format(first)]
        return found


def _check_packed(name: str, act: PackedActivation, theta: Tensor, fixed: Tensor) -> None:
    """Refuse numbers from a file that the activation could not be evaluated with."""
    probe = PackedActivation(act.family.name, act.degree, tails=act.tails, groups=act.groups, channel=act.channel)
    probe.theta.data, probe.fixed = theta, fixed
    check_tensors(name, probe)


def _fresh(name: str, config: OrthoactConfig, old: nn.Module) -> PackedActivation:
    """The activation of a site before its numbers are read; one that is to be trained starts as its fit."""
    entry = config.orthoact["sites"][name]
    act = cast(PackedActivation, rebuilt(name, entry, old, PackedActivation))
    if act.theta.is_meta or not config.inference_mode:
        start(name, act)
    else:
        act.fixed.fill_(torch.nan)  # what is not read from a file must not pass for an activation
    return act


def _activation(module: nn.Module) -> nn.Module:
    return module.activation if isinstance(module, Shared) else module


def _device(model: nn.Module, path: str) -> torch.device:
    from .surgeon import _device

    return _device(model, path)


# -- the base ----------------------------------------------------------------------------------------------------------


def shapes_at(model: nn.Module, path: str) -> dict[str, list[int]]:
    """The shapes of the first parameters beside an activation, by their names in its owner."""
    owner = model.get_submodule(path.rpartition(".")[0])
    found = {}
    for name, parameter in owner.named_parameters():
        parts = [part for part in name.split(".") if part != "base_layer"]
        if not any(part.startswith(("lora_", LAYER)) for part in parts) and len(parts) <= 3:
            found[".".join(parts)] = list(parameter.shape)
        if len(found) == 4:
            break
    return found


def check_base(model: nn.Module, record: Mapping[str, Any]) -> dict[str, str]:
    """Each recorded name with its path in `model`; `OrthoactError` where it is not a model that the adapter fits."""
    check(record)
    places, shapes, made_of = {}, None, record.get("base", {}).get("model") or "the base model"
    kind = type(model).__name__
    for name, path in sorted(located(model, record).items()):
        shapes = record.get("shapes", {}).get(name, shapes)
        if path is None:
            raise OrthoactError(
                f"the adapter replaces the activation {name!r}, which {kind} does not have: give it {made_of}"
            )
        held = model.get_submodule(path)
        held = held.get_base_layer() if isinstance(held, ActivationLayer) else held
        if record["sites"][name].get("shared"):
            places[name] = path
            continue
        site, target = recognise(path, held), record["sites"][name]["target"]
        if site is None or site.target.name != target or isinstance(held, Activation):
            is_ = f"a {site.target.name}" if site else f"a {type(held).__name__}"
            is_ = "converted already" if isinstance(held, Activation) else is_
            raise OrthoactError(
                f"the adapter replaces the {target} at {name!r}, in this {kind} it is {is_}: give it {made_of}"
            )
        here = shapes_at(model, path)
        if shapes and any(key in here and here[key] != list(shape) for key, shape in shapes.items()):
            key = next(key for key, shape in shapes.items() if key in here and here[key] != list(shape))
            raise OrthoactError(
                f"the adapter was made where {key} beside {name!r} is {tuple(shapes[key])}, in this {kind} it is "
                f"{tuple(here[key])}: give it {made_of}"
            )
        places[name] = path
    if len(set(places.values())) < len(places):
        raise OrthoactError(f"the adapter names an activation of {kind} twice: its record is damaged")
    return places


# -- writing and reading -----------------------------------------------------------------------------------------------


def adapter_config(model: nn.Module, spec: Mapping[str, Any] | None = None, **lora) -> OrthoactConfig:
    """The configuration of an adapter with the activations that a converted `model` holds.

    `lora` are the fields of PEFT's `LoraConfig` (r, target_modules, ...): LoRA in the same adapter. Load the base
    model and `get_peft_model(base, config)`; or `write_adapter`, which needs no base.
    """
    record = dict(spec or spec_of(model) or {})
    check(record)
    shapes, last = {}, None
    for name, path in sorted(located(model, record).items()):  # as the file is: a name has the shapes of the last
        if path is not None and (found := shapes_at(model, path)) != last:
            shapes[name] = last = found
    kept = {k: v for k, v in record.items() if k not in ("activations", "fusion_sentinel")} | {"shapes": shapes}
    base = record.get("base", {})
    return OrthoactConfig(
        orthoact=kept,
        base_model_name_or_path=base.get("model"),
        revision=base.get("revision"),
        **{"task_type": _task(model), **lora},
    )


def to_peft(model: nn.Module, **lora) -> peft.PeftModel:
    """A converted model as a PEFT model whose adapter is its activations, and the LoRA layers that `lora` asks for.

    In place: the base model is reverted and wrapped. What trains is the adapter; `save_pretrained` writes it alone.
    """
    from .surgeon import revert_

    config = adapter_config(model, **lora)
    places = located(model, config.orthoact)
    acts = {name: _activation(model.get_submodule(path)) for name, path in places.items() if path}
    wrapped = peft.get_peft_model(revert_(model), config)  # pyright: ignore[reportArgumentType]
    for name, path in located(model, config.orthoact).items():
        layer = cast(ActivationLayer, model.get_submodule(path or name))
        with torch.no_grad():
            for key in TENSORS:
                getattr(layer.orthoact_act["default"], key).copy_(getattr(acts[name], key))
    return cast(peft.PeftModel, wrapped)


def _task(model: nn.Module) -> str | None:
    """The task that PEFT gives a class of its own; with the tasks of classifiers it would ask for their heads too."""
    endings = {("LMHeadModel", "ForCausalLM"): "CAUSAL_LM", ("ForConditionalGeneration",): "SEQ_2_SEQ_LM"}
    name = type(model).__name__
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write the activations of a converted model, and nothing else, as an adapter into an empty folder."""
    config = adapter_config(model, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, path in located(model, config.orthoact).items():
        act = None if path is None else model.get_submodule(path)
        if isinstance(act, Shared):
            continue
        if not isinstance(act, Activation):
            raise OrthoactError(f"the record names {name!r}, which is no learnable activation: convert the model again")
        packed = PackedActivation.of(act)
        for key in ("theta", "fixed"):
            tensors[f"base_model.model.{name}.{LAYER}.{key}"] = getattr(packed, key).detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def load_applied(name: str, folder: Path, local: bool, **options) -> Source:
    """The base that an adapter names, loaded and converted by it; a base with other weights than it had is refused.

    A local base is looked for by its name beside a local adapter; a Hub id is loaded at the recorded revision.
    """
    from .folder import read_record

    config = read_json(folder / CONFIG)
    base, recorded = config.get("base_model_name_or_path"), read_record(folder).get("base", {})
    if not isinstance(base, str) or not (
        DEMO_NAME.fullmatch(base) or re.fullmatch(r"(timm:)?\w[\w.-]*(/[\w.-]+)?", base)
    ):
        raise OrthoactError(
            f"{name}: an adapter whose base model is {str(base)[:60]!r}; load the base yourself and give it to "
            f"PeftModel.from_pretrained"
        )
    beside = folder.parent / base
    found = DEMO if DEMO_NAME.fullmatch(base) else str(beside) if local and beside.is_dir() else base
    if (path := Path(found)).is_dir() and not (path / "config.json").is_file():
        raise OrthoactError(f"{name}: its base model {base} is an adapter or no model; expected a checkpoint folder")
    revision = config.get("revision") if found == base and not Path(found).is_dir() else None
    source = load_source(found, revision=revision, **options)
    if source.converted:
        raise OrthoactError(f"{name}: its base model {base} is converted already; expected the original")
    files, weights = recorded.get("files") or {}, weights_folder(source)
    for file in weight_files(weights) if files and weights else []:
        if files.get(file.name) != recorded_sha256(file):
            raise OrthoactError(
                f"{name}: the weights {file.name} of {base} are not those that the adapter was made of; "
                f"give PeftModel.from_pretrained the base at revision {recorded.get('revision')}"
            )
    if not (folder / WEIGHTS).is_file():
        raise OrthoactError(f"{name}: the adapter has no {WEIGHTS}; its weights are lost, or pickled")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for the old name
        peft_model = peft.PeftModel.from_pretrained(source.model, str(folder))
    source.model = cast(Any, peft_model).merge_and_unload().eval()
    return Source(source.model, name, source.kind, source.folder, config.get("revision"))


def load_into(model: Any, name: str, adapter_name: str, *, is_trainable: bool = False, **download) -> set[str]:
    """Put the adapter called `name` into a transformers model, as its own `load_adapter`; returns what was missing."""
    config = PeftConfig.from_pretrained(name, **download)
    config.inference_mode = not is_trainable
    weights = load_peft_weights(name, device="cpu", **download)
    inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True
    result = set_peft_model_state_dict(model, weights, adapter_name)
    model.eval()
    return {key for key in result.missing_keys if f".{adapter_name}." in key}


def _bounded(old: Callable) -> Callable:
    """PEFT reads the configuration of an adapter whole, and before it knows whose it is."""

    def from_json_file(cls, path_json_file, **kwargs):
        bounded(path_json_file)
        return old(cls, path_json_file, **kwargs)

    return from_json_file


def register() -> None:
    """Make the method known to PEFT; doing it twice changes nothing.

    PEFT's table of types is an enumeration that nothing public extends, and `register_peft_method` asks it.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if version < tuple(int(part) for part in TESTED[0].split(".")):
        raise OrthoactError(f"peft {peft.__version__} is installed, adapters need {TESTED[0]} or later: upgrade peft")
    if METHOD not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD)
        member._name_, member._value_ = METHOD, METHOD
        PeftType._member_map_[METHOD] = PeftType._value2member_map_[METHOD] = member
        PeftType._member_names_.append(METHOD)
        type.__setattr__(PeftType, METHOD, member)  # Python 3.12 looks members up on the class
    wrap(PeftConfigMixin, "from_json_file", _bounded)
    if PeftType(METHOD) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD.lower(), config_cls=OrthoactConfig, model_cls=OrthoactModel)


register()
