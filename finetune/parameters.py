"""What trains: minimal, until the branch that owns it is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..interp.activation import Activation


@dataclass
class Trainable:
    """What trains in a model."""

    model: nn.Module
    groups: list[dict[str, Any]]
    count: dict[str, int]

    def finish(self) -> nn.Module:
        """The model that is saved."""
        return self.model


def choose(
    model, what, *, learning_rate, activation_learning_rate=None, head_learning_rate=None, weight_decay=0.0, **_
):
    """Freeze all but what trains."""
    thetas = {id(m.theta) for m in model.modules() if isinstance(m, Activation)}
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    kinds: dict[str, list] = {}
    for name, p in model.named_parameters():
        head = name.split(".")[0] in ("classifier", "score", "head", "fc") and "lm_head" not in name
        kind = "activations" if id(p) in thetas else "head" if head else "norms" if id(p) in norms else "weights"
        p.requires_grad_(kind == "head" or kind in what.split("+") or what == "all")
        if p.requires_grad:
            kinds.setdefault(kind, []).append(p)
    rates = {"activations": activation_learning_rate, "head": head_learning_rate}
    groups = [
        {"name": k, "params": v, "lr": rates.get(k) or learning_rate, "weight_decay": weight_decay * (k == "weights")}
        for k, v in kinds.items()
    ]
    return Trainable(model, groups, {k: sum(p.numel() for p in v) for k, v in kinds.items()})
