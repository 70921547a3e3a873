"""The contract that every family of activations fulfils, and the three kinds of family that the solver knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._C import _are_functorch_transforms_active as _are_transforms_active

from .variance import Moments, moments

Array = Any  # a numpy array or a torch tensor: the formulas below are written once for both

Series = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""From linear numbers in rows to S, S' and S'' (starts, points) and the derivatives of S and S' by the shape."""

TAILS = ("linear", "none")
"""How a core is continued beyond its joints."""


def fma(a: Array, b: Array, c: Array, over: Array = None) -> Array:
    """The sum a b + c, for tensors in one operation.

    `over` is the one of them that is not needed any more: its place is taken where it is one of `blocks`, which
    makes its tensors in inference mode.
    """
    if not (torch.is_tensor(c) and torch.is_tensor(a) and torch.is_tensor(b)):
        return a * b + c
    if over is None or torch.compiler.is_compiling() or not over.is_inference() or _are_transforms_active():
        return torch.addcmul(c, a, b)
    return torch.addcmul(c, a, b, out=over)


class Family(ABC):
    r"""A family of functions $S(z; p)$ of one real variable with learnable numbers $p$.

    A family is one object without state. The methods take the standardised variable $z = (x - location) / scale$, a
    numpy array (fitting, float64) or a torch tensor (evaluation, float32 or better), and return the same kind. The
    numbers p come as a list, each a scalar or an array that broadcasts with z. Derive from one of `Linear`,
    `Separable` and `Piecewise`, which say how the solver finds p.
    """

    def __deepcopy__(self, memo: Any) -> Family:
        return self

    def __reduce__(self) -> Any:
        from .families import FAMILIES, get_family

        return (get_family, (self.name,)) if FAMILIES.get(self.name) is self else object.__reduce__(self)

    name: str
    """The key in `FAMILIES` and in every file."""
    formula: str
    """The series, in plain text."""
    numbers: str
    """The learnable numbers at degree n, in plain text, in their order."""
    smoothness: str
    """How often the series can be differentiated."""
    cost: str
    """The operations for one value, in plain text."""
    reference: str
    """Where the family comes from."""
    degrees: range
    """The degrees that can be asked for."""

    @abstractmethod
    def size(self, degree: int) -> int:
        """The number of learnable numbers at a degree."""

    @abstractmethod
    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        """S at `z`."""

    @abstractmethod
    def slope(self, parameters: list[Array], z: Array) -> Array:
        """S' at `z`, the derivative with respect to z."""

    @abstractmethod
    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        """The derivatives of S and of S' at `z` with respect to each learnable number, each with the shape of `z`."""

    def conversion(self, degree: int) -> np.ndarray | None:
        """The matrix from the learnable numbers to those that the next three methods take; None: they are the same.

        A family that has a cheaper form to evaluate than `evaluate` overrides these four. The first of the numbers
        that `value` takes come first; `value_slope` may have others of its own behind them.
        """
        return None

    def value(self, numbers: list[Array], z: Array) -> Array:
        """S at `z`."""
        return self.evaluate(numbers, z)

    def value_slope(self, numbers: list[Array], z: Array) -> Array:
        """S' at `z`."""
        return self.slope(numbers, z)

    def value_parts(self, numbers: list[Array], z: Array) -> list[Array]:
        """The derivatives of `value` by each number that it takes."""
        return self.jacobian(numbers, z)[0]

    @abstractmethod
    def variance_preserving(self, degree: int) -> list[float]:
        """The numbers of a start for training from scratch, with E[F^2] = E[F'^2] = 1 under N(0, 1).

        A family names a shape and which numbers move its level and its scale; `variance.balance` does the rest.
        """

    def curve(self, parameters: list[float]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """S and S' as one function of z."""
        return lambda z: (self.evaluate(parameters, z), self.slope(parameters, z))

    def moments(self, parameters: list[float]) -> Moments:
        """The moments of S under N(0, 1): by quadrature, unless the family knows better."""
        return moments(self.curve(parameters))


class Linear(Family):
    r"""$S(z) = \sum_k p_k \phi_k(z)$: the numbers are found by least squares, the joints by a search."""

    @abstractmethod
    def reach(self, degree: int) -> float:
        """The |z| up to which the basis is well conditioned; the core is scaled to it."""

    @abstractmethod
    def basis(self, z: Array, degree: int) -> list[Array]:
        r"""The values $\phi_0(z), \phi_1(z), \dots$, each with the shape of `z`."""

    @abstractmethod
    def slopes(self, z: Array, degree: int) -> list[Array]:
        r"""The derivatives $\phi_0'(z), \phi_1'(z), \dots$ with respect to z, each with the shape of `z`."""

    def degree(self, parameters: list[Array]) -> int:
        """The degree that has so many numbers."""
        return next(n for n in self.degrees if self.size(n) == len(parameters))

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        basis = self.basis(z, self.degree(parameters))
        return sum((p * b for p, b in zip(parameters, basis, strict=True)), z * 0)

    def slope(self, parameters: list[Array], z: Array) -> Array:
        slopes = self.slopes(z, self.degree(parameters))
        return sum((p * b for p, b in zip(parameters, slopes, strict=True)), z * 0)

    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        degree = self.degree(parameters)
        return self.basis(z, degree), self.slopes(z, degree)


class Separable(Family):
    r"""$S(z) = \sum_k p_k \phi_k(z; q)$: linear in all but its last numbers q, the shape.

    The solver eliminates p (variable projection) and improves q and the joints by least squares from `starts`.
    """

    centred = False
    """Whether z = 0 is a special point, so that shifting z changes the family; then the location is searched too."""
    anywhere = False
    """Whether z = 0 may lie anywhere in the core as well: then it lies where most inputs do: less rounding."""

    @abstractmethod
    def shape(self, degree: int) -> int:
        """How many numbers are the shape; they come last."""

    @abstractmethod
    def reach(self, degree: int) -> float:
        """The |z| to which the core is scaled."""

    @abstractmethod
    def starts(self, degree: int, z: np.ndarray, w: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Shapes to start the search from in each of several cores, (cores, starts, numbers); deterministic.

        Values `f` with weights `w` are wanted at `z`, each (cores, points).
        """

    def columns(self, shape: np.ndarray, z: np.ndarray, linear: int) -> tuple[np.ndarray, np.ndarray]:
        r"""The basis $\phi_k$ and its slopes, (starts, points, k), for shapes (starts, numbers) and z (starts, points).

        What the search calls most: a family may have a faster one.
        """
        values, slopes = self.jacobian([0.0] * linear + _columns(shape), z)
        return _stack(values[:linear], z), _stack(slopes[:linear], z)

    def normal(
        self,
        shape: np.ndarray,
        z: np.ndarray,
        w: np.ndarray,
        f: np.ndarray,
        d: np.ndarray,
        lam: np.ndarray,
        linear: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], Series]:
        """The normal equations of the columns, their right sides and the roots of E of each column's square.

        Values `f` and slopes `d` by z are wanted with weights `w` and `lam` times these, each (starts, points), `lam`
        (starts, 1). `z` may have points before these: then the columns there and their slopes; and the series.
        """
        values, slopes = self.columns(shape, z, linear)
        ends = z.shape[1] - w.shape[1]
        heavy = (w[..., None] * values[:, ends:]).swapaxes(1, 2)
        steep = ((lam * w)[..., None] * slopes[:, ends:]).swapaxes(1, 2)
        gram = heavy @ values[:, ends:]
        share = np.sqrt(np.einsum("snn->sn", gram))
        right = (heavy @ f[..., None] + steep @ d[..., None])[..., 0]

        def series(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
            value, slope = (values @ numbers[..., None])[..., 0], (slopes @ numbers[..., None])[..., 0]
            given = numbers, shape, z, values, slopes
            return value, slope, self.bend(*given), *self.turns(*given)

        return gram + steep @ slopes[:, ends:], right, share, (values[:, :ends], slopes[:, :ends]), series

    def turns(
        self, numbers: np.ndarray, shape: np.ndarray, z: np.ndarray, values: np.ndarray, slopes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The derivatives of S and S' by the shape, (starts, points, numbers), likewise; the columns are given."""
        by, slopes_by = self.jacobian(_columns(numbers) + _columns(shape), z)
        linear = numbers.shape[1]
        return _stack(by[linear:], z), _stack(slopes_by[linear:], z)

    def bend(
        self, numbers: np.ndarray, shape: np.ndarray, z: np.ndarray, values: np.ndarray, slopes: np.ndarray
    ) -> np.ndarray:
        """S'' at `z`, (starts, points), likewise; asked for where z is shifted."""
        h, linear = 1e-6, numbers.shape[1]
        before, after = (self.columns(shape, z + by, linear)[1] for by in (-h, h))
        return ((after - before) @ numbers[..., None])[..., 0] / (2 * h)

    def curve(self, parameters: list[float]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        degree = next(n for n in self.degrees if self.size(n) == len(parameters))
        linear = len(parameters) - self.shape(degree)
        numbers, shape = np.array(parameters[:linear]), np.array([parameters[linear:]])

        def series(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values, slopes = (part[0] @ numbers for part in self.columns(shape, np.reshape(z, (1, -1)), linear))
            return values.reshape(np.shape(z)), slopes.reshape(np.shape(z))

        return series

    def through(self, degree: int, values: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Shapes and linear numbers of what has these values and slopes, (starts, 2), at z = -reach and z = reach.

        None where they leave a choice.
        """
        return None

    def relaxed(self) -> Separable | None:
        """A smoother family that holds most of the best members of this one, to be searched before it."""
        return None

    def sound(self, shape: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Whether a shape can be used on all of `z`, likewise."""
        return np.ones(len(z), dtype=bool)

    def settle(
        self, shape: list[float], location: float, scale: float, lo: float, hi: float
    ) -> list[tuple[list[float], float, float, float, float]]:
        """Near a member of the smoother one on a core from `lo` to `hi`: shapes, locations, scales and joints."""
        raise NotImplementedError


class Piecewise(Family):
    """A continuous, piecewise straight function with at most `degree` kinks: the solver finds the kinks."""

    convex: bool
    """Whether the slopes may only grow."""

    @abstractmethod
    def from_kinks(self, start: tuple[float, float], kinks: np.ndarray, jumps: np.ndarray) -> list[float]:
        """The numbers of the function with the line `start` (slope, intercept) at -inf and these jumps of its slope."""


def _columns(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[:, j : j + 1] for j in range(numbers.shape[1])]


def _stack(parts: list, z: np.ndarray) -> np.ndarray:
    found = empty(*z.shape, len(parts))
    for k, part in enumerate(parts):
        found[..., k] = part
    return found


def empty(*shape: int) -> np.ndarray:
    """An array whose last axis is the slowest in memory: one loop does the same to all starts and points."""
    found = np.empty((shape[-1], *shape[:-1]))
    return found.transpose(*range(1, found.ndim), 0)
