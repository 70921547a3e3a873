"""The rational families: quotients of polynomials whose denominator cannot vanish."""

from __future__ import annotations

from math import factorial

import numpy as np
from scipy.optimize import nnls

from .family import Array, Separable
from .variance import balance


class Rational(Separable):
    r"""$S(z) = P(z) / (1 + |Q(z)|)$, $P = \sum_{k=0}^n p_k z^k$, $Q = \sum_{j=1}^{n-1} q_j z^j$: Pade (n, n-1).

    The safe denominator of Pade activation units (arXiv:1907.06732) and NoRA (arXiv:2509.13240). Where Q = 0 the slope
    may jump. Between joints the ends, which are the weakness of these forms, are those of the target.

    >>> Rational().evaluate([1.0, 2.0, 3.0, -0.5], np.array(2.0)).item()  # (1 + 4 + 12) / (1 + 1)
    8.5
    """

    name = "rational"
    formula = "P(z) / (1 + |Q(z)|), P of degree n, Q of degree n - 1 without constant"
    numbers = "2n: p_0..p_n, q_1..q_(n-1)"
    smoothness = "smooth but for a kink where Q changes sign"
    cost = "2n multiply-adds, 1 division"
    reference = "arXiv:1907.06732, arXiv:2509.13240"
    degrees = range(2, 13)
    centred = True

    def size(self, degree: int) -> int:
        return 2 * degree

    def shape(self, degree: int) -> int:
        return degree - 1

    def reach(self, degree: int) -> float:
        return 1.0

    def starts(self, degree: int, z: np.ndarray, w: np.ndarray, f: np.ndarray) -> list[list[float]]:
        every, even = range(1, degree), range(2, degree, 2)
        found = [self.linearised(degree, z, w, f, powers) for powers in ([every, even] if even else [every])]
        return [*found, [0.0] * (degree - 1)]  # the last is exact where the target is a straight line

    def linearised(self, degree: int, z: np.ndarray, w: np.ndarray, f: np.ndarray, powers: range) -> list[float]:
        """The shape of the least P - f D over D as it was before, four times (Sanathanan and Koerner, 1963)."""
        numerator = np.stack([z**k for k in range(degree + 1)], axis=-1)
        columns = -f[:, None] * np.stack([self.base(z) ** j for j in powers], axis=-1)
        last, found = np.ones_like(z), np.zeros(len(powers))
        for _ in range(4):
            root = (np.sqrt(w) / last)[:, None]
            q, _ = np.linalg.qr(root * numerator)
            system, wanted = root * columns, root[:, 0] * f
            found = self.least(system - q @ (q.T @ system), wanted - q @ (q.T @ wanted))
            last = np.maximum(abs(1 + self.base(z)[:, None] ** np.array(powers) @ found), 1e-2)
        shape = [0.0] * (degree - 1)
        for j, value in zip(powers, found, strict=True):
            shape[j - 1] = float(value)
        return shape

    def base(self, z: np.ndarray) -> np.ndarray:
        """What the powers of the denominator are of."""
        return z

    def least(self, system: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(system, wanted, rcond=1e-12)[0]

    def split(self, parameters: list[Array]) -> tuple[list[Array], list[Array]]:
        cut = len(parameters) // 2 + 1
        return parameters[:cut], parameters[cut:]

    def denominator(self, shape: list[Array], z: Array) -> tuple[Array, Array, list[Array], list[Array]]:
        """D, D' and the derivatives of both by each number of the shape."""
        powers = [z * 0 + 1]
        for _ in shape:
            powers.append(powers[-1] * z)
        q = sum((b * power for b, power in zip(shape, powers[1:], strict=True)), z * 0)
        slope = sum((k * b * power for k, (b, power) in enumerate(zip(shape, powers, strict=False), 1)), z * 0)
        sign = _sign(q)
        return (
            1 + abs(q),
            sign * slope,
            [sign * power for power in powers[1:]],
            [sign * k * power for k, power in enumerate(powers[:-1], 1)],
        )

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        p, q = self.split(parameters)
        return _horner(p, z) / self.positive(q, z)

    def positive(self, shape: list[Array], z: Array) -> Array:
        """The denominator."""
        return 1 + abs(z * _horner(shape, z))

    def slope(self, parameters: list[Array], z: Array) -> Array:
        p, q = self.split(parameters)
        d, d_slope, _, _ = self.denominator(q, z)
        return (_horner(_derivative(p), z) - _horner(p, z) * d_slope / d) / d

    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        p, q = self.split(parameters)
        d, d_slope, d_by, d_slope_by = self.denominator(q, z)
        value, slope = _horner(p, z), _horner(_derivative(p), z)
        values, slopes, power, lower, steep = [], [], 1 / d, z * 0, d_slope / d
        for k in range(len(p)):  # z^k / D and its derivative
            values.append(power)
            slopes.append(k * lower - power * steep)
            power, lower = power * z, power
        outer = value / d**2
        inner = 2 * outer * steep - slope / d**2
        for by, slope_by in zip(d_by, d_slope_by, strict=True):
            values.append(-outer * by)
            slopes.append(inner * by - outer * slope_by)
        return values, slopes

    def variance_preserving(self, degree: int) -> list[float]:
        r"""$(p_0 + c (z - z^2 / 2)) / (1 + \sum_{j = 2, 4, \dots} z^j / j!)$: even j alone: a smooth start."""
        numerator = [0.0, 1.0, -0.5] + [0.0] * (degree - 2)
        shape = [0.0 if j % 2 else 1 / factorial(j) for j in range(1, degree)]
        return balance(self, numerator + shape, slice(1), slice(degree + 1))


class SumRational(Rational):
    r"""$S(z) = P(z) / (1 + \sum_j |q_j| |z|^j)$: the form of KAT (arXiv:2409.10594).

    >>> SumRational().evaluate([1.0, 2.0, 3.0, -0.5], np.array(-2.0)).item()  # (1 - 4 + 12) / (1 + 1)
    4.5
    """

    name = "rational-sum"
    formula = "P(z) / (1 + sum_j |q_j| |z|^j), P of degree n, j = 1..n - 1"
    smoothness = "smooth but at z = 0"
    reference = "arXiv:1907.06732, arXiv:2409.10594"

    def base(self, z):
        return abs(z)

    def least(self, system, wanted):
        size, n = np.linalg.norm(system, axis=0) + 1e-300, system.shape[1]
        # the ridge keeps nnls from cycling among columns that are nearly the same
        try:
            found, _ = nnls(np.concatenate([system / size, 1e-6 * np.eye(n)]), np.append(wanted, np.zeros(n)))
        except RuntimeError:  # it cycled all the same: this is only a start
            return np.zeros(n)
        return found / size

    def denominator(self, shape, z):
        size, side = abs(z), _sign(z)
        powers = [z * 0 + 1]
        for _ in shape:
            powers.append(powers[-1] * size)
        d = sum((abs(b) * power for b, power in zip(shape, powers[1:], strict=True)), powers[0])
        slope = sum((k * abs(b) * power for k, (b, power) in enumerate(zip(shape, powers, strict=False), 1)), z * 0)
        return (
            d,
            side * slope,
            [_sign(b) * power for b, power in zip(shape, powers[1:], strict=True)],
            [_sign(b) * k * side * power for k, (b, power) in enumerate(zip(shape, powers, strict=False), 1)],
        )

    def positive(self, shape, z):
        size = abs(z)
        return 1 + size * _horner([abs(b) for b in shape], size)


def _horner(coefficients: list[Array], z: Array) -> Array:
    value = coefficients[-1] + z * 0
    for c in reversed(coefficients[:-1]):
        value = value * z + c
    return value


def _derivative(coefficients: list[Array]) -> list[Array]:
    return [k * c for k, c in enumerate(coefficients)][1:]


def _sign(x: Array) -> Array:
    """+1 or -1: at zero a side is taken, so that a number that is zero can be learned."""
    return 2 * ((x >= 0) + x * 0) - 1
