"""The laws under which a fit is judged: what the inputs of an activation look like."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import numpy as np

from .errors import OrthoactError


@dataclass(frozen=True)
class Gaussian:
    """The normal law N(mean, std^2) of a site's inputs.

    >>> x, w = Gaussian().nodes()
    >>> round(float(w @ x**2), 6)
    1.0
    """

    mean: float = 0.0
    """Centre of the law, in units of the input."""
    std: float = 1.0
    """Standard deviation, in units of the input; positive."""

    def __post_init__(self):
        if not (isfinite(self.mean) and isfinite(self.std) and self.std > 0):
            raise OrthoactError(f"--mean {self.mean} --std {self.std}: expected finite numbers and a positive std")

    @property
    def location(self) -> float:
        """Centre of the family's standardised variable."""
        return self.mean

    @property
    def scale(self) -> float:
        """Unit of the family's standardised variable."""
        return self.std

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Equidistant points over mean +- 9 std and their weights, which sum to one (the trapezoidal rule, which is
        exact to rounding for a Gaussian weight)."""
        z, w = _standard_nodes()
        return self.mean + self.std * z, w


@lru_cache
def _standard_nodes() -> tuple[np.ndarray, np.ndarray]:
    z = np.linspace(-9, 9, 721)
    w = np.exp(-(z**2) / 2)
    return z, w / w.sum()
