"""The laws under which a fit is judged: what the inputs of an activation look like, and where an error hurts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import asinh, ceil, floor, isfinite
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from .errors import OrthoactError

TAIL_WIDTH = 2.0
"""Standard deviation of the wide part of a law, in units of its own."""

CELLS = 30
"""Nodes of a law in one standard deviation."""

SMALLEST, LARGEST = 1e-9, 1e9
"""The standard deviations that a law may have."""


class Law(ABC):
    """A law of a site's inputs: what `fit` weighs an error with."""

    kind: str
    """The key in `LAWS` and in every record."""
    mean: float
    """Centre, in units of the input."""
    std: float
    """Standard deviation, in units of the input."""

    @abstractmethod
    def nodes(self, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
        """Equidistant points over mean +- `reach` std or more, and their weights, which sum to one: a midpoint rule."""

    def narrow(self) -> Law:
        """The law without its wide part: that of a bare series, which nothing holds outside."""
        return self

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The law as a few plain JSON values, its kind among them; `law_from_dict` reads them."""


@dataclass(frozen=True)
class Gaussian(Law):
    """The law of a site's inputs: N(mean, std^2), with a share of a twice as wide one.

    The wide part stands for the outliers of pretrained models: with a tenth of it, copies of every real model measured
    diverged less than with the pure Gaussian in sketches; `benchmarks/laws.py` measures it.

    >>> x, w = Gaussian(tail=0.0).nodes()
    >>> round(float(w @ x**2), 6)
    1.0
    """

    kind = "gaussian"
    mean: float = 0.0
    """Centre of the law, in units of the input."""
    std: float = 1.0
    """Standard deviation of the narrow part, in units of the input; positive."""
    tail: float = 0.1
    """Share of the wide part, from 0 to 1; a fit without tails takes none of it."""

    def __post_init__(self):
        if not (isfinite(self.mean) and isfinite(self.std) and self.std > 0):
            raise OrthoactError(f"--mean {self.mean} --std {self.std}: expected finite numbers and a positive std")
        least = max(SMALLEST, 1e-6 * abs(self.mean))
        if not least <= self.std <= LARGEST:
            raise OrthoactError(
                f"--mean {self.mean:g} --std {self.std:g}: expected a std from {least:g}, below which float32 does not "
                f"tell such inputs apart, to {LARGEST:g}"
            )
        if not 0 <= self.tail <= 1:
            raise OrthoactError(f"tail {self.tail}: expected a share between 0 and 1")

    def nodes(self, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
        z, narrow, wide = _standard_nodes(reach)
        w = (1 - self.tail) * narrow + self.tail * wide
        return self.mean + self.std * z, w / w.sum()

    def narrow(self) -> Gaussian:
        return replace(self, tail=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | asdict(self)


@lru_cache
def _standard_nodes(reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # midpoints of cells of 1/30: no node on the kinks at 0, 0.5, 1, 3, 6 of the standard law, which end cells instead
    z = (np.arange(round(2 * CELLS * reach)) + 0.5) / CELLS - reach
    return z, np.exp(-(z**2) / 2), np.exp(-((z / TAIL_WIDTH) ** 2) / 2) / TAIL_WIDTH


@dataclass(frozen=True)
class Uniform(Law):
    """Every input from `low` to `high` alike, none outside: for a range that is enforced.

    >>> x, w = Uniform(-1, 1).nodes()
    >>> round(float(w @ x**2), 4)
    0.3333
    """

    kind = "uniform"
    low: float = -3.0
    """Least input."""
    high: float = 3.0
    """Greatest input."""

    def __post_init__(self):
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise OrthoactError(f"a uniform law from {self.low} to {self.high}: expected two finite numbers in order")

    @property
    def mean(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The middle."""
        return (self.low + self.high) / 2

    @property
    def std(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The length over the root of twelve."""
        return (self.high - self.low) / 12**0.5

    def nodes(self, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
        count = 20 * CELLS
        x = self.low + (self.high - self.low) * (np.arange(count) + 0.5) / count
        return x, np.full(count, 1 / count)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | asdict(self)


FINEST = 0.01
"""The |x| up to which bins of a measured law are of one width; beyond, they grow with |x|."""

BINS = 3760
"""Bins of a measured law: to |x| = 1e6, each beside zero 1e-4 wide, at |x| = 1 a hundredth."""

FAR = 1e6
"""The |x| from which inputs are only counted."""

MISSED = 0.01
"""The share of inputs that may only be counted."""

SMOOTHING = 0.1
"""Width of the Gaussian that smooths a measured law, in its standard deviations."""

SENSITIVITY = 0.9
"""Share of sensitivity in the weight of a measured law (`benchmarks/calibration.py` measures it); the rest is density,
for inputs that no gradient reached, as those of all but the first token in the last layer before a head."""


class Measured(Law):
    """The inputs that a site was seen to have, and how much an error at each of them would hurt.

    A histogram in asinh(x / 0.01), so that every scale is resolved in memory that does not grow with the data. `add`
    counts inputs and tells their bins, `weigh` adds the squared gradients of a loss at these inputs. An error e(x) of
    the copy changes that loss, to second order and as if all errors were independent, by half the integral of
    sensitivity times e^2; the law weighs J by that, with a share of plain density where few gradients were seen.

    >>> law = Measured()
    >>> _ = law.add(torch.linspace(-1, 1, 10001))
    >>> x, w = law.nodes()
    >>> round(law.std, 3), round(float(w @ x**2), 2)
    (0.577, 0.34)
    """

    kind = "measured"

    def __init__(self):
        self.counts = np.zeros(BINS + 2)
        """Inputs in each bin; the first and the last hold those beyond -1e6 and 1e6."""
        self.squares = np.zeros(BINS + 2)
        """Sum of squared gradients in each bin; zero where none were collected."""
        self.count = 0
        """Inputs seen."""
        self.rows = 0
        """Positions (of texts, images or tokens) that the loss was summed over."""
        self._mean, self._spread = 0.0, 0.0

    def add(self, x: Tensor) -> Tensor:
        """Count the inputs in `x`, of any shape; returns the bin of each, in that shape. NaN or infinity: an error."""
        if not x.numel():
            return x.short()
        # the variance tells of NaN and infinity too; merged by Chan's formula, which is exact in pieces
        spread, centre = (float(v) for v in torch.var_mean(x.detach().double(), correction=0))
        if not isfinite(spread):
            raise OrthoactError("a measured law: expected finite inputs, got NaN or infinity; repair the model or data")
        number = x.numel()
        total, shift = self.count + number, centre - self._mean
        self._mean += shift * number / total
        self._spread += spread * number + shift**2 * self.count * number / total
        self.count = total
        unit = 2 * asinh(FAR / FINEST) / BINS
        bins = ((x.detach().float() / FINEST).asinh() / unit + (BINS / 2 + 1)).floor().clamp(0, BINS + 1).short()
        self.counts += _tally(bins)
        return bins

    def weigh(self, bins: Tensor, gradient: Tensor) -> None:
        """Add the squared gradients of the loss at inputs whose bins `add` has told; the shapes are the same."""
        self.squares += _tally(bins, gradient.detach().double() ** 2)

    @property
    def mean(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Mean of all inputs."""
        self._check()
        return self._mean

    @property
    def std(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Standard deviation of all inputs."""
        self._check()
        return (self._spread / self.count) ** 0.5

    @property
    def sensitivity(self) -> float:
        """Sum of squared gradients at one position; half of it times a mean squared error is what a copy costs."""
        return float(self.squares.sum()) / max(self.rows, 1)

    def _check(self) -> None:
        if not self.count:
            raise OrthoactError("a measured law: expected inputs, it has seen none; give data that reach the site")
        if self._spread <= 1e-12 * self.count * self._mean**2:
            raise OrthoactError(
                f"a measured law: expected inputs that vary, all {self.count} are {self._mean:g}; give more data, or "
                f"exclude the site"
            )
        outside = self.counts[[0, -1]].sum() / self.count
        if outside > MISSED:
            raise OrthoactError(
                f"a measured law: {100 * outside:.3g} % of {self.count} inputs are beyond {FAR:g}; exclude the site"
            )

    def share_outside(self, lo: float, hi: float) -> float:
        """Share of the inputs below `lo` or above `hi`, to the width of a bin."""
        below = np.interp([lo, hi], _edges(), np.cumsum(self.counts)[:-1]) / self.count
        return float(1 - below[1] + below[0])

    def nodes(self, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
        cell, edges = self.std / CELLS, _edges()
        seen = np.flatnonzero(self.counts[1:-1])
        # 40 std hold whatever a fit can follow
        start = max(min(self.mean - reach * self.std, edges[seen[0]]), self.mean - 40 * self.std)
        end = min(max(self.mean + reach * self.std, edges[seen[-1] + 1]), self.mean + 40 * self.std)
        borders = cell * np.arange(floor(start / cell), ceil(end / cell) + 1)

        def spread(bins: np.ndarray) -> np.ndarray:
            mass = np.diff(np.interp(borders, edges, np.cumsum(bins[:-1])))
            return gaussian_filter1d(mass / (mass.sum() or 1.0), SMOOTHING * CELLS, mode="constant", truncate=6)

        w = spread(self.counts)
        if self.squares.any():
            w = (1 - SENSITIVITY) * w + SENSITIVITY * spread(self.squares)
        return (borders[1:] + borders[:-1]) / 2, w / w.sum()

    def to_dict(self) -> dict[str, Any]:
        """The summary: mean, std, count and the shares that the histogram did not hold."""
        below, above = self.counts[[0, -1]] / self.count
        return {
            "kind": self.kind,
            "mean": self.mean,
            "std": self.std,
            "count": self.count,
            "below": float(below),
            "above": float(above),
        }

    def histogram(self, cells: int = 64) -> dict[str, Any]:
        """The law in so many cells over its central 99.9 %, for a report: shares of density and of sensitivity.

        `least` and `greatest` are the outermost inputs, to the width of a bin.
        """
        self._check()
        edges = _edges()
        seen = np.flatnonzero(self.counts[1:-1])
        least, greatest = edges[seen[0]], edges[seen[-1] + 1]
        held = np.cumsum(self.counts)[:-1] / self.count
        low, high = (edges[min(np.searchsorted(held, q), len(edges) - 1)] for q in (5e-4, 1 - 5e-4))
        room = 0.1 * (high - low)
        borders = np.linspace(max(least, low - room), min(greatest, high + room), cells + 1)

        def share(bins: np.ndarray) -> list[float]:
            mass = np.diff(np.interp(borders, edges, np.cumsum(bins[:-1])))
            return [float(f"{v:.3g}") for v in mass / (bins.sum() or 1.0)]

        return {
            "low": float(borders[0]),
            "high": float(borders[-1]),
            "least": float(least),
            "greatest": float(greatest),
            "density": share(self.counts),
            "sensitivity": share(self.squares),
        }


def _tally(bins: Tensor, weights: Tensor | None = None) -> np.ndarray:
    flat = None if weights is None else weights.flatten()
    return torch.bincount(bins.flatten().int(), flat, minlength=BINS + 2).double().cpu().numpy()


@lru_cache
def _edges() -> np.ndarray:
    """Borders of the bins between -1e6 and 1e6."""
    return FINEST * np.sinh(np.linspace(-1, 1, BINS + 1) * asinh(FAR / FINEST))


LAWS: dict[str, type[Law]] = {law.kind: law for law in (Gaussian, Uniform, Measured)}
"""Every law by its kind."""


def law_from_dict(record: Mapping[str, Any]) -> Law:
    """The law that `to_dict` described; a measured one comes back as the Gaussian of its mean and std.

    >>> law_from_dict(Uniform(-1, 2).to_dict())
    Uniform(low=-1, high=2)
    """
    values = dict(record)
    kind = values.pop("kind", "gaussian")
    if kind not in LAWS:
        raise OrthoactError(f"a law of kind {kind!r}: expected one of {', '.join(LAWS)}; upgrade orthoact")
    if kind == "measured":
        return Gaussian(values["mean"], values["std"])
    return LAWS[kind](**values)
