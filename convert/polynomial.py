r"""The polynomial view: a network with bare activations as one explicit map from its inputs to its outputs.

A network of linear layers and Hermite activations without tails is a polynomial map. One with tropical activations is
a tropical rational map, each output the difference of two max-plus polynomials (Zhang, Naitzat and Lim, 2018,
arXiv:1805.07091; arXiv:2502.01247, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from math import comb, prod
from typing import Any

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor, nn

from ..interp.activation import Activation
from ..interp.errors import OrthoactError

MONOMIALS = 1000
"""The most monomials that an expansion may have, unless more are asked for: seconds of work."""

PIECES = 100_000
"""The most affine pieces that a max-plus polynomial may have before it is pruned, unless more are asked for."""

THIN = 1e-10
"""The share of the pieces' size below which what they span in a direction is rounding."""

HULL = 6
"""The most dimensions in which pieces are pruned; a hull of many points in more takes minutes."""

DIGITS = 50
"""Decimal digits of an expansion's coefficients."""

IDLE = (nn.Identity, nn.Flatten, nn.Dropout)
"""Modules that pass their input on, in evaluation mode."""


class PolynomialView(ABC):
    """A network as an explicit map; `inputs` numbers in, `outputs` numbers out.

    Calling it evaluates the explicit map in float64, not the network. Shapes: (batch, inputs) to (batch, outputs).
    """

    def __init__(self, model: nn.Module):
        self.network = deepcopy(model).cpu().double().eval()
        self.layers: list[Any] = [module for _, module in _leaves(self.network) if not isinstance(module, IDLE)]
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        self.inputs, self.outputs = linear[0].in_features, linear[-1].out_features
        self.degree = prod(layer.degree for layer in self.layers if isinstance(layer, Activation))
        """The product of the activations' degrees: a bound on the degree of the map."""

    @property
    def monomials(self) -> int:
        """The most monomials that a polynomial of this degree in so many inputs can have."""
        return comb(self.inputs + self.degree, self.inputs)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def points(self, x: Tensor) -> Tensor:
        """`x` as rows in float64, (batch, inputs); `OrthoactError` for another shape or no row."""
        if x.ndim < 2 or not len(x) or x[0].numel() != self.inputs:
            raise OrthoactError(f"points of shape {tuple(x.shape)}: expected (batch, {self.inputs}), one row at least")
        return x.detach().cpu().double().flatten(1)

    @torch.no_grad()
    def difference(self, x: Tensor) -> float:
        """The largest |map - network| at the points `x`, both in float64, over the largest |network| or one."""
        self.points(x)
        wanted = self.network(x.cpu().double())
        return float((self(x) - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


class HermiteMap(PolynomialView):
    """A network with Hermite activations: a polynomial in each output, expanded when it is first asked for."""

    def __init__(self, model: nn.Module, limit: int):
        super().__init__(model)
        self.limit = limit
        self._expanded: list[Any] = []

    @property
    def polynomials(self) -> list[Any]:
        """Each output as a `sympy.Poly` in x0, x1, ..., its coefficients to 50 digits.

        `OrthoactError` where there might be more monomials than the limit.
        """
        if not self._expanded:
            self._expanded = self._expand()
        return self._expanded

    def _expand(self) -> list[Any]:
        if self.monomials > self.limit:
            raise OrthoactError(
                f"the polynomial has degree up to {self.degree} in {self.inputs} inputs, hence up to "
                f"{self.monomials:,} monomials: expected at most {self.limit:,}; take a smaller network or raise limit="
            )
        import mpmath
        from sympy import Float, Poly, RealField, ring

        field = RealField(dps=DIGITS)
        over, *values = ring([f"x{i}" for i in range(self.inputs)], field)
        zero = over.zero

        def number(x: Any) -> Any:
            return field.convert(Float(x, DIGITS))

        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                weight, bias = _affine(layer)
                values = [
                    sum((v * number(w) for v, w in zip(values, row, strict=True) if w), zero) + number(b)
                    for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
                ]
                continue
            location, scale = number(float(layer.location)), number(float(layer.scale))
            for i, a in enumerate(_numbers(layer, len(values)).tolist()):
                z = (values[i] - location) * (1 / scale)
                before, current, total = zero + 1, z, z * number(a[1]) + number(a[0])
                for k in range(1, layer.degree):  # h_{k+1} sqrt(k+1) = z h_k - sqrt(k) h_{k-1}, to 50 digits
                    with mpmath.workdps(DIGITS + 5):
                        root, inverse = number(mpmath.sqrt(k)), number(1 / mpmath.sqrt(k + 1))
                    before, current = current, (z * current - before * root) * inverse
                    total += current * number(a[k + 1])
                values[i] = total
        return [Poly.from_dict(dict(value), *over.symbols, domain=field) for value in values]

    def __call__(self, x: Tensor) -> Tensor:
        points = self.points(x)
        columns = []
        for polynomial in self.polynomials:
            total = torch.zeros(len(points), dtype=torch.float64)
            for powers, c in polynomial.terms():
                total = total + float(c) * (points ** torch.tensor(powers)).prod(dim=1)
            columns.append(total)
        return torch.stack(columns, dim=1)


class TropicalMap(PolynomialView):
    """A network with tropical activations: each output is P - Q, both maxima of affine functions.

    `pairs` holds (P, Q) for each output, each an array with one row for each piece: a coefficient for each input, and
    the constant.
    """

    def __init__(self, model: nn.Module, limit: int):
        super().__init__(model)
        unit = np.eye(self.inputs + 1)
        nothing = np.zeros((1, self.inputs + 1))
        pairs: list[Pair] = [(unit[i : i + 1], nothing) for i in range(self.inputs)]
        for place, layer in enumerate(self.layers):
            algebra = MaxPlus(limit, f"layer {place} ({type(layer).__name__})")
            if isinstance(layer, nn.Linear):
                weight, bias = _affine(layer)
                pairs = [algebra.affine(pairs, row, b) for row, b in zip(weight.tolist(), bias.tolist(), strict=True)]
            else:
                rows = _numbers(layer, len(pairs)).tolist()
                pairs = [algebra.activate(layer, row, pair) for row, pair in zip(rows, pairs, strict=True)]
        self.pairs = pairs

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """The pieces of P and of Q for each output."""
        return [(len(p), len(q)) for p, q in self.pairs]

    def __call__(self, x: Tensor) -> Tensor:
        points = np.column_stack([self.points(x).numpy(), np.ones(len(x))])
        return torch.from_numpy(
            np.stack([(points @ p.T).max(axis=1) - (points @ q.T).max(axis=1) for p, q in self.pairs], axis=1)
        )


Pair = tuple[np.ndarray, np.ndarray]


class MaxPlus:
    """Arithmetic of max-plus polynomials: arrays of pieces, one row of coefficients and constant each."""

    def __init__(self, limit: int, where: str):
        self.limit, self.where = limit, where

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The sum of two functions: every piece of one plus every piece of the other."""
        self.check(len(a) * len(b))
        return self.prune((a[:, None] + b[None]).reshape(-1, a.shape[1]))

    def maximum(self, parts: list[np.ndarray]) -> np.ndarray:
        """The maximum of several functions: all their pieces."""
        self.check(sum(len(part) for part in parts))
        return self.prune(np.concatenate(parts))

    def check(self, count: int) -> None:
        """Refuse too many pieces before they are made."""
        if count > self.limit:
            raise OrthoactError(
                f"{self.where}: a max-plus polynomial of {count:,} pieces, expected at most {self.limit:,}; take a "
                f"smaller network or raise limit="
            )

    def prune(self, pieces: np.ndarray) -> np.ndarray:
        """Keep the pieces that are somewhere the largest: the upper vertices of the convex hull of their rows."""
        # of equal slopes the highest piece; rounding makes slopes that are equal on paper differ by 1e-16
        keys = np.round(pieces[:, :-1] / (np.abs(pieces[:, :-1]).max() or 1.0), 12) + 0.0
        order = np.lexsort([-pieces[:, -1], *keys.T])
        first = np.append(True, (np.diff(keys[order], axis=0) != 0).any(axis=1))
        pieces = pieces[order[first]]
        if len(pieces) < 3:
            return pieces
        # the slopes often span less than the inputs do: as many dimensions as the first layer has rows
        slopes = pieces[:, :-1] - pieces[0, :-1]
        _, size, axes = np.linalg.svd(slopes, full_matrices=False)
        flat, level = slopes @ axes[size > THIN * (size[0] or 1.0)].T, pieces[:, -1:]
        bend = level - flat @ np.linalg.lstsq(flat, level - level[0], rcond=None)[0]
        # in one plane, as without biases, each vertex of the slopes' hull is somewhere the largest
        plane = np.ptp(bend) <= THIN * np.abs(pieces).max()
        flat = flat if plane else np.column_stack([flat, level])
        dimensions = flat.shape[1]
        if plane and dimensions == 1:
            return pieces[[flat.argmin(), flat.argmax()]]
        if not dimensions + 1 < len(pieces) or not 1 < dimensions <= HULL:
            return pieces
        try:
            hull = ConvexHull(flat)
        except QhullError:  # thin in a way that rounding hides
            return pieces
        if plane:
            return pieces[np.sort(hull.vertices)]
        upper = hull.simplices[hull.equations[:, dimensions - 1] > -1e-12]
        return pieces[np.unique(upper)]

    def cancel(self, pair: Pair) -> Pair:
        """Take an affine Q over into P."""
        p, q = pair
        return (p - q, np.zeros_like(q)) if len(q) == 1 else pair

    def affine(self, pairs: list[Pair], weights: list[float], bias: float) -> Pair:
        """Sum_i w_i (P_i - Q_i) + b, terms of negative weight with P and Q exchanged."""
        p = np.zeros((1, pairs[0][0].shape[1]))
        q = p.copy()
        p[0, -1] = bias
        for (plus, minus), w in zip(pairs, weights, strict=True):
            if w:
                plus, minus = (plus, minus) if w > 0 else (minus, plus)
                p, q = self.product(p, abs(w) * plus), self.product(q, abs(w) * minus)
        return self.cancel((p, q))

    def convex(self, lines: list[tuple[float, float]], pair: Pair) -> Pair:
        """max_k (s_k u + t_k) of u = P - Q, times (-m) P + M Q above and below, so that no power is negative."""
        p, q = pair
        low, high = min(0.0, *(s for s, _ in lines)), max(0.0, *(s for s, _ in lines))
        parts = []
        for s, t in lines:
            part = self.product((s - low) * p, (high - s) * q)
            part[:, -1] += t
            parts.append(part)
        return self.cancel((self.maximum(parts), self.product(-low * p, high * q)))

    def activate(self, act: Activation, numbers: list[float], pair: Pair) -> Pair:
        """A tropical activation of u = P - Q."""
        location, scale = float(act.location), float(act.scale)
        above, below = _lines(act, numbers)
        found = []
        for lines in (above, below):
            lines = [(s / scale, t - s * location / scale) for s, t in lines]
            found.append(self.convex(lines, pair))
        (p, q), (minus, plus) = found
        return self.cancel((self.product(p, plus), self.product(q, minus)))


def _lines(act: Activation, numbers: list[float]) -> tuple[list, list]:
    """The activation as a difference of two maxima of straight lines (slope, intercept) in z."""
    n = act.degree
    if act.family.name == "tropical":
        return list(zip(numbers[n + 1 :], numbers[: n + 1], strict=True)), [(0.0, 0.0)]
    level, slope, jumps, kinks = numbers[0], numbers[1], numbers[2 : n + 2], numbers[n + 2 :]
    found = []
    for sign, line in ((1, (slope, level)), (-1, (0.0, 0.0))):
        lines = [line]
        for kink, jump in sorted((k, sign * c) for k, c in zip(kinks, jumps, strict=True) if sign * c > 0):
            s, t = lines[-1]
            lines.append((s + jump, t - jump * kink))
        found.append(lines)
    return found[0], found[1]


def _affine(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach().double().cpu()
    return weight, torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double().cpu()


def _numbers(act: Activation, width: int) -> Tensor:
    """The learnable numbers for each of `width` channels, float64: (width, numbers)."""
    a = act.exact_coefficients.detach().cpu()
    if act.groups is None:
        return a.expand(width, -1)
    if width % act.groups or act.channel not in (-1, 1):
        raise OrthoactError(
            f"groups {act.groups} along axis {act.channel}: expected a divisor of {width} channels along the last axis"
        )
    return a.repeat_interleave(width // act.groups, dim=0)


KINDS: dict[str, Callable[[nn.Module, int], PolynomialView]] = {
    "hermite": HermiteMap,
    "tropical": TropicalMap,
    "tropical-rational": TropicalMap,
}
"""What a network with activations of a family is."""


def _leaves(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in the order in which an `nn.Sequential` runs them."""
    if isinstance(model, nn.Sequential):
        for key, child in model.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name or "the model", model


def polynomial(model: nn.Module, *, limit: int | None = None) -> PolynomialView:
    """The explicit map of a multilayer perceptron whose activations have no tails.

    `model` is an `nn.Sequential` (nested, if you like) of Linear and `Activation`, with Flatten, Identity and Dropout
    where they please; converted with `tails="none"` or made by `Activation.variance_preserving`. Hermite activations
    give a `HermiteMap`: the bound on the degree at once, and `polynomials`, expanded by sympy, where they have at most
    `limit` (1,000) monomials. Tropical ones give a `TropicalMap`, whose max-plus polynomials have at most `limit`
    (100,000) pieces before pruning. Everything else is no polynomial: `OrthoactError` says what and why.

    >>> net = nn.Sequential(nn.Linear(2, 3), Activation.variance_preserving("hermite", 2), nn.Linear(3, 1))
    >>> view = polynomial(net)
    >>> view.degree, view.monomials, len(view.polynomials[0].terms())
    (2, 6, 6)
    >>> view.difference(torch.randn(10, 2)) < 1e-9
    True
    """
    width = None
    kinds: dict[Any, str] = {}
    for name, module in _leaves(model):
        if isinstance(module, IDLE):
            continue
        if not isinstance(module, nn.Linear | Activation):
            raise OrthoactError(
                f"{name} is a {type(module).__name__}: expected an nn.Sequential of Linear, Activation, Flatten, "
                f"Identity and Dropout"
            )
        if isinstance(module, Activation):
            family = module.family.name
            if family not in KINDS:
                raise OrthoactError(f"{name} is {family}, which is no polynomial: expected one of {', '.join(KINDS)}")
            if module.tails != "none":
                raise OrthoactError(
                    f"{name} has tails {module.tails}, with which it is a polynomial only between its joints: convert "
                    f"with --tails none"
                )
            if module.bypass:
                raise OrthoactError(f"{name} runs its original activation: leave `with original(model)` first")
            kinds[KINDS[family]] = family
            continue
        if width not in (None, module.in_features):
            raise OrthoactError(
                f"{name} takes {module.in_features} inputs: expected {width}, what the layer before gives"
            )
        width = module.out_features
    if width is None:
        raise OrthoactError("the model has no Linear layer: expected a multilayer perceptron")
    if len(kinds) > 1:
        raise OrthoactError(f"the model mixes {' and '.join(kinds.values())}: expected polynomials of one kind")
    kind = next(iter(kinds), HermiteMap)
    default = MONOMIALS if kind is HermiteMap else PIECES
    return kind(model, default if limit is None else limit)
