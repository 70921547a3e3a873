"""The numbers of each site by least squares on its own inputs: a start for recovery that takes no steps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.fidelity import outputs
from ..interp.activation import Activation
from ..interp.family import Linear
from ..interp.formula import Frame, derivatives, value
from ..interp.layout import Layout
from .distill import Distillation

RIDGE = 1e-2
"""What a change of a site's curve costs beside what it leaves of the error: few inputs of a channel are no proof."""


def solve(
    model: nn.Module, taught: Distillation, batches: Iterable[dict[str, Tensor]], *, ridge: float = RIDGE
) -> None:
    r"""Move the numbers of each activation that trains, group by group, to the least squares on its inputs, in place.

    $$\min_d \sum_i (f(x_i) - F(x_i) - \phi(x_i) \cdot d)^2 + ridge \cdot N |d|^2, \quad \phi = dF / d\theta$$

    over the N inputs that the original model gives the activation on `batches`, without padding, with its original f:
    for a family that is linear in its numbers the minimum, else a Gauss-Newton step in each group that it makes better.
    theta is measured in function space (`coordinates`), so that one `ridge` suits all. A plain fit copies f for one law
    of inputs; the channels of a site have many.

    >>> from orthoact import convert_
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> _ = convert_(net, degree=3, groups="per-channel")
    >>> batch = {"input": torch.randn(512, 4)}
    >>> taught = Distillation(net)
    >>> before = taught.loss(net, batch)
    >>> solve(net, taught, [batch])
    >>> bool(taught.loss(net, batch) < before)
    True
    """
    acts = [m for m in model.modules() if isinstance(m, Activation) and m.theta.requires_grad]
    systems = {act: _System(act) for act in acts}
    batches = list(batches)
    _meet(model, taught, batches, {act: system.add for act, system in systems.items()})
    with torch.no_grad():
        for system in systems.values():
            system.step(ridge)
        stepped = {act: system for act, system in systems.items() if not isinstance(act.family, Linear)}
        if stepped:  # a Gauss-Newton step may lead too far
            _meet(model, taught, batches, {act: system.check for act, system in stepped.items()})
        for system in stepped.values():
            system.take_back()


def _meet(
    model: nn.Module, taught: Distillation, batches: list[dict[str, Tensor]], take: dict[Activation, Any]
) -> None:
    """Let each activation take the inputs that the original gives it."""
    device = next(model.parameters()).device
    mask: Tensor | None = None

    def told(act: Activation, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        padded = mask is not None and act.channel in (None, -1) and x.dim() > 2 and x.shape[:2] == mask.shape
        take[act](x[mask.to(x.device).bool()] if mask is not None and padded else x)

    with ExitStack() as exits, torch.no_grad():
        exits.enter_context(taught.teacher(model))
        for act in take:
            exits.callback(act.register_forward_pre_hook(told).remove)
        for batch in batches:
            batch = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            mask = batch.get("attention_mask")
            outputs(model, batch)


PIECE = 2**21
"""Values of which all derivatives are held at a time."""


class _System:
    """The normal equations of an activation, one system for each group, in float64."""

    def __init__(self, act: Activation):
        self.act, self.count = act, 0
        self.start = act.theta.detach().clone()
        theta = self.start.double()
        numbers, self.frame = act.numbers(torch.float64)
        self.numbers = numbers.detach()
        self.by_theta = torch.func.vmap(torch.func.jacrev(act._numbers))(theta.view(-1, theta.shape[-1])).detach()
        """The derivatives of the numbers by theta, (groups, numbers, n)."""
        learnt = len(act.family.value_parts(list(self.numbers.unbind(-1))[:-2], theta.new_zeros(1))) + 2
        self.products = theta.new_zeros(len(self.by_theta), learnt + 1, learnt + 1)
        """Of the derivatives of F by the numbers that have any, and of what F leaves of f: sums over the inputs."""
        self.left = theta.new_zeros(len(self.by_theta))
        """The squared error after the step."""

    def add(self, x: Tensor) -> None:
        """Take the inputs of a pass."""
        self.products += self._sums(x, self.numbers, True)
        self.count += x.numel() // len(self.products)

    def check(self, x: Tensor) -> None:
        """Take the same inputs again, after the step."""
        self.left += self._sums(x, self.act.numbers(torch.float64)[0], False)[:, 0, 0]

    def _sums(self, x: Tensor, numbers: Tensor, parts: bool) -> Tensor:
        act, groups = self.act, len(self.products)
        assert act.original is not None
        layout = Layout.of(x, act.groups, act.channel)
        views = [layout.columns(layout.flat(part)) for part in (x, act.original(x.clone()))]
        mine, frame = list(layout.spread(numbers).unbind()), Frame(*self.frame.unbind())
        size = self.products.shape[-1] if parts else 1
        found = self.products.new_zeros(views[0].shape[1], size, size)
        rows = max(1, PIECE // max(1, views[0][:1].numel()))
        for some, wanted in zip(*(view.split(rows) for view in views), strict=True):
            some = some.double()
            each = derivatives(act.family, some, mine, frame, True)[1] if parts else []
            each = [*each, wanted - value(act.family, some, mine, frame)]
            stacked = torch.stack([one.expand_as(some).permute(1, 0, 2).flatten(1) for one in each], 1)
            found += stacked @ stacked.mT
        return found.view(groups, -1, size, size).sum(1)  # a group may have many columns

    def step(self, ridge: float) -> None:
        if not self.count:
            return
        learnt = self.products.shape[-1] - 3
        by_theta = torch.cat([self.by_theta[:, :learnt], self.by_theta[:, -2:]], 1)
        matrix = by_theta.mT @ self.products[:, :-1, :-1] @ by_theta
        matrix += ridge * self.count * torch.eye(matrix.shape[-1]).to(matrix)
        step = torch.linalg.solve(matrix, (by_theta.mT @ self.products[:, :-1, -1:]).squeeze(-1))
        self.act.theta += step.view_as(self.start).to(self.start)

    def take_back(self) -> None:
        """Undo the step in the groups that it made worse."""
        worse = ~(self.left < self.products[:, -1, -1])  # and where it is not finite
        theta = self.act.theta.view(len(worse), -1)
        theta[worse] = self.start.view(len(worse), -1)[worse]
