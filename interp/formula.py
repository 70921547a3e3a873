r"""The formulas of an activation, written once for numpy's arrays, torch's tensors and the numbers of `trace`.

$$F(x) = S(x_c) + l \max(lo - x, 0) + r \max(x - hi, 0), \quad x_c = \mathrm{clip}(x, lo, hi)$$
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .family import Array, Family, fma


class Frame(NamedTuple):
    """Joints and standardised variable z = unit x + offset: tensors, or plain numbers for `blocks` on a CPU."""

    lo: Any
    hi: Any
    unit: Any
    offset: Any


def relu(a: Array) -> Array:
    return torch.relu(a) if torch.is_tensor(a) else np.maximum(a, 0)


def where(test: Array, yes: Array, no: Array) -> Array:
    return (torch if torch.is_tensor(test) else np).where(test, yes, no)


def standardised(x: Array, frame: Frame) -> tuple[Array, Array, Array]:
    """How far x is below lo and above hi, and z at x_c."""
    if torch.is_tensor(x) and isinstance(frame.lo, float):  # as few passes over the block as there can be
        inside = x.clamp(frame.lo, frame.hi)
        beyond = x - inside
        above = beyond.relu()
        return beyond.neg_().relu_(), above, inside.mul_(frame.unit).add_(frame.offset)
    if torch.is_tensor(x):  # at its very bounds torch halves the derivative of `clip`: they are a float off the joints
        kind = torch.finfo(x.dtype)
        left, right = (end.abs() * kind.eps + kind.tiny for end in (frame.lo, frame.hi))
        inside = x.clip(frame.lo - left, frame.hi + right)
    else:
        inside = where(x < frame.lo, frame.lo, where(x > frame.hi, frame.hi, x))
    return relu(inside - x), relu(x - inside), fma(inside, frame.unit, frame.offset)


def value(family: Family, x: Array, numbers: list[Array], frame: Frame) -> Array:
    """F at x. `numbers` are those of the core, as `Family.value` takes them, and l and r."""
    *core, left, right = numbers
    below, above, z = standardised(x, frame)
    core_value = family.value(core, z)
    core_value = fma(below, left, core_value, over=core_value)
    return fma(above, right, core_value, over=core_value)


def derivatives(
    family: Family, x: Array, numbers: list[Array], frame: Frame, by_numbers: bool, steps: list[Tensor] | None = None
) -> tuple[Array, list[Array]]:
    """F' at x, at a joint the core's; and the derivatives of F by the first numbers of the core, and by l and r.

    By any other numbers of the core they are zero. `steps` are those of F' at the joints, where they are known.
    """
    *core, left, right = numbers
    below, above, z = standardised(x, frame)
    slope = family.value_slope(core, z) * frame.unit
    if steps is not None:  # `where` takes as long as ten other operations
        slope = fma(above.sign(), steps[1], slope, over=slope)
        slope = fma(below.sign(), steps[0], slope, over=slope)
    else:
        slope = where(above > 0, right, where(below > 0, -left, slope))
    return slope, [*family.value_parts(core, z), below, above] if by_numbers else []


def steps(family: Family, numbers: list[Tensor], frame: Frame) -> list[Tensor]:
    """How far the slope of the tails is from the core's at lo and hi; zero where there are no joints."""
    *core, left, right = numbers
    at = [core[0].new_tensor(end * frame.unit + frame.offset) for end in (frame.lo, frame.hi)]
    inside = [family.value_slope(core, z) * frame.unit for z in at]
    return [(tail - slope).nan_to_num(0.0) for tail, slope in zip((-left, right), inside, strict=True)]


def plain(x: Tensor, numbers: Tensor, frame: Tensor, family: Family, groups: int | None, channel: int | None) -> Tensor:
    """F by differentiable operations on whole tensors, for compilers, tracers and derivatives of any kind."""
    wide = x.to(numbers.dtype)
    if groups is not None and channel is not None:
        numbers = numbers.repeat_interleave(x.shape[channel] // groups, dim=0)
        numbers = numbers.reshape(-1, *[1] * (x.dim() - 1 - channel % x.dim()), numbers.shape[-1])
    return value(family, wide, list(numbers.unbind(-1)), Frame(*frame.unbind())).to(x.dtype)
