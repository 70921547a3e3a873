"""How the values of a tensor lie in memory, and the views on them that the passes of an activation run over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

BLOCK = 2**16
"""Values of a block of torch's operations, for each thread: some blocks fit the cache of a core."""

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

    @staticmethod
    def of(x: Tensor, groups: int | None, channel: int | None) -> Layout:
        return _layout(tuple(x.shape), x.stride(), groups, channel)

    @cached_property
    def kind(self) -> str:
        """`one` set of numbers; numbers for each `channel`, which is the last axis in memory; or for each `group`."""
        return "one" if self.groups is None else "channel" if self.inner == 1 else "group"

    def flat(self, x: Tensor) -> Tensor:
        """The values in the order in which they lie in memory; a copy where they are not dense."""
        return (x if self.inverse is None else x.permute(self.order)).reshape(-1).contiguous()

    def restore(self, flat: Tensor) -> Tensor:
        """The tensor of the values `flat`, for autograd no view of these: what follows may work in place."""
        back = flat.view(self.shape)
        return (back if self.inverse is None else back.permute(self.inverse)).data

    @cached_property
    def inverse(self) -> list[int] | None:
        """The axes in their own order; None where they are so."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return None if inverse == list(self.order) == list(range(len(inverse))) else inverse

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

    def whole(self, size: int, unit: int) -> int:
        """How many of `size` values a kernel takes, whole tiles or `unit`s without groups; `blocks` the rest."""
        tile = {"one": unit, "channel": ROWS * self.channels, "group": 1}[self.kind]
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


@lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], groups: int | None, channel: int | None) -> Layout:
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    dense, step = True, 1
    for axis in reversed(order):
        dense &= shape[axis] == 1 or strides[axis] == step
        step *= shape[axis]
    if not dense:
        order = list(range(len(shape)))
    sizes = tuple(shape[axis] for axis in order)
    if groups is None or channel is None:
        return Layout(tuple(order), sizes, None, 1, 1, prod(sizes))
    at = order.index(channel % len(shape))
    return Layout(tuple(order), sizes, groups, prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :]))


def blocks(view: torch.Tensor) -> Iterator[tuple[slice, list[tuple[slice, slice, slice]]]]:
    """Slices that cover a view (outer, columns, inner), of about BLOCK values a thread, by the columns that they take.

    On a GPU, of far more values.
    """
    shape, steps = view.shape, []
    room = BLOCK * torch.get_num_threads() if view.device.type == "cpu" else 2**24
    for size in reversed(shape):
        steps.insert(0, max(1, min(size, room)))
        room = room // max(size, 1) if size <= room else 1
    outer, columns, inner = (
        [slice(i, i + step) for i in range(0, size, step)] for size, step in zip(shape, steps, strict=True)
    )
    for column in columns:
        yield column, [(i, column, k) for i in outer for k in inner]
