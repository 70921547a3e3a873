"""The Hermite family: polynomials that are orthonormal under the standard normal law."""

from __future__ import annotations

from math import factorial, sqrt

import numpy as np

from . import halving
from .family import Array, Linear
from .variance import Moments, balance


class Hermite(Linear):
    r"""$S(z) = \sum_{k=0}^n c_k h_k(z)$ with $h_k = He_k / \sqrt{k!}$, the probabilists' Hermite polynomials.

    They obey $h_{k+1} = (z h_k - \sqrt{k} h_{k-1}) / \sqrt{k+1}$ and $h_k' = \sqrt{k} h_{k-1}$. The paper
    (arXiv:2502.01247, section 3) writes $\sum_k a_k He_k / k!$; there $a_k = c_k \sqrt{k!}$.

    >>> import numpy as np
    >>> h = Hermite()
    >>> [float(v[0]) for v in h.basis(np.array([2.0]), 2)]  # 1, z, (z^2 - 1) / sqrt(2)
    [1.0, 2.0, 2.1213203435596424]
    """

    name = "hermite"
    formula = "sum_k c_k He_k(z) / sqrt(k!), k = 0..n"
    numbers = "n + 1: c_0..c_n"
    smoothness = "polynomial"
    cost = "2n multiply-adds"
    reference = "arXiv:2502.01247, section 3"
    degrees = range(1, 25)

    def size(self, degree: int) -> int:
        return degree + 1

    def degree(self, parameters: list[Array]) -> int:
        return len(parameters) - 1

    def reach(self, degree: int) -> float:
        # inside the turning point 2 sqrt(n); measured: the least float32 error from degree 2 to 24
        return 1.3 * sqrt(degree)

    def basis(self, z: Array, degree: int) -> list[Array]:
        values = [z * 0 + 1, z]
        for k in range(1, degree):
            values.append((z * values[k] - sqrt(k) * values[k - 1]) / sqrt(k + 1))
        return values[: degree + 1]

    def slopes(self, z: Array, degree: int) -> list[Array]:
        values = self.basis(z, degree)
        return [z * 0] + [sqrt(k) * values[k - 1] for k in range(1, degree + 1)]

    def evaluate(self, parameters: list[Array], z: Array) -> Array:
        # Clenshaw's recurrence: stable where the monomial form loses digits (degree 16 at |z| = 3.5).
        upper, upper2 = parameters[-1] + z * 0, None
        for k in range(len(parameters) - 2, -1, -1):
            current = parameters[k] + z * upper * (1 / sqrt(k + 1))
            if upper2 is not None:
                current = current - upper2 * sqrt((k + 1) / (k + 2))
            upper, upper2 = current, upper
        return upper

    def conversion(self, degree: int) -> np.ndarray:
        """To the numbers of `halving`: n + 1 for the polynomial, n for its slope."""
        reach = self.reach(degree)
        both = [(degree + 1, self.basis), (degree, self.slopes)]
        at = [halving.nodes(size, reach) for size, _ in both]
        series = [np.stack(of(z, degree), axis=-1) for z, (_, of) in zip(at, both, strict=True)]
        return np.concatenate([halving.from_series(values, z, reach) for values, z in zip(series, at, strict=True)])

    def value(self, numbers: list[Array], z: Array) -> Array:
        degree = len(numbers) // 2
        return halving.evaluate(numbers[: degree + 1], z, self.reach(degree))

    def value_slope(self, numbers: list[Array], z: Array) -> Array:
        degree = len(numbers) // 2
        return halving.evaluate(numbers[degree + 1 :], z, self.reach(degree))

    def value_parts(self, numbers: list[Array], z: Array) -> list[Array]:
        degree = len(numbers) // 2
        return halving.basis(degree + 1, z, self.reach(degree))

    def variance_preserving(self, degree: int) -> list[float]:
        r"""The paper's magnitudes $|a_k| = c$, $a_0^2 = c^2 (1 - 1/n!)$, $c^{-2} = \sum_{k<n} 1/k!$, with other signs.

        Signs do not change E[F^2] and E[F'^2]. Those of the paper, all +, make a truncated $e^{x - 1/2}$, whose chi
        tends to 2: a deep plain net overflows. With + + - - + + ... it is a truncated $\sqrt e (\cos x + \sin x)$,
        whose second moment is the same for inputs of any variance: chi tends to 0.
        """
        shape = [(1, 1, -1, -1)[k % 4] / sqrt(factorial(k)) for k in range(degree + 1)]
        return balance(self, [0.0, *shape[1:]], slice(1), slice(None))

    def moments(self, parameters: list[float]) -> Moments:
        c, k = np.array(parameters), np.arange(len(parameters))
        slope_square = float(k @ c**2)
        bent = float(np.sqrt(k[2:] * k[1:-1]) @ (c[2:] * c[:-2]))  # E[F F'']
        return Moments(float(c[0]), float(c @ c), slope_square, slope_square + bent)
