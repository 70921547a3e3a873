"""orthoact: convert pretrained models to learnable activations and fine-tune them.

After `import orthoact`, converted checkpoints load with plain `from_pretrained` of transformers and `create_model` of
timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .convert.calibrate import calibrate
    from .convert.checkpoint import save
    from .convert.fidelity import evaluate
    from .convert.report import write_report
    from .convert.sites import Site, find_sites
    from .convert.sources import load
    from .convert.surgeon import Conversion, Plan, convert_, inspect_model, plan, revert_
    from .interp.activation import Activation, original
    from .interp.domains import Gaussian, Law, Measured, Uniform
    from .interp.errors import OrthoactError
    from .interp.families import FAMILIES
    from .interp.fit import Fit, fit
    from .interp.targets import TARGETS, Target

_PUBLIC = {
    "load": "convert.sources",
    "calibrate": "convert.calibrate",
    "save": "convert.checkpoint",
    "evaluate": "convert.fidelity",
    "write_report": "convert.report",
    "Site": "convert.sites",
    "find_sites": "convert.sites",
    "Conversion": "convert.surgeon",
    "Plan": "convert.surgeon",
    "convert_": "convert.surgeon",
    "inspect_model": "convert.surgeon",
    "plan": "convert.surgeon",
    "revert_": "convert.surgeon",
    "Activation": "interp.activation",
    "original": "interp.activation",
    "Gaussian": "interp.domains",
    "Law": "interp.domains",
    "Measured": "interp.domains",
    "Uniform": "interp.domains",
    "OrthoactError": "interp.errors",
    "FAMILIES": "interp.families",
    "Fit": "interp.fit",
    "fit": "interp.fit",
    "TARGETS": "interp.targets",
    "Target": "interp.targets",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if __name__ == "orthoact":  # not where a test runner imports this file under another name
    from .convert.hooks import install as _install

    _install()
