"""The rational families: quotients of polynomials whose denominator cannot vanish."""

from __future__ import annotations

from math import factorial

import numpy as np
from scipy.optimize import nnls

from .family import Array, Separable, empty
from .variance import balance

CLOSE = 1.05
"""How far a pole beyond an end of the core is from z = 0, in the distance of that end."""


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

    def starts(self, degree, z, w, f):
        """One without a denominator, exact where the target is a straight line; and some with Q = 0 at z = 0.

        Q changes sign there alone, or also at the same place on the other side of the core.
        """
        other = z.min(axis=1, keepdims=True) + z.max(axis=1, keepdims=True)
        signs = [np.sign(z)] if degree < 3 or abs(other).max() < 0.1 else [np.sign(z), np.sign(z) * np.sign(z - other)]
        powers = _powers(z, degree - 1)[..., 1:]
        found = [self.linearised(degree, z, w, f, sign[..., None] * powers) for sign in signs]
        return np.stack([np.zeros_like(found[0]), *found], axis=1)

    def linearised(self, degree: int, z: np.ndarray, w: np.ndarray, f: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """The least P - f D over D as it was before, four times (Sanathanan and Koerner, 1963), for each core.

        D = 1 + a combination of `parts`, (cores, points, parts); the factors are returned, (cores, parts).
        """
        system = np.concatenate([_powers(z, degree), -f[..., None] * parts, f[..., None]], axis=-1)
        root, found = np.sqrt(w), np.zeros((len(z), parts.shape[-1]))
        for _ in range(4):
            last = np.maximum(abs(1 + (parts @ found[..., None])[..., 0]), 1e-2)
            r = np.asarray(np.linalg.qr((root / last)[..., None] * system, mode="r"))[:, degree + 1 :, degree + 1 :]
            found = self.least(r[..., :-1], r[..., -1])
        return found

    def plain(self, degree: int, z: np.ndarray, w: np.ndarray, f: np.ndarray, at: np.ndarray | None = None) -> list:
        """Denominators with every power of `z`, and with the even ones alone; the numerator is one of `at`."""
        powers, at = _powers(z, degree - 1)[..., 1:], z if at is None else at
        found = [self.linearised(degree, at, w, f, powers)]
        if degree > 2:
            even = np.zeros_like(found[0])
            even[:, 1::2] = self.linearised(degree, at, w, f, powers[..., 1::2])
            found.append(even)
        return found

    def least(self, system: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return (np.linalg.pinv(system, rcond=1e-12) @ wanted[..., None])[..., 0]

    def relaxed(self) -> Separable | None:
        return Quotient()

    def settle(self, shape, location, scale, lo, hi):
        """D (1 + |Q|) seen from the places in the core where D is least: the same where D is no less than there.

        The core ends where it is.
        """
        ends = (np.array([lo, hi]) - location) / scale
        d = np.polynomial.Polynomial([1.0, *shape])
        turns = d.deriv().roots() if len(shape) > 1 else np.zeros(0)
        turns = turns.real[(abs(turns.imag) < 1e-6) & (turns.real > ends[0]) & (turns.real < ends[1])]
        places = np.concatenate([ends, turns, [ends.mean()]])
        dense, found = np.linspace(-1, 1, 2001), []
        for place in places[np.argsort(d(places) + 1e-9 * places**2, kind="stable")][:3]:
            least = float(np.float32(location + scale * place))
            unit = float(np.float32(max(hi - least, least - lo)))
            moved = d(np.polynomial.Polynomial([(least - location) / scale, unit / scale])).coef
            moved = np.pad(moved, (0, len(shape) + 1 - len(moved))) / moved[0]
            where = least + unit * dense
            below = where[np.polynomial.polynomial.polyval(dense, moved) < 1 - 1e-6]
            left, right = below[below < least].max(initial=lo), below[below > least].min(initial=hi)
            found.append((moved[1:].tolist(), least, unit, left, right))
        return found

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

    def parts(self, shape: np.ndarray, z: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, ...]:
        """D, D' and D'' (starts, points), from powers of z and shapes in rows."""
        q, slope, bend = _derivatives(powers, shape)
        sign = _sign(q)
        return 1 + abs(q), sign * slope, sign * bend

    def by(self, shape: np.ndarray, z: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The derivatives of D and D' by each number of the shape, (starts, points, numbers), likewise."""
        n, sign = shape.shape[1], _sign(powers[..., 1 : shape.shape[1] + 1] @ shape[..., None])
        return sign * powers[..., 1 : n + 1], sign * (np.arange(1, n + 1) * powers[..., :n])

    def columns(self, shape, z, linear):
        powers = _powers(z, linear - 1)
        d, slope, _ = self.parts(shape, z, powers)
        values = powers / d[..., None]
        slopes = values * (-slope / d)[..., None]
        slopes[..., 1:] += np.arange(1, linear) * values[..., :-1]
        return values, slopes

    def turns(self, numbers, shape, z, values, slopes):
        d, steep = 1 / values[..., 0], -slopes[..., 0] / values[..., 0]  # D, D' / D
        by, slope_by = self.by(shape, z, values[..., : shape.shape[1] + 1] * d[..., None])
        value, slope = (values @ numbers[..., None])[..., 0], (slopes @ numbers[..., None])[..., 0]
        outer, inner = (-value / d)[..., None], ((value * steep - slope) / d)[..., None]
        slope_by *= outer
        slope_by += inner * by
        by *= outer
        return by, slope_by

    def bend(self, numbers, shape, z, values, slopes):
        d, steep = 1 / values[..., 0], -slopes[..., 0] / values[..., 0]
        powers = values * d[..., None]
        value, slope = (values @ numbers[..., None])[..., 0], (slopes @ numbers[..., None])[..., 0]
        p_bend, d_bend = _derivatives(powers, numbers[:, 1:])[2], self.parts(shape, z, powers)[2]
        return (p_bend - value * d_bend) / d - 2 * slope * steep

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


class Quotient(Rational):
    """$P(z) / (1 + Q(z))$ without a pole: what `rational` is searched as, for z = 0 is no special point of it."""

    name = "quotient"
    centred = False

    def starts(self, degree, z, w, f):
        """Every power in the denominator, or the even ones alone, or what is left beside poles close to the ends.

        And poles above and below, to the left, to the right.
        """
        found, reach = self.plain(degree, z, w, f), abs(z).max(axis=1, keepdims=True)
        least, most = z.min(axis=1, keepdims=True), z.max(axis=1, keepdims=True)
        for ends in ([least], [most], [least, most]):
            rest = degree - 1 - len(ends)
            if rest >= 2:
                close = np.prod([1 - z / (CLOSE * end) for end in ends], axis=0)
                own = self.linearised(degree, z, w / close**2, f * close, _powers(z, rest)[..., 1:])
                d = np.concatenate([np.ones_like(least), own, np.zeros((len(z), len(ends)))], axis=1)
                for end in ends:
                    d[:, 1:] -= d[:, :-1] / (CLOSE * end)
                found.append(d[:, 1:])
        polynomial, orders = np.polynomial.Polynomial, np.arange(1, degree)
        above, side = (
            polynomial([1.0, 0.0, 4.0 / degree]) ** ((degree - 1) // 2),
            polynomial([1.0, 2 / 3]) ** (degree - 1),
        )
        for d in (
            np.pad(above.coef, (0, degree - len(above.coef)))[1:],
            side.coef[1:],
            side.coef[1:] * (-1.0) ** orders,
        ):
            found.append(d / reach**orders)
        return np.stack(found, axis=1)

    def relaxed(self):
        return None

    def denominator(self, shape, z):
        powers = [z * 0 + 1]
        for _ in shape:
            powers.append(powers[-1] * z)
        d = sum((b * power for b, power in zip(shape, powers[1:], strict=True)), powers[0])
        slope = sum((k * b * power for k, (b, power) in enumerate(zip(shape, powers, strict=False), 1)), z * 0)
        return d, slope, powers[1:], [k * power for k, power in enumerate(powers[:-1], 1)]

    def parts(self, shape, z, powers):
        q, slope, bend = _derivatives(powers, shape)
        return 1 + q, slope, bend

    def by(self, shape, z, powers):
        n = shape.shape[1]
        return powers[..., 1 : n + 1].copy(), np.arange(1, n + 1) * powers[..., :n]

    def positive(self, shape, z):
        return 1 + z * _horner(shape, z)

    def sound(self, shape, z):
        return self.positive([shape[:, j, None] for j in range(shape.shape[1])], z).min(axis=1) > 0


class SumRational(Rational):
    r"""$S(z) = P(z) / (1 + \sum_j |q_j| |z|^j)$: the form of KAT (arXiv:2409.10594).

    >>> SumRational().evaluate([1.0, 2.0, 3.0, -0.5], np.array(-2.0)).item()  # (1 - 4 + 12) / (1 + 1)
    4.5
    """

    name = "rational-sum"
    formula = "P(z) / (1 + sum_j |q_j| |z|^j), P of degree n, j = 1..n - 1"
    smoothness = "smooth but at z = 0"
    reference = "arXiv:1907.06732, arXiv:2409.10594"

    def starts(self, degree, z, w, f):
        """One without a denominator; every power in it, or the even ones alone."""
        found = self.plain(degree, abs(z), w, f, z)
        return np.stack([np.zeros_like(found[0]), *found], axis=1)

    def relaxed(self):
        return None

    def least(self, system, wanted):
        size, n = np.linalg.norm(system, axis=1) + 1e-300, system.shape[-1]
        found = np.zeros_like(size)
        for i in range(len(system)):
            # the ridge keeps nnls from cycling among columns that are nearly the same
            try:
                found[i], _ = nnls(
                    np.concatenate([system[i] / size[i], 1e-6 * np.eye(n)]), np.append(wanted[i], np.zeros(n))
                )
            except RuntimeError:  # it cycled all the same: this is only a start
                continue
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

    def parts(self, shape, z, powers):
        q, slope, bend = _derivatives(abs(powers), abs(shape))
        return 1 + q, _sign(z) * slope, bend

    def by(self, shape, z, powers):
        n, powers, sign = shape.shape[1], abs(powers), _sign(shape)[:, None]
        return sign * powers[..., 1 : n + 1], sign * np.arange(1, n + 1) * (_sign(z)[..., None] * powers[..., :n])

    def positive(self, shape, z):
        size = abs(z)
        return 1 + size * _horner([abs(b) for b in shape], size)


def _powers(z: np.ndarray, n: int) -> np.ndarray:
    """1, z, z^2, ..., z^n along a last axis, the slowest in memory."""
    powers = empty(*z.shape, n + 1)
    powers[..., 0] = 1.0
    for k in range(n):
        np.multiply(powers[..., k], z, out=powers[..., k + 1])
    return powers


def _derivatives(powers: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The polynomial without constant with `numbers` in rows, and its first two derivatives, from powers of z."""
    n = np.arange(1, numbers.shape[1] + 1)
    rows = np.zeros((len(numbers), len(n) + 1, 3))
    rows[:, 1:, 0], rows[:, :-1, 1], rows[:, :-2, 2] = numbers, n * numbers, (n * (n - 1) * numbers)[:, 1:]
    found = rows.swapaxes(1, 2) @ powers[..., : len(n) + 1].swapaxes(1, 2)
    return found[:, 0], found[:, 1], found[:, 2]


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
