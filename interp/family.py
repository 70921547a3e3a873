"""The contract that every family of activations fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

Array = Any  # a numpy array or a torch tensor: the formulas below are written once for both


class Family(ABC):
    r"""A family of functions that is linear in its coefficients: $S(z) = \sum_k c_k \phi_k(z)$.

    A family is one object without state. The methods take the standardised variable $z = (x - location) / scale$, a
    numpy array (fitting, float64) or a torch tensor (evaluation, float32 or better), and return the same kind.
    """

    name: str
    """The key in `FAMILIES` and in every file."""
    formula: str
    """The series, in plain text."""
    smoothness: str
    """How often the series can be differentiated."""
    reference: str
    """Where the family comes from."""
    degrees: range
    """The degrees that can be asked for."""

    @abstractmethod
    def size(self, degree: int) -> int:
        """The number of coefficients at a degree."""

    @abstractmethod
    def reach(self, degree: int) -> float:
        """The |z| up to which the basis is well conditioned; the core is scaled to it."""

    @abstractmethod
    def basis(self, z: Array, degree: int) -> list[Array]:
        r"""The values $\phi_0(z), \phi_1(z), \dots$, each with the shape of `z`."""

    @abstractmethod
    def slopes(self, z: Array, degree: int) -> list[Array]:
        r"""The derivatives $\phi_0'(z), \phi_1'(z), \dots$ with respect to z, each with the shape of `z`."""

    @abstractmethod
    def evaluate(self, coefficients: list[Array], z: Array) -> Array:
        """The series at `z`; each coefficient is a scalar or broadcasts with `z`."""
