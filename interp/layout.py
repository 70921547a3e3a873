"""How the values of a tensor lie in memory, and the views on them that the passes of an activation run over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

BLOCK = 2**15
"""Values of a block of the eager path, for each thread: some blocks fit the cache of a core."""

ROW = 4096
"""Most values that are summed in one go, if the size of the input can be halved so often."""

LEAST_ROW = 64
"""Least length of rows that a kernel is made for; shorter ones vary from call to call."""

TILE = 128, 256
"""Most rows and channels that the kernels cross with the same numbers in the cache."""


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
        """A view (outer, columns, inner), each column with numbers of its own."""
        count = self.channels if self.groups is None or self.kind == "channel" else self.groups
        return flat.view(self.outer, count, self.channels // count * self.inner)

    def tiles(self, flat: Tensor) -> Tensor:
        """A view for the kernel of the values, in the order of its loops.

        Numbers for each channel are (n, 2, 1, 256), for x of (4, 2, 128, 256) say: they stay in the cache.
        """
        if self.kind != "channel":
            return self.rows(flat)
        rows, width = _part(self.outer, TILE[0]), _halve(self.channels, TILE[1])
        return flat.view(-1, rows, self.channels // width, width).transpose(1, 2)

    def rows(self, flat: Tensor) -> Tensor:
        """A view for the kernel of the gradients, in the order of its loops: it sums over the last axis."""
        if self.kind == "one":
            row = gcd(len(flat), ROW)
            return flat.view(-1, row if row >= LEAST_ROW else _part(len(flat), ROW))
        if self.kind == "channel":
            return flat.view(-1, _part(self.outer, TILE[0]), self.channels).transpose(1, 2)
        return self.columns(flat)


def _part(size: int, most: int) -> int:
    """A divisor of `size` of at most `most`, and such that each thread gets two, if halving leads to one."""
    return _halve(size, min(most, max(size // (2 * torch.get_num_threads()), 1)))


def _halve(size: int, most: int) -> int:
    while size > most and size % 2 == 0:
        size //= 2
    return size


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
