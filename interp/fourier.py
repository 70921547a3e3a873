"""The Fourier families: trigonometric series with learnable frequencies."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import factorial, pi

import numpy as np
import torch

from .family import Array, Separable, Series, empty, fma
from .variance import Moments, balance


def cos_sin(angle: Array) -> tuple[Array, Array]:
    """Cosine and sine; in kernels for float32 both at once, from polynomials for half of the angle.

    To 1.5e-6 within two turns, and further out to some times what rounding the angle to float32 does.

    >>> [round(float(wave), 6) for wave in cos_sin(pi / 3)]
    [0.5, 0.866025]
    """
    if torch.is_tensor(angle):
        fused = torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not torch.is_grad_enabled()
        if not fused or angle.dtype != torch.float32:
            return torch.cos(angle), torch.sin(angle)
    elif not getattr(angle, "single", False):
        return np.cos(angle), np.sin(angle)
    turns = angle * (0.5 / pi)
    turns = turns - turns.round()
    square = turns * turns
    sine = turns * _horner(HALF_SINE, square)
    twice = 2 * sine
    return 1 - twice * sine, twice * _horner(HALF_COSINE, square)


def _polynomial(function: Callable[[np.ndarray], np.ndarray], degree: int) -> list[float]:
    """The coefficients, lowest first, of the best polynomial in t^2 for |t| <= 1/2, but for some per cent."""
    made = np.polynomial.Chebyshev.interpolate(lambda u: function(np.sqrt(u)), degree, domain=[0, 0.25])
    return made.convert(kind=np.polynomial.Polynomial).coef.tolist()


def _horner(coefficients: list[float], x: Array) -> Array:
    value = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


def _waves(angle: np.ndarray, n: int) -> np.ndarray:
    """The powers 0 to n of exp(i angle), (starts, powers, points), for angles (starts, points)."""
    waves = np.empty((len(angle), n + 1, angle.shape[1]), dtype=complex)
    waves[:, 0] = 1.0
    np.exp(1j * angle, out=waves[:, 1])
    k = 1
    while k < n:
        more = min(k, n - k)
        np.multiply(waves[:, 1 : more + 1], waves[:, k, None], out=waves[:, k + 1 : k + more + 1])
        k += more
    return waves


def _parts(waves: np.ndarray) -> np.ndarray:
    """Cosines, then sines."""
    return np.concatenate([np.real(waves), np.imag(waves)], axis=1)


@lru_cache
def _products(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which moments, of cosines, of sines, and both with the other sign, E of a product of two columns is half of.

    cos a cos b = (cos(a - b) + cos(a + b)) / 2, and so on; and the products of the orders.
    """
    orders, sine, size = np.array([0, *range(1, n + 1), *range(1, n + 1)]), np.arange(2 * n + 1) > n, 2 * n + 1
    less, more = orders - orders[:, None], orders + orders[:, None]
    other = np.where(sine, less, -less)  # the order of the sine less that of the cosine
    alike = sine == sine[:, None]
    apart = np.where(alike, abs(less), np.where(other < 0, 3 * size - other, size + other))
    together = np.where(alike, more + 2 * size * sine, size + more)
    return apart, together, np.outer(orders, orders)


STRAIGHT = 1e-8
"""How far, as a share, a rise may be from what the slopes make it: a wave as long as that is a line to float32."""

FAR = 1e12
"""What the ratio of the slopes and the rise may be at most."""

HALF_SINE = _polynomial(lambda t: pi * np.sinc(t), 4)
HALF_COSINE = _polynomial(lambda t: np.cos(pi * t), 4)


class Fourier(Separable):
    r"""$S(z) = a_0 + \sum_{k=1}^n a_k \cos k\omega z + b_k \sin k\omega z$ with one learnable frequency $\omega$.

    The paper (arXiv:2502.01247, section 3) has the same series with $a_k / k!$. Between joints it is no periodic copy:
    with a period longer than the core it converges fast although the target is not periodic (a Fourier extension).

    >>> round(float(Fourier().evaluate([0.5, 2.0, 0.0, 1.0], np.array(pi))), 6)  # 0.5 + 2 cos(pi)
    -1.5
    """

    name = "fourier"
    formula = "a_0 + sum_k a_k cos(k w z) + b_k sin(k w z), k = 1..n"
    numbers = "2n + 2: a_0, a_1..a_n, b_1..b_n, w"
    smoothness = "analytic"
    cost = "1 sine, 1 cosine, 6n multiply-adds"
    reference = "arXiv:2502.01247, section 3"
    degrees = range(1, 17)
    anywhere = True

    def size(self, degree: int) -> int:
        return 2 * degree + 2

    def shape(self, degree: int) -> int:
        return 1

    def reach(self, degree: int) -> float:
        return pi  # w = 1 is periodic on the core

    def starts(self, degree, z, w, f):
        return np.tile([[0.8], [0.68], [0.55], [0.4], [0.25], [0.1]], (len(z), 1, 1))

    def through(self, degree, values, slopes):
        r"""One wave, with the phase u at pi: $u \cot u = \pi (S'(-\pi) + S'(\pi)) / (S(\pi) - S(-\pi))$.

        Of its solutions that in (0, pi), if there is one. Else, where the rise is less than the slopes make it, that
        beyond 2 pi: with the one beyond pi the curve falls in its middle.
        """
        if degree > 1:
            return None
        rise, total = values[:, 1] - values[:, 0], slopes.sum(axis=1)
        with np.errstate(all="ignore"):  # joints through which there is no wave have an infinite J
            y = np.where(total == 0, 0.0, np.clip(pi * total / rise, -FAR, FAR))
            y = np.where(np.abs(y - 1) < STRAIGHT, 1 - STRAIGHT, y)
            turn = np.where(y < 1, 0.0, 2 * pi)
            phase = np.where(y < 1, pi * np.sqrt((1 - y) / (1 - y + pi**2 / 3)), turn + np.arctan(7 / y))
            for _ in range(3):  # Newton's steps, which from there arrive at rounding
                phase -= (phase - turn - np.arctan2(phase, y)) / (1 - y / (phase**2 + y**2))
            shape, cosine, sine = phase / pi, np.cos(phase), np.sin(phase)
            a = (slopes[:, 0] - slopes[:, 1]) / (2 * shape * sine)
            b = np.where(np.abs(sine) > np.abs(cosine), rise / (2 * sine), total / (2 * shape * cosine))
            a = np.where(slopes[:, 0] == slopes[:, 1], 0.0, a)
        return shape[:, None], np.stack([values.mean(axis=1) - a * cosine, a, b], axis=1)

    def angles(self, shape: np.ndarray, z: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosine and sine of each harmonic, (starts, points, harmonics), and its frequency, for shapes in rows."""
        waves = _waves(shape * z, degree)[:, 1:].swapaxes(1, 2)
        return np.real(waves), np.imag(waves), shape * np.arange(1, degree + 1)

    def columns(self, shape, z, linear):
        n = linear // 2
        c, s, w = self.angles(shape, z, n)
        values, slopes = empty(*z.shape, linear), empty(*z.shape, linear)
        values[..., 0], values[..., 1 : n + 1], values[..., n + 1 :] = 1.0, c, s
        slopes[..., 0] = 0.0
        np.multiply(-w[:, None], s, out=slopes[..., 1 : n + 1])
        np.multiply(w[:, None], c, out=slopes[..., n + 1 :])
        return values, slopes

    def normal(
        self, shape, z, w, f, d, lam, linear
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], Series]:
        """From moments E[exp(ik w z)], k = 0..2n, of which all products of two columns are sums."""
        n, ends = linear // 2, z.shape[1] - w.shape[1]
        size, k = 2 * n + 1, np.arange(n + 1)
        weights = np.empty((len(w), 3, w.shape[1]))
        weights[:, 0], weights[:, 1], weights[:, 2] = w, w * f, lam * shape * w * d
        if len(z) > 1 and np.ptp(z[:, [0, -1]], axis=0).max() < 1e-9:  # few shapes, all with the same nodes
            each, which = np.unique(shape[:, 0], return_inverse=True)
            waves, found = _waves(each[:, None] * z[: len(each)], 2 * n), np.empty((len(z), 3, 2 * size))
            for i, part in enumerate(_parts(waves[..., ends:])):
                found[which == i] = weights[which == i] @ part.T
            waves = waves[which, : n + 1]
        else:
            waves = _waves(shape * z, 2 * n)
            found = weights @ _parts(waves[..., ends:]).swapaxes(1, 2)
        less, more, orders = _products(n)
        signed = np.concatenate([found[:, 0], -found[:, 0]], axis=1)
        apart, together = signed.take(less, axis=1), signed.take(more, axis=1)
        gram = (lam * shape**2 / 2)[..., None] * orders
        gram *= apart - together
        share = np.sqrt(np.maximum(np.einsum("snn->sn", apart + together) / 2, 0))
        apart += together
        apart /= 2
        gram += apart
        cosines, sines = found[..., : n + 1], found[..., size : size + n + 1]
        right = cosines[:, 1] - k * sines[:, 2], (sines[:, 1] + k * cosines[:, 2])[:, 1:]
        there, turn = waves[:, : n + 1, :ends].swapaxes(1, 2), k * shape[..., None]
        there, steep = (np.concatenate([np.real(v), np.imag(v)[..., 1:]], axis=2) for v in (there, 1j * turn * there))

        def series(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
            c, turn = numbers[:, : n + 1].astype(complex), 1j * k
            c[:, 1:] -= 1j * numbers[:, n + 1 :]
            curves = np.real(waves[:, : n + 1].swapaxes(1, 2) @ np.stack([c, turn * c, turn**2 * c], axis=2))
            turned, bent = curves[..., 1], curves[..., 2]  # derivatives by the angle
            by, slope_by = z * turned, turned + shape * z * bent
            return curves[..., 0], shape * turned, shape**2 * bent, by[..., None], slope_by[..., None]

        return gram, np.concatenate(right, axis=1), share, (there, steep), series

    def turns(self, numbers, shape, z, values, slopes):
        n = numbers.shape[1] // 2
        a, b, orders, level = numbers[:, 1 : n + 1], numbers[:, n + 1 :], np.arange(1, n + 1), 0 * numbers[:, :1]
        turned = (values @ np.concatenate([level, orders * b, -orders * a], axis=1)[..., None])[..., 0]
        bent = (slopes @ np.concatenate([level, orders * b, -orders * a], axis=1)[..., None])[..., 0]
        return (z * turned)[..., None], (turned + z * bent)[..., None]

    def waves(self, shape: list[Array], z: Array, degree: int) -> tuple[list[Array], list[Array], list[Array]]:
        """Cosines and sines of each harmonic, and its frequency."""
        (frequency,) = shape
        cosines, sines = ([wave] for wave in cos_sin(frequency * z))
        for _ in range(1, degree):  # by rotation: stable where the three-term recurrence is not, near zero
            c, s = cosines[-1], sines[-1]
            cosines.append(c * cosines[0] - s * sines[0])
            sines.append(s * cosines[0] + c * sines[0])
        return cosines, sines, [k * frequency for k in range(1, degree + 1)]

    def split(self, parameters: list[Array]) -> tuple[Array, list[Array], list[Array], list[Array], int]:
        degree = next(n for n in self.degrees if self.size(n) == len(parameters))
        cut = 2 * degree + 1
        return parameters[0], parameters[1 : degree + 1], parameters[degree + 1 : cut], parameters[cut:], degree

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        """By Horner's rule in $e^{i w z}$, whose coefficients are $a_k - i b_k$."""
        level, a, b, shape, _ = self.split(parameters)
        c, s = cos_sin(shape[0] * z)
        real, imaginary = a[-1], -b[-1]
        for cosine, sine in zip(a[-2::-1], b[-2::-1], strict=True):
            real, imaginary = fma(real, c, cosine - imaginary * s), fma(imaginary, c, real * s - sine)
        return fma(real, c, level - imaginary * s)

    def slope(self, parameters: list[Array], z: Array) -> Array:
        _, a, b, shape, degree = self.split(parameters)
        cosines, sines, frequencies = self.waves(shape, z, degree)
        return sum((frequencies[k] * (b[k] * cosines[k] - a[k] * sines[k]) for k in range(degree)), z * 0)

    def jacobian(self, parameters: list[Array], z: Array) -> tuple[list[Array], list[Array]]:
        _, a, b, shape, degree = self.split(parameters)
        cosines, sines, frequencies = self.waves(shape, z, degree)
        n = range(degree)
        turned = [b[k] * cosines[k] - a[k] * sines[k] for k in n]  # d/d(angle) of each harmonic
        bent = [-a[k] * cosines[k] - b[k] * sines[k] for k in n]
        by_frequency = [z * turned[k] for k in n]
        slopes_by_frequency = [turned[k] + frequencies[k] * z * bent[k] for k in n]
        values = [z * 0 + 1, *cosines, *sines, *self.gather(by_frequency)]
        slopes = [
            z * 0,
            *(-frequencies[k] * sines[k] for k in n),
            *(frequencies[k] * cosines[k] for k in n),
            *self.gather(slopes_by_frequency),
        ]
        return values, slopes

    def turned(self, parameters: list[Array], z: Array) -> tuple[Array, list[Array], list[Array], Array]:
        """The derivative of S by the angle, which those by z and by the frequency share; and the waves."""
        _, a, b, shape, degree = self.split(parameters)
        cosines, sines, _ = self.waves(shape, z, degree)
        value = b[0] * cosines[0]
        for k in range(1, degree):
            value = fma((k + 1) * b[k], cosines[k], value, over=value)
        for k in range(degree):
            value = fma((-k - 1) * a[k], sines[k], value, over=value)
        return value, cosines, sines, shape[0]

    def value_slope(self, numbers: list[Array], z: Array) -> Array:
        turned, _, _, frequency = self.turned(numbers, z)
        return frequency * turned

    def value_parts(self, numbers: list[Array], z: Array) -> list[Array]:
        turned, cosines, sines, _ = self.turned(numbers, z)
        return [z * 0 + 1, *cosines, *sines, z * turned]

    def gather(self, by_frequency: list[Array]) -> list[Array]:
        """Derivatives by the learnable frequencies from those by the frequency of each harmonic."""
        return [sum((k + 1) * part for k, part in enumerate(by_frequency))]

    def variance_preserving(self, degree: int) -> list[float]:
        """The paper's a_k = b_k = c / k! and frequencies k, with the c and a_0 that are exact under N(0, 1)."""
        waves = [1 / factorial(k) for k in range(1, degree + 1)]
        shape = [float(k) for k in range(1, self.shape(degree) + 1)]
        return balance(self, [0.0, *waves, *waves, *shape], slice(1), slice(2 * degree + 1))

    def moments(self, parameters: list[float]) -> Moments:
        level, cosines, sines, shape, degree = self.split(parameters)
        w, a, b = np.array(self.waves(shape, np.zeros(()), degree)[2]), np.array(cosines), np.array(sines)
        damp = np.exp(-(w**2) / 2)  # E[cos w x], the characteristic function
        apart, together = (np.exp(-((w[:, None] + sign * w) ** 2) / 2) / 2 for sign in (-1, 1))
        cc, ss = apart + together, apart - together  # E[cos cos] and E[sin sin]; E[cos sin] = 0
        mean = level + a @ damp
        square = level**2 + 2 * level * (a @ damp) + a @ cc @ a + b @ ss @ b
        slope_square = (a * w) @ ss @ (a * w) + (b * w) @ cc @ (b * w)
        bent = -(a * w**2) @ (level * damp + cc @ a) - (b * w**2) @ ss @ b  # E[F F'']
        return Moments(float(mean), float(square), float(slope_square), float(slope_square + bent))


class FreeFourier(Fourier):
    r"""$S(z) = a_0 + \sum_{k=1}^n a_k \cos \omega_k z + b_k \sin \omega_k z$: each harmonic has a frequency of its own.

    As the paper's code has it (arXiv:2502.01247); the search starts at the best series with one frequency.

    >>> FreeFourier().size(4)
    13
    """

    name = "fourier-free"
    formula = "a_0 + sum_k a_k cos(w_k z) + b_k sin(w_k z), k = 1..n"
    numbers = "3n + 1: a_0, a_1..a_n, b_1..b_n, w_1..w_n"
    cost = "n sines, n cosines, 2n multiply-adds"
    degrees = range(1, 13)

    def size(self, degree: int) -> int:
        return 3 * degree + 1

    def shape(self, degree: int) -> int:
        return degree

    def starts(self, degree, z, w, f):
        multiples = [[k * frequency for k in range(1, degree + 1)] for frequency in (0.8, 0.5)]
        halves = [[(k - 0.5) * frequency for k in range(1, degree + 1)] for frequency in (1.25, 1.0, 0.7)]
        # without a line the best frequencies lie ever further apart
        halves += [
            [(k - 0.5) * frequency * (1 + 0.05 * (k - 1)) for k in range(1, degree + 1)] for frequency in (1.25, 1.45)
        ]
        # a frequency near zero makes a straight line, and lets the others lie between the multiples
        lines = [[0.02, *((k + 0.55) * step for k in range(degree - 1))] for step in (1.6, 1.35, 1.0, 0.7, 0.45)]
        return np.tile([*multiples, *halves, *lines], (len(z), 1, 1))

    def normal(self, shape, z, w, f, d, lam, linear):
        return Separable.normal(self, shape, z, w, f, d, lam, linear)

    def angles(self, shape, z, degree):
        angle = np.multiply(shape[:, None], z[..., None], out=empty(*z.shape, degree))
        return np.cos(angle), np.sin(angle), shape

    def turns(self, numbers, shape, z, values, slopes):
        n = numbers.shape[1] // 2
        a, b = numbers[:, None, 1 : n + 1], numbers[:, None, n + 1 :]
        turned = b * values[..., 1 : n + 1] - a * values[..., n + 1 :]
        bent = b * slopes[..., 1 : n + 1] - a * slopes[..., n + 1 :]
        return z[..., None] * turned, turned + z[..., None] * bent

    def waves(self, shape, z, degree):
        cosines, sines = zip(*(cos_sin(frequency * z) for frequency in shape), strict=True)
        return list(cosines), list(sines), shape

    def gather(self, by_frequency: list[Array]) -> list[Array]:
        return by_frequency

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        level, a, b, shape, degree = self.split(parameters)
        cosines, sines, _ = self.waves(shape, z, degree)
        value = a[0] * cosines[0] + level
        for number, wave in zip([*a[1:], *b], [*cosines[1:], *sines], strict=True):
            value = fma(number, wave, value, over=value)
        return value

    def value_slope(self, numbers: list[Array], z: Array) -> Array:
        return self.slope(numbers, z)

    def value_parts(self, numbers: list[Array], z: Array) -> list[Array]:
        return self.jacobian(numbers, z)[0]
