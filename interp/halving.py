r"""Polynomials in the form that is evaluated: fast and accurate in float32, where powers of z are not.

Splitting a polynomial into even and odd powers, $S(z) = E(z^2) + z O(z^2)$, halves its degree. With $z^2$ replaced by
the monic Chebyshev polynomial $u = z^2 - R^2/2$, which stays within $R^2/2$ where $|z| \le R$, nothing grows. Horner's
rule takes over where five numbers are left. Basis function k has degree k: it is the product of the monic Chebyshev
polynomials of degrees 1, 2, 4, ... for the binary digits of k, but for the last, which is a power.

It takes n + 1 fused multiply-adds and one for each halving, with short chains; Clenshaw's recurrence takes 2n in one
chain. Measured in float32 for copies of GELU, degree 8 to 24: 2e-7 to 3e-7 of max(1, |F|), Clenshaw's in Hermite
polynomials 2e-7 to 4e-6, powers of z 6e-7 to 2e-4.
"""

from __future__ import annotations

import numpy as np

from .family import Array, fma

LEAST = 5
"""Numbers that may be left to Horner's rule."""


def evaluate(numbers: list[Array], z: Array, reach: float) -> Array:
    """The polynomial with these numbers, lowest degree first, at |z| <= reach.

    >>> float(evaluate([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0], np.array(0.5), reach=2.0))  # 1 + 2 z + (z^2 - 2)^3
    -3.359375
    """
    return _evaluate(numbers, z, _shifts(len(numbers), reach))


def _evaluate(numbers: list[Array], z: Array, shifts: list[float]) -> Array:
    if shifts and len(numbers) > 1:
        half = z * z - shifts[0]
        even, odd = (_evaluate(numbers[i::2], half, shifts[1:]) for i in (0, 1))
        return fma(z, odd, even, over=even)
    # two numbers and a tensor: not in one operation, which is slow where two of three have a single value
    value = numbers[-1] + z * 0 if len(numbers) == 1 else z * numbers[-1] + numbers[-2]
    for number in reversed(numbers[:-2]):
        value = fma(value, z, number, over=value)
    return value


def basis(size: int, z: Array, reach: float) -> list[Array]:
    """What each of `size` numbers is multiplied by; the first is one."""
    return _basis(size, z, _shifts(size, reach))


def _basis(size: int, z: Array, shifts: list[float]) -> list[Array]:
    if shifts and size > 1:
        even = _basis((size + 1) // 2, z * z - shifts[0], shifts[1:])
        found = [even[0]] * size
        found[0::2], found[1::2] = even, [z, *(part * z for part in even[1 : size // 2])]
        return found
    found = [z * 0 + 1, z]
    while len(found) < size:
        found.append(found[-1] * z)
    return found[:size]


def _shifts(size: int, reach: float) -> list[float]:
    """What is subtracted from the square of each monic Chebyshev polynomial to give the one of twice the degree."""
    levels = 0
    while size > LEAST << levels:
        levels += 1
    return [2 * (reach / 2) ** 2 ** (level + 1) for level in range(levels)]


def from_series(values: np.ndarray, nodes: np.ndarray, reach: float) -> np.ndarray:
    """The matrix from the coefficients of a series, with `values` (nodes, series) at n + 1 nodes, to the numbers."""
    columns = np.stack(basis(len(nodes), nodes, reach), axis=-1)
    size = np.abs(columns).max(axis=0)
    return np.linalg.solve(columns / size, values) / size[:, None]


def nodes(size: int, reach: float) -> np.ndarray:
    """Chebyshev's nodes, at which `from_series` is well conditioned."""
    return reach * np.cos(np.pi * (np.arange(size) + 0.5) / size)
