"""The numbers of each site by least squares on its own inputs: a start for recovery that takes no steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..convert.calibrate import observe
from ..interp.activation import Activation
from ..interp.family import Linear, Separable
from ..interp.formula import Frame, derivatives, value
from ..interp.layout import Layout
from . import joints
from .distill import Distillation
from .joints import Laws

RIDGE = 1e-3
"""What a change of a site's curve costs beside what it leaves of the error: few inputs of a channel are no proof."""

SHORTER = (10.0, 100.0, 1e3)
"""Multiples of the ridge with which a Gauss-Newton step is tried: the whole one may lead too far."""


def solve(
    model: nn.Module, taught: Distillation, batches: Iterable[dict[str, Tensor]], *, ridge: float = RIDGE, seed: int = 0
) -> None:
    r"""Move the numbers of each activation that trains, group by group, to the least squares on its inputs, in place.

    $$\min_d \sum_i g_i^2 (f(x_i) - F(x_i) - \phi(x_i) \cdot d)^2 + ridge \cdot G |d|^2, \quad \phi = dF / d\theta$$

    over the inputs that the original model gives the activation on `batches`, without padding, with its original f and
    the gradient g of a loss at its output (see `convert.calibrate`: half of the sum is the model's divergence, if all
    errors are small and independent); G is the mean over the site's groups of the sum of $g^2$. For a family that is
    linear in its numbers d is the minimum, else the best of some Gauss-Newton steps, and none in a group that they make
    worse. theta is measured in function space (`coordinates`), so that one `ridge` suits all. A plain fit copies f for
    one law of inputs; the channels of a site have many, and do not matter alike. `seed` draws the losses.

    Before, joints and a common curve to start from are put where that leaves least (`joints.Laws`), without the
    equalities of a fit.

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
    batches, laws = list(batches), {act: Laws(act) for act in acts if joints.are_free(act)}
    if laws:
        _meet(model, taught, batches, {act: law.add for act, law in laws.items()}, seed)
    while laws:  # each is as large as a thousand numbers for each group
        laws.popitem()[1].place(ridge)
    systems = {act: _System(act) for act in acts}
    _meet(model, taught, batches, {act: system.add for act, system in systems.items()}, seed)
    with torch.no_grad():
        for system in systems.values():
            system.step(ridge)
        tried = {act: system for act, system in systems.items() if len(system.steps) > 1}
        if tried:
            _meet(model, taught, batches, {act: system.check for act, system in tried.items()}, seed)
        for system in systems.values():
            system.choose()


Take = Callable[[Tensor, Tensor], None]


def _meet(
    model: nn.Module, taught: Distillation, batches: list[dict[str, Tensor]], take: dict[Activation, Take], seed: int
) -> None:
    """Let each activation take the inputs that the original gives it, and the gradients at its outputs."""

    def add(act: nn.Module, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert isinstance(act, Activation)
        if act.channel not in (None, -1):  # what looks like a mask of positions would be one of channels
            keep = None
        return x.clone() if getattr(act.original, "inplace", False) else x, keep

    @torch.no_grad()
    def weigh(act: nn.Module, met: tuple[Tensor, Tensor | None], g: Tensor) -> None:
        assert isinstance(act, Activation)
        x, keep = met
        take[act](*((x, g) if keep is None else (x[keep], g[keep])))

    with taught.teacher(model):
        observe(model, list(take), batches, add, weigh, seed=seed)


PIECE = 2**21
"""Values of which all derivatives are held at a time."""


class _System:
    """The normal equations of an activation, one system for each group, in float64."""

    def __init__(self, act: Activation):
        self.act = act
        self.start = act.theta.detach().clone()
        theta = self.start.double()
        numbers, self.frame = act.numbers(torch.float64)
        self.numbers = numbers.detach()
        self.by_theta = torch.func.vmap(torch.func.jacrev(act._numbers))(theta.view(-1, theta.shape[-1])).detach()
        """The derivatives of the numbers by theta, (groups, numbers, n)."""
        learnt = len(act.family.value_parts(list(self.numbers.unbind(-1))[:-2], theta.new_zeros(1))) + 2
        self.products = theta.new_zeros(len(self.by_theta), learnt + 1, learnt + 1)
        """Of the derivatives of F by the numbers that have any, and of what F leaves of f: sums over the inputs."""
        self.weight = theta.new_zeros(())
        """The sum of the weights."""
        self.steps: list[Tensor] = []
        """Where a step may lead: thetas; and the squared errors there, by group."""
        self.left: list[Tensor] = []

    def add(self, x: Tensor, g: Tensor) -> None:
        """Take the inputs of a pass."""
        self.products += self._sums(x, g, self.numbers, True)
        self.weight += g.double().square().sum()

    def check(self, x: Tensor, g: Tensor) -> None:
        """Take the same inputs again, after the steps."""
        for left, theta in zip(self.left, self.steps, strict=True):
            left += self._sums(x, g, self.act._numbers(theta), False)[:, 0, 0]

    def _sums(self, x: Tensor, g: Tensor, numbers: Tensor, parts: bool) -> Tensor:
        act, groups = self.act, len(self.products)
        assert act.original is not None
        layout = Layout.of(x, act.groups, act.channel)
        views = [layout.columns(layout.flat(part)) for part in (x, act.original(x.clone()), g)]
        mine, frame = list(layout.spread(numbers).unbind()), Frame(*self.frame.unbind())
        size = self.products.shape[-1] if parts else 1
        found = self.products.new_zeros(views[0].shape[1], size, size)
        rows = max(1, PIECE // max(1, views[0][:1].numel()))
        for some, wanted, root in zip(*(view.split(rows) for view in views), strict=True):
            some, root = some.double(), root.double()
            each = derivatives(act.family, some, mine, frame, True)[1] if parts else []
            each = [root * one for one in (*each, wanted - value(act.family, some, mine, frame))]
            stacked = torch.stack([one.permute(1, 0, 2).flatten(1) for one in each], 1)
            found += stacked @ stacked.mT
        return found.view(groups, -1, size, size).sum(1)  # a group may have many columns

    def step(self, ridge: float) -> None:
        """Find where a step may lead: with this ridge, for families that are not linear in all numbers also shorter."""
        if not self.weight > 0:  # nothing was met, or nothing that matters
            return
        learnt, family = self.products.shape[-1] - 3, self.act.family
        by_theta = torch.cat([self.by_theta[:, :learnt], self.by_theta[:, -2:]], 1)
        matrix, right = self.products[:, :-1, :-1] @ by_theta, self.products[:, :-1, -1:]
        matrix, right = by_theta.mT @ matrix, by_theta.mT @ right
        every = torch.eye(matrix.shape[-1]).to(matrix)
        unit, ways = self.weight / len(matrix) * every, [(every, ridge)]
        if not isinstance(family, Linear):
            ways += [(every, ridge * by) for by in SHORTER]
        if isinstance(family, Separable):  # with its shape as it is it is linear
            into = torch.linalg.inv(self.act.transform.double())
            ways.append((into[:, : len(every) - family.shape(self.act.degree)], ridge))
        for way, strength in ways:
            step = torch.linalg.solve(way.mT @ (matrix + strength * unit) @ way, way.mT @ right)
            self.steps.append(self.start + (way @ step).view_as(self.start).to(self.start))
            self.left.append(self.products.new_zeros(len(matrix)))

    def choose(self) -> None:
        """Take the only step, or in each group the best of several, if it is better than none."""
        if len(self.steps) == 1:
            self.act.theta.copy_(self.steps[0])
        if len(self.steps) < 2:
            return
        every = torch.stack([theta.view(len(self.products), -1) for theta in (self.start, *self.steps)])
        left = torch.stack([self.products[:, -1, -1], *self.left]).nan_to_num(torch.inf)
        best = every[left.argmin(0), torch.arange(len(self.products), device=every.device)]
        self.act.theta.copy_(best.view_as(self.start))
