"""How files name models: what can be pushed names no path of the machine it was made on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .._version import __version__
from ..interp.errors import OrthoactError
from .files import read_json

METHOD = "ORTHOACT"
"""The type of this package's adapters in PEFT."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter."""

DEMO = "demo"


def portable(name: str | None) -> str | None:
    """How a file may name a model: a local path by its last part, all else as it is."""
    if name and (os.path.isabs(name) or name.startswith(("~", ".")) or Path(name).is_dir()):
        return Path(os.path.abspath(os.path.expanduser(name))).name
    return name


DEMO_NAME = re.compile(r"orthoact==[\w.]+:demo")
"""How an adapter names the demo model: by package and version."""


def demo_name() -> str:
    """The demo model of this version."""
    return f"orthoact=={__version__}:demo"


def resolve(name: Any) -> Any:
    """The folder of the demo for its name, every other name as it is."""
    if isinstance(name, str) and DEMO_NAME.fullmatch(name):
        from .sources import demo_folder

        return str(demo_folder())
    return name


def is_adapter(folder: Path) -> bool:
    """Whether a local folder is an adapter of this kind."""
    try:
        return read_json(folder / CONFIG, strict=False).get("peft_type") == METHOD
    except (OSError, OrthoactError):
        return False
