"""The coordinates in which a series is learned: one step of them is one step in function space."""

from __future__ import annotations

import numpy as np

from .families import get_family
from .family import Linear
from .fit import Copy

HEAVY = ((0.9, -0.5, 1.1), (0.1, 0.0, 4.0))
"""The law of a step's size, in standard deviations of the fit's law: (weight, mean, std) of each Gaussian."""

SLOPE_WEIGHT = 0.1
"""Weight of the slopes in the inner product."""

FLOOR = 1e-4
"""Least eigenvalue of the Gram matrix, as a share of the largest, where the series is not linear in its numbers.

Frequencies and denominators have combinations that hardly move the function to first order; a long step along one of
them moves it by its curvature instead: without this the first step of Adam took fourier from a loss of 0.5 to 1,000.
"""


def heavy(z: np.ndarray) -> np.ndarray:
    """The density of that law at `z`, but for a factor."""
    return np.sum([p / s * np.exp(-(((z - m) / s) ** 2) / 2) for p, m, s in HEAVY], axis=0)


def transform(fit: Copy) -> np.ndarray:
    r"""The matrix W of $a = a_0 + W \theta$: the inverse square root of the Gram matrix of the copy's features.

    The features are $\partial F / \partial a_k$, tails included, under the inner product of J with a heavy-tailed law,
    so that a coefficient whose tail moves far is stepped little. Shape (coefficients, coefficients), float64.

    >>> from .fit import fit
    >>> transform(fit("gelu", degree=4)).shape
    (5, 5)
    """
    family = get_family(fit.family)
    z = np.linspace(-16, 16, 2049)
    law = heavy(z)
    if fit.tails == "none":  # nothing bounds a bare polynomial: judge it where the fit does
        law = law * (np.abs(z) <= 4)
    x, law = fit.domain.mean + fit.domain.std * z, law / law.sum()

    def rows(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = family.jacobian(list(fit.coefficients), (at - fit.location) / fit.scale)
        return np.stack(values, axis=-1), np.stack(slopes, axis=-1) / fit.scale

    core = np.clip(x, fit.lo, fit.hi)
    values, slopes = rows(core)
    values = values + slopes * (x - core)[:, None]
    gram = (law[:, None] * values).T @ values + SLOPE_WEIGHT * (law[:, None] * slopes).T @ slopes
    idle = np.diag(gram) < 1e-9 * np.diag(gram).max()  # a piece that is nowhere the largest: the step of the liveliest
    gram[idle, idle] = np.diag(gram).max()
    size, axes = np.linalg.eigh(gram)
    floor = 1e-10 if isinstance(family, Linear) else FLOOR
    return axes @ np.diag(np.maximum(size, size.max() * floor) ** -0.5) @ axes.T
