"""How activations are computed: eagerly, or by kernels that the compiler makes the first time that each is needed.

Eager is the default: making a kernel takes some seconds. The environment variable `ORTHOACT_PATH`, `set_path` and
`using` choose; where nobody has, fine-tuning and evaluation ask `suited` whether their work is long enough. Under
`torch.compile(model)` and `torch.export` this has no part: the formulas become part of the user's graph.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import OrthoactError

PATHS = ("eager", "compiled")
"""The two ways to compute an activation outside a user's own `torch.compile`."""

SAVED = {"forward": 3e-9, "both": 1e-8}
"""Seconds that the compiled path saves for each value on two cores, forward and forward and backward, at least."""

COST = 20.0
"""Seconds that making the kernels of one family and degree takes, at most."""

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


class _State:
    path = ""
    chosen = False
    broken = ""
    """Why kernels cannot be made here; empty while they can."""


_kernels: dict[Hashable, Callable[..., Sequence[Tensor]]] = {}


def set_path(path: str) -> None:
    """Compute activations in this process by `eager` or `compiled`; `OrthoactError` for anything else."""
    if path not in PATHS:
        raise OrthoactError(f"path {path!r}: expected one of {', '.join(PATHS)}")
    _State.path, _State.chosen = path, True


def get_path() -> str:
    """The path in use: by `set_path`, else by `ORTHOACT_PATH`, else eager; eager where kernels cannot be made.

    >>> with using("compiled"):
    ...     get_path()
    'compiled'
    """
    if not _State.path:
        chosen = os.environ.get("ORTHOACT_PATH")
        set_path(chosen or "eager")
        _State.chosen = bool(chosen)
    return "eager" if _State.broken else _State.path


@contextmanager
def using(path: str):
    """Compute activations by `path` in this block."""
    get_path()
    before = _State.path, _State.chosen
    set_path(path)
    try:
        yield
    finally:
        _State.path, _State.chosen = before


def suited(values: float, *, training: bool) -> str:
    """The path for work of so many values of activations: what was chosen, else compiled where it pays for the kernels.

    >>> with using("eager"):
    ...     suited(1e12, training=True)
    'eager'
    """
    path = get_path()
    worth = values * SAVED["both" if training else "forward"] > COST
    return "compiled" if worth and not _State.chosen and not _State.broken else path


def describe() -> str:
    """The path and why, for `orthoact env`."""
    if _State.broken:
        return f"eager, for kernels cannot be made: {_State.broken}"
    return get_path()


def kernel(
    key: Hashable, function: Callable, example: Callable[[], Sequence[tuple[Tensor, tuple[int, ...]]]]
) -> Callable[..., Sequence[Tensor]] | None:
    """The kernel of `function`, which returns a tuple, made once for each `key`; None where kernels cannot be made.

    `example` gives arguments with their axes that vary, all by the one size of the first argument's first such axis. A
    key stands for everything else that the kernel depends on: on a CPU what the compiler made is called as it is,
    without the checks of `torch.compile`, which take as long as 100,000 values.
    """
    if key in _kernels:
        return _kernels[key]
    if _State.broken:
        return None
    # a code object of its own: the compiler counts recompilations by code object
    code = function.__code__.replace(co_name=f"orthoact_{len(_kernels)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    made: list[Callable[..., Sequence[Tensor]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        inner: list[Callable[[list[Any]], Sequence[Tensor]]] = []

        def compiler(*given: Any, **how: Any) -> Any:
            inner.append(compile_fx_inner(*given, **how))
            return inner[-1]

        # a hit of autograd's cache would pass the compiler by; the compiler has a cache of its own
        with torch._functorch.config.patch(enable_autograd_cache=False), _traced_once():
            compiled: Any = compile_fx(graph, inputs, inner_compile=compiler, config_patches=OPTIONS)
        (call,) = inner
        order = [places.get(node.target) for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            size: Any = tensors[0].shape[axis]
            return call([size if place is None else tensors[place] for place in order])

        made.append(run)
        return compiled

    places = {f"L_{name}_": place for place, name in enumerate(code.co_varnames[: code.co_argcount])}
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = example()
            axis = next(iter(arguments[0][1]))
            for tensor, sizes in arguments:
                for size in sizes:
                    torch._dynamo.mark_dynamic(tensor, size)
            guarded = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
            guarded(*(tensor for tensor, _ in arguments))
        # on a GPU with the checks, of alignment too: they are hidden behind the kernels that run
        _kernels[key] = made[0] if arguments[0][0].device.type == "cpu" else guarded
    except Exception as error:  # no compiler, a read-only cache, a torch without it: the eager path always works
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _State.broken = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        warnings.warn(f"torch.compile failed, so activations are computed eagerly: {_State.broken}", stacklevel=2)
        return None
    return _kernels[key]


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
