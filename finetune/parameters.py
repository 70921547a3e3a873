"""What trains: which parameters, at which rate, with or without weight decay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from ..interp.family import Linear

WHAT: dict[str, tuple[str, ...]] = {
    "activations": ("activations",),
    "activations+norms": ("activations", "norms"),
    "lora": ("lora",),
    "lora+activations": ("lora", "activations"),
    "bias": ("bias",),
    "norms": ("norms",),
    "head": (),
    "all": ("activations", "weights"),
}
"""What can train, and the `PARTS` of the model that it means; the head of a classifier comes first in each."""


def _head(model: Any) -> list[nn.Parameter]:
    """The parameters of a classifier's head; of a language model, none: its head is a part of the pretrained trunk."""
    base = getattr(model, "base_model", model)
    if type(model).__name__.endswith("Classification") and base is not model:
        inside = {id(p) for p in base.parameters()}
        outside = [p for p in model.parameters() if id(p) not in inside]
        if outside:
            return outside
    owner = next((m for m in (model, getattr(model, "timm_model", None)) if hasattr(m, "get_classifier")), None)
    found = owner.get_classifier() if owner is not None else ()  # a module, or several of a distilled model
    return [p for m in (found if isinstance(found, list | tuple) else [found]) for p in m.parameters()]


def _of_norms(model: nn.Module) -> list[nn.Parameter]:
    norms = (m for m in model.modules() if "norm" in type(m).__name__.lower())
    return [p for m in norms for p in m.parameters(recurse=False)]


PARTS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "head": _head,
    "activations": lambda model: [m.theta for m in model.modules() if isinstance(m, Activation)],
    "lora": lambda model: [p for name, p in model.named_parameters() if "lora_" in name],
    "norms": _of_norms,
    "bias": lambda model: [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"],
    "weights": lambda model: list(model.parameters()),
}
"""Each part of a model by name; a parameter in several belongs to the first of those that train."""


@dataclass
class Trainable:
    """A model of which some parameters train."""

    model: nn.Module
    """The model that was given; LoRA's layers are put into it in place."""
    groups: list[dict[str, Any]]
    """Parameter groups for the optimizer: `name`, `params`, `lr`, `weight_decay`."""
    count: dict[str, int]
    """The numbers that train, by part."""
    adapter: Any = field(default=None, repr=False)
    """PEFT's view of the model, where LoRA trains."""

    @property
    def total(self) -> int:
        """All the numbers that train."""
        return sum(self.count.values())

    def finish(self) -> nn.Module:
        """The model to be saved, its LoRA merged into the weights; the same object that was given."""
        if self.adapter is not None:
            self.adapter.merge_and_unload()
            self.adapter = None
            if hasattr(self.model, "peft_config"):  # PEFT leaves it, and transformers would save an adapter
                del self.model.peft_config
        return self.model


def choose(
    model: nn.Module,
    what: str,
    *,
    learning_rate: float,
    activation_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    lora_rank: int = 8,
    lora_alpha: int | None = None,
    lora_targets: tuple[str, ...] | list[str] = (),
    tails: str = "free",
    head: bool = True,
) -> Trainable:
    """Let `what` (a key of `WHAT`) of `model` train and freeze the rest, in place.

    Activations (their `theta`) and the head have rates of their own or the common one. Weight decay is for matrices of
    weights only: never for activations, norms and biases. LoRA is PEFT's: `lora_targets` are names of linear layers,
    by default those that PEFT names for the architecture, else all but the head's. With `tails="fixed"` the value and
    slope of each activation at its joints, and so its tails, stay as they are (see `fix_tails`). With `head=False` a
    classifier's head stays as it is.

    Raises `OrthoactError` for an unknown `what` and where the model has nothing of the kind.

    >>> from orthoact import convert_
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8))
    >>> _ = convert_(net, degree=8)
    >>> choose(net, "activations+norms", learning_rate=1e-3).count
    {'activations': 9, 'norms': 16}
    """
    if what not in WHAT:
        raise OrthoactError(f"train.what: expected one of {', '.join(WHAT)}, got {what!r}")
    if tails not in ("free", "fixed"):
        raise OrthoactError(f"train.tails: expected free or fixed, got {tails!r}")
    model.requires_grad_(False)
    of_head = _head(model)
    adapter = _lora(model, lora_rank, lora_alpha, list(lora_targets)) if "lora" in WHAT[what] else None
    masks = {}
    if tails == "fixed" and "activations" in WHAT[what]:
        masks = {id(m.theta): fix_tails(m) for m in model.modules() if isinstance(m, Activation)}
    rates = {"activations": activation_learning_rate, "head": head_learning_rate}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    chosen: set[int] = set()
    count: dict[str, int] = {}
    for part in (*(["head"] if head else []), *WHAT[what]):
        found = of_head if part == "head" else PARTS[part](model)
        parameters = {id(p): p for p in found if p.is_floating_point()}
        if not parameters and part != "head" and what != "all":
            raise OrthoactError(_nothing(part, what, model))
        for p in parameters.values():
            if id(p) in chosen:
                continue
            chosen.add(id(p.requires_grad_(True)))
            decay = weight_decay if p.dim() > 1 and part not in ("activations", "norms", "bias") else 0.0
            rate = rates.get(part) or learning_rate
            group = {"name": part, "params": [], "lr": rate, "weight_decay": decay}
            groups.setdefault((part, decay), group)["params"].append(p)
            free = int(masks[id(p)].sum()) * (p.numel() // p.shape[-1]) if id(p) in masks else p.numel()
            count[part] = count.get(part, 0) + free
    if not groups:
        raise OrthoactError(_nothing("head", what, model))
    return Trainable(model, list(groups.values()), count, adapter)


def _nothing(part: str, what: str, model: nn.Module) -> str:
    hint = "convert it first" if part == "activations" else "choose another"
    names = {"activations": "learnable activation", "head": "classification head", "bias": "bias", "norms": "norm"}
    return f"train.what: {what}: {type(model).__name__} has no {names.get(part, part)} that could train; {hint}"


def _lora(model: Any, rank: int, alpha: int | None, targets: list[str]) -> Any:
    """PEFT's LoRA, its layers put into `model` in place."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not targets and kind not in KNOWN:
        head = {id(p) for p in _head(model)}
        targets = [n for n, m in model.named_modules() if _is_linear(m) and id(m.weight) not in head]
    options: dict[str, Any] = {"target_modules": targets} if targets else {}
    options["fan_in_fan_out"] = any(type(m).__name__ == "Conv1D" for m in model.modules())  # GPT-2's transposed weights
    try:
        with warnings.catch_warnings():  # of transformers, for names of its own that PEFT uses
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, **options))
    except ValueError as error:
        raise OrthoactError(
            f"train.lora_targets: PEFT cannot put LoRA into {type(model).__name__} ({error})"
        ) from error


def _is_linear(module: Any) -> bool:
    """Whether a module mixes channels only: a linear layer, or a convolution of one pixel."""
    convolves = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or convolves


@torch.no_grad()
def fix_tails(act: Activation) -> Tensor:
    r"""Hold the core's value and slope at both joints while `theta` trains, and with them the tails.

    They are linear in theta: $C (a_0 + W \theta)$. W is turned, $W V$ with V orthogonal, so that the first components
    of theta alone move them; the function and the length of a step stay the same. The gradient of those components
    is then zero, which holds them under every optimizer without weight decay. Returns the mask of what is free.
    Raises `OrthoactError` for a family that is not linear in its numbers, for a bare series, and where nothing is free.
    """
    family = act.family
    if not isinstance(family, Linear) or act.tails != "linear":
        raise OrthoactError(
            f"train.tails: fixed: expected a family that is linear in its numbers (hermite), with tails; "
            f"got {family.name} with tails {act.tails}"
        )
    z = ((torch.stack([act.lo, act.hi]) - act.location) / act.scale).double().cpu().numpy()
    rows = np.stack([*np.stack(family.basis(z, act.degree), -1), *np.stack(family.slopes(z, act.degree), -1)])
    _, size, turned = np.linalg.svd(rows @ act.transform.double().cpu().numpy())
    held = int((size > 1e-6 * size[0]).sum())
    if held == len(turned):
        raise OrthoactError(f"train.tails: fixed: nothing is free at degree {act.degree}; choose a higher one")
    turn = torch.from_numpy(turned.T).to(act.theta.device)
    act.theta.copy_(act.theta.double() @ turn)
    act.transform.copy_(act.transform.double() @ turn)
    free = torch.arange(len(turned), device=act.theta.device) >= held
    act.theta.requires_grad_(True).register_hook(lambda gradient: gradient * free.to(gradient.device))
    return free
