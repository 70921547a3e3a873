"""The escape monitor: how far the inputs of the activations leave the cores while the model trains."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from ..interp.activation import Activation

SAMPLE = 4096
"""Inputs of a site at one forward pass that are counted; least and greatest are those of all."""


class Monitor:
    r"""Watches the inputs of every learnable activation of `model`, as a context.

    `step` tells, since it was last asked, per site: `outside`, the share of inputs outside the core (of an even sample
    of `SAMPLE` a forward pass), `least` and `greatest`. The core is [lo, hi], of a bare series location +- 4 scale,
    where its fit is judged. Passes with the original activations (a teacher's) are not counted.

    With `penalise`, `penalty` is a term for the loss that draws inputs back into the cores: the mean over the sites of
    $E[d^2]$, d the distance to the core over half its width.

    >>> from orthoact import convert_
    >>> net = nn.Sequential(nn.GELU())
    >>> _ = convert_(net, degree=4)
    >>> with Monitor(net) as monitor:
    ...     _ = net(torch.tensor([[-9.0, 0.0, 1.0, 5.0]]))
    ...     monitor.step()
    {'0': {'outside': 0.5, 'least': -9.0, 'greatest': 5.0}}
    """

    def __init__(self, model: nn.Module, *, penalise: bool = False):
        self.penalise = penalise
        self.names = {m: name for name, m in model.named_modules() if isinstance(m, Activation)}
        self._seen: dict[Activation, Tensor] = {}  # outside, least, greatest: on the model's device
        self._counted: dict[Activation, int] = {}
        self._ends: dict[Activation, Tensor] = {}  # least and greatest of the last forward pass, in the order of calls
        self._terms: dict[Activation, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Monitor:
        self._hooks = [m.register_forward_pre_hook(self._watch) for m in self.names]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._terms.clear()

    def _watch(self, act: Activation, args: tuple[Tensor, ...]) -> None:
        if act.bypass:  # a teacher's pass
            return
        middle, half = core(act)
        x = args[0]
        again = torch._C._current_graph_task_id() != -1  # recomputed in a backward pass: the same graph, not counted
        if self.penalise and torch.is_grad_enabled():
            term = ((x.float() - middle).abs() / half - 1).relu().square().mean()
            if not again:
                self._terms[act] = term
        if again:
            return
        with torch.no_grad():
            ends = torch.stack(x.aminmax()).float()
            flat = x.detach().reshape(-1)
            stride = -(-flat.numel() // SAMPLE)
            while gcd(stride, flat.numel()) > 1:  # no axis in step with it, so that all channels are seen
                stride += 1
            some = flat[::stride].float()
            outside = ((some - middle).abs() > half).sum()
            if act in self._seen:
                old = self._seen[act]
                self._seen[act] = torch.stack([old[0] + outside, old[1].minimum(ends[0]), old[2].maximum(ends[1])])
            else:
                self._seen[act] = torch.stack([outside.float(), *ends])
            self._counted[act] = self._counted.get(act, 0) + len(some)
            self._ends.pop(act, None)
            self._ends[act] = ends

    def step(self) -> dict[str, dict[str, float]]:
        """What was seen of each site since the last call, by name; a site that was not called is not in it."""
        told = {act: (*row.tolist(), self._counted[act]) for act, row in self._seen.items()}
        self._seen.clear()
        self._counted.clear()
        return {
            self.names[act]: {"outside": outside / counted, "least": least, "greatest": greatest}
            for act, (outside, least, greatest, counted) in told.items()
        }

    def penalty(self) -> Tensor | None:
        """The boundary penalty of the forward passes since the last call, a differentiable scalar; None without any."""
        terms, self._terms = list(self._terms.values()), {}
        return torch.stack(terms).mean() if terms else None

    def broken(self) -> str | None:
        """The first site, in the order of calls, whose inputs were NaN or infinite in the last forward pass."""
        return next((self.names[act] for act, ends in self._ends.items() if not bool(ends.isfinite().all())), None)


def core(act: Activation) -> tuple[Tensor, Tensor]:
    """Middle and half width of the core; of a bare series, location and 4 scales."""
    if act.tails == "none":
        return act.location, 4 * act.scale
    return (act.lo + act.hi) / 2, (act.hi - act.lo) / 2
