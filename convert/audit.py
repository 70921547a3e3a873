"""One forward pass on inputs made from the config: what a walk cannot see, and which axis counts the channels."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..interp.errors import OrthoactError
from .sites import Site

ACTIVATIONS = {
    *("gelu", "silu", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "softplus", "logsigmoid", "log_sigmoid", "softsign", "prelu", "rrelu"),
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "erf", "quick_gelu", "swish"),
}
"""Names of the torch functions that a forward pass is watched for."""

GATE_CALLS = {"tanh", "tanh_", "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "logsigmoid", "log_sigmoid"}
"""Calls that are gates, poolers, routers or soft caps: left on purpose."""


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
        return self.reason.startswith((FUNCTIONAL, NOT_AUDITED, "the forward pass"))


FUNCTIONAL = "called as a function, not as a module: a walk cannot replace it"
NOT_AUDITED = "not audited"


@dataclass
class Audit:
    """What a forward pass told."""

    left: list[Left] = field(default_factory=list)
    """Calls of activation functions outside the surveyed modules."""
    channels: dict[str, int] = field(default_factory=dict)
    """Axis of the channels of each site's input."""
    widths: dict[str, int] = field(default_factory=dict)
    """Number of channels of each site's input."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of each site's module."""
    ran: bool = False
    """Whether the forward pass came to its end."""


def audit(model: nn.Module, sites: list[Site]) -> Audit:
    """Run `model` once on a small input made from its config and watch every activation.

    Where no input can be made, or the pass fails, `left` says so. The model's mode is restored, its weights untouched.
    """
    try:
        batch = probe_batch(model, rows=1, length=8)
    except Exception as error:  # any config
        return Audit(left=[Left("", "?", 0, f"{NOT_AUDITED}: {error}")])
    result = Audit()
    watched = {id(model.get_submodule(site.name)): site.name for site in sites}
    paths = {id(module): path for path, module in model.named_modules()}
    stack: list[nn.Module] = [model]
    produced: dict[tuple[int, ...], int] = {}
    calls: Counter[tuple[str, str]] = Counter()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in ACTIVATIONS and id(stack[-1]) not in watched:
                calls[paths.get(id(stack[-1]), type(stack[-1]).__name__), name] += 1
            return func(*args, **(kwargs or {}))

    def before(module: nn.Module, args: tuple) -> None:
        if id(module) in watched and args and isinstance(args[0], Tensor):
            # before the call: an in-place activation overwrites its input
            name, x = watched[id(module)], args[0]
            result.calls[name] = result.calls.get(name, 0) + 1
            axis = produced.get(tuple(x.shape))
            if axis is None and x.dim() <= 3:
                axis = -1
            if axis is not None:
                result.channels[name], result.widths[name] = axis, x.shape[axis]
        stack.append(module)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        stack.pop()
        if isinstance(output, Tensor) and not module._modules and "weight" in module._parameters:
            axis = _channel_axis(module, output)
            if axis is not None:
                produced[tuple(output.shape)] = axis

    training = {m: m.training for m in model.modules()}
    hooks = torch.nn.modules.module
    with ExitStack() as exits:
        for handle in (
            hooks.register_module_forward_pre_hook(before),
            hooks.register_module_forward_hook(after, always_call=True),
        ):
            exits.callback(handle.remove)
        exits.callback(lambda: [setattr(m, "training", mode) for m, mode in training.items()])
        model.eval()
        try:
            with torch.no_grad(), Watch():
                model(**batch)
            result.ran = True
        except Exception as error:  # any architecture, any failure: the audit then says what it could not see
            why = (str(error).splitlines() or [""])[0][:120]
            reason = f"the forward pass on made-up inputs failed ({type(error).__name__}: {why})"
            return Audit(left=[Left("", "?", 0, reason)])
    for (where, function), count in sorted(calls.items()):
        reason = "a gate, pooler or soft cap, not a hidden activation" if function in GATE_CALLS else FUNCTIONAL
        result.left.append(Left(where, function, count, reason))
    return result


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
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        raise OrthoactError("the model has no weights in memory")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        batch = _timm_batch(model, rows, generator)
    else:
        batch = _transformers_batch(model, config, rows, length, generator)
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return {k: v.to(parameter.device, dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


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
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def _transformers_batch(model: Any, config: Any, rows: int, length: int, generator) -> dict[str, Tensor]:
    accepted = set(inspect.signature(model.forward).parameters)
    wanted = {model.main_input_name, *({"input_ids", "pixel_values"} & accepted)}
    batch: dict[str, Tensor] = {}
    for name in sorted(wanted):
        maker = _INPUTS.get(name)
        made = maker(config, rows, length, generator) if maker else None
        if made is None:
            raise OrthoactError(f"the config of {type(model).__name__} does not tell the shape of its input {name!r}")
        batch[name] = made
    if "input_ids" in batch and "attention_mask" in accepted:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = _tokens(config, rows, length, generator)  # pyright: ignore[reportArgumentType]
    return batch


def _tokens(config, rows, length, generator) -> Tensor | None:
    size = _first(config, "vocab_size")
    if not isinstance(size, int):
        return None
    limit = _first(config, "max_position_embeddings", "n_positions")
    limit = limit if isinstance(limit, int) and limit > 0 else length  # xlnet says -1
    # no special tokens at the low end: a padding id in the middle would shift positions
    return torch.randint(min(5, size - 1), size, (rows, min(length, limit)), generator=generator)


def _pixels(config, rows, length, generator) -> Tensor | None:
    size = _first(config, "image_size")
    channels = _first(config, "num_channels", "in_channels") or 3
    size = (size, size) if isinstance(size, int) else size
    if size is None:
        size = (224, 224)  # convolutional trunks take any size
    return torch.randn(rows, channels, *size, generator=generator)


def _features(config, rows, length, generator) -> Tensor | None:
    bins, positions = _first(config, "num_mel_bins"), _first(config, "max_source_positions")
    return torch.randn(rows, bins, 2 * positions, generator=generator) if bins and positions else None


_INPUTS: dict[str, Callable[..., Tensor | None]] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": lambda config, rows, length, generator: torch.randn(rows, 4000, generator=generator),
}
"""How each kind of input is made."""
