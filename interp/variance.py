r"""How an activation passes variance on: the second moments of F and F', and starts for training from scratch.

With $q$ the variance of a layer's inputs, He-style weights of gain $\Gamma$ make the next layer's inputs have the
variance $\Gamma E[F(\sqrt q x)^2]$, and gradients grow by $\Gamma E[F'^2]$ from layer to layer. Where
$E[F^2] = E[F'^2] = 1$ under N(0, 1), both gains of the paper (arXiv:2502.01247, section 3) are one: variances and
gradients hold at every depth, to first order. What happens to a deviation is the next order, the slope at q = 1 of the
map from q to $E[F(\sqrt q x)^2]$,

$$\chi = E[x F F'] = E[F'^2] + E[F F''],$$

the second form, by Stein's identity, under N(0, 1), with F'' a sum of deltas at kinks. A deviation dies out where
$|\chi| < 1$ and grows by $\chi$ a layer where $\chi > 1$.

The law is N(0, 1) for every family, also for Fourier, where the paper takes U(-pi, pi): the inputs of a layer are sums
of many terms, hence nearly normal whatever the activation before them; and only a law of variance one comes back to
itself where E[F^2] = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .domains import TAIL_WIDTH, Gaussian
from .errors import OrthoactError

if TYPE_CHECKING:
    from .family import Family

PANELS = 256
"""Most panels that are split at a time; no function has as many kinks."""

REACH = 18.0
"""Standard deviations that are integrated over: a polynomial of degree 24 has its mass out to 10."""


class Law(Protocol):
    """What `moments` asks of a law of inputs."""

    @property
    def mean(self) -> float: ...

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Points and their weights, which sum to one."""
        ...


@dataclass(frozen=True)
class Moments:
    """What a law of inputs x becomes after an activation F."""

    mean: float
    """E[F]."""
    square: float
    """E[F^2]."""
    slope_square: float
    """E[F'^2]."""
    chi: float
    """E[x F F'], the slope at q = 1 of the map from q to E[F(sqrt(q) x)^2]; x counted from the law's mean."""
    variance: float = 1.0
    """Var[x]."""

    @property
    def forward(self) -> float:
        """The paper's forward gain Var[x] / E[F^2]."""
        return self.variance / self.square

    @property
    def backward(self) -> float:
        """The paper's backward gain Var[x] / E[F'^2]."""
        return self.variance / self.slope_square


def moments(curve: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], law: Law | None = None) -> Moments:
    """The moments of a function under a law of its inputs (default: N(0, 1)), to about 1e-12 of each.

    `curve` maps points to values and slopes, in float64, as a `Fit`, a `Target` and `Family.curve` do. Under a
    `Gaussian` the integrals are adaptive Gauss-Legendre, which closes in on kinks; any other law gives its `nodes`.

    >>> relu = lambda x: (np.maximum(x, 0), (x > 0) * 1.0)
    >>> found = moments(relu)
    >>> round(found.square, 12), round(found.slope_square, 12), round(found.chi, 12), round(found.forward, 12)
    (0.5, 0.5, 0.5, 2.0)
    """
    law = law or Gaussian(tail=0.0)
    centre = law.mean

    def integrands(x: np.ndarray) -> np.ndarray:
        value, slope = curve(x)
        return np.stack([value, value**2, slope**2, (x - centre) * value * slope])

    if not isinstance(law, Gaussian):
        x, w = law.nodes()
        return Moments(*(float(v) for v in integrands(x) @ w), variance=float(w @ (x - centre) ** 2))
    found, variance = np.zeros(4), 0.0
    for share, std in ((1 - law.tail, law.std), (law.tail, TAIL_WIDTH * law.std)):
        if share > 0:
            found += share * _integrate(lambda z, std=std: integrands(centre + std * z))
            variance += share * std**2
    return Moments(*(float(v) for v in found), variance=variance)


def _integrate(integrands: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The integrals of several functions under N(0, 1), a level of panels at once: those that disagree are split."""
    nodes, weights = _legendre()

    def sums(left: np.ndarray, width: np.ndarray) -> np.ndarray:
        z = left + width * nodes[:, None]
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        values = integrands(z.ravel()).reshape(-1, *z.shape)
        return np.einsum("n,fnp->fp", weights, values * density) * width

    left, width = np.arange(-REACH, REACH), np.ones(round(2 * REACH))
    coarse, total = sums(left, width), 0.0
    size = np.abs(coarse).sum(axis=1, keepdims=True) + 1e-300
    for _ in range(48):  # a panel around a kink is then 2^-48 wide
        left, width = np.concatenate([left, left + width / 2]), np.concatenate([width, width]) / 2
        fine = sums(left, width)
        half = len(left) // 2
        gain = (np.abs(fine[:, :half] + fine[:, half:] - coarse) / size).max(axis=0)
        # where a function is steep its own rounding makes the halves of every panel disagree, however narrow
        wrong = gain > (1e-15 if half <= PANELS else max(1e-15, np.partition(gain, -PANELS)[-PANELS]))
        again = np.concatenate([wrong, wrong])
        total = total + fine[:, ~again].sum(axis=1)
        if not wrong.any():
            break
        left, width, coarse = left[again], width[again], fine[:, again]
    else:
        total = total + coarse.sum(axis=1)
    return np.asarray(total)


@lru_cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    return (nodes + 1) / 2, weights / 2


def balance(family: Family, numbers: list[float], level: slice, scaled: slice) -> list[float]:
    """The numbers of c (S + r L) with E[F^2] = E[F'^2] = 1 under N(0, 1), S the series with these numbers.

    L is what the numbers `level` add when each grows by one, `scaled` are those that S and L are linear in. E[F^2] and
    E[F'^2] are quadratic in r, so r solves a quadratic equation; c follows. Where L = 1 a solution exists for every
    S: Poincare's inequality Var[S] <= E[S'^2] is its discriminant. Of its two solutions the one of lesser |chi| is
    taken, which pulls the variances of a deep net back to one the faster. `OrthoactError` where there is none.
    """
    start, step = np.array(numbers, dtype=np.float64), np.zeros(len(numbers))
    step[level] = 1.0

    def gap(r: float) -> float:
        found = family.moments([float(v) for v in start + r * step])
        return found.square - found.slope_square

    behind, here, ahead = gap(-1.0), gap(0.0), gap(1.0)
    bend, tilt = (ahead + behind) / 2 - here, (ahead - behind) / 2
    discriminant = tilt**2 - 4 * bend * here
    candidates = []
    for sign in (1, -1) if discriminant > -1e-12 and bend else ():
        found = start + (sign * max(discriminant, 0.0) ** 0.5 - tilt) / (2 * bend) * step
        size = family.moments([float(v) for v in found]).slope_square ** 0.5
        if size > 0:
            found[scaled] /= size
            square = family.moments([float(v) for v in found]).square
            if abs(square - 1) < 1e-6:  # else their sums are too large for doubles to tell
                candidates.append([float(v) for v in found])
    if not candidates:
        raise OrthoactError(
            f"family {family.name} with {len(numbers)} numbers: expected enough freedom for E[F^2] = E[F'^2] = 1, "
            f"found none; take another degree"
        )
    return min(candidates, key=lambda c: round(abs(family.moments(c).chi), 9))  # of a tie the first, on any machine
