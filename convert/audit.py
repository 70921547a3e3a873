"""Forward passes on inputs made from the config: what a walk cannot see, and which axis counts the channels."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..interp.errors import OrthoactError
from .calls import base_of, exposed, mentions
from .sites import Site

ACTIVATIONS = {
    *("gelu", "silu", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "softplus", "logsigmoid", "log_sigmoid", "softsign", "prelu", "rrelu"),
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "erf", "quick_gelu", "swish", "glu"),
    *("lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell"),
}
"""Names of the torch functions that a forward pass is watched for."""

GATE_CALLS = {
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "logsigmoid", "log_sigmoid", "glu"),
    *("hardtanh", "lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell"),
}
"""Calls that are gates, poolers, routers or soft caps: left on purpose."""

PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}


@dataclass(frozen=True)
class Left:
    """An activation that stays as it was."""

    where: str
    """Dotted path of the module whose forward calls it; empty for the model itself."""
    function: str
    """The function called."""
    calls: int
    """Calls in one forward pass."""
    reason: str
    """Why it stays."""

    @property
    def proper(self) -> bool:
        """Whether it may be an activation proper, not a gate or a head left on purpose: `--strict` fails on these."""
        return self.reason.startswith((FUNCTIONAL, NOT_AUDITED, FAILED))


FUNCTIONAL = "called as a function that cannot be replaced"
NOT_AUDITED = "not audited"
FAILED = "the forward pass on made-up inputs failed"
IN_PARTS = "the model was audited part by part"
GATE = "a gate, pooler or soft cap, not a hidden activation"


@dataclass
class Audit:
    """What the forward passes told."""

    left: list[Left] = field(default_factory=list)
    """Calls of activation functions outside the surveyed modules."""
    channels: dict[str, int] = field(default_factory=dict)
    """Axis of the channels of each site's input."""
    widths: dict[str, int] = field(default_factory=dict)
    """Number of channels of each site's input."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of each site's module."""
    dead: set[str] = field(default_factory=set)
    """Sites whose owner ran to its end and did not call them."""
    ran: bool = False
    """Whether a forward pass of the whole model came to its end."""


def audit(model: nn.Module, sites: list[Site]) -> Audit:
    """Run `model` on small inputs made from its config and watch every activation.

    What a pass of the whole model does not reach (the vision tower of a model that was given text, an expert that got
    no token) is run by itself. Where no input can be made, or a pass fails, `left` says so. On the meta device nothing
    is computed. The model's mode is restored, its weights untouched.
    """
    with exposed(model), _Watcher(model, sites) as watcher:
        return watcher.audit()


class _Watcher:
    """The hooks of an audit and what they saw."""

    def __init__(self, model: nn.Module, sites: list[Site]):
        self.model, self.sites, self.result = model, sites, Audit()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.watched: dict[int, list[str]] = {}  # one module may be at several places
        for site in sites:
            self.watched.setdefault(id(self.modules[site.name]), []).append(site.name)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.finished: set[int] = set()
        self.kinds: set[type] = set()  # classes of which a module has run to its end
        self.produced: dict[tuple[int, ...], int] = {}
        self.functions: Counter[tuple[int, str]] = Counter()
        self.exits = ExitStack()

    def __enter__(self):
        training = {m: m.training for m in self.model.modules()}
        self.exits.callback(lambda: [setattr(m, "training", mode) for m, mode in training.items()])
        self.model.eval()
        hooks = torch.nn.modules.module
        self.exits.callback(hooks.register_module_forward_pre_hook(self._before).remove)
        self.exits.callback(hooks.register_module_forward_hook(self._after, always_call=True).remove)
        self.exits.enter_context(torch.no_grad())
        if any(p.is_meta for p in self.model.parameters()):  # where nothing can be read, so that no router can branch
            for config in {
                id(c): c for m in self.modules.values() if (c := m.__dict__.get("config")) is not None
            }.values():
                if (way := getattr(config, "_experts_implementation", None)) is not None:
                    self.exits.callback(setattr, config, "_experts_implementation", way)
                    config._experts_implementation = "batched_mm"
        return self

    def __exit__(self, *error):
        self.exits.close()

    # -- the plan --------------------------------------------------------------------------------------------------

    def audit(self) -> Audit:
        why = self._run(self.model, lambda: probe_batches(self.model))
        self.result.ran = why is None
        if why is not None or self._unreached():
            self._run_parts()
        self._report(why)
        return self.result

    def _run_parts(self) -> None:
        """Run by themselves the parts that no pass has reached: submodels, then the owners of single activations."""
        for module in list(self.modules.values()):
            if module is not self.model and hasattr(module, "main_input_name") and id(module) not in self.finished:
                self._run(module, lambda module=module: probe_batches(module))
        for site in self._unreached():
            owner = self._owner(site.name)
            if id(owner) not in self.finished:
                self._run(owner, lambda owner=owner: tensors_for(owner))

    def _owner(self, name: str) -> nn.Module:
        """The module whose forward calls a site: the nearest one above that is more than a list."""
        module = self.model
        while name:
            name = name.rpartition(".")[0]
            module = self.modules[name]
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                break
        return module

    def _unreached(self) -> list[Site]:
        """The sites that were not called though nothing says that they never are."""
        return [
            s
            for s in self.sites
            if not s.left and s.name not in self.result.calls and id(self._owner(s.name)) not in self.finished
        ]

    def _report(self, why: str | None) -> None:
        result = self.result
        for site in self.sites:
            if site.name not in result.calls and id(self._owner(site.name)) in self.finished:
                result.dead.add(site.name)
        rows: Counter[tuple[str, str]] = Counter()
        for (owner, function), count in self.functions.items():
            if count > 0:
                rows[self.paths.get(owner, ""), function] += count
        for (where, function), count in sorted(rows.items()):
            result.left.append(Left(where, function, count, GATE if function in GATE_CALLS else FUNCTIONAL))
        blind = [
            Left(path, "?", 0, f"{NOT_AUDITED}: no made-up input reaches this {type(module).__name__}")
            for path, module in self.modules.items()
            if path
            and id(module) not in self.finished | self.watched.keys()
            and base_of(module) not in self.kinds
            and (mentions(base_of(module)) or self._holds_unreached(path))
        ]
        if why is not None:
            own = bool(blind) or mentions(base_of(self.model)) or not self.finished
            result.left.append(Left("", "?", 0, why if own else f"{IN_PARTS}: {why}"))
        result.left.extend(blind)

    def _holds_unreached(self, path: str) -> bool:
        return any(self._owner(s.name) is self.modules[path] for s in self._unreached())

    # -- one pass --------------------------------------------------------------------------------------------------

    def _run(self, module: nn.Module, batches: Callable[[], Iterable[dict[str, Tensor]]]) -> str | None:
        """Run `module` on the first batch that it takes; why not, where it takes none."""
        why = None
        try:
            for batch in batches():
                failure = self._attempt(module, batch)
                if failure is None:
                    return None
                why = why or failure
        except Exception as error:  # any config
            return why or f"{NOT_AUDITED}: {_first_line(error)}"
        return why or f"{NOT_AUDITED}: no input could be made"

    def _attempt(self, root: nn.Module, batch: dict[str, Tensor]) -> str | None:
        self.stack: list[nn.Module] = [root]
        self.done: set[int] = set()
        self.seen: Counter[tuple[int, str]] = Counter()
        self.called: Counter[str] = Counter()
        failure = None
        try:
            with _Mode(self):
                root(**batch) if "" not in batch else root(batch[""])
        except Exception as error:  # any architecture, any failure: the audit then says what it could not see
            failure = f"{FAILED} ({type(error).__name__}: {_first_line(error)})"
        fresh = self.done - self.finished
        for (owner, name), count in self.seen.items():
            if owner in fresh:  # what did not come to its end is not known
                self.functions[owner, name] += count
        for name, count in self.called.items():
            self.result.calls.setdefault(name, count)
        self.finished |= fresh
        self.kinds |= {base_of(m) for m in self.modules.values() if id(m) in fresh}
        return failure

    def _before(self, module: nn.Module, args: tuple) -> None:
        for name in self.watched.get(id(module), ()):
            self.called[name] += 1
            if args and isinstance(args[0], Tensor):  # before the call: an in-place activation overwrites its input
                x = args[0]
                axis = module.__dict__.get("_orthoact_channel") or self.produced.get(tuple(x.shape))
                if axis is None and x.dim() <= 3:
                    axis = -1
                if axis is not None and x.dim():
                    self.result.channels[name], self.result.widths[name] = axis, x.shape[axis]
        self.stack.append(module)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.stack.pop()
        if output is not None:
            self.done.add(id(module))
        if isinstance(output, Tensor) and not module._modules and module._parameters.get("weight") is not None:
            axis = _channel_axis(module, output)
            if axis is not None:
                self.produced[tuple(output.shape)] = axis

    def owner(self) -> nn.Module:
        """The innermost module of the model that runs now."""
        return next((m for m in reversed(self.stack) if id(m) in self.paths), self.model)


class _Mode(TorchFunctionMode):
    """Counts the activation functions that are called outside the watched modules."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher
        self.gates: dict[int, tuple[Any, Any]] = {}
        self.scaled: dict[int, tuple[Any, Any]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, w = func(*args, **(kwargs or {})), self.watcher
        name = getattr(func, "__name__", "")
        if name in ACTIVATIONS or name in PRODUCTS:
            owner = w.owner()
            if id(owner) not in w.watched:
                if name in ACTIVATIONS:
                    w.seen[id(owner), name] += 1
                    if name == "sigmoid" and args:
                        self.gates[id(out)] = (ref(out), ref(args[0]))
                else:
                    self._product(args, out, id(owner))
        return out

    def _product(self, args: tuple, out: Tensor, owner: int) -> None:
        """X * sigmoid(x) is a SiLU, x * sigmoid(1.7 x) a quick GELU, whoever writes it out."""
        if len(args) != 2 or not isinstance(args[0], Tensor):
            return
        if not isinstance(args[1], Tensor):
            self.scaled[id(out)] = (ref(out), ref(args[0]))
            return
        for gate, x in (args, args[::-1]):
            inner = _alive(self.gates, gate)
            if inner is None:
                continue
            plain = inner is x
            if plain or _alive(self.scaled, inner) is x:
                self.watcher.seen[owner, "sigmoid"] -= 1
                self.watcher.seen[owner, "silu" if plain else "quick_gelu"] += 1
                return


def _alive(kept: dict[int, tuple[Any, Any]], tensor: Tensor) -> Tensor | None:
    """What is remembered of this very tensor."""
    made, source = kept.get(id(tensor), (None, None))
    return source() if made is not None and made() is tensor else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _channel_axis(module: nn.Module, output: Tensor) -> int | None:
    """The axis along which the weights of a layer differ."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return 1
    for name in ("out_features", "num_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            break
    else:
        width = module._parameters["weight"].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
    if output.dim() and output.shape[-1] == width:
        return -1
    return 1 if output.dim() > 1 and output.shape[1] == width else None


# -- inputs ------------------------------------------------------------------------------------------------------------


def probe_batch(model: nn.Module, *, rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Seeded inputs for `model`, made from its config: token ids, pixels or audio features, on the model's device.

    Raises `OrthoactError` where the config does not tell what the model takes.
    """
    return next(iter(probe_batches(model, rows=rows, length=length, seed=seed)))


def probe_batches(model: nn.Module, *, rows: int = 1, length: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches that `model` may take: all that its forward accepts and its config tells, then only what it needs."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise OrthoactError("the model has no weights")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        made = iter([_timm_batch(model, rows, generator)])
    else:
        if type(model).forward is nn.Module.forward:
            raise OrthoactError(f"{type(model).__name__} has no forward pass of its own")
        made = _transformers_batches(model, config, rows, length, generator)
    for batch in made:
        yield {
            k: v.to(parameter.device, parameter.dtype) if v.is_floating_point() else v.to(parameter.device)
            for k, v in batch.items()
        }


def tensors_for(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs of one tensor for a module that starts with a layer: of the shape that this layer takes."""
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if weight is None:
            continue
        shape: tuple[int, ...]
        if isinstance(layer, nn.modules.conv._ConvNd):
            shape = (1, layer.in_channels, *[16] * (weight.dim() - 2))
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            shape = (1, weight.shape[0], 16, 16)
        else:
            shape = (1, 4, getattr(layer, "in_features", weight.shape[-1] if weight.dim() < 2 else weight.shape[1]))
        yield {"": torch.zeros(shape, device=weight.device, dtype=weight.dtype)}
        return


def _timm_batch(model: nn.Module, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise OrthoactError("the model has no config that tells its input")
    args = getattr(model, "_model_args", {})  # the config tells the input of the pretrained weights
    built = args.get("img_size") or size[1:]
    size = (args.get("in_chans") or size[0], *((built, built) if isinstance(built, int) else built))
    name = next(iter(inspect.signature(model.forward).parameters))
    return {name: torch.randn(rows, *size, generator=generator)}


def _first(config: Any, *names: str) -> Any:
    """The first of `names` that the config, or one of its parts, has."""
    parts, seen = [config], set()
    while parts:
        part = parts.pop(0)
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
        seen.add(id(part))
        inner = [getattr(part, name) for name in ORDER if hasattr(part, name)] + list(vars(part).values())
        parts += [v for v in inner if hasattr(v, "to_dict") and hasattr(v, "model_type") and id(v) not in seen]
    return None


ORDER = ("text_config", "vision_config", "audio_config")
"""Parts of a config that are asked before the others."""


def _transformers_batches(model: Any, config: Any, rows: int, length: int, generator) -> Iterator[dict[str, Tensor]]:
    parameters = inspect.signature(model.forward).parameters
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty and p.kind in plain}
    main = {model.main_input_name} & set(parameters) or (set() if needed else {next(iter(parameters))})
    every = needed | main | ({"input_ids", "pixel_values", "bbox"} & set(parameters))
    choices = [every, needed | main]
    choices += [needed | {n} for n in _INPUTS if n in parameters and n not in ("bbox", "attention_mask")]
    why, given = None, []
    for names in choices:
        for variant in range(5):
            batch = {}
            for name in sorted(names):
                made = _INPUTS[name](config, rows, length, generator) if name in _INPUTS else []
                if not made:
                    why = why or f"the config of {type(model).__name__} does not tell the shape of its input {name!r}"
                    break
                batch[name] = made[min(variant, len(made) - 1)]
            shapes = {name: tensor.shape for name, tensor in batch.items()}
            if len(batch) < len(names) or shapes in given:
                continue
            given.append(shapes)
            if "input_ids" in batch and "attention_mask" in parameters:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
                batch["decoder_input_ids"] = _tokens(config, rows, length, generator)[0]
            yield batch
    if not given:
        raise OrthoactError(why or f"{type(model).__name__} takes no input that is known")


def _tokens(config, rows, length, generator) -> list[Tensor]:
    size = _first(config, "vocab_size")
    size = size if isinstance(size, int) else 256
    limit = _first(config, "max_position_embeddings", "n_positions")
    limit = limit if isinstance(limit, int) and limit > 0 else length  # xlnet says -1
    # no special tokens at the low end: a padding id in the middle would shift positions
    return [torch.randint(min(5, size - 1), max(size, 2), (rows, min(length, limit)), generator=generator)]


def _pixels(config, rows, length, generator) -> list[Tensor]:
    size = _first(config, "image_size")
    channels = _first(config, "num_channels", "in_channels", "in_chans") or 3
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, list | tuple):
        size = (224, 224)  # convolutional trunks take any size
    frames = _first(config, "num_frames", "frames_per_clip")
    patch, group = _first(config, "patch_size"), _first(config, "temporal_patch_size") or 1
    found = [torch.randn(rows, channels, *size, generator=generator)]
    if isinstance(frames, int):
        found.insert(0, torch.randn(rows, frames, channels, *size, generator=generator))
    else:
        found.append(torch.randn(rows, 1, channels, *size, generator=generator))
    if isinstance(patch, int) and isinstance(group, int) and isinstance(channels, int):
        found.append(torch.randn(16, channels * group * patch**2, generator=generator))  # of a grid of 4 x 4 patches
    return found


def _features(config, rows, length, generator) -> list[Tensor]:
    width = _first(config, "feature_projection_input_dim", "input_feat_per_channel", "input_dim", "feature_size")
    bins, positions = _first(config, "num_mel_bins", "n_mels", "mel_bins"), _first(config, "max_source_positions")
    time = 2 * positions if isinstance(positions, int) else _first(config, "max_length") or 128
    found = []
    if isinstance(bins, int):
        found += [torch.randn(rows, bins, time, generator=generator), torch.randn(rows, 128, bins, generator=generator)]
        found.append(torch.randn(rows, 1, 1024, bins, generator=generator))
    if isinstance(width, int):
        found.append(torch.randn(rows, 64, width, generator=generator))
    return found


def _waves(config, rows, length, generator) -> list[Tensor]:
    bins, time = _first(config, "num_mel_bins"), _first(config, "max_length")
    found = [torch.randn(rows, 4000, generator=generator), torch.randn(rows, 1, 4000, generator=generator)]
    if isinstance(bins, int) and isinstance(time, int):
        found.insert(0, torch.randn(rows, time, bins, generator=generator))
    return found


def _states(config, rows, length, generator) -> list[Tensor]:
    widths = [_first(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim"), _first(config, "input_dim")]
    found = [torch.randn(rows, length, width, generator=generator) for width in widths if isinstance(width, int)]
    channels, patch = _first(config, "in_channels", "num_channels", "in_chans"), _first(config, "patch_size")
    if isinstance(channels, int) and isinstance(patch, int):  # patches already cut, of a grid of 4 x 4
        group = _first(config, "temporal_patch_size")
        areas = [patch**2 * group, patch**2] if isinstance(group, int) else [patch**2]
        found += [torch.randn(16, channels * area, generator=generator) for area in areas]
    return found


def _series(config, rows, length, generator, features: str = "") -> list[Tensor]:
    time = (_first(config, "context_length") or 64) + max(_first(config, "lags_sequence") or [0])
    channels = (_first(config, features) or 0) if features else (_first(config, "num_input_channels") or 1)
    if features:
        return [torch.randn(rows, time, channels, generator=generator)]
    flat = [] if channels > 1 else [torch.randn(rows, time, generator=generator)]
    return [torch.randn(rows, time, channels, generator=generator), *flat]


_INPUTS: dict[str, Callable[..., list[Tensor]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "image": _pixels,
    "input_features": _features,
    "input_values": _waves,
    "input_embeds": _states,
    "inputs_embeds": _states,
    "hidden_states": _states,
    "encoder_hidden_states": _states,
    "query_embeds": _states,
    "past_values": _series,
    "past_observed_mask": lambda *given: [torch.ones_like(made) for made in _series(*given)],
    "past_time_features": lambda *given: _series(*given, features="num_time_features"),
    "bbox": lambda config, rows, length, generator: [
        torch.tensor([1, 2, 3, 4]).expand(rows, _tokens(config, rows, length, generator)[0].shape[1], 4)
    ],
    "attention_mask": lambda config, rows, length, generator: [torch.ones(rows, length, dtype=torch.long)],
    "input_features_mask": lambda config, rows, length, generator: [torch.ones(rows, 128, dtype=torch.long)],
    "grid_thw": lambda config, rows, length, generator: [torch.tensor([[1, 4, 4]])],
    "image_grid_thw": lambda config, rows, length, generator: [torch.tensor([[1, 4, 4]])],
    "spatial_shapes": lambda config, rows, length, generator: [torch.tensor([[4, 4]])],
}
"""How each kind of input is made: the shapes that it may have, the likeliest first."""
