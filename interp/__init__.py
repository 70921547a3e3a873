"""Functions of one real variable: families, targets, laws, the solver, the learnable activation. Knows no models."""

from .activation import Activation, original
from .choose import fit_to_tolerance, ladder
from .domains import Gaussian, Law, Measured, Uniform
from .errors import OrthoactError
from .families import FAMILIES, get_family
from .family import Family, Linear, Piecewise, Separable
from .fit import Fit, fit, variance_preserving
from .targets import ALIASES, TARGETS, Target, get_target
from .variance import Moments, moments

__all__ = [
    "ALIASES",
    "FAMILIES",
    "TARGETS",
    "Activation",
    "Family",
    "Fit",
    "Gaussian",
    "Law",
    "Linear",
    "Measured",
    "Moments",
    "OrthoactError",
    "Piecewise",
    "Separable",
    "Target",
    "Uniform",
    "fit",
    "fit_to_tolerance",
    "get_family",
    "get_target",
    "ladder",
    "moments",
    "original",
    "variance_preserving",
]
