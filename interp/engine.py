"""How activations are computed: at once, or by kernels that torch's compiler makes when each is first needed.

`eager` is the default: on a CPU loops in machine code (`loops`), elsewhere torch's operations (`blocks`). `compiled` is
`kernels`, which take some seconds to make; where there are loops, on a CPU, the same as `eager`. `torch` is torch's
operations alone. The environment variable `ORTHOACT_PATH`, `set_path` and `using` choose; where nobody has, fine-tuning
and evaluation ask `suited` whether their work is long enough. Under `torch.compile(model)` and `torch.export` this has
no part: the formulas become part of the user's graph.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from . import loops
from .errors import OrthoactError

PATHS = ("eager", "compiled", "torch")
"""The ways to compute an activation outside a user's own `torch.compile`."""

SAVED = {"forward": 3e-9, "both": 1e-8}
"""Seconds that kernels save for each value beside torch's operations, forward and forward and backward, at least."""

COST = 20.0
"""Seconds that making the kernels of one family and degree takes, at most."""


class _State:
    path = ""
    chosen = False
    broken = ""
    """Why kernels cannot be made here; empty while they can."""


def set_path(path: str) -> None:
    """Compute activations in this process by one of `PATHS`; `OrthoactError` for anything else."""
    if path not in PATHS:
        raise OrthoactError(f"path {path!r}: expected one of {', '.join(PATHS)}")
    _State.path, _State.chosen = path, True


def get_path() -> str:
    """The path in use: by `set_path`, else by `ORTHOACT_PATH`, else eager; not compiled where kernels cannot be made.

    >>> with using("compiled"):
    ...     get_path()
    'compiled'
    """
    if not _State.path:
        chosen = os.environ.get("ORTHOACT_PATH")
        set_path(chosen or "eager")
        _State.chosen = bool(chosen)
    return "eager" if _State.broken and _State.path == "compiled" else _State.path


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


def suited(values: float, *, training: bool, device: torch.device | None = None) -> str:
    """The path for work of so many values: what was chosen, else compiled where it pays for the kernels.

    >>> with using("eager"):
    ...     suited(1e12, training=True)
    'eager'
    """
    path = get_path()
    if _State.chosen or _State.broken or (device is not None and device.type == "cpu" and loops.available()):
        return path
    return "compiled" if values * SAVED["both" if training else "forward"] > COST else path


def broken() -> str:
    """Why kernels cannot be made here; empty while they can."""
    return _State.broken


def give_up(reason: str) -> None:
    """Make no more kernels in this process."""
    _State.broken = reason


def describe() -> str:
    """The path and why, for `orthoact env`."""
    if _State.broken:
        return f"eager, for kernels cannot be made: {_State.broken}"
    path = get_path()
    if path == "torch":
        return path
    if not loops.available():
        return f"{path}; on a CPU by torch's operations, for llvmlite or OpenMP is not there"
    return path + (f"; a formula by torch's operations: {loops.refused()}" if loops.refused() else "")
