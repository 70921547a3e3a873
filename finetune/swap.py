"""A progressive swap: the new activations come in little by little while the model trains."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..interp.activation import Activation, original
from ..interp.errors import OrthoactError

HOW = ("sites", "blend")


class Swap:
    r"""From the original activations of `model` to its own in `steps` steps; in force inside the context.

    `sites`: one site after the other, in the order of the model. `blend`: all at once, each $f + s (F - f)$ with the
    share s growing evenly from $1 / steps$ to 1. Outside the context, where the model is measured, all are new.
    Raises `OrthoactError` where an original is not known.

    >>> from orthoact import convert_
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2), nn.GELU())
    >>> _ = convert_(net, degree=4)
    >>> swap = Swap(net, "sites", steps=10)
    >>> [swap.begin(step) for step in (0, 5, 10)]
    [0.5, 1.0, 1.0]
    """

    def __init__(self, model: nn.Module, how: str, *, steps: int):
        if how not in HOW:
            raise OrthoactError(f"train.swap: expected one of {', '.join(HOW)}, got {how!r}")
        if steps < 1:
            raise OrthoactError(f"train.swap_steps: expected a positive whole number, got {steps}")
        with original(model):  # says which originals are not known
            self.sites = [m for m in model.modules() if isinstance(m, Activation)]
        self.how, self.steps, self.share = how, steps, 1.0
        self._hooks: list[Any] = []
        self.begin(0)

    def begin(self, step: int) -> float:
        """Set the share of what is new for the step of this number, from 0, and return it."""
        self.share = min(1.0, (step + 1) / self.steps)
        if self.how == "sites":
            self.share = ceil(self.share * len(self.sites)) / len(self.sites)
        return self.share

    def __enter__(self) -> Swap:
        self._before = [m.bypass for m in self.sites]
        if self.how == "blend":
            self._hooks = [m.register_forward_hook(self._mix) for m in self.sites]
            return self
        for place, m in enumerate(self.sites):
            m.bypass = m.bypass or place >= round(self.share * len(self.sites))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for m, bypass in zip(self.sites, self._before, strict=True):
            m.bypass = bypass

    def _mix(self, act: Activation, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if act.bypass or self.share == 1 or act.original is None:
            return None
        return torch.lerp(act.original(args[0]), output, self.share)
