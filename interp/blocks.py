"""Activations by torch's operations, over blocks that stay in the cache: on every device, and without any compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Family
from .formula import Frame, derivatives, steps, value
from .layout import Layout, blocks


def block_values(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor:
    """F of `flat`."""
    joints = _frame(frame)
    out = torch.empty_like(flat)
    source, into = layout.columns(flat), layout.columns(out)
    with torch.inference_mode():
        for columns, column_blocks in blocks(source):
            numbers = _numbers(spread, columns)
            for block in column_blocks:
                into[block] = value(family, source[block].to(spread.dtype), numbers, joints)
    return out


def block_gradients(
    family: Family, layout: Layout, flat: Tensor, steep: Tensor, spread: Tensor, frame: Tensor, by_numbers: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient by x for those of F, `steep`; and the sums (sums, columns) by the numbers, if they are asked for."""
    out, sums = torch.empty_like(flat), None
    source, steeps, into = layout.columns(flat), layout.columns(steep), layout.columns(out)
    joints = _frame(frame)
    for columns, column_blocks in blocks(source):
        numbers = _numbers(spread, columns)
        jumps = steps(family, numbers, joints) if isinstance(joints.lo, float) else None
        for block in column_blocks:
            with torch.inference_mode():
                x, grad = source[block].to(spread.dtype), steeps[block].to(spread.dtype)
                slope, parts = derivatives(family, x, numbers, joints, by_numbers, jumps)
                into[block] = torch.mul(slope, grad, out=slope)
                found = [_total(part, grad, layout) for part in parts]
            if found:
                sums = spread.new_zeros(len(found), spread.shape[1]) if sums is None else sums
                sums[:, columns] += torch.stack(found)
    return out, sums


def _frame(frame: Tensor) -> Frame:
    return Frame(*(frame.tolist() if frame.device.type == "cpu" else frame.unbind()))


def _numbers(spread: Tensor, columns: slice = slice(None)) -> list[Tensor]:
    """Without axes where there is one of each: operations with a single number are fast, with a tensor of one not."""
    return list((spread.view(-1) if spread.shape[1] == 1 else spread[:, columns]).unbind())


def _total(part: Tensor, grad: Tensor, layout: Layout) -> Tensor:
    if layout.kind == "one":
        return torch.dot(part.reshape(-1), grad.reshape(-1))[None]
    return (part * grad).sum((0, 2))
