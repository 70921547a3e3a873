"""The fixed activations that are replaced: their formulas, their asymptotes and their kinks.

A target is a function of one real variable. Its asymptotes tell the tails of the copy, its kinks where joints can make
the copy exact. The formulas are written here and compared with those of torch and transformers by a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import floor, log10, pi, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import OrthoactError

Line = tuple[float, float]
"""Slope and intercept of an affine asymptote."""


@dataclass(frozen=True)
class Target:
    """A function of one real variable with what is known of its ends.

    >>> gelu = get_target("gelu")
    >>> values, slopes = gelu(np.array([0.0, 2.0]))
    >>> slopes.round(4).tolist()
    [0.5, 1.0852]
    """

    name: str
    """The name that files record; `get_target` gives the target back for every name in `TARGETS`."""
    function: Callable[[Tensor], Tensor]
    """Elementwise, differentiable by autograd."""
    left: Line | None = (0.0, 0.0)
    """The asymptote at minus infinity, None where it is not affine."""
    right: Line | None = (1.0, 0.0)
    """The asymptote at plus infinity, None where it is not affine."""
    kinks: tuple[float, ...] = ()
    """Where the function or its first or second derivative jumps."""
    holds: tuple[float, float] = (float("-inf"), float("inf"))
    """The range in which the asymptotes hold."""

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and first derivatives at `x`, in float64."""
        with torch.inference_mode(False), torch.enable_grad():
            points = torch.tensor(np.asarray(x, dtype=np.float64), requires_grad=True)
            values = self.function(points.clone())  # which may be overwritten
            if values.requires_grad:
                (slopes,) = torch.autograd.grad(values.sum(), points)
            else:
                slopes = torch.zeros_like(points)
            values, slopes = values.detach().double(), slopes.double()
            lost = ~slopes.isfinite()
            if values.shape == points.shape and lost.any():  # by inf / inf, as of x / (1 + exp(-x)) far out
                beside = (1e-6 * (1 + points.detach().abs())).where(lost, 0)
                rise = self.function(points.detach() + beside) - self.function(points.detach() - beside)
                slopes[lost] = (rise.double() / (2 * beside))[lost]
        return values.numpy(), slopes.numpy()


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def _leaky(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(x >= 0, x, slope * x)


def _softplus(beta: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta


def _gelu(name: str) -> Target:
    return Target(name, lambda x: x * torch.special.ndtr(x))


def _leaky_relu(name: str, slope: float = 0.01) -> Target:
    return Target(name, _leaky(slope), left=(slope, 0.0), kinks=(0.0,))


def _elu(name: str, alpha: float = 1.0) -> Target:
    return Target(
        name,
        lambda x: torch.where(x > 0, x, alpha * torch.expm1(torch.where(x > 0, 0 * x, x))),
        (0.0, -alpha),
        kinks=(0.0,),
    )


def _celu(name: str, alpha: float = 1.0) -> Target:
    function = lambda x: torch.where(x > 0, x, alpha * torch.expm1(torch.where(x > 0, 0 * x, x) / alpha))  # noqa: E731
    return Target(name, function, (0.0, -alpha), kinks=(0.0,))


def _selu(name: str) -> Target:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    function = lambda x: scale * torch.where(x > 0, x, alpha * torch.expm1(torch.where(x > 0, 0 * x, x)))  # noqa: E731
    return Target(name, function, (0.0, -alpha * scale), (scale, 0.0), (0.0,))


def _hardtanh(name: str, low: float = -1.0, high: float = 1.0) -> Target:
    if not low < high:
        raise OrthoactError(f"target {name!r}: expected two numbers in order, as in hardtanh(-2, 2)")
    return Target(name, lambda x: x.clamp(low, high), (0.0, low), (0.0, high), (low, high))


def _softshrink(name: str, cut: float = 0.5) -> Target:
    function = lambda x: x - x.clamp(-cut, cut)  # noqa: E731
    return Target(name, function, (1.0, cut), (1.0, -cut), (-cut, cut))


def _hardshrink(name: str, cut: float = 0.5) -> Target:
    return Target(name, lambda x: torch.where(x.abs() > cut, x, 0 * x), (1.0, 0.0), kinks=(-cut, cut))


def _threshold(name: str, threshold: float = 0.0, value: float = 0.0) -> Target:
    function = lambda x: torch.where(x > threshold, x, 0 * x + value)  # noqa: E731
    return Target(name, function, (0.0, value), kinks=(threshold,))


def _xielu(name: str, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5) -> Target:
    """arXiv:2411.13010, with the values of its positive parameters (after the softplus)."""

    def function(x: Tensor) -> Tensor:
        negative = (torch.expm1(x.clamp(max=-1e-6)) - x) * alpha_n + beta * x
        return torch.where(x > 0, alpha_p * x * x + beta * x, negative)

    return Target(name, function, (beta - alpha_n, -alpha_n), None, (0.0,))


def _softplus_target(name: str, beta: float = 1.0, threshold: float = 20.0) -> Target:
    """Torch's goes over to the identity at beta x = threshold, which shows below 15."""
    smooth, jump = _softplus(beta), threshold / beta
    if threshold >= 15:
        return Target(name, smooth)
    return Target(name, lambda x: torch.where(x > jump, x, smooth(x)), kinks=(jump,))


TARGETS: dict[str, Callable[..., Target]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda name: Target(name, _gelu_tanh),
    "gelu_10": lambda name: Target(
        name, lambda x: (x * torch.special.ndtr(x)).clamp(-10, 10), holds=(float("-inf"), 10)
    ),
    "quick_gelu": lambda name: Target(name, lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": lambda name: Target(name, lambda x: x * torch.sigmoid(x)),
    "mish": lambda name: Target(name, lambda x: x * torch.tanh(torch.logaddexp(x, torch.zeros_like(x)))),
    "relu": lambda name: Target(name, lambda x: x.clamp(min=0), kinks=(0.0,)),
    "relu2": lambda name: Target(name, lambda x: x.clamp(min=0) ** 2, right=None, kinks=(0.0,)),
    "relu6": lambda name: Target(name, lambda x: x.clamp(0, 6), right=(0.0, 6.0), kinks=(0.0, 6.0)),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "hardswish": lambda name: Target(name, lambda x: x * (x + 3).clamp(0, 6) / 6, kinks=(-3.0, 3.0)),
    "hardsigmoid": lambda name: Target(name, lambda x: (x + 3).clamp(0, 6) / 6, right=(0.0, 1.0), kinks=(-3.0, 3.0)),
    "hardtanh": _hardtanh,
    "sigmoid": lambda name: Target(name, torch.sigmoid, right=(0.0, 1.0)),
    "tanh": lambda name: Target(name, torch.tanh, (0.0, -1.0), (0.0, 1.0)),
    "laplace": lambda name: Target(
        name, lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * sqrt(2)))), right=(0.0, 1.0)
    ),
    "softplus": _softplus_target,
    "sqrtsoftplus": lambda name: Target(name, lambda x: _softplus(1.0)(x).sqrt(), right=None),
    "log_sigmoid": lambda name: Target(name, F.logsigmoid, (1.0, 0.0), (0.0, 0.0)),
    "softsign": lambda name: Target(name, lambda x: x / (1 + x.abs()), None, None, (0.0,)),
    "tanhshrink": lambda name: Target(name, lambda x: x - torch.tanh(x), (1.0, 1.0), (1.0, -1.0)),
    "softshrink": _softshrink,
    "hardshrink": _hardshrink,
    "threshold": _threshold,
    "xielu": _xielu,
    "linear": lambda name: Target(name, lambda x: x * 1, (1.0, 0.0)),
}
"""Every named target; those with parameters take them in brackets: `leaky_relu(0.2)`, `hardtanh(-2, 2)`."""

ALIASES: dict[str, str] = {
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
    "prelu": "leaky_relu(0.25)",
    "rrelu": "leaky_relu(0.22916666666666666)",
    "identity": "linear",
}
"""Other names of the same functions, as transformers and torch.nn use them (prelu and rrelu at their defaults)."""


def get_target(target: str | Target | Callable[[Tensor], Tensor]) -> Target:
    """The target of that name, or a target made of any elementwise callable, its asymptotes estimated and checked.

    >>> get_target("leaky_relu(0.2)").left
    (0.2, 0.0)
    >>> get_target(torch.erf).right
    (0.0, 1.0)

    Raises `OrthoactError` for an unknown name, wrong parameters, or a callable that is not elementwise or not finite.
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        return _from_callable(target)
    return _from_name(target)


@lru_cache
def _from_name(target: str) -> Target:
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", target.strip())
    base = ALIASES.get(match[1], match[1]) if match else None
    if match and base and base not in TARGETS and "(" in base and match[2] is None:
        return get_target(base)
    if match is None or base not in TARGETS:
        raise OrthoactError(f"unknown target {target!r}: choose one of {', '.join([*TARGETS, *ALIASES])}")
    try:
        parameters = [float(p) for p in (match[2] or "").split(",") if p]
        made = TARGETS[base](target.strip() if match[2] else base, *parameters)
        if not (np.isfinite(np.array(made(np.linspace(-30, 30, 61)))).all() and _meets(made, parameters)):
            raise ValueError
        return made
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise OrthoactError(
            f"target {target!r}: expected numbers in their usual range as its parameters, as in leaky_relu(0.2)"
        ) from error


def _meets(target: Target, parameters: list[float]) -> bool:
    """Whether the target has the asymptotes that its formula has for parameters in their usual range."""
    far = 1e5 * (1 + max(map(abs, parameters), default=0))
    for x, line, end in ((-far, target.left, target.holds[0]), (far, target.right, target.holds[1])):
        if line is not None and abs(end) > far:
            value = float(target(np.array([x]))[0][0])
            if not abs(value - line[0] * x - line[1]) <= 1e-6 * far:
                return False
    return True


def _from_callable(function: Callable[[Tensor], Tensor]) -> Target:
    name = getattr(function, "__name__", None) or type(function).__name__
    try:
        target = Target(name, function, None, None)
        far = np.array([-1e3, -500.0, -30.0, 30.0, 500.0, 1e3])
        grid = np.concatenate([far[:3], np.linspace(-8, 8, 33), far[3:]])
        values, slopes = target(grid)
        again, part = target(grid[::-1].copy())[0], target(grid[::4])[0]
    except Exception as error:  # whatever a stranger's function raises
        raise OrthoactError(f"target {name!r} could not be evaluated on a float64 vector: {error}") from error
    if (
        values.shape != grid.shape
        or part.shape != grid[::4].shape
        or not np.allclose(again[::-1], values, rtol=1e-9, atol=1e-9, equal_nan=True)
        or not np.allclose(part, values[::4], rtol=1e-9, atol=1e-9, equal_nan=True)
    ):
        raise OrthoactError(
            f"target {name!r} is not elementwise: expected one output for each input, the same each time"
        )
    if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
        raise OrthoactError(f"target {name!r} is not finite on [-1000, 1000]: give a function that is")
    if np.ptp(values) > 0 and not slopes.any():
        raise OrthoactError(f"target {name!r} is not differentiable: its values vary, its slopes by autograd are zero")
    unit = np.abs(values).max() / far[-1] or 1.0
    left, right = _line(grid[:3][::-1], values[:3][::-1], unit), _line(grid[-3:], values[-3:], unit)
    return Target(name, function, left, right)


def _line(x: np.ndarray, y: np.ndarray, unit: float) -> Line | None:
    """The line through the two farthest points if the nearest (|x| = 30) lies on it too; `unit` is a slope that the
    function has, for what rounding left of the line's to be none.
    """
    slope = (y[2] - y[1]) / (x[2] - x[1])
    intercept = y[2] - slope * x[2]
    if abs(slope * x[0] + intercept - y[0]) > 1e-6 * (unit + abs(y[0])):
        return None
    decimals = 9 - floor(log10(unit))
    return round(float(slope), decimals) + 0.0, round(float(intercept), decimals - 3) + 0.0
