"""The tropical families: piecewise straight functions, as polynomials and rationals of the max-plus algebra."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import ndtri

from .family import Array, Piecewise
from .variance import balance


class Tropical(Piecewise):
    r"""$S(z) = \max_k (s_k z + t_k)$, $k = 0..n$: a tropical polynomial with learnable slopes and offsets.

    The paper (arXiv:2502.01247, section 3) fixes the slopes at $k\sqrt 2 / n$, which no target's tails have. S is
    convex: a target that is not, as GELU, is copied by the nearest convex function with its tails.

    >>> Tropical().evaluate([0.0, 0.0, 0.0, 1.0], np.array([-2.0, 3.0])).tolist()  # max(0, z)
    [0.0, 3.0]
    """

    name = "tropical"
    formula = "max_k (s_k z + t_k), k = 0..n"
    numbers = "2n + 2: t_0..t_n, s_0..s_n"
    smoothness = "piecewise straight, convex"
    cost = "n + 1 multiply-adds, n maxima"
    reference = "arXiv:2502.01247, section 3"
    degrees = range(1, 25)
    convex = True

    def size(self, degree: int) -> int:
        return 2 * degree + 2

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        offsets, slopes = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        value = slopes[0] * z + offsets[0]
        for s, t in zip(slopes[1:], offsets[1:], strict=True):
            value = _maximum(value, s * z + t)
        return value

    def slope(self, parameters: list[Array], z: Array) -> Array:
        slopes = parameters[len(parameters) // 2 :]
        return sum((s * on for s, on in zip(slopes, self.active(parameters, z), strict=True)), z * 0)

    def active(self, parameters: list[Array], z: Array) -> list[Array]:
        """One for the first piece that is the largest at z, zero for the others."""
        offsets, slopes = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        best, masks = slopes[0] * z + offsets[0], [z * 0 == 0]
        for s, t in zip(slopes[1:], offsets[1:], strict=True):
            piece = s * z + t
            above = piece > best
            masks = [mask & ~above for mask in masks] + [above]
            best = _maximum(best, piece)
        return [mask + z * 0 for mask in masks]  # in the dtype of z

    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        on = self.active(parameters, z)
        return [*on, *(z * part for part in on)], [*(0 * part for part in on), *on]

    def from_kinks(self, start, kinks, jumps) -> list[float]:
        slopes, offsets = [start[0]], [start[1]]
        for kink, jump in zip(kinks, jumps, strict=True):
            slopes.append(slopes[-1] + jump)
            offsets.append(offsets[-1] - jump * kink)
        return [float(v) for v in offsets + slopes]

    def variance_preserving(self, degree: int) -> list[float]:
        """Slopes in equal steps from zero; each piece is the largest for an n-th of N(0, 1), the outer two for half."""
        shape = self.from_kinks((0.0, 0.0), _quantiles(degree), np.ones(degree))
        return balance(self, shape, slice(degree + 1), slice(None))


class TropicalRational(Piecewise):
    r"""$S(z) = t + s z + \sum_{i=1}^n c_i \max(z - k_i, 0)$, a difference of two tropical polynomials.

    It has n kinks in all. Every difference of two maxima of affine functions is of this form and the other way round:
    the terms with $c_i > 0$ make the first maximum, those with $c_i < 0$ the second. Written by its kinks each piece is
    alive, where in a maximum of pieces one that is nowhere the largest gets no gradient; and a kink may change sides in
    training.

    >>> TropicalRational().evaluate([0.0, 0.0, 1.0, -1.0, 0.0, 6.0], np.array([-1.0, 3.0, 9.0])).tolist()  # ReLU6
    [0.0, 3.0, 6.0]
    """

    name = "tropical-rational"
    formula = "t + s z + sum_i c_i max(z - k_i, 0), i = 1..n: a difference of two maxima of affine pieces"
    numbers = "2n + 2: t, s, c_1..c_n, k_1..k_n"
    smoothness = "piecewise straight"
    cost = "2n + 1 multiply-adds, n maxima"
    reference = "arXiv:2502.01247, section 3"
    degrees = range(1, 25)
    convex = False

    def size(self, degree: int) -> int:
        return 2 * degree + 2

    def split(self, parameters: list[Array]) -> tuple[Array, Array, list[tuple[Array, Array]]]:
        n = len(parameters) // 2 - 1
        return parameters[0], parameters[1], list(zip(parameters[2 : n + 2], parameters[n + 2 :], strict=True))

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        level, slope, terms = self.split(parameters)
        return sum((c * (z - k).clip(min=0) for c, k in terms), level + slope * z)

    def slope(self, parameters: list[Array], z: Array) -> Array:
        _, slope, terms = self.split(parameters)
        return sum((c * (z > k) for c, k in terms), slope + z * 0)

    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        _, _, terms = self.split(parameters)
        on = [(z > k) + z * 0 for _, k in terms]
        values = [z * 0 + 1, z, *((z - k).clip(min=0) for _, k in terms)]
        values += [-c * part for (c, _), part in zip(terms, on, strict=True)]
        # S' steps at a kink: its derivative by the kink is zero almost everywhere
        return values, [z * 0, z * 0 + 1, *on, *(0 * part for part in on)]

    def from_kinks(self, start, kinks, jumps) -> list[float]:
        return [float(v) for v in (start[1], start[0], *jumps, *kinks)]

    def variance_preserving(self, degree: int) -> list[float]:
        """A staircase: the slope rises from zero over the lower half of N(0, 1) and falls back over the upper half."""
        up = (degree + 1) // 2
        jumps = [1 / up] * up + [-1 / (degree - up or 1)] * (degree - up)
        shape = self.from_kinks((0.0, 0.0), _quantiles(degree), np.array(jumps))
        return balance(self, shape, slice(1), slice(degree + 2))


def _quantiles(n: int) -> np.ndarray:
    """Kinks that share N(0, 1) evenly."""
    return ndtri((np.arange(n) + 0.5) / n)


def _maximum(a: Array, b: Array) -> Array:
    return torch.maximum(a, b) if torch.is_tensor(a) else np.maximum(a, b)
