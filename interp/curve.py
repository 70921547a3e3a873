"""An activation as a function of its input and its numbers, with a backward pass that keeps nothing but the input.

The formulas (`formula`) are run on a CPU as loops in machine code (`loops`), on a GPU as kernels if they are asked for
(`kernels`), and else over blocks by torch's operations (`blocks`); `engine` says which. The derivatives by the numbers
are sums over the input, taken in the same pass: in float32 or better within some thousand values, then over these sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import engine
from .blocks import block_gradients, block_values
from .family import Family
from .formula import plain
from .kernels import kernel_gradients, kernel_values
from .layout import Layout
from .loops import loop_gradients, loop_values


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
        # gradients of the gradients are wanted, or many at once
        if torch.is_grad_enabled() or is_whole(grad) or not torch._C._has_storage(grad):
            with torch.enable_grad():  # views: one may follow from the other, and the ways are the outer pass's
                x, theta = x.view_as(x), theta.view_as(theta)
                numbers = source.recorded(theta, frame.dtype) if source else theta
                again = plain(x, numbers, frame, family, groups, channel)
            inputs = [x] * by_x + [theta] * by_theta
            found = torch.autograd.grad(again, inputs, grad, create_graph=True)
            return found[0] if by_x else None, found[-1] if by_theta else None, *[None] * 5
        numbers = source.numbers(theta, frame.dtype) if source else theta
        layout = Layout.of(x, groups, channel)
        given = family, layout, layout.flat(x), layout.flat(grad), layout.spread(numbers), frame, by_theta
        path = engine.get_path()
        found = loop_gradients(*given) if path != "torch" else None
        if found is None and path == "compiled":
            found = kernel_gradients(*given)
        flat, sums = found or block_gradients(*given)
        by_x = layout.restore(flat) if by_x else None
        whole = torch.zeros_like(numbers) if by_theta and sums is None else None
        if sums is not None:  # by any numbers between the first and the last two they are zero
            whole = layout.gather(sums)
            if between := numbers.shape[-1] - whole.shape[-1]:
                core, tails = whole.split((whole.shape[-1] - 2, 2), dim=-1)
                whole = torch.cat([core, core.new_zeros(*core.shape[:-1], between), tails], dim=-1)
        if whole is not None:
            whole = source.gradient(theta, whole) if source else whole.to(numbers.dtype)
        return by_x, whole, *[None] * 5


def values(
    x: Tensor, numbers: Tensor, frame: Tensor, family: Family, groups: int | None, channel: int | None
) -> Tensor:
    """F of x, without a graph."""
    layout = Layout.of(x, groups, channel)
    given = family, layout, layout.flat(x), layout.spread(numbers), frame
    path = engine.get_path()
    found = loop_values(*given) if path != "torch" else None
    if found is None and path == "compiled":
        found = kernel_values(*given)
    return layout.restore(block_values(*given) if found is None else found)


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
