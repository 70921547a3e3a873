r"""An activation as a function of its input and its numbers, with a backward pass that keeps nothing but the input.

$$F(x) = S(x_c) + l \max(lo - x, 0) + r \max(x - hi, 0), \quad x_c = \mathrm{clip}(x, lo, hi)$$

`value` and `derivatives` are the formulas, written once for every family. `Curve` runs them over blocks that stay in
the cache, or as one kernel for each direction (see `engine`). The derivatives by the numbers are sums over the input,
taken in the same pass: in float32 or better within some thousand values, then over these sums.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import engine
from .family import Family, fma
from .layout import FEW, ROW, STREAMS, Layout, blocks


class Frame(NamedTuple):
    """Joints and standardised variable z = unit x + offset: tensors, or plain numbers on the eager path of a CPU."""

    lo: Any
    hi: Any
    unit: Any
    offset: Any


def standardised(x: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """How far x is below lo and above hi, and z at x_c."""
    if isinstance(frame.lo, float):  # as few passes over the block as there can be
        inside = x.clamp(frame.lo, frame.hi)
        beyond = x - inside
        above = beyond.relu()
        return torch.sub(above, beyond, out=beyond), above, inside.mul_(frame.unit).add_(frame.offset)
    # by subtraction, which is exact between the joints, and needs no check for NaN
    below, above = torch.relu(frame.lo - x), torch.relu(x - frame.hi)
    return below, above, fma(x - above + below, frame.unit, frame.offset)


def value(family: Family, x: Tensor, numbers: list[Tensor], frame: Frame) -> Tensor:
    """F at x. `numbers` are those of the core, as `Family.value` takes them, and l and r."""
    *core, left, right = numbers
    below, above, z = standardised(x, frame)
    core_value = family.value(core, z)
    core_value = fma(below, left, core_value, over=core_value)
    return fma(above, right, core_value, over=core_value)


def value_of_few(family: Family, x: np.ndarray, numbers: list[float], frame: list[float]) -> np.ndarray:
    """F at few x by numpy, whose operations on so few take less time than torch's."""
    (*core, left, right), (lo, hi, unit, offset) = numbers, frame
    with np.errstate(all="ignore"):
        inside = np.clip(x, lo, hi)
        beyond = x - inside
        tails = np.maximum(beyond, 0) * right - np.minimum(beyond, 0) * left
        return family.value(core, inside * unit + offset) + tails


def derivatives(
    family: Family, x: Tensor, numbers: list[Tensor], frame: Frame, by_numbers: bool, steps: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
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
        slope = torch.where(above > 0, right, torch.where(below > 0, -left, slope))
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


class Curve(torch.autograd.Function):
    """F of x for numbers (n,) or (groups, n) and a frame (4,), both of the dtype that is computed in.

    With a `source` theta is given in place of the numbers, which follow from it by `activation.Source`. Without
    `setup_context`, for which autograd binds the arguments at every call: that takes as long as 100,000 values.
    Transforms, which need it, take `plain`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, frame: Tensor, source: Any, *how: Any) -> Tensor:
        ctx.save_for_backward(x, theta, frame)
        ctx.source, ctx.how = source, how
        return values(x, source.numbers(theta, frame.dtype) if source else theta, frame, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, theta, frame), source, (family, groups, channel), (grad,) = ctx.saved_tensors, ctx.source, ctx.how, grads
        by_x, by_theta = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            x, theta = (
                x.view_as(x),
                theta.view_as(theta),
            )  # one may follow from the other: the ways are the outer pass's
            inputs = [x] * by_x + [theta] * by_theta
            again = plain(x, source.recorded(theta, frame.dtype) if source else theta, frame, family, groups, channel)
            found = torch.autograd.grad(again, inputs, grad, create_graph=True)
            return found[0] if by_x else None, found[-1] if by_theta else None, *[None] * 5
        numbers = source.numbers(theta, frame.dtype) if source else theta
        layout = Layout.of(x, groups, channel)
        run = _gradients_by_kernel if engine.get_path() == "compiled" and x.numel() else _gradients
        steep = layout.flat(grad)
        flat, sums = run(family, layout, layout.flat(x), steep, layout.spread(numbers), frame, by_theta)
        by_x = layout.restore(flat) if by_x else None
        whole = torch.zeros_like(numbers) if by_theta and sums is None else None
        if sums is not None:  # by any numbers between the first and the last two they are zero
            whole = layout.gather(sums)
            if between := numbers.shape[-1] - whole.shape[-1]:
                core, tails = whole.split((whole.shape[-1] - 2, 2), dim=-1)
                whole = torch.cat([core, core.new_zeros(*core.shape[:-1], between), tails], dim=-1)
        return by_x, source.gradient(theta, whole) if source and whole is not None else whole, *[None] * 5


def values(
    x: Tensor, numbers: Tensor, frame: Tensor, family: Family, groups: int | None, channel: int | None
) -> Tensor:
    """F of x, without a graph."""
    layout = Layout.of(x, groups, channel)
    run = _values_by_kernel if engine.get_path() == "compiled" and x.numel() else _values
    return layout.restore(run(family, layout, layout.flat(x), layout.spread(numbers), frame))


def _values(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor:
    if layout.kind == "one" and flat.numel() <= FEW and flat.device.type == "cpu":
        few = flat.to(spread.dtype, copy=True).numpy()  # a copy: a storage that numpy has seen cannot be resized
        return torch.from_numpy(value_of_few(family, few, spread.view(-1).tolist(), frame.tolist())).to(flat.dtype)
    joints = _eager_frame(frame)
    out = torch.empty_like(flat)
    source, into = layout.columns(flat), layout.columns(out)
    with torch.inference_mode():
        for columns, column_blocks in blocks(source):
            numbers = _numbers(spread, columns)
            for block in column_blocks:
                into[block] = value(family, source[block].to(spread.dtype), numbers, joints)
    return out


def _gradients(
    family: Family, layout: Layout, flat: Tensor, steep: Tensor, spread: Tensor, frame: Tensor, by_numbers: bool
) -> tuple[Tensor, Tensor | None]:
    out, sums = torch.empty_like(flat), None
    source, steeps, into = layout.columns(flat), layout.columns(steep), layout.columns(out)
    joints = _eager_frame(frame)
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


def _eager_frame(frame: Tensor) -> Frame:
    return Frame(*(frame.tolist() if frame.device.type == "cpu" else frame.unbind()))


def _numbers(spread: Tensor, columns: slice = slice(None)) -> list[Tensor]:
    """Without axes where there is one of each: operations with a single number are fast, with a tensor of one not."""
    return list((spread.view(-1) if spread.shape[1] == 1 else spread[:, columns]).unbind())


def _total(part: Tensor, grad: Tensor, layout: Layout) -> Tensor:
    if layout.kind == "one":
        return torch.dot(part.reshape(-1), grad.reshape(-1))[None]
    return (part * grad).sum((0, 2))


def _values_by_kernel(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor:
    streams = STREAMS if flat.device.type == "cpu" else 1
    end = layout.whole(flat.numel(), streams)
    if not end:
        return _values(family, layout, flat, spread, frame)
    whole = flat if end == flat.numel() else flat[:end]
    x, split = (whole.view(streams, -1), 0) if layout.kind == "one" else (layout.tiles(whole), 1)

    def run(x: Tensor, numbers: Tensor, frame: Tensor) -> tuple[Tensor, ...]:
        each, joints = list(numbers.unbind()), Frame(*frame.unbind())

        def of(x: Tensor) -> Tensor:
            return value(family, x.to(numbers.dtype), each, joints).to(x.dtype)

        return (of(x) if layout.kind == "group" else torch.stack([of(row) for row in x.unbind(split)], split),)

    found = _kernel(run, "values", family, layout, [x], 1 - split, spread, frame)
    if found is None:
        return _values(family, layout, flat, spread, frame)
    out = found(x, layout.held(spread), frame)[0].view(-1)
    return out if end == flat.numel() else torch.cat([out, _values(family, layout, flat[end:], spread, frame)])


def _gradients_by_kernel(
    family: Family, layout: Layout, flat: Tensor, steep: Tensor, spread: Tensor, frame: Tensor, by_numbers: bool
) -> tuple[Tensor, Tensor | None]:
    end, columns = layout.whole(flat.numel(), ROW), spread.shape[1]
    if not end:
        return _gradients(family, layout, flat, steep, spread, frame, by_numbers)

    def run(x: Tensor, grad: Tensor, numbers: Tensor, frame: Tensor, units: Tensor) -> tuple[Tensor, ...]:
        each, joints = list(numbers.unbind()), Frame(*frame.unbind())._replace(unit=units)

        def of(x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
            wide, grad = x.to(numbers.dtype), grad.to(numbers.dtype)
            slope, parts = derivatives(family, wide, each, joints, by_numbers)
            return (slope * grad).to(x.dtype), [part * grad for part in parts]

        if layout.kind != "channel":
            out, parts = of(x, grad)
            sums = [part.sum(-1) for part in parts]
        else:
            rows = [of(*pair) for pair in zip(x.unbind(1), grad.unbind(1), strict=True)]
            out = torch.stack([out for out, _ in rows], 1)
            sums = [reduce(torch.add, parts) for parts in zip(*(parts for _, parts in rows), strict=True)]
        return out, *([torch.stack(sums)] if sums else [])

    wholes = [flat, steep] if end == flat.numel() else [flat[:end], steep[:end]]
    views = [layout.tiles(whole) for whole in wholes]
    found = _kernel(run, f"gradients {by_numbers}", family, layout, views, 0, spread, frame)
    if found is None:
        return _gradients(family, layout, flat, steep, spread, frame, by_numbers)
    out, *each = found(*views, layout.held(spread), frame, _units(frame, views[0].shape[0]))
    out = out.view(-1)
    sums = each[0].view(each[0].shape[0], -1, columns).sum(1) if each else None
    if end < flat.numel():
        rest, more = _gradients(family, layout, flat[end:], steep[end:], spread, frame, by_numbers)
        out, sums = torch.cat([out, rest]), None if sums is None or more is None else sums + more
    return out, sums


def _units(frame: Tensor, rows: int) -> Tensor:
    """The unit once for each row: so the values are no single long row, and are computed in the loop of the sums."""
    return frame[2].expand(rows, 1).contiguous()


def _kernel(
    run: Any, name: str, family: Family, layout: Layout, views: list[Tensor], axis: int, spread: Tensor, frame: Tensor
) -> Any:
    """The kernel of `run` for views of this kind, of any size along `axis`."""
    shape = list(views[0].shape)
    del shape[axis]
    key = (name, family, layout.kind, *shape, spread.shape[0], views[0].dtype, spread.dtype, spread.device)

    def example() -> list[tuple[Tensor, tuple[int, ...]]]:
        count = max(8, 2**20 // prod(shape))
        shape.insert(axis, count)
        made: list[tuple[Tensor, tuple[int, ...]]] = [(view.new_zeros(shape), (axis,)) for view in views]
        if layout.kind == "group":
            made.append((spread[:, :1].repeat(1, count, 1), (1,)))
        else:
            made.append((layout.held(spread), ()))
        return [*made, (frame, ()), *([(_units(frame, count), (0,))] if len(views) > 1 else [])]

    return engine.kernel(key, run, example)


def is_whole(x: Tensor) -> bool:
    """Whether `plain` must be taken: where operations are recorded or transformed, not run."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
