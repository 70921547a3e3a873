"""The numbers of each site by least squares on its own inputs: a start for recovery that takes no steps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..convert.fidelity import outputs
from ..interp.activation import Activation
from ..interp.formula import Frame, derivatives, value
from ..interp.layout import Layout, blocks
from .distill import Distillation

RIDGE = 1e-2
"""What a change of a site's curve costs beside what it leaves of the error: few inputs of a channel are no proof."""


def solve(model: nn.Module, taught: Distillation, batches: Iterable[dict[str, Tensor]], *, ridge: float = RIDGE) -> None:
    r"""Move the numbers of every activation, group by group, to the least squares on its own inputs, in place.

    $$\min_d \sum_i (f(x_i) - F(x_i) - \phi(x_i) \cdot d)^2 + ridge \cdot N |d|^2, \quad \phi = dF / d\theta$$

    over the N inputs that the original model gives the activation on `batches`, with its original f: for a family that
    is linear in its numbers the minimum, else a Gauss-Newton step. theta is measured in function space (`coordinates`),
    so that one `ridge` suits all. A plain fit copies f for one law of inputs; the channels of a site have many.

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
    systems = {m: _System(m) for m in model.modules() if isinstance(m, Activation)}
    device = next(model.parameters()).device
    with ExitStack() as exits, torch.no_grad():
        exits.enter_context(taught.teacher(model))
        for act, system in systems.items():
            exits.callback(act.register_forward_pre_hook(lambda m, args, to=system: to.add(args[0])).remove)
        for batch in batches:
            outputs(model, {k: v.to(device) for k, v in batch.items() if k != "labels"})
    with torch.no_grad():
        for act, system in systems.items():
            if system.count:
                act.theta += system.solution(ridge).view_as(act.theta).to(act.theta)


class _System:
    """The normal equations of an activation, one system for each group, in float64."""

    def __init__(self, act: Activation):
        self.act, self.count = act, 0
        theta = act.theta.detach().double()
        numbers, self.frame = act.numbers(torch.float64)
        self.numbers = numbers.detach()
        by_theta = torch.func.vmap(torch.func.jacrev(act._numbers))(theta.view(-1, theta.shape[-1]))
        self.by_theta = by_theta.detach()
        """The derivatives of the numbers by theta, (groups, numbers, n)."""
        size = self.by_theta.shape[:1]
        learnt = len(act.family.value_parts(list(self.numbers.unbind(-1))[:-2], theta.new_zeros(1))) + 2
        self.gram = theta.new_zeros(*size, learnt, learnt)
        self.right = theta.new_zeros(*size, learnt)

    def add(self, x: Tensor) -> None:
        """Take the inputs of a pass."""
        act, x = self.act, x.detach()
        assert act.original is not None
        layout = Layout.of(x, act.groups, act.channel)
        views = [layout.columns(layout.flat(part)) for part in (x, act.original(x.clone()))]
        spread, frame = layout.spread(self.numbers), Frame(*self.frame.unbind())
        each = views[0].shape[1] // len(self.gram)  # columns of a group
        gram, right = self.gram.repeat_interleave(each, 0) * 0, self.right.repeat_interleave(each, 0) * 0
        for column, slices in blocks(views[0]):
            mine = list(spread[:, column].unbind())
            for piece in slices:
                some, wanted = (view[piece].double() for view in views)
                _, parts = derivatives(act.family, some, mine, frame, True)
                left = wanted - value(act.family, some, mine, frame)
                stacked = torch.stack([torch.as_tensor(part).expand_as(some) for part in (*parts, left)])
                stacked = stacked.permute(2, 0, 1, 3).flatten(2)
                products = stacked @ stacked.mT
                gram[column] += products[:, :-1, :-1]
                right[column] += products[:, :-1, -1]
        self.gram += gram.view(len(self.gram), each, *gram.shape[1:]).sum(1)
        self.right += right.view(len(self.right), each, -1).sum(1)
        self.count += x.numel() // len(self.gram)

    def solution(self, ridge: float) -> Tensor:
        """The change of theta, (groups, n)."""
        learnt = self.gram.shape[-1] - 2
        by_theta = torch.cat([self.by_theta[:, :learnt], self.by_theta[:, -2:]], 1)
        matrix = by_theta.mT @ self.gram @ by_theta
        damped = matrix + ridge * self.count * torch.eye(matrix.shape[-1]).to(matrix)
        return torch.linalg.solve(damped, (by_theta.mT @ self.right.unsqueeze(-1)).squeeze(-1))
