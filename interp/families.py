"""The registry of families."""

from __future__ import annotations

from .errors import OrthoactError
from .family import Family
from .fourier import Fourier, FreeFourier
from .hermite import Hermite
from .rational import Rational, SumRational
from .tropical import Tropical, TropicalRational

FAMILIES: dict[str, Family] = {
    "hermite": Hermite(),
    "fourier": Fourier(),
    "fourier-free": FreeFourier(),
    "tropical": Tropical(),
    "tropical-rational": TropicalRational(),
    "rational": Rational(),
    "rational-sum": SumRational(),
}
"""Every family by its name. A new family is one file and one entry here."""


def get_family(name: str) -> Family:
    """The family called `name`; `OrthoactError` names the known ones.

    >>> get_family("hermite").size(8)
    9
    """
    if name not in FAMILIES:
        raise OrthoactError(f"unknown family {name!r}: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
