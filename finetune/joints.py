"""Joints and a common start for the numbers of a site by least squares, without equalities: a start for `solve`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import minimum_filter
from scipy.optimize import minimize

from ..interp.activation import Activation
from ..interp.coordinates import transform
from ..interp.family import Linear, Separable
from ..interp.fit import Copy
from .laws import Law

KINK = 1e-3
"""The jump of the slope from which a joint is taken to sit on a kink of the original, where it stays."""

SHARES = (0.002, 0.01, 0.04, 0.1, 0.18, 0.27, 0.38)
"""Of the weight of the inputs, what is beyond the joints that are looked at first, on each side."""

GAIN, FLOOR = 1e-2, 1e-13
"""What other joints must gain: as a share of what is left, and of the square of the original."""

STARTS, CALLS = 3, 40
"""From how many of these the search goes on, no two of them beside each other, and how many more each looks at."""


def are_free(act: Activation) -> bool:
    """Whether an activation has a joint to choose: one on a kink of the original stays; other kinks are numbers."""
    known = act.tails == "linear" and act.domain is not None and act.original is not None
    return known and isinstance(act.family, Linear | Separable) and bool(_off_kinks(act).any())


def _off_kinks(act: Activation) -> np.ndarray:
    return np.abs(act.jumps.cpu().numpy()) < KINK


def place(law: Law, ridge: float) -> None:
    """Put joints and start of its activation where the least squares of all groups (see `solve`) leave least, in place.

    >>> from ..interp.fit import fit
    >>> law = Law(Activation.from_fit(fit("gelu", degree=3), original=torch.nn.functional.gelu))
    >>> x = torch.linspace(-3, 3, 1001)
    >>> law.add(x, torch.ones_like(x))
    >>> place(law, 1e-3)
    >>> (law.act(x) - torch.nn.functional.gelu(x)).abs().max().item() < 0.04
    True
    """
    copy = _Search(law, ridge).run()
    if copy is not None:
        law.act.load_fit(copy)


class _Search:
    """What the groups' least squares leave, as a function of the joints."""

    def __init__(self, law: Law, ridge: float):
        act, x, mass = law.act, law.x.cpu().numpy(), law.weights().cpu().numpy()
        assert act.domain is not None and act.derivative_weight is not None
        family = act.family
        self.x, self.mass, self.family = x, mass, family
        self.f = law.original().cpu().numpy()
        self.ridge = ridge
        self.total = mass.sum(axis=0) + len(mass) * law.unseen().cpu().numpy()
        self.old = np.array([float(act.lo), float(act.hi)])
        self.free = _off_kinks(act)
        size = act.start.numel()
        self.linear = size - (family.shape(act.degree) if isinstance(family, Separable) else 0)
        self.reach = family.reach(act.degree) if isinstance(family, Linear) else None
        self.copy = Copy(
            target=act.target,
            family=family.name,
            degree=act.degree,
            tails=act.tails,
            coefficients=tuple(act.start.double().tolist()),
            domain=act.domain,
            derivative_weight=act.derivative_weight,
            location=float(act.location),
            scale=float(act.scale),
            lo=self.old[0],
            hi=self.old[1],
            jumps=tuple(act.jumps.double().tolist()),
        )

    def basis(self, copy: Copy) -> np.ndarray:
        """The derivatives of the copy by its numbers at the nodes."""
        core = np.clip(self.x, copy.lo, copy.hi)
        values, slopes = self.family.jacobian(list(copy.coefficients), (core - copy.location) / copy.scale)
        return np.stack(values, axis=-1) + np.stack(slopes, axis=-1) * ((self.x - core) / copy.scale)[:, None]

    def solved(self, lo: float, hi: float) -> Copy:
        """The least squares of all groups together between these joints, its shape as it is."""
        lo, hi = float(np.float32(lo)), float(np.float32(hi))  # the module keeps them so
        copy = replace(self.copy, lo=lo, hi=hi, jumps=tuple(np.where(self.free, 0.0, self.copy.jumps)))
        if self.reach is not None:  # the core spans what the basis is well conditioned on
            location, scale = (float(np.float32(v)) for v in ((lo + hi) / 2, (hi - lo) / 2 / self.reach))
            copy = replace(copy, location=location, scale=scale)
        basis, root = self.basis(copy)[:, : self.linear], np.sqrt(self.total)
        outside = np.minimum(self.x - lo, 0) * copy.jumps[0] + np.maximum(self.x - hi, 0) * copy.jumps[1]
        numbers = np.linalg.lstsq(root[:, None] * basis, root * (self.f - outside), rcond=None)[0]
        return replace(copy, coefficients=(*numbers.tolist(), *copy.coefficients[self.linear :]))

    def left(self, lo: float, hi: float) -> float:
        """What the groups leave of the error between these joints, each with the ridge of `solve`."""
        copy = self.solved(lo, hi)
        basis = self.basis(copy) @ transform(copy)
        rest, n = self.f - copy(self.x)[0], basis.shape[1]
        right = self.mass @ (basis * rest[:, None])
        grams = self.mass @ (basis[:, :, None] * basis[:, None]).reshape(len(self.x), -1)
        step = np.linalg.solve(grams.reshape(-1, n, n) + self.ridge * np.eye(n), right[..., None])[..., 0]
        return float(self.total @ rest**2 - (step * right).sum())

    def run(self) -> Copy | None:
        """The best copy: some joints that leave shares of the inputs outside, and a search from the best of these.

        None where the joints that are there are as good.
        """
        seen, least = np.cumsum(self.total) / self.total.sum(), (self.old[1] - self.old[0]) / 8
        shares = np.array(SHARES)
        outer = [self.x[np.searchsorted(seen, shares)], self.x[np.searchsorted(seen, 1 - shares)]]
        ends = min(outer[0].min(), self.old[0]), max(outer[1].max(), self.old[1])
        outer = [each if free else old[None] for each, free, old in zip(outer, self.free, self.old, strict=True)]

        def joints(at: np.ndarray) -> np.ndarray:
            both = self.old.copy()
            both[self.free] = at
            return both

        def left(at: np.ndarray) -> float:
            lo, hi = joints(at)
            return self.left(lo, hi) if ends[0] <= lo <= hi - least and hi <= ends[1] else np.inf

        pairs = np.stack(np.meshgrid(*outer, indexing="ij"), axis=-1)[..., self.free]
        values = np.apply_along_axis(left, -1, pairs)
        lowest = np.isfinite(values) & (values == minimum_filter(values, size=3, mode="nearest"))
        order = np.argsort(values[lowest], kind="stable")[:STARTS]
        starts = [self.old[self.free], *pairs[lowest][order]]
        inwards = (self.old[1] - self.old[0]) / 10 * np.diag(np.array([1.0, -1.0])[self.free])
        found = []
        for start in starts:
            options = {"initial_simplex": np.vstack([start, start + inwards]), "maxfev": CALLS, "xatol": least / 50}
            found.append(minimize(left, start, method="Nelder-Mead", options=options | {"fatol": 0.0}))
        best = min(found, key=lambda one: one.fun)
        enough = (1 - GAIN) * self.left(*self.old) - FLOOR * (self.total @ self.f**2)
        return self.solved(*joints(best.x)) if best.fun < enough else None
