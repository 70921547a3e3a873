"""Activations as kernels that torch's compiler makes when each is first needed: one for each direction.

Making one takes seconds, so that they are worth long work on a GPU; on a CPU `loops` are faster, and are there at once.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import engine
from .blocks import block_gradients, block_values
from .family import Family
from .formula import Frame, derivatives, value
from .layout import ROW, Layout

OPTIONS = {
    # multiply and add in one instruction, which rounds once: a third faster, and no less accurate
    "cpp.enable_floating_point_contract_flag": "fast",
    # one loop for all
    "cpp.max_horizontal_fusion_size": 64,
    # nothing in between is written to memory, see `_traced_once`
    "realize_cpu_opcount_threshold": 10**6,
    "realize_cpu_acc_reads_threshold": 10**6,
    "realize_reads_threshold": 10**6,
    "realize_opusers_threshold": 10**6,
}


_kernels: dict[Hashable, Callable[..., Sequence[Tensor]] | None] = {}


def kernel_values(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor | None:
    """F of `flat`; None where kernels cannot be made."""
    end = layout.whole(flat.numel(), 1)
    if not end:
        return None
    x = flat if layout.kind == "one" else layout.tiles(flat[:end])

    def run(x: Tensor, numbers: Tensor, frame: Tensor) -> tuple[Tensor, ...]:
        each, joints = list(numbers.unbind()), Frame(*frame.unbind())

        def of(x: Tensor) -> Tensor:
            return value(family, x.to(numbers.dtype), each, joints).to(x.dtype)

        return (torch.stack([of(row) for row in x.unbind(1)], 1) if layout.kind == "channel" else of(x),)

    if (found := _kernel(run, "values", family, layout, [x], spread, frame)) is None:
        return None
    out = found(x, layout.held(spread), frame)[0].view(-1)
    return out if end == flat.numel() else torch.cat([out, block_values(family, layout, flat[end:], spread, frame)])


def kernel_gradients(
    family: Family, layout: Layout, flat: Tensor, steep: Tensor, spread: Tensor, frame: Tensor, by_numbers: bool
) -> tuple[Tensor, Tensor | None] | None:
    """What `block_gradients` returns; None where kernels cannot be made."""
    end, columns = layout.whole(flat.numel(), ROW), spread.shape[1]
    if not end:
        return None

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

    views = [layout.tiles(whole[:end]) for whole in (flat, steep)]
    if (found := _kernel(run, f"gradients {by_numbers}", family, layout, views, spread, frame)) is None:
        return None
    out, *each = found(*views, layout.held(spread), frame, _units(frame, views[0].shape[0]))
    out = out.view(-1)
    sums = each[0].view(each[0].shape[0], -1, columns).sum(1) if each else None
    if end < flat.numel():
        rest, more = block_gradients(family, layout, flat[end:], steep[end:], spread, frame, by_numbers)
        out, sums = torch.cat([out, rest]), None if sums is None or more is None else sums + more
    return out, sums


def _units(frame: Tensor, rows: int) -> Tensor:
    """The unit once for each row: so the values are no single long row, and are computed in the loop of the sums."""
    return frame[2].expand(rows, 1).contiguous()


def _kernel(
    run: Any, name: str, family: Family, layout: Layout, views: list[Tensor], spread: Tensor, frame: Tensor
) -> Any:
    """The kernel of `run` for views of this kind, of any length."""
    shape = views[0].shape[1:]
    key = (name, family, layout.kind, *shape, spread.shape[0], views[0].dtype, spread.dtype, spread.device)

    if key in _kernels:
        return _kernels[key]
    count = max(8, 2**20 // prod(shape))
    given = [view.new_zeros((count, *shape)) for view in views]
    given.append(spread[:, :1].repeat(1, count, 1) if layout.kind == "group" else layout.held(spread))
    given += [frame, *([_units(frame, count)] if len(views) > 1 else [])]
    for tensor in (*given[: len(views)], *given[len(views) + 2 :]):
        torch._dynamo.mark_dynamic(tensor, 0)
    if layout.kind == "group":
        torch._dynamo.mark_dynamic(given[len(views)], 1)
    _kernels[key] = _compiled(run, given)
    return _kernels[key]


def _compiled(function: Callable, given: list[Tensor]) -> Callable[..., Sequence[Tensor]] | None:
    """The kernel of `function`, made by a call with what is given; None, and a warning, where it cannot be made."""
    if engine.broken():
        return None
    # a code object of its own: the compiler counts recompilations by code object
    code = function.__code__.replace(co_name=f"orthoact_{len(_kernels)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with _traced_once():
            return compile_fx(graph, inputs, config_patches=_known(OPTIONS))

    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
            kernel(*given)
        # what a tensor's gradient is to be is no part of what a kernel is made for
        return lambda *tensors: kernel(*(tensor.detach() for tensor in tensors))
    except Exception as error:  # no compiler, a read-only cache, a torch without it: torch's operations always work
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        warnings.warn(f"torch.compile failed, so torch's operations compute activations: {reason}", stacklevel=2)
        engine.give_up(reason)
        return None


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the compiler's options that this version of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {key: value for key, value in options.items() if key in known}


@contextmanager
def _traced_once():
    """Let the compiler trace a value that is used several times once.

    It would do so once for each use, and so for the uses of each use: it keeps that from taking for ever by writing
    values in between to memory, which takes more time than all of an activation's arithmetic.
    """
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import V

    plain = Pointwise.make_loader

    def make_loader(self: Pointwise) -> Callable:
        load, handler, known = plain(self), None, {}

        def once(index: Sequence) -> Any:
            nonlocal handler, known
            if handler is not V.get_ops_handler():  # another pass over the graph, or another scope
                handler, known = V.get_ops_handler(), {}
            place = tuple(index)
            if place not in known:
                known[place] = load(index)
            return known[place]

        return once

    Pointwise.make_loader = make_loader
    try:
        yield
    finally:
        Pointwise.make_loader = plain
