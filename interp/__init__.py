"""Functions of one real variable: families, targets, laws, the solver, the learnable activation. Knows no models."""

from .activation import Activation, original
from .domains import Gaussian, Law, Measured, Uniform
from .errors import OrthoactError
from .families import FAMILIES, get_family
from .family import Family
from .fit import Fit, fit, fit_to_tolerance
from .targets import ALIASES, TARGETS, Target, get_target

__all__ = [
    "ALIASES",
    "FAMILIES",
    "TARGETS",
    "Activation",
    "Family",
    "Fit",
    "Gaussian",
    "Law",
    "Measured",
    "OrthoactError",
    "Target",
    "Uniform",
    "fit",
    "fit_to_tolerance",
    "get_family",
    "get_target",
    "original",
]
