"""Activations as loops in machine code on a CPU: LLVM makes them when they are first needed, no C++ compiler.

Nothing in between is written to memory, a call takes some microseconds, and the threads are torch's own. What is not
done here (another device, a formula with an operation that `trace` does not know) is left to torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Array, Family
from .formula import Frame, derivatives, value
from .layout import Layout
from .machine import CHUNK, OPENMP, TOLD, WIDTH, Code, Formula, compiled

TYPES = torch.float32, torch.float64
"""The types that are computed in; bfloat16 is read and written beside float32."""

SHARE = 2**15
"""Values that are worth a thread of their own."""


class Loop(NamedTuple):
    """Machine code (see `machine.Code`), how many sums it makes, and what it lives in."""

    call: Callable[[Any], None]
    parts: int
    engine: Any


_loops: dict[Hashable, Loop | None] = {}
_refused: list[str] = []
"""Why machine code could not be made; what has none is computed by torch."""


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether loops can be made here."""
    try:
        import llvmlite.binding as llvm

        return hasattr(llvm, "create_pass_builder") and _openmp() is not None
    except (ImportError, OSError, RuntimeError, AttributeError):  # not there, or not for this machine
        return False


def refused() -> str:
    """Why the last formula that has no loop has none; empty while all have one."""
    return _refused[-1] if _refused else ""


def loop_values(family: Family, layout: Layout, flat: Tensor, spread: Tensor, frame: Tensor) -> Tensor | None:
    """F of `flat`; None where there are no loops."""

    def formula(x: Array, numbers: list[Array], frame: list[Array]) -> tuple[Array, list[Array]]:
        return value(family, x, numbers, Frame(*frame)), []

    if not _within_reach(flat, spread, frame):
        return None
    x = _readable(flat, spread)
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

    if not _within_reach(flat, steep, spread, frame):
        return None
    x, grad = _readable(flat, spread), _readable(steep, spread)
    made = loop(formula, ("gradients", family, by_numbers), layout, x, spread, steep=True)
    if made is None or grad.dtype != x.dtype:
        return None
    out = torch.empty_like(x)
    sums = run(made, layout, [x, grad, out], spread, frame)
    return out.to(flat.dtype), sums


def _within_reach(*tensors: Tensor) -> bool:
    """Whether all have values that lie in the memory of the CPU."""
    return tensors[0].numel() > 0 and all(t.device.type == "cpu" and not t._is_zerotensor() for t in tensors)


def _readable(flat: Tensor, spread: Tensor) -> Tensor:
    """The same with bytes that are its values, in a type that is taken."""
    flat = flat.resolve_neg()
    taken = flat.dtype == spread.dtype or (flat.dtype, spread.dtype) == (torch.bfloat16, torch.float32)
    return flat if taken else flat.to(spread.dtype)


def loop(
    formula: Formula, key: Hashable, layout: Layout, flat: Tensor, spread: Tensor, *, steep: bool = False
) -> Loop | None:
    """The loop of a formula over values like `flat`, with numbers like `spread`; None where there is none.

    `key` stands for the formula. With `steep` its result and what it sums are multiplied by a gradient.
    """
    key = key, steep, layout.kind == "channel", len(spread), flat.dtype, spread.dtype
    if key not in _loops:
        _loops[key] = _made(formula, *key[1:]) if available() and spread.dtype in TYPES else None
    return _loops[key]


def _made(formula: Formula, *how: Any) -> Loop | None:
    openmp = _openmp()
    try:
        code = Code(formula, *how)
        addresses = {name: ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value or 0 for name in OPENMP}
        call, engine = compiled(code.source, addresses)
    except Exception as error:  # an operation that has no instruction, an llvmlite of another time
        _refused.append(f"{type(error).__name__}: {error}"[:200])
        return None
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
    parts = max(1, min(torch.get_num_threads(), size // SHARE))
    step = -(-size // parts // unit) * unit
    # without sums nothing is read or written there
    sums = torch.zeros(parts, made.parts, columns, dtype=torch.float64, device="cpu") if made.parts else frame
    held = torch.empty(parts, room, dtype=spread.dtype, device="cpu") if room else frame
    sizes = {"parts": parts, "step": step, "size": size, "inner": inner, "columns": columns}
    given = dict(zip(("x", "grad", "out"), tensors, strict=True), numbers=spread, frame=frame, sums=sums, held=held)
    told = (ctypes.c_int64 * len(TOLD))(*(sizes[k] if k in sizes else given[k].data_ptr() for k in TOLD))
    if parts == 1:
        made.call(told)
    else:
        _openmp().GOMP_parallel(made.call, told, parts, 0)
    return sums.sum(0) if made.parts else None


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The OpenMP runtime of torch, whose threads do not wait for torch's own as those of others would have to."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for name in (*map(str, own), "libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"):
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            runtime.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            for function in OPENMP:
                getattr(runtime, function).argtypes = []
        except (OSError, AttributeError):
            continue
        return runtime
    return None
