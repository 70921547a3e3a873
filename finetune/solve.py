"""The numbers of each site by least squares on its own inputs: a start for recovery that takes no steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..interp.activation import Activation
from ..interp.family import Linear, Separable
from ..interp.formula import Frame, derivatives, value
from . import joints
from .distill import Distillation
from .laws import Law, laws_of

RIDGE, PROOF = 1e-3, 16
"""What a change of a site's curve costs at least, beside the errors; with few inputs it is more: as much as this many
inputs of a channel may gain by it."""

STEPS = 5
"""Gauss-Newton steps, for families that are not linear in all their numbers."""

DAMPING = (0.0, 10.0, 100.0, 1e3)
"""Multiples of the ridge by which these are tried shorter: the whole one may lead too far."""


def solve(
    model: nn.Module,
    taught: Distillation,
    batches: Iterable[dict[str, Tensor]],
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    r"""Move the numbers of each activation that trains, group by group, to the least squares on its inputs, in place.

    $$\min_d \sum_i g_i^2 (f(x_i) - F(x_i) - \phi(x_i) \cdot d)^2 + ridge \cdot G |d|^2, \quad \phi = dF / d\theta$$

    over the inputs that the original model gives the activation on `batches`, without padding, with its original f and
    the gradient g of a loss at its output (see `convert.calibrate`: half of the sum is the model's divergence, if all
    errors are small and independent); G is the mean over the site's groups of the sum of $g^2$. With few inputs the
    ridge is larger (`PROOF`). For a family that is linear in its numbers d is the minimum, else the best of some
    Gauss-Newton steps, and none in a group that they make worse. theta is measured in function space (`coordinates`),
    so that one `ridge` suits all. A plain fit copies f for one law of inputs; the channels of a site have many, and do
    not matter alike. The sums are those of `laws.Law`; `seed` draws the losses; `progress` is told how many batches and
    sites are done, and of how many.

    Before, joints and a common curve to start from are put where that leaves least (`joints.place`), without the
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
    if not acts:
        return
    batches, told = list(batches), progress or (lambda done, total: None)
    total = len(batches) + len(acts)
    laws = laws_of(model, taught, batches, acts, seed, lambda done: told(done, total))
    while laws:  # each is as large as a thousand numbers for each group
        law = laws.pop()
        if law.mass.any():  # else nothing was met, or nothing that matters
            strength = ridge * max(1.0, PROOF / RIDGE / max(law.count, 1.0))
            if joints.are_free(law.act):
                joints.place(law, strength)
            with torch.no_grad():
                law.act.theta.copy_(_least(law, strength).view_as(law.act.theta))
        told(total - len(laws), total)


def _least(law: Law, ridge: float) -> Tensor:
    """The numbers of each group, (groups, n), that leave least."""
    act, family = law.act, law.act.family
    start = theta = act.theta.double().view(len(law.mass), -1)
    every = torch.eye(start.shape[-1]).to(start)
    ways = [(every, damping) for damping in DAMPING]
    if isinstance(family, Separable):  # with its shape as it is it is linear
        into = torch.linalg.inv(act.transform.double())
        ways.append((into[:, : len(every) - family.shape(act.degree)], 0.0))
    for _ in range(STEPS):
        products, by_theta = _products(law, theta, True), torch.func.vmap(torch.func.jacrev(act._numbers))(theta)
        learnt = products.shape[-1] - 3
        by_theta = torch.cat([by_theta[:, :learnt], by_theta[:, -2:]], 1)
        matrix = by_theta.mT @ products[:, :-1, :-1] @ by_theta + ridge * every
        right = by_theta.mT @ products[:, :-1, -1:] - ridge * (theta - start).unsqueeze(-1)
        tried = [theta]
        for way, damping in ways:
            step = torch.linalg.solve(way.mT @ (matrix + damping * ridge * every) @ way, way.mT @ right)
            tried.append(theta + (way @ step).squeeze(-1))
        if isinstance(family, Linear):
            return tried[1]
        left = [_products(law, one, False)[:, 0, 0] + ridge * (one - start).square().sum(-1) for one in tried]
        best = torch.stack(left).nan_to_num(torch.inf).argmin(0)
        theta = torch.stack(tried)[best, torch.arange(len(start), device=start.device)]
    return theta


PIECE = 2**21
"""Values of which all derivatives are held at a time."""


def _products(law: Law, theta: Tensor, parts: bool) -> Tensor:
    """Of the derivatives of F by its numbers and of what F leaves of f, (groups, k, k): sums over the inputs.

    Only the numbers that F has derivatives by, and the tails' slopes; without `parts` only what F leaves.
    """
    act, f, found = law.act, law.original(), []
    frame, rows, weights = Frame(*act._frame().unbind()), max(1, PIECE // len(law.x)), law.weights()
    for numbers, mass in zip(act._numbers(theta).split(rows), weights.split(rows), strict=True):
        mine, x = list(numbers.unsqueeze(1).unbind(-1)), law.x.expand(len(mass), -1)
        each = derivatives(act.family, x, mine, frame, True)[1] if parts else []
        each = [part.expand_as(x) for part in (*each, f - value(act.family, x, mine, frame))]
        stacked = torch.stack(each, 1)
        found.append((stacked * mass.unsqueeze(1)) @ stacked.mT)
    return torch.cat(found)
