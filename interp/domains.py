"""The laws under which a fit is judged: what the inputs of an activation look like."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import numpy as np

from .errors import OrthoactError

TAIL_WIDTH = 2.0
"""Standard deviation of the wide part of a law, in units of its own."""


@dataclass(frozen=True)
class Gaussian:
    """The law of a site's inputs: N(mean, std^2), with a share of a twice as wide one.

    The wide part stands for the outliers of pretrained models: with a tenth of it, copies of every real model measured
    diverged less than with the pure Gaussian in sketches; `benchmarks/laws.py` measures it.

    >>> x, w = Gaussian(tail=0.0).nodes()
    >>> round(float(w @ x**2), 6)
    1.0
    """

    mean: float = 0.0
    """Centre of the law, in units of the input."""
    std: float = 1.0
    """Standard deviation of the narrow part, in units of the input; positive."""
    tail: float = 0.1
    """Share of the wide part, from 0 to 1; a fit without tails takes none of it."""

    def __post_init__(self):
        if not (isfinite(self.mean) and isfinite(self.std) and self.std > 0):
            raise OrthoactError(f"--mean {self.mean} --std {self.std}: expected finite numbers and a positive std")
        if not 0 <= self.tail <= 1:
            raise OrthoactError(f"tail {self.tail}: expected a share between 0 and 1")

    def nodes(self, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
        """Equidistant points over mean +- `reach` std and their weights, which sum to one: the midpoint rule."""
        z, narrow, wide = _standard_nodes(reach)
        w = (1 - self.tail) * narrow + self.tail * wide
        return self.mean + self.std * z, w / w.sum()


@lru_cache
def _standard_nodes(reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # midpoints of cells of 1/30: no node on the kinks at 0, 0.5, 1, 3, 6 of the standard law, which end cells instead
    z = (np.arange(round(60 * reach)) + 0.5) / 30 - reach
    return z, np.exp(-(z**2) / 2), np.exp(-((z / TAIL_WIDTH) ** 2) / 2) / TAIL_WIDTH
