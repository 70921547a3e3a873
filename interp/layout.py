"""How the values of a tensor lie in memory, and the views on them that the passes of an activation run over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

BLOCK = 2**15
"""Values of a block of the eager path, for each thread: some blocks fit the cache of a core."""

ROW = 4096
"""Values of a row that the kernels sum in one go, where all share their numbers."""

ROWS = 8
"""Rows of a tile where each channel has its numbers: the kernels read these once for all."""


@dataclass(frozen=True)
class Layout:
    """A tensor as (outer, channels, inner), the channels in groups that share their numbers; without groups flat."""

    order: tuple[int, ...]
    """Its axes from the slowest to the fastest in memory."""
    shape: tuple[int, ...]
    """Its sizes in that order."""
    groups: int | None
    outer: int
    channels: int
    inner: int

    @classmethod
    def of(cls, x: Tensor, groups: int | None, channel: int | None) -> Layout:
        order = tuple(sorted(range(x.dim()), key=lambda axis: -x.stride(axis)))
        if not x.permute(order).is_contiguous():
            order = tuple(range(x.dim()))
        shape = tuple(x.shape[axis] for axis in order)
        if groups is None or channel is None:
            return cls(order, shape, None, 1, 1, prod(shape))
        at = order.index(channel % x.dim())
        return cls(order, shape, groups, prod(shape[:at]), shape[at], prod(shape[at + 1 :]))

    @property
    def kind(self) -> str:
        """`one` set of numbers; numbers for each `channel`, which is the last axis in memory; or for each `group`."""
        return "one" if self.groups is None else "channel" if self.inner == 1 else "group"

    def flat(self, x: Tensor) -> Tensor:
        """The values in the order in which they lie in memory: no copy where they are dense."""
        return x.permute(self.order).reshape(-1)

    def restore(self, flat: Tensor) -> Tensor:
        """The tensor of the values `flat`."""
        return flat.view(self.shape).permute(sorted(range(len(self.order)), key=self.order.__getitem__))

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers (n,) or (groups, n) as (n, columns, 1), which broadcast with `columns`."""
        if self.groups is None:
            return numbers.view(-1, 1, 1)
        if self.kind == "channel" and self.channels != self.groups:
            numbers = numbers.repeat_interleave(self.channels // self.groups, dim=0)
        return numbers.t().contiguous().unsqueeze(-1)

    def gather(self, sums: Tensor) -> Tensor:
        """Sums (n, columns) for the numbers, in their shape (n,) or (groups, n)."""
        if self.groups is None:
            return sums.view(-1)
        return sums.view(len(sums), self.groups, -1).sum(-1).t()

    def columns(self, flat: Tensor) -> Tensor:
        """A view (outer, columns, inner), each column with numbers of its own; of a part of the outermost too."""
        if self.groups is None:
            return flat.view(1, 1, -1)
        count = self.channels if self.kind == "channel" else self.groups
        inner = self.channels // count * self.inner
        return flat.view(len(flat) // max(count * inner, 1), count, inner)

    def whole(self, size: int) -> int:
        """How many of `size` values the kernels take, whose tiles have a fixed size; the eager path takes the rest."""
        tile = {"one": ROW, "channel": ROWS * self.channels, "group": 1}[self.kind]
        return size - size % tile

    def tiles(self, flat: Tensor) -> Tensor:
        """A view of so many values for the kernels: the first axis varies from call to call."""
        if self.kind == "one":
            return flat.view(-1, ROW)
        if self.kind == "channel":
            return flat.view(-1, ROWS, self.channels)
        return flat.view(-1, self.channels // (self.groups or 1) * self.inner)

    def held(self, spread: Tensor) -> Tensor:
        """The numbers for these tiles: one set; a set for each channel, or for each row."""
        if self.kind == "one":
            return spread.view(-1)
        return spread.squeeze(-1) if self.kind == "channel" else spread.repeat(1, self.outer, 1)


def blocks(view: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices that cover a view (outer, columns, inner), of about BLOCK values a thread; on a GPU, of far more."""
    shape, steps = view.shape, []
    room = BLOCK * torch.get_num_threads() if view.device.type == "cpu" else 2**24
    for size in reversed(shape):
        steps.insert(0, max(1, min(size, room)))
        room = room // max(size, 1) if size <= room else 1
    for i in range(0, shape[0], steps[0]):
        for j in range(0, shape[1], steps[1]):
            for k in range(0, shape[2], steps[2]):
                yield slice(i, i + steps[0]), slice(j, j + steps[1]), slice(k, k + steps[2])
