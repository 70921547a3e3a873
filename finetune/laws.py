"""What the channels of each activation meet: all that the least squares of `solve` need, in one pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import asinh

import numpy as np
import torch
from torch import Tensor, nn

from ..convert.calibrate import observe
from ..interp.activation import Activation
from ..interp.coordinates import heavy
from ..interp.layout import Layout
from .distill import Distillation

NODES = 1024
"""Nodes of a law, at equal distances in the inverse hyperbolic sine of the distance from the core's middle."""

FAR = 1000.0
"""The distance of the outermost nodes; what lies beyond counts as there."""

UNSEEN, PROOF = 1e-2, 160
"""The least share of a law with heavy tails in the law of a site: where no input was seen its original counts. With few
inputs it is more: it weighs as much as `PROOF` inputs of each channel."""


class Law:
    r"""The inputs of each group of channels of an activation, weighted by squared gradients, on nodes for all.

    An input between two nodes counts at both, with its mean: the sum over nodes of a smooth function is that over the
    inputs to second order in the nodes' distance, in the core 1.5 % of its unit.

    >>> from ..interp.fit import fit
    >>> law = Law(Activation.from_fit(fit("gelu", degree=3), original=torch.nn.functional.gelu))
    >>> x = torch.linspace(-3, 3, 1001)
    >>> law.add(x, torch.ones_like(x))
    >>> round(float(law.mass.sum())), bool(abs(law.mass @ law.nodes) < 1e-3)
    (1001, True)
    """

    def __init__(self, act: Activation):
        self.act = act
        self.middle, self.unit = float(act.location), float(act.scale)
        self.cell = 2 * asinh(FAR) / (NODES - 1)
        steps = torch.arange(NODES, dtype=torch.float64, device=act.theta.device) - (NODES - 1) / 2
        self.x = self.middle + self.unit * (self.cell * steps).sinh()
        """The nodes, in float64."""
        self.mass = torch.zeros(act.groups or 1, NODES, device=act.theta.device)
        """Of each node, (groups, nodes)."""
        self.nodes = self.x.to(self.mass)
        self.count = 0.0
        """How many inputs of each channel there were."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Take inputs and the gradients at their outputs; what is not finite counts for nothing."""
        layout, groups = Layout.of(x, self.act.groups, self.act.channel), len(self.mass)
        self.count += x.numel() / max(x.shape[-1 if self.act.channel is None else self.act.channel], 1)
        x, weight = (layout.columns(layout.flat(part.float())) for part in (x, g))
        weight = weight.square()
        sound = x.isfinite() & weight.isfinite()
        x, weight = x.where(sound, 0.0), weight.where(sound, 0.0)
        place = ((x - self.middle) / self.unit).asinh() / self.cell + (NODES - 1) / 2
        left = place.long().clamp(0, NODES - 2)
        here, there = self.nodes[left], self.nodes[left + 1]
        share = ((x - here) / (there - here)).clamp(0, 1)
        columns = torch.arange(x.shape[1], device=x.device)
        left += (columns // (len(columns) // groups) * NODES).view(1, -1, 1)
        self.mass.view(-1).scatter_add_(0, left.flatten(), (weight * (1 - share)).flatten())
        self.mass.view(-1).scatter_add_(0, left.flatten() + 1, (weight * share).flatten())

    def weights(self) -> Tensor:
        """The mass in float64, one for each group on average; zero where nothing was met, or nothing that matters."""
        mass = self.mass.double()
        return mass * (len(mass) / mass.sum().clamp_min(torch.finfo(torch.float32).tiny))

    def unseen(self) -> Tensor:
        """The law with heavy tails, (nodes,), beside these weights."""
        act = self.act
        mean, std = (act.domain.mean, act.domain.std) if act.domain else (self.middle, self.unit)
        law = heavy(((self.x - mean) / std).cpu().numpy()) * np.gradient(self.x.cpu().numpy())
        share = max(UNSEEN, PROOF / max(self.count, 1.0))
        return torch.from_numpy(share * law / law.sum()).to(self.x)

    def original(self) -> Tensor:
        """The original at the nodes, in float64."""
        assert self.act.original is not None
        return self.act.original(self.x.clone())  # one may work in place


def laws_of(
    model: nn.Module,
    taught: Distillation,
    batches: Iterable[dict[str, Tensor]],
    acts: Iterable[Activation],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Law]:
    """The laws of the inputs that the original gives each activation, without padding; `seed` draws the losses.

    `progress` is told how many batches are done.
    """
    laws = {act: Law(act) for act in acts}

    def add(act: nn.Module, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert isinstance(act, Activation)
        if act.channel not in (None, -1):  # what looks like a mask of positions would be one of channels
            keep = None
        return x.clone(), keep  # the original, or what comes after it, may work in place

    @torch.no_grad()
    def weigh(act: nn.Module, met: tuple[Tensor, Tensor | None], g: Tensor) -> None:
        assert isinstance(act, Activation)
        x, keep = met
        laws[act].add(*((x, g) if keep is None else (x[keep], g[keep])))

    with taught.teacher(model):
        observe(model, list(laws), batches, add, weigh, seed=seed, progress=progress)
    return list(laws.values())
