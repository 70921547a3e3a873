"""Activations as loops in machine code on a CPU: LLVM makes them in a tenth of a second, without a C++ compiler.

Nothing in between is written to memory, a call takes some microseconds, and the threads are torch's own. What is not
done here (another device, a formula with an operation that `trace` does not know) is left to torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Array, Family
from .formula import Frame, derivatives, value
from .layout import Layout
from .machine import CHUNK, WIDTH, Code, Formula, compiled

TYPES = torch.float32, torch.float64, torch.bfloat16
"""The types of tensors that are taken."""

SHARE = 2**15
"""Values that are worth a thread of their own."""


class Loop(NamedTuple):
    """Machine code (see `machine.Code`), how many sums it makes, and what it lives in."""

    call: Callable[[Any], None]
    parts: int
    engine: Any


_loops: dict[Hashable, Loop | None] = {}


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether loops can be made here."""
    return find_spec("llvmlite") is not None and _openmp() is not None


def loop_values(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor | None:
    """F of `flat`; None where there are no loops."""

    def formula(x: Array, numbers: list[Array], frame: list[Array]) -> tuple[Array, list[Array]]:
        return value(family, x, numbers, Frame(*frame)), []

    if flat.device.type != "cpu" or not flat.numel():
        return None
    x = flat if flat.dtype in TYPES else flat.to(spread.dtype)
    made = loop(formula, ("values", family), layout, x, spread)
    if made is None:
        return None
    out = torch.empty_like(x)
    run(made, layout, [x, x, out], spread, frame)
    return out.to(flat.dtype)


def loop_gradients(
    family: Family, layout: Layout, flat: Tensor, steep: Tensor, spread: Tensor, frame: Tensor, by_numbers: bool
) -> tuple[Tensor, Tensor | None] | None:
    """What `blocks.block_gradients` returns; None where there are no loops."""

    def formula(x: Array, numbers: list[Array], frame: list[Array]) -> tuple[Array, list[Array]]:
        return derivatives(family, x, numbers, Frame(*frame), by_numbers)

    if flat.device.type != "cpu" or not flat.numel():
        return None
    x, grad = (flat, steep) if flat.dtype in TYPES else (flat.to(spread.dtype), steep.to(spread.dtype))
    made = loop(formula, ("gradients", family, by_numbers), layout, x, spread, steep=True)
    if made is None:
        return None
    out = torch.empty_like(x)
    sums = run(made, layout, [x, grad, out], spread, frame)
    return out.to(flat.dtype), sums


def loop(
    formula: Formula, key: Hashable, layout: Layout, flat: Tensor, spread: Tensor, *, steep: bool = False
) -> Loop | None:
    """The loop of a formula over values like `flat`, with numbers like `spread`; None where there is none.

    `key` stands for the formula. With `steep` its result and what it sums are multiplied by a gradient.
    """
    how = steep, layout.kind == "channel", len(spread), flat.dtype, spread.dtype
    if (key, how) not in _loops:
        known = available() and flat.dtype in TYPES and spread.dtype in TYPES
        _loops[key, how] = _made(formula, *how) if known else None
    return _loops[key, how]


def _made(formula: Formula, *how: Any) -> Loop | None:
    try:
        code = Code(formula, *how)
    except TypeError:  # an operation for which there is no instruction
        return None
    thread = ctypes.cast(_openmp().omp_get_thread_num, ctypes.c_void_p).value
    call, engine = compiled(code.source, thread or 0)
    return Loop(call, code.parts, engine)


def run(made: Loop, layout: Layout, tensors: list[Tensor], spread: Tensor, frame: Tensor) -> Tensor | None:
    """Go through `tensors`, flat: x, the gradient or x again, the result.

    Returned are the sums (sums, columns) in float64, if there are any.
    """
    (size, columns), unit, room = (tensors[0].numel(), spread.shape[1]), CHUNK, 0
    inner = size if layout.kind == "one" else layout.columns(tensors[0]).shape[-1]
    if layout.kind == "channel":  # the numbers of a block side by side
        unit, room, blocks = columns, made.parts * WIDTH, -(-columns // WIDTH)
        padded = F.pad(spread[..., 0], (0, blocks * WIDTH - columns))
        spread = padded.view(-1, blocks, WIDTH).transpose(0, 1).contiguous()
    threads = max(1, min(torch.get_num_threads(), size // SHARE))
    step = -(-size // threads // unit) * unit
    # a tensor without values has no address
    sums = torch.zeros(threads, made.parts, columns, dtype=torch.float64) if made.parts else frame
    held = torch.empty(threads, room, dtype=spread.dtype) if room else frame
    addresses = [tensor.data_ptr() for tensor in (*tensors, spread, frame, sums, held)]
    told = (ctypes.c_int64 * 11)(size, step, inner, columns, *addresses)
    if threads == 1:
        made.call(told)
    else:
        _openmp().GOMP_parallel(made.call, told, threads, 0)
    return sums.sum(0) if made.parts else None


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The OpenMP runtime of torch, whose threads do not wait for torch's own as those of others would have to."""
    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"):
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            runtime.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            runtime.omp_get_thread_num.argtypes = []
        except (OSError, AttributeError):
            continue
        return runtime
    return None
